"""What cases start from: a model that decodes in parallel, the decode of one rank alone, latents, a chosen plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage
from paravae.vae.choice import DecodePlan, DecodePlanner
from paravae.vae.cost import machine_named
from tests.builders import noise, small_vae
from tests.ranks import Rank

TILES: dict[str, Any] = {
    "tile_sample_min_height": 64,
    "tile_sample_min_width": 64,
    "tile_sample_stride_height": 48,
    "tile_sample_stride_width": 48,
}
# Of the small model's 32 x 32 latents a tile of 8 x 8 and the picture fit, but no window of one rank in four does.
TILE_FITS_GIB = 4.95e-3


def parallel_vae(here: Rank, dtype: torch.dtype = torch.float32, **options: Any) -> AutoencoderKLQwenImage:
    return small_vae(dtype, here.device, use_parallel_decode=True, **options)


def alone(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """The decode that this rank makes by itself, untiled."""
    single = small_vae(vae.dtype, vae.device)
    pixels = single.decode(latents)
    assert single.last_choice is not None
    assert (single.last_choice.mode, single.last_choice.ranks) == ("single", 1)
    return pixels


def latents_for(here: Rank, size: str, frames: int, batch: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    height, width = map(int, size.split("x"))
    return noise(batch, 16, frames, height, width, dtype=dtype, device=here.device, seed=seed)


def _offered(planner: DecodePlanner) -> list[DecodePlan]:
    """Every exact plan, made once for what is asked for more than once."""
    key = (type(planner.engine), planner.shape, planner.dtype, planner.ranks, planner.pixel_bytes)
    if key not in _PLANS:
        _PLANS[key] = [planner.single(), *planner.patches()]
    return _PLANS[key]


_PLANS: dict[Hashable, list[DecodePlan]] = {}


@contextmanager
def plan_chosen(choose: Callable[[Sequence[DecodePlan]], DecodePlan]) -> Iterator[None]:
    """Decodes on several ranks go by what ``choose`` finds among the exact plans for them, however slow it is."""

    def plan(self: DecodePlanner, mode: str | None, budget_bytes: int) -> DecodePlan:
        return choose(_offered(self)) if self.ranks > 1 else self.single()

    with patch.object(DecodePlanner, "plan", plan):
        yield


def plan_with(grid: tuple[int, int], head: str = "own", groups: int = 1) -> AbstractContextManager[None]:
    """Decodes on several ranks go by the plan with these."""

    def choose(plans: Sequence[DecodePlan]) -> DecodePlan:
        wanted = (grid, head, groups)
        (found,) = [one for one in plans if (one.choice.grid, one.choice.head, one.choice.groups) == wanted]
        return found

    return plan_chosen(choose)


def table_for_shared_heads(path: Path) -> str:
    """Writes a cost table by which links cost nothing and attention much: so the ranks share every head they can."""
    known = machine_named("default")
    engines = {kind: replace(rates, attention_ms=1e3) for kind, rates in known.engines.items()}
    path.write_text(replace(known, engines=engines, link=replace(known.link, latency_ms=0.0, gb_per_s=1e9)).to_json())
    return str(path)
