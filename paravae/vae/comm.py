"""The ranks that share a decode: which they are, how they agree, how their shards come together.

The group is a value that is passed in; there is no global one. Two planes: *data*, the group's own backend
(NCCL on GPUs), carries one all-gather of equally padded shards; *control*, a gloo group over the same ranks,
carries small fixed-size rows between hosts. Errors therefore reach every rank before any rank enters the
all-gather, and without a GPU ever being waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed the collective and deprecated its old name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_ROW_BYTES = 1024  # a status row: one byte of kind, then a message in UTF-8, cut to fit
_FINE, _INPUT_ERROR, _FAILURE = 0, 1, 2


class RankError(RuntimeError):
    """Another rank failed, or asked for something else; ``input_error`` says that its input was at fault."""

    def __init__(self, message: str, *, rank: int, input_error: bool) -> None:
        super().__init__(message)
        self.rank = rank
        self.input_error = input_error


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one process group, seen from one of them."""

    rank: int
    size: int
    data: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @staticmethod
    def alone() -> RankGroup:
        """A group of this process only: nothing is ever sent."""
        return RankGroup(rank=0, size=1)

    @staticmethod
    def world() -> RankGroup:
        """Every rank of torch.distributed, or this process alone where it is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return RankGroup.alone()
        return RankGroup.of(dist.group.WORLD)

    @staticmethod
    def of(process_group: dist.ProcessGroup | None) -> RankGroup:
        """The ranks of ``process_group``. A collective call among them where the group carries no CPU tensors,
        because a gloo group is then made beside it.

        Raises:
            ValueError: this process is not one of its ranks.
        """
        if process_group is None:
            raise ValueError("the parallel group is None: this process is in no rank of it")
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ValueError(
                f"rank {dist.get_rank()} of the world is not in the parallel group given to it; "
                "each rank must be given a group that it belongs to"
            )
        size = dist.get_world_size(process_group)
        if size == 1:
            return RankGroup.alone()
        return RankGroup(rank, size, process_group, _control_group(process_group))

    def all_gather(self, shard: Tensor) -> Tensor:
        """[...] on each rank -> [size, ...] on all, in one collective. Every rank's shard has one shape and dtype.

        Bytes travel, so any dtype does on any backend; nothing is pickled and the host waits for nothing on a GPU.
        """
        if self.size == 1:
            return shard[None]
        gathered = shard.new_empty((self.size, *shard.shape))
        _all_gather_single(
            gathered.view(-1).view(torch.uint8), shard.contiguous().view(-1).view(torch.uint8), group=self.data
        )
        return gathered

    @contextmanager
    def agreement(self, request: str) -> Iterator[None]:
        """Run the body on every rank, then go on only if it succeeded on all and all had the same ``request``.

        A rank whose body raised raises that again, after telling the others.

        Raises:
            RankError: on the ranks whose own body was fine, naming a rank that failed or differs, and why.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if failure is not None:
            with suppress(Exception):  # whatever became of the others, this rank's own error is the one to raise
                self._exchange(request, failure)
            raise failure
        self._raise_if_different(self._exchange(request))

    def minimum(self, name: str, value: int) -> int:
        """The least of the ranks' values of ``name``.

        Raises:
            RankError: another rank came with something else than its ``name``.
        """
        if self.size == 1:
            return value
        requests = self._exchange(f"{name}: {value}")
        values = [text.removeprefix(f"{name}: ") for text in requests]
        if any(text == rest for text, rest in zip(requests, values, strict=True)):
            self._raise_if_different(requests)
        return min(int(text) for text in values)

    def _exchange(self, request: str, failure: Exception | None = None) -> list[str]:
        """Every rank's request, if no rank came with a failure."""
        row = _status_row(request, failure)
        gathered = row.new_empty((self.size, *row.shape))
        _all_gather_single(gathered.view(-1), row, group=self.control)
        rows = [_read_row(row) for row in gathered]
        for rank, (kind, message) in enumerate(rows):
            if kind != _FINE:
                text = f"rank {rank} of {self.size} failed: {message}"
                raise RankError(text, rank=rank, input_error=kind == _INPUT_ERROR)
        return [message for _, message in rows]

    def _raise_if_different(self, requests: list[str]) -> None:
        for rank, request in enumerate(requests):
            if request != requests[0]:
                text = f"the ranks were asked for different things: rank 0 {requests[0]}, rank {rank} {request}"
                raise RankError(text, rank=rank, input_error=True)


def _control_group(process_group: dist.ProcessGroup) -> dist.ProcessGroup:
    if "cpu:" in dist.get_backend_config(process_group):
        return process_group
    ranks = dist.get_process_group_ranks(process_group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _status_row(request: str, failure: Exception | None) -> Tensor:
    kind, text = _FINE, request
    if failure is not None:
        kind = _INPUT_ERROR if isinstance(failure, ValueError) else _FAILURE
        text = f"{type(failure).__name__}: {failure}"
    message = text.encode()[: _ROW_BYTES - 1]
    return torch.tensor(list(bytes([kind]) + message.ljust(_ROW_BYTES - 1, b"\0")), dtype=torch.uint8)


def _read_row(row: Tensor) -> tuple[int, str]:
    kind, *message = row.tolist()
    return kind, bytes(message).rstrip(b"\0").decode(errors="replace")
