"""What the parallel code asks of an engine. Engines know nothing of ranks, the parallel code nothing of engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from paravae.vae.plan import Stages, Window


class Engine(Protocol):
    """Turns windows of latents into pixels and windows of pixels into features, on one device.

    A trace (``plan.trace_window``) names the window that each local stage is fed and, last, the one it gives.
    """

    decoder_stages: Stages
    """Geometry of the decoder's local stages, from features at latent size to pixels."""
    encoder_stages: Stages
    """Geometry of the encoder's local stages, from pixels to features at latent size."""
    feature_channels: int
    """Channels of the encoder's features."""

    def decode(self, latents: Tensor, trace: Sequence[Window], *, as_uint8: bool = False) -> Iterator[Tensor]:
        """Pixels of the window ``trace[-1]`` from whole latents [B, z, T, h, w], a latent frame at a time:
        one pixel frame first, then ``temporal_ratio`` for each; [B, 3, f, rows, cols], clamped to [-1, 1],
        or as levels 0..255. The caller owns them."""
        ...

    def encode_window(self, pixels: Tensor, trace: Sequence[Window]) -> Iterator[Tensor]:
        """Features [B, C, 1, rows, cols] of the window ``trace[-1]``, one for each latent frame."""
        ...

    def encode_features(self, features: Tensor) -> Tensor:
        """Moments [B, 2 z, T, h, w] (mean, then log-variance) from the whole features [B, C, T, h, w]."""
        ...

    def head_work(self, lat_height: int, lat_width: int) -> int:
        """Multiply-adds a frame of the decoder's head, which every rank repeats."""
        ...
