"""The ranks that share a decode: which they are, how they keep in step, how their shards come together.

The group is a value that is passed in; there is no global one. Three planes: *data*, the group's own backend (NCCL on
GPUs), carries all-gathers of equally padded shards; *presence*, a socket between every two, carries small rows of fixed
size and tells when a process has ended; *control*, a gloo group over the same ranks, lets them find each other, and
carries the rows where sockets cannot be had. Errors therefore reach every rank before any rank enters an all-gather,
and a rank that is killed leaves nobody waiting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from paravae.vae.presence import GoneError, Presence
from paravae.vae.rows import FINE, GONE, INPUT_ERROR, ROW_BYTES, Row

logger = logging.getLogger("paravae")

# PyTorch 2.13 renamed the collective and deprecated its old name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_TEXT_BYTES = 400  # of a longer text, in one row
_GOING_ON = "the ranks were to go on together"

_EAGER_S = 0.05  # a wait up to this long keeps the processor, lest a wake-up be added to it
_GRACE_S = 1.0
_PAUSE_S = 2e-4
_LOOK_EVERY_S = 0.05  # for ranks that are gone
_BLAME_S = 3.0  # for a closed socket to show which rank broke a connection
_ABORT_S = 5.0


GatherTo = Literal["all"] | int
"""Which ranks of a group receive: all, or one."""


class RankError(RuntimeError):
    """Another rank failed, is gone, or asked for something else; ``input_error``: its input was at fault.

    ``gone``: its process has ended. ``group``: whose ranks all have this error by now.
    """

    def __init__(
        self, message: str, *, rank: int, input_error: bool, gone: bool = False, group: RankGroup | None = None
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.input_error = input_error
        self.gone = gone
        self.group = group


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one process group, seen from one of them."""

    rank: int
    size: int
    data: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    presence: Presence | None = None
    connected: set[tuple[GatherTo | str, int]] = field(default_factory=set, compare=False, repr=False)
    """What NCCL has moved already: gathers by whom they were to, or a broadcast, and how many bytes of a rank."""

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
        """The ranks of ``process_group``. A collective call among them: they connect for ``presence``, and where the
        group carries no CPU tensors a gloo group is made beside it.

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
        group = RankGroup(rank, size, process_group, _control_group(process_group))
        return RankGroup(rank, size, process_group, group.control, group._meet())

    def _meet(self) -> Presence | None:
        """The ranks' lines, if all of them have theirs."""
        presence, reason = None, ""
        try:
            presence = Presence.meet(self.rank, self.size, lambda text: [row.message for row in self._exchange(text)])
        except OSError as error:
            reason = str(error)
        rows = self._exchange(reason, int(presence is not None))
        if all(row.number for row in rows):
            return presence
        if presence is not None:
            presence.close()
        rank, reason = next((rank, row.message) for rank, row in enumerate(rows) if not row.number)
        logger.warning(
            "rank %d cannot connect to the others (%s): they go by gloo, which is slower, and should one be killed the "
            "others may wait for the time limit of torch.distributed",
            rank,
            reason,
        )
        return None

    # -------------------------------------------------------------------------------------------- in step

    @contextmanager
    def in_step(self, request: str) -> Iterator[Step]:
        """What all ranks do together; the body's calls to the ``Step`` are the same on all.

        A rank whose body raises raises that again, after telling the others. The body ends with
        ``agree(last=True)``: what fails after it is this rank's own affair.

        Raises:
            RankError: on the ranks whose own body was fine, naming a rank that failed, is gone or differs, and why.
        """
        step = Step(self, request)
        try:
            yield step
        except Exception as error:
            step.tell(error)
            raise

    @contextmanager
    def agreement(self, request: str) -> Iterator[None]:
        """Run the body on every rank, then go on only if it succeeded on all and all had the same ``request``.

        Raises: as ``in_step`` does.
        """
        with self.in_step(request) as step:
            yield
            step.agree(last=True)

    def minimum(self, name: str, value: int) -> int:
        """The least of the ranks' values of ``name``.

        Raises:
            RankError: another rank came with something else than its ``name``.
        """
        with self.in_step(name) as step:
            return step.agree(value, last=True)

    def first(self, name: str, text: str) -> str:
        """Rank 0's ``text``, so that all ranks go by the same.

        Raises:
            RankError: another rank failed or is gone.
        """
        if self.size == 1:
            return text
        data, received = text.encode(), b""
        while True:  # a row's worth at a time; rank 0's first row says how much there is
            part = data[len(received) :][:_TEXT_BYTES].hex()
            rows = self._exchange(f"{name}: {part}", len(data))
            for rank, row in enumerate(rows):
                if not row.message.startswith(f"{name}: "):
                    text = f"the ranks were asked for different things: rank {rank} {row.message}, others {name}"
                    raise RankError(text, rank=rank, input_error=True, group=self)
            received += bytes.fromhex(rows[0].message.removeprefix(f"{name}: "))
            if len(received) >= rows[0].number:
                return received.decode()

    # ------------------------------------------------------------------------------------------- tensors

    def all_gather(self, shard: Tensor) -> Tensor:
        """[...] on each rank -> [size, ...] on all, in one collective. Every rank's shard has one shape and dtype.

        Bytes travel, so any dtype does on any backend; nothing is pickled and the host waits for nothing on a GPU.
        """
        gathered = shard.new_empty((self.size, *shard.shape))
        self.gather_into(gathered, shard.contiguous(), "all")
        return gathered

    def gather_into(self, gathered: Tensor | None, shard: Tensor, to: GatherTo) -> None:
        """``all_gather`` of a contiguous shard into memory that is there, [size, ...]; on ``to`` "all" ranks, or on
        that one alone, and None on the others."""
        sent, received = _bytes(shard), None if gathered is None else _bytes(gathered)
        if self.size == 1:
            if received is not None:
                received.copy_(sent)
        elif to == "all":
            self._run(lambda **how: _all_gather_single(received, sent, group=self.data, **how), sent, to)
        else:
            assert self.data is not None
            parts = None if gathered is None else [_bytes(part) for part in gathered]
            target = dist.get_global_rank(self.data, to)
            self._run(lambda **how: dist.gather(sent, parts, target, self.data, **how), sent, to)

    def broadcast(self, value: Tensor) -> Tensor:
        """Rank 0's ``value``, on all; every rank's has one shape and dtype, and those of the others are not read."""
        if self.size == 1:
            return value
        assert self.data is not None
        source = dist.get_global_rank(self.data, 0)
        plain = torch.contiguous_format
        value = value.contiguous() if self.rank == 0 else torch.empty_like(value, memory_format=plain)
        moved = _bytes(value)
        self._run(lambda **how: dist.broadcast(moved, source, self.data, **how), moved, "from 0")
        return value

    def settle(self, like: Tensor) -> None:
        """Wait until the device of ``like`` has done what was queued on it, as long as all ranks are there.

        Raises:
            RankError: a rank is gone, for which the device would wait; the group is of no use any more.
        """
        if self.size == 1 or not like.is_cuda:
            return
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(like.device))
        self._wait_for(done.query, "a decode was under way")

    # ------------------------------------------------------------------------------------------- control

    def _exchange(self, message: str, number: int = 0, failure: Exception | None = None) -> list[Row]:
        """Every rank's row, if no rank came with a failure."""
        own = Row.of(message, number, failure).packed()
        rows = [Row.unpacked(row) for row in self._rows(own)]
        for row in rows:
            if row.kind == GONE:
                raise self._error_of_gone(row.number, _GOING_ON)
        for rank, row in enumerate(rows):
            if row.kind != FINE:
                text = f"rank {rank} of {self.size} failed: {row.message}"
                raise RankError(text, rank=rank, input_error=row.kind == INPUT_ERROR, group=self)
        return rows

    def _rows(self, own: bytes) -> list[bytes]:
        """Every rank's row."""
        if self.presence is None:
            row = torch.frombuffer(bytearray(own), dtype=torch.uint8)
            gathered = row.new_empty((self.size, *row.shape))
            self._run(lambda **how: _all_gather_single(gathered.view(-1), row, group=self.control, **how), row, "all")
            return [bytes(row.numpy()) for row in gathered]
        try:
            rows = {self.rank: own, **self.presence.exchange(own)}
        except GoneError as gone:
            raise self._error_of_gone(gone.rank, _GOING_ON) from None
        return [rows[rank] for rank in range(self.size)]

    def _run(self, collective: Callable[..., Any], sent: Tensor, to: GatherTo | str) -> None:
        """Start a collective. On CPU tensors wait for it too, as long as all ranks are there."""
        if sent.is_cuda:
            key = (to, sent.numel())
            if key in self.connected:
                collective()
            else:
                self._connect(collective, sent)
                self.connected.add(key)
            return
        with self._blaming("the ranks were exchanging data") as meanwhile:
            work = collective(async_op=True)
            self._wait_for(work.is_completed, meanwhile)
            work.wait()

    def _connect(self, collective: Callable[..., Any], sent: Tensor) -> None:
        """Start a collective for which NCCL may have to connect the ranks: that keeps the thread that asks for it, for
        ever if a rank is gone. Which connections it has yet depends on the collective and the bytes."""
        stream, inference = torch.cuda.current_stream(sent.device), torch.is_inference_mode_enabled()
        connecting: Future[None] = Future()

        def connect() -> None:
            try:
                with torch.inference_mode(inference), torch.cuda.stream(stream):
                    collective()
                connecting.set_result(None)
            except Exception as error:
                connecting.set_exception(error)

        threading.Thread(target=connect, daemon=True).start()
        with self._blaming("the ranks were connecting") as meanwhile:
            self._wait_for(connecting.done, meanwhile)
            connecting.result()

    @contextmanager
    def _blaming(self, meanwhile: str) -> Iterator[str]:
        """An error of a collective in the body is a rank's that is gone, if one is."""
        try:
            yield meanwhile
        except RankError:
            raise
        except RuntimeError as error:  # a connection that broke: because a rank is gone?
            self._raise_if_gone(meanwhile, wait_s=_BLAME_S)
            text = f"the ranks lost each other: {error}"
            raise RankError(text, rank=self.rank, input_error=False) from error

    def _wait_for(self, done: Callable[[], bool], meanwhile: str) -> None:
        """A rank that ends while this one waits may have done its part before: so wait a little longer."""
        started = looked = time.monotonic()
        deadline: float | None = None
        while not done():
            now = time.monotonic()
            time.sleep(0 if now - started < _EAGER_S else _PAUSE_S)
            if deadline is not None and now > deadline:
                self._raise_if_gone(meanwhile)
            elif deadline is None and now - looked > _LOOK_EVERY_S:
                looked = now
                if self.presence is not None and self.presence.gone() is not None:
                    deadline = now + _GRACE_S

    def _raise_if_gone(self, meanwhile: str, wait_s: float = 0) -> None:
        """``wait_s``: how long to wait for a rank to be gone, where something says that one is."""
        deadline = time.monotonic() + wait_s
        while self.presence is not None:
            rank = self.presence.gone()
            if rank is not None:
                raise self._error_of_gone(rank, meanwhile)
            if time.monotonic() >= deadline:
                return
            time.sleep(_PAUSE_S)

    def _error_of_gone(self, rank: int, meanwhile: str) -> RankError:
        """``rank`` has ended: because another had, if its last row says so. All others get to know it from here, lest
        they wait for this rank, or take it for the one that was first to end."""
        assert self.presence is not None
        last = self.presence.last_row(rank, ROW_BYTES)
        if last and Row.unpacked(last).kind == GONE:
            rank = Row.unpacked(last).number
        self.presence.lose(rank, Row(GONE, rank, "").packed())
        self._abort()
        text = f"rank {rank} of {self.size} is gone ({self.presence.name(rank)} ended) while {meanwhile}"
        return RankError(text, rank=rank, input_error=False, gone=True, group=self)

    def _abort(self) -> None:
        """Stop NCCL's kernels, which would wait for a rank that is gone for ever and keep the GPU from all else."""
        assert self.data is not None
        if "nccl" not in dist.get_backend_config(self.data):
            return
        with suppress(Exception):  # an error is on its way already; this is to free the GPU
            backend: Any = self.data._get_backend(torch.device("cuda"))
            aborting = threading.Thread(target=backend.abort, daemon=True)
            aborting.start()
            aborting.join(_ABORT_S)


class Step:
    """What the ranks of a group do together, one thing after another; see ``RankGroup.in_step``."""

    def __init__(self, group: RankGroup, request: str) -> None:
        self._group, self._request = group, request
        self._count = 0
        self._over = group.size == 1

    @property
    def group(self) -> RankGroup:
        return self._group

    def agree(self, number: int = 0, *, last: bool = False) -> int:
        """Wait for all ranks; the least of their numbers.

        Raises:
            RankError: a rank failed, is gone, or is at something else.
        """
        if self._group.size == 1:
            return number
        self._count += 1
        self._over = True  # if this fails it fails on every rank, and there is nobody left to tell
        rows = self._group._exchange(f"{self._request} (step {self._count})", number)
        for rank, row in enumerate(rows):
            if row.message != rows[0].message:
                text = f"the ranks were asked for different things: rank 0 {rows[0].message}, rank {rank} {row.message}"
                raise RankError(text, rank=rank, input_error=True, group=self._group)
        self._over = last
        return min(row.number for row in rows)

    def also(self, words: str) -> None:
        """From here on all ranks must come with these words too."""
        self._request = f"{self._request}; {words}"

    def tell(self, error: Exception) -> None:
        """Let the others know that this rank has failed, unless they do."""
        if self._over or (isinstance(error, RankError) and error.group == self._group):
            return
        self._over = True
        with suppress(Exception):  # whatever became of the others, this rank's own error is the one to raise
            self._group._exchange(self._request, failure=error)


def _control_group(process_group: dist.ProcessGroup) -> dist.ProcessGroup:
    if "cpu:" in dist.get_backend_config(process_group):
        return process_group
    ranks = dist.get_process_group_ranks(process_group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _bytes(values: Tensor) -> Tensor:
    return values.view(-1).view(torch.uint8)
