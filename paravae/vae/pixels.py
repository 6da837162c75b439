"""Pixel values: [-1, 1] in the network, 0 to 255 outside; and how near two pictures are."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded to nearest, computed in at least fp32."""
    wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return (wide * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0..255 -> [-1, 1]."""
    return (levels.to(torch.float32) / 127.5 - 1).to(dtype)


def psnr_db(a: Tensor, b: Tensor, value_range: float) -> float:
    """Peak signal-to-noise ratio in dB over all values, ``value_range`` from least to largest (2 for [-1, 1], 255
    for levels); infinite for identical pictures."""
    mean_square = float((a.double() - b.double()).square().mean())
    return 10 * math.log10(value_range**2 / mean_square) if mean_square else math.inf
