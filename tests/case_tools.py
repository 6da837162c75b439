"""What cases start from: a model that decodes in parallel, the decode of one rank alone, latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage
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
