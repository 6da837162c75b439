"""What calibration times: whole pictures, single windows of plans for many, videos, tiles, and what ranks exchange.

A window is decoded by itself, as a rank of several would, but for the exchange. Several ranks time the same things all
at once, and the slowest counts: as in a shared decode, no GPU has the host for itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch

from paravae import AutoencoderKLQwenImage
from paravae.launch.bench_cases import Case
from paravae.launch.bench_timing import turns_ms
from paravae.launch.calibrate_fit import NO_LINK, DecodeSample, GatherSample, Sample, SharedSample
from paravae.launch.planned import decode_as, lone_window, planner_of
from paravae.launch.world import World
from paravae.vae import plan
from paravae.vae.choice import DecodePlan, DecodePlanner
from paravae.vae.comm import RankGroup
from paravae.vae.cost import Machine, Rates

Found = TypeVar("Found", bound=Sample)
Size = tuple[int, int]
"""Width and height in pixels."""

# Timed calls of each case; fewer, but five, where they take longer together. Long enough that small pictures, too, are
# timed at the clocks that a GPU keeps under load: it starts with higher ones.
_REPEATS, _SECONDS = 100, 0.4
_FEWEST_IMAGES = 4  # however little time there is
_SHARD_BYTES = tuple(2**power for power in range(22, 27))  # 4 to 64 MiB: of smaller ones the host's time is measured
_GATHERS = 10  # queued in a row: within a decode the host is ahead, too
_ANY_MEMORY = 2**62


@dataclass(frozen=True)
class Sizes:
    """What is timed with one engine. ``images``: whole pictures; ``windows``: (size, grid) of which one window is;
    ``videos``: (size, pixel frames); ``shared``: that several ranks share; ``share``: of the time allowed, after which
    no more images are begun."""

    images: Sequence[Size]
    windows: Sequence[tuple[Size, tuple[int, int]]]
    videos: Sequence[tuple[Size, int]]
    tiled: Sequence[Size]
    shared: Sequence[Size] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Measured(Generic[Found]):
    """``row``: what the result file says of it, but for the times; ``sample``: what the fit takes of it."""

    row: dict[str, Any]
    sample: Found


@dataclass(frozen=True)
class Meter:
    """``machine``: the constants known before, the same on all ranks; ``seconds``: how long all is to take."""

    machine: Machine
    here: World
    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start

    # --------------------------------------------------------------------------------------- on one device

    def images(self, vae: AutoencoderKLQwenImage, sizes: Sizes) -> list[Measured[DecodeSample]]:
        """Whole pictures and windows, as far as time allows."""
        found: list[Measured[DecodeSample]] = []
        for what, size, planner, planned in self._planned_images(vae, sizes):
            if len(found) < _FEWEST_IMAGES or self._has_time(sizes.share):
                found.append(self._alone(vae, what, Case("decode", *size, 1), planner, planned))
        return found

    def videos(self, vae: AutoencoderKLQwenImage, sizes: Sizes) -> list[Measured[DecodeSample]]:
        found = []
        for size, frames in sizes.videos:
            case = Case("decode", *size, frames)
            planner = self._planner(vae, case, 1)
            found.append(self._alone(vae, "video", case, planner, planner.single()))
        return found

    def tiled(self, vae: AutoencoderKLQwenImage, sizes: Sizes) -> list[Measured[DecodeSample]]:
        found = []
        for size in sizes.tiled:
            case = Case("decode", *size, 1)
            planner = self._planner(vae, case, 1)
            found.append(self._alone(vae, "tiles", case, planner, planner.tiled(_ANY_MEMORY)))
        return found

    def _planned_images(
        self, vae: AutoencoderKLQwenImage, sizes: Sizes
    ) -> Iterator[tuple[str, Size, DecodePlanner, DecodePlan]]:
        for size in sizes.images:
            planner = self._planner(vae, Case("decode", *size, 1), 1)
            yield "image", size, planner, planner.single()
        for size, grid in sizes.windows:
            planner = self._planner(vae, Case("decode", *size, 1), grid[0] * grid[1])
            for planned in planner.patches():
                if planned.choice.grid == grid and planned.choice.head == "own":
                    yield "window", size, planner, lone_window(planned, _busiest(planner, planned))

    def _alone(
        self, vae: AutoencoderKLQwenImage, what: str, case: Case, planner: DecodePlanner, planned: DecodePlan
    ) -> Measured[DecodeSample]:
        """A decode that each rank does for itself."""
        ms = self._decode_ms(vae, case, planned, RankGroup.alone())
        how = f"{planned.choice.grid[0]} x {planned.choice.grid[1]}" if what in ("window", "tiles") else ""
        kind = planner.engine.kind(planner.dtype, planner.device)
        return _measured(kind, what, case, how, 1, DecodeSample(planner.cost, planned.layout, 1, ms))

    # -------------------------------------------------------------------------------------- between ranks

    def gathers(self) -> list[Measured[GatherSample]]:
        """All-gathers of several sizes, many queued at once."""
        group, found = self.here.group, []
        for size in _SHARD_BYTES:
            shard = torch.zeros(size, dtype=torch.uint8, device=self.here.device)
            gathered = shard.new_empty((group.size, size))

            def gather(gathered: torch.Tensor = gathered, shard: torch.Tensor = shard) -> None:
                for _ in range(_GATHERS):
                    group.gather_into(gathered, shard, "all")

            sample = GatherSample(size, group.size, self._median_ms(gather) / _GATHERS)
            labels = {"engine": "link", "what": "gather", "size": f"{size / 2**20:g} MiB", "frames": 1}
            found.append(Measured({**labels, "how": "", "ranks": group.size}, sample))
        return found

    def shared(self, vae: AutoencoderKLQwenImage, sizes: Sequence[Size], rates: Rates) -> list[Measured[SharedSample]]:
        """Decodes of all ranks. What the slowest computes is measured, and where the head is shared, predicted by
        ``rates``: what is left is the exchange."""
        group, found = self.here.group, []
        for size in sizes:
            case = Case("decode", *size, 1)
            planner = self._planner(vae, case, group.size)
            for planned in _some(list(planner.patches()), group.size):
                assert isinstance(planned.layout, plan.PatchPlan)
                ms = self._decode_ms(vae, case, planned, group)
                decode = DecodeSample(planner.cost, planned.layout, group.size, ms)
                if planned.choice.head == "own":
                    compute_ms = self._decode_ms(vae, case, lone_window(planned, group.rank), RankGroup.alone())
                else:
                    compute_ms = decode.predict(rates, replace(NO_LINK, step_ms=0.0))
                sample, how = SharedSample(decode, compute_ms), planned.choice.how.removeprefix("patch, ")
                found.append(_measured(vae.engine.kind(vae.dtype, vae.device), "shared", case, how, group.size, sample))
        return found

    # --------------------------------------------------------------------------------------------- timing

    def _planner(self, vae: AutoencoderKLQwenImage, case: Case, ranks: int) -> DecodePlanner:
        shape = case.latents_shape(vae.config.arch_config)
        return planner_of(vae, self.machine, shape, vae.dtype, vae.device, ranks)

    def _decode_ms(self, vae: AutoencoderKLQwenImage, case: Case, planned: DecodePlan, group: RankGroup) -> float:
        latents = case.draw_input(vae.config.arch_config).to(vae.device, vae.dtype)
        return self._median_ms(lambda: decode_as(vae, planned, latents, group))

    def _median_ms(self, call: Callable[[], object]) -> float:
        """After a call in which libraries choose their algorithms, and one in which a graph is recorded."""
        for _ in range(2):
            call()
        device, group = self.here.device, self.here.group
        times = turns_ms({"it": call}, _REPEATS, device, group, seconds=_SECONDS, together=True)
        return statistics.median(times["it"])

    def _has_time(self, share: float) -> bool:
        """The same on every rank."""
        return bool(self.here.group.minimum("time left", int(self.elapsed_s < share * self.seconds)))


def _busiest(planner: DecodePlanner, planned: DecodePlan) -> int:
    """The rank with the most to compute."""
    assert isinstance(planned.layout, plan.PatchPlan)
    work = [plan.local_work(planner.engine.decoder_stages, trace) for trace in planned.layout.traces]
    return work.index(max(work))


def _some(plans: Sequence[DecodePlan], ranks: int) -> list[DecodePlan]:
    """Whole rows, whole columns and what is nearest to square, of those that use all ranks; each head."""
    full = [found for found in plans if found.choice.grid[0] * found.choice.grid[1] == ranks]
    grids = sorted({found.choice.grid for found in full}, key=lambda grid: abs(grid[0] - grid[1]))
    wanted = {grids[0], grids[-1], (ranks, 1)} if grids else set()
    return [found for found in full if found.choice.grid in wanted]


def _measured(kind: str, what: str, case: Case, how: str, ranks: int, sample: Found) -> Measured[Found]:
    labels = {"engine": kind, "what": what, "size": case.size, "frames": case.frames, "how": how, "ranks": ranks}
    return Measured(labels, sample)
