"""Decodes by a plan that is given, not chosen: what calibration times, and the benchmark of every plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage
from paravae.vae.checks import FiniteCheck
from paravae.vae.choice import DecodePlan, DecodePlanner
from paravae.vae.comm import RankGroup
from paravae.vae.cost import Machine, machine_of
from paravae.vae.memory import device_name
from paravae.vae.plan import PatchPlan, Span, grids
from paravae.vae.share import Sharer
from paravae.vae.work import Decode


def planner_of(
    vae: AutoencoderKLQwenImage,
    machine: Machine,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    ranks: int,
    pixel_bytes: int | None = None,
) -> DecodePlanner:
    """The planner of ``vae.decode`` of latents of ``shape``. ``pixel_bytes``: of a value of the result, by default the
    dtype's."""
    return DecodePlanner(
        config=vae.config,
        engine=vae.engine,
        machine=machine,
        shape=shape,
        dtype=dtype,
        device=device,
        ranks=ranks,
        pixel_bytes=pixel_bytes or dtype.itemsize,
    )


@torch.no_grad()
def decode_as(vae: AutoencoderKLQwenImage, planned: DecodePlan, latents: Tensor, group: RankGroup) -> Tensor:
    """Pixels [B, 3, F, 8 h, 8 w] of ``latents``, decoded as ``planned`` by the ranks of ``group``, who all call this:
    ``vae.decode``, but for the choice."""
    with group.in_step(f"decode of {list(latents.shape)} {latents.dtype}: {planned.choice.how}") as step:
        finite = FiniteCheck("latents", latents)
        sharer = Sharer(vae.engine, vae.config.arch_config, step)
        picture = Decode(sharer, planned, latents, finite, as_uint8=False, gather_to="all").whole(None)
        step.agree(last=True)
    vae.last_choice = planned.choice
    assert picture is not None
    group.settle(picture)
    return picture


def lone_window(planned: DecodePlan, rank: int) -> DecodePlan:
    """What ``rank`` does of a plan for many, as a plan for one: its window, and nothing is exchanged."""
    assert isinstance(planned.layout, PatchPlan)
    trace, images = planned.layout.traces[rank], planned.layout.images[rank]
    layout = PatchPlan((1, 1), (trace,), (Span(0, images.size),))
    # The grid stays in the choice: it tells this window's recording from those of others.
    return replace(planned, choice=replace(planned.choice, ranks=rank), layout=layout, kept_bytes=0)


def candidates(planner: DecodePlanner, budget_bytes: int) -> Iterator[DecodePlan]:
    """Every plan that ``auto`` chooses from: alone, each exact way to share, tiles."""
    yield planner.single()
    if planner.ranks > 1:
        yield from planner.patches()
    yield planner.tiled(budget_bytes)


@dataclass(frozen=True)
class Way:
    """One of the exact ways to decode a lone image. ``grid``: of windows, 1 x 1: every rank decodes alone; ``head``:
    own or shared."""

    grid: tuple[int, int]
    head: str

    @property
    def name(self) -> str:
        """Such as "4x2-shared", or "single"."""
        return "single" if self.grid == (1, 1) else f"{self.grid[0]}x{self.grid[1]}-{self.head}"

    @staticmethod
    def all_of(ranks: int) -> list[Way]:
        """Those that auto chooses from, of pictures with enough latents for each rank to have some."""
        many = grids((ranks, ranks), ranks) if ranks > 1 else ()
        return [Way((1, 1), "own"), *(Way(grid, head) for grid in many for head in ("own", "shared"))]


class WayOfDecoding:
    """``vae.decode`` of lone images or videos in one way, whatever auto would choose."""

    def __init__(self, vae: AutoencoderKLQwenImage, way: Way) -> None:
        self._vae, self._way = vae, way
        self._plans: dict[tuple[int, ...], DecodePlan] = {}

    def __call__(self, latents: Tensor) -> Tensor:
        shape = tuple(latents.shape)
        if shape not in self._plans:  # planning takes longer than launching what was planned
            self._plans[shape] = self._plan(latents)
        return decode_as(self._vae, self._plans[shape], latents, self._vae.parallel_group)

    def _plan(self, latents: Tensor) -> DecodePlan:
        ranks = self._vae.parallel_group.size
        machine = machine_of(self._vae.config.cost_table, device_name(latents.device))
        planner = planner_of(self._vae, machine, tuple(latents.shape), latents.dtype, latents.device, ranks)
        for planned in (planner.single(), *(planner.patches() if ranks > 1 else ())):
            if Way(planned.choice.grid, planned.choice.head) == self._way:
                return planned
        raise ValueError(f"latents of {list(latents.shape)} cannot be decoded as {self._way.name} by {ranks} ranks")
