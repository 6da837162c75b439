"""How ranks come to one decode or encode of a pipeline: all drive it alike, or rank 0 does and the others follow.

Either way what is decoded is rank 0's. Where all drive, each rank compares that with its own, lest ranks that were
given other prompts or seeds go on as if all were well. Where rank 0 drives, the others wait for its next call: a row of
text says what it is, then its tensor follows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from paravae.vae.comm import RankError, RankGroup

logger = logging.getLogger("paravae")

DECODE, ENCODE, END = "decode", "encode", "end"
_NEXT = "the next call of rank 0, which drives"
_ALIKE = 0.1  # of the values' RMS: rounding between ranks stays far below, another seed or prompt far above

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """What all ranks are to do with rank 0's tensor. ``tiles_px``: least height and width, and both strides."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    tiled: bool = False
    tiles_px: tuple[int, ...] = ()

    @staticmethod
    def from_text(text: str) -> Call:
        stated = json.loads(text)
        return Call(**{**stated, "shape": tuple(stated["shape"]), "tiles_px": tuple(stated["tiles_px"])})

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    def blank(self, device: torch.device) -> Tensor:
        """Of the tensor's shape and dtype, without its memory."""
        return torch.empty((), dtype=getattr(torch, self.dtype), device=device).expand(self.shape)


class Driven(Protocol):
    """A VAE whose decodes and encodes are shared."""

    leads: bool

    @property
    def shares(self) -> bool:
        """Whether it shares decodes at all."""

    @property
    def group(self) -> RankGroup: ...

    def take_part(self, call: Call) -> None:
        """Do what rank 0 does, on a rank that drives nothing."""


def lead(vae: Driven, work: Callable[[], Result]) -> Result | None:
    """Rank 0 runs ``work``, and all ranks share its decodes and encodes by ``vae``. All ranks of the group call this.

    The others need a VAE of the same weights and config and no more of a pipeline. An error of a single call that
    ``work`` catches ends nothing; once ``work`` is left, by an error or without, they return too.

    Args:
        vae: what ``paravae_vae_for`` or ``accelerate`` made, with ``use_parallel_decode``.
        work: takes nothing, such as ``lambda: pipe("a cat").images``. Not called on the other ranks.

    Returns:
        What ``work`` returned, on rank 0; None on the others.

    Raises:
        ValueError: ``vae`` decodes alone although there are other ranks, or is being led already.
        RankError: on the others, if ``work`` raised or rank 0 is gone; on any rank, if another is gone.
    """
    if not hasattr(vae, "take_part"):
        raise ValueError(f"vae is a {type(vae).__name__}; lead needs what paravae_vae_for or accelerate made: pipe.vae")
    if vae.leads:
        raise ValueError("this VAE is being led already: a second lead inside of work has nobody to follow it")
    world = vae.group if vae.shares else RankGroup.world()
    if world.size == 1:
        return work()
    if not vae.shares:
        raise ValueError(
            f"there are {world.size} ranks, but this VAE decodes alone: accelerate with "
            "vae_config=QwenImageVAEConfig(use_parallel_decode=True)"
        )
    if world.rank:
        _follow(vae, world)
        return None
    with world.in_step(_NEXT) as step:
        vae.leads = True
        try:
            result = work()
        except BaseException as error:  # KeyboardInterrupt too: the others are not to wait for a next call
            step.tell(_own(error))
            raise
        finally:
            vae.leads = False
        announce(world, Call(END))
    return result


def _own(error: BaseException) -> Exception:
    """As an error of this rank's own: those that follow have got over one that all ranks had."""
    shared = isinstance(error, RankError) and not error.gone
    return error if isinstance(error, Exception) and not shared else RuntimeError(f"{type(error).__name__}: {error}")


def announce(group: RankGroup, call: Call) -> None:
    """Have the ranks that follow take part in rank 0's ``call``."""
    group.first(_NEXT, call.to_text())


def _follow(vae: Driven, group: RankGroup) -> None:
    while True:
        call = Call.from_text(group.first(_NEXT, ""))
        if call.name == END:
            return
        try:
            vae.take_part(call)
        except Exception as error:  # rank 0 has it too, and decides whether to go on
            if isinstance(error, RankError) and error.gone:
                raise
            logger.warning("rank %d: %s of rank 0 failed: %s", group.rank, call.name, error)


def of_rank_zero(group: RankGroup, words: str, own: Callable[[], Tensor], *, alike: bool) -> Tensor:
    """Rank 0's tensor, on all ranks. ``own``: this rank's, checked; of rank 0's shape and dtype, which ``words`` tell.

    Raises:
        ValueError: ``alike``, and this rank's own differs by more than rounding; or what ``own`` raises.
        RankError: another rank failed, is gone, or is at something else.
    """
    with group.in_step(words) as step:
        value = own()
        step.agree()
        first = group.broadcast(value)
        if alike:
            group.settle(first)  # the comparison waits for it, which a rank that is gone would make for ever
            _check_alike(value, first, group.rank)
        step.agree(last=True)
    return first


def _check_alike(value: Tensor, first: Tensor, rank: int) -> None:
    difference, size = (float(x.float().square().mean().sqrt()) for x in (value - first, first))
    if difference > _ALIKE * size:  # never with NaN or Inf, of which the decode has its own error
        raise ValueError(
            f"rank {rank} came with something else than rank 0 (RMS difference {difference:.3g}, of values of RMS "
            f"{size:.3g}): give all ranks the same prompt, pictures and seed (generator=torch.Generator().manual_seed"
            "(0)), or have rank 0 drive alone (paravae.integrations.driving.lead)"
        )
