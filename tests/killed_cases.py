"""A rank whose process ends while the others need it, at each moment of a decode: they hear of it, and which it was."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage, RankError
from paravae.vae.comm import RankGroup
from paravae.vae.engines.graphs import CudaGraph
from tests.builders import max_error, noise, pictures, small_vae
from tests.case_tools import TILES, parallel_vae, plan_with
from tests.fault_cases import BrokenEngine, error_of
from tests.ranks import Rank, run_ranks

SOON_S = 0.3  # enough for the other ranks to have come where they wait
Call = Callable[[AutoencoderKLQwenImage], object]


@dataclass(frozen=True)
class Told:
    """What a rank that lived on was told: how long after, of which rank, in which words."""

    seconds: float
    rank: int
    words: str


@dataclass(frozen=True)
class Death:
    """Ends this process, as its last deed writing into ``note`` which it was and when."""

    note: Path
    by_signal: bool = True

    def __call__(self, *_: object, **__: object) -> NoReturn:
        self.note.write_text(f"{os.getpid()} {time.monotonic()}")
        if self.by_signal:
            os.kill(os.getpid(), signal.SIGKILL)
        raise SystemExit(0)


@dataclass(frozen=True)
class Moment:
    """``call``: what all ranks call; ``dying``: the same on the rank that dies of it, in place of which it may do
    something else; ``around``: both; ``before``: how many decodes went well (the third, with graphs, replays one)."""

    call: Call
    dying: Callable[[AutoencoderKLQwenImage, Death], object]
    around: Callable[[int], AbstractContextManager[object]] = lambda size: nullcontext()
    before: int = 3


def image(vae: AutoencoderKLQwenImage, frames: int = 1) -> Tensor:
    """Latents so long that every one of four ranks has some to do."""
    return noise(1, 16, frames, 20, 3, dtype=vae.dtype, device=vae.device)


def decode(vae: AutoencoderKLQwenImage) -> object:
    return vae.decode(image(vae))


def soon(death: Death) -> NoReturn:
    time.sleep(SOON_S)
    death()


def decode_later(vae: AutoencoderKLQwenImage) -> object:
    time.sleep(SOON_S)
    return decode(vae)


def in_engine(call: Call, broken: str, good_steps: int = 0) -> Moment:
    """In the middle of this rank's own share."""

    def living(vae: AutoencoderKLQwenImage) -> object:
        vae.use_engine(vae.engine)  # with another engine a rank plans anew, so all do
        return call(vae)

    def dying(vae: AutoencoderKLQwenImage, death: Death) -> object:
        vae.use_engine(BrokenEngine(vae.engine, broken, good_steps, fail=partial(soon, death)))
        return call(vae)

    return Moment(living, dying)


def in_gather(
    call: Call,
    gathers: int = 0,
    around: Callable[[int], AbstractContextManager[object]] = lambda size: nullcontext(),
    before: int = 3,
) -> Moment:
    """After all ranks have agreed to gather, ``gathers`` of this decode being done, while the others are in it."""

    def dying(vae: AutoencoderKLQwenImage, death: Death) -> object:
        original, count = RankGroup.gather_into, [0]

        def gather(self: RankGroup, *tensors: object) -> None:
            count[0] += 1
            if count[0] > gathers:
                soon(death)
            original(self, *tensors)  # type: ignore[arg-type]

        with patch.object(RankGroup, "gather_into", gather):
            return call(vae)

    return Moment(call, dying, around, before)


def in_replay() -> Moment:
    """Before this rank replays a graph that all replay."""

    def dying(vae: AutoencoderKLQwenImage, death: Death) -> object:
        with patch.object(CudaGraph, "__call__", lambda self, value: soon(death)):
            return decode(vae)

    return Moment(decode, dying)


def in_stream() -> Moment:
    """As it takes the second piece of a video."""

    def dying(vae: AutoencoderKLQwenImage, death: Death) -> object:
        taken: list[Tensor] = []
        return vae.decode(image(vae, 3), on_frames=lambda piece: soon(death) if taken else taken.append(piece))

    return Moment(lambda vae: vae.decode(image(vae, 3), on_frames=lambda piece: None), dying)


def late(vae: AutoencoderKLQwenImage) -> object:
    """The first rank comes when the others have long been told, and have ended."""
    time.sleep(1.5 if vae.parallel_group.rank == 0 else SOON_S)
    return decode(vae)


def to_first(vae: AutoencoderKLQwenImage) -> object:
    return vae.decode(image(vae), gather_to=0)


def head_shared(size: int) -> AbstractContextManager[None]:
    return plan_with((size, 1), head="shared")


MOMENTS: dict[str, Moment] = {
    "between decodes": Moment(decode_later, lambda vae, death: death()),
    "before one that comes late": Moment(late, lambda vae, death: death()),
    "while the others wait for it": Moment(decode, lambda vae, death: soon(death)),
    "in its share": in_engine(decode, "decode"),
    "in its share of a video": in_engine(lambda vae: vae.decode(image(vae, 2)), "decode", good_steps=1),
    "in its tiles": in_engine(lambda vae: vae.parallel_tiled_decode(image(vae)), "decode"),
    "in its share of an encode": in_engine(
        lambda vae: vae.encode(pictures(1, 3, 1, 128, 16, dtype=vae.dtype, device=vae.device)), "encode_window"
    ),
    "in the gather": in_gather(decode),
    "in the group's first gather": in_gather(decode, before=0),
    "in the gather to one": in_gather(to_first),
    "with keys and values": in_gather(decode, around=head_shared),
    "with the attention": in_gather(decode, gathers=1, around=head_shared),
    "in a stream": in_stream(),
}
GPU_MOMENTS = MOMENTS | {"before a replay": in_replay()}


def rank_dies(here: Rank, moment: str, victim: int, death: Death, dtype: torch.dtype, graphs: int) -> Told:
    """All are fine before; after, those that live on are told, and told again; and each by itself can still decode."""
    vae = parallel_vae(here, dtype, parallel_decode_mode="patch", cuda_graphs=graphs, **TILES)
    single = small_vae(dtype, here.device)
    now = GPU_MOMENTS[moment]
    with now.around(here.size):
        pixels = [vae.decode(image(vae)) for _ in range(now.before)]
        if here.rank == victim:
            now.dying(vae, death)
            raise AssertionError("it should be dead")
        error = error_of(lambda: now.call(vae))
        told = time.monotonic()
        again = error_of(lambda: vae.decode(image(vae)))
    assert isinstance(error, RankError), repr(error)
    assert isinstance(again, RankError), repr(again)
    assert (error.rank, error.input_error) == (again.rank, again.input_error) == (victim, False)
    assert float(torch.ones(10, device=here.device).sum()) == 10
    alone, bound = single.decode(image(vae)), 2e-5 if dtype == torch.float32 else 0.1
    assert all(max_error(alone, shared) <= bound for shared in pixels)
    return Told(told - float(death.note.read_text().split()[1]), error.rank, str(error))


def check_told(
    moment: str,
    size: int,
    victim: int,
    death: Death,
    rendezvous: Path,
    *,
    most_s: float,
    backend: str = "gloo",
    dtype: torch.dtype = torch.float32,
    graphs: int = 0,
) -> None:
    """Run a world in which one rank dies at that moment, and see that the others were told in ``most_s``."""
    case = partial(rank_dies, moment=moment, victim=victim, death=death, dtype=dtype, graphs=graphs)
    outcomes = run_ranks({moment: case}, size, rendezvous, backend=backend, timeout_s=60, tidy=False)[moment]
    assert death.note.exists(), f"it did not die: {outcomes}"
    name = f"process {death.note.read_text().split()[0]} on {socket.gethostname()}"
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert outcome.error == "no result: the rank hung or died before it"
            continue
        assert outcome.error is None, outcome.error
        assert isinstance(outcome.value, Told)
        assert outcome.value.rank == victim
        assert f"rank {victim} of {size} is gone ({name} ended)" in outcome.value.words
        assert outcome.value.seconds < most_s
