"""What is timed: decodes and encodes of given sizes, and the inputs for them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paravae import VAEArchConfig
from paravae.configs.values import width_and_height

WHATS = ("decode", "encode")
SIZES = (
    "512x512", "1024x1024", "928x1664", "1664x928", "1328x1328", "1104x1472", "720x1280", "1088x1920", "2048x2048",
)  # fmt: skip
_SEED = 1


@dataclass(frozen=True)
class Case:
    """``what``: decode or encode; ``width``, ``height``, ``frames`` in pixels and pixel frames. The batch is 1."""

    what: str
    width: int
    height: int
    frames: int

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    def __str__(self) -> str:
        return f"{self.what} {self.size}, {self.frames} frame{'s' if self.frames > 1 else ''}"

    def head(self) -> dict[str, object]:
        """What tells this case from others, as a row of a result file has it."""
        return {"what": self.what, "size": self.size, "frames": self.frames}

    def latents_shape(self, arch: VAEArchConfig) -> tuple[int, ...]:
        """[B, z, T, h, w]."""
        lat_frames = 1 + (self.frames - 1) // arch.temporal_ratio
        return 1, arch.z_dim, lat_frames, self.height // arch.spatial_ratio, self.width // arch.spatial_ratio

    def pixels_shape(self, arch: VAEArchConfig) -> tuple[int, ...]:
        """[B, 3, F, H, W]."""
        return 1, arch.input_channels, self.frames, self.height, self.width

    def draw_input(self, arch: VAEArchConfig) -> Tensor:
        """Seeded fp32 on the host, so that every device gets the same: standard normal latents, or pixels evenly
        spread over [-1, 1]."""
        generator = torch.Generator().manual_seed(_SEED)
        if self.what == "decode":
            return torch.randn(self.latents_shape(arch), generator=generator)
        return 2 * torch.rand(self.pixels_shape(arch), generator=generator) - 1


def pixel_size(text: str) -> tuple[int, int]:
    """argparse's type of a size: "1024x768" -> (width, height)."""
    try:
        return width_and_height(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_cases(
    whats: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    frames: Sequence[int],
    arch: VAEArchConfig,
    flag: str = "--sizes",
) -> list[Case]:
    """Every combination, each once: images before videos, decodes before encodes. ``flag``: that named the sizes.

    Raises:
        ValueError: the model has no pictures of such a size or length.
    """
    for width, height in sizes:
        _check_size(flag, width, height, arch.spatial_ratio)
    for count in frames:
        _check_frames(count, arch.temporal_ratio)
    cases = [Case(what, width, height, count) for count in frames for what in whats for width, height in sizes]
    return list(dict.fromkeys(cases))


def _check_size(flag: str, width: int, height: int, ratio: int) -> None:
    for side, px in (("width", width), ("height", height)):
        if px < ratio or px % ratio:
            near = sorted({max(ratio, px - px % ratio), px - px % ratio + ratio})
            raise ValueError(
                f"{flag} {width}x{height}: the {side} is {px} pixels, needs a positive multiple of {ratio}, "
                f"such as {' or '.join(map(str, near))}"
            )


def _check_frames(count: int, ratio: int) -> None:
    if count < 1 or (count - 1) % ratio:
        below = max(1, count - (count - 1) % ratio)
        raise ValueError(
            f"--frames {count}: needs 1 + a multiple of {ratio}, such as {below} or {below + ratio}; an image has 1"
        )
