"""What the parallel code asks of an engine. Engines know nothing of ranks, the parallel code nothing of engines."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from paravae.vae.engines.graphs import Agree
from paravae.vae.models.blocks import Together
from paravae.vae.plan import Stages, Window

Half = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class HeadShare:
    """The rows of the frame for which the attention, and what stands before it, is computed here.

    ``trace``: of the front stages, the last window being whole rows. ``gather``: brings everyone's rows together.
    """

    trace: tuple[Window, ...]
    gather: Together


@dataclass(frozen=True)
class Load:
    """What an engine is to run at once: ``half`` along ``trace``, for as many ``images``; the largest, if of several
    sizes. ``kept_bytes``: of what calls that are repeated (``Engine.repeats``) read and write. ``lat_frame``: latent
    rows and columns of the picture, or tile, that ``trace`` lies in."""

    half: Half
    trace: Sequence[Window]
    images: int
    kept_bytes: int = 0
    lat_frame: tuple[int, int] = (0, 0)


class Engine(Protocol):
    """Turns windows of latents into pixels and windows of pixels into features, on one device.

    A trace (``plan.trace_window``) names the window that each local stage is fed and, last, the one it gives.
    """

    decoder_front: Stages
    """Geometry of the decoder's local stages from latents to its attention."""
    decoder_stages: Stages
    """Geometry of the decoder's local stages from its attention, at latent size, to pixels."""
    encoder_stages: Stages
    """Geometry of the encoder's local stages, from pixels to features at latent size."""
    encoder_front: Stages
    """Geometry of the encoder's local stages from features to its attention."""
    feature_channels: int
    """Channels of the encoder's features."""
    attention_channels: int
    """Channels of the decoder's attention."""
    shares_head: bool
    """Whether ranks can share the attention and what stands before it (``HeadShare``)."""

    def decode(
        self, latents: Tensor, trace: Sequence[Window], *, as_uint8: bool = False, head: HeadShare | None = None
    ) -> Iterator[Tensor]:
        """Pixels of the window ``trace[-1]`` from whole latents [B, z, T, h, w], a latent frame at a time:
        one pixel frame first, then ``temporal_ratio`` for each; [B, 3, f, rows, cols], clamped to [-1, 1],
        or as levels 0..255. The caller owns them.

        ``head``: what of the head is computed here; None: keys and values of the whole frame, and the queries that
        the window needs. An empty window gives empty pixels.
        """
        ...

    def encode_window(self, pixels: Tensor, trace: Sequence[Window]) -> Iterator[Tensor]:
        """Features [B, C, 1, rows, cols] of the window ``trace[-1]``, one for each latent frame."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Moments [B, 2 z, T, h, w] of whole pixels, nothing shared: the two below, one after the other."""
        ...

    def encode_features(self, features: Tensor, head: HeadShare | None = None) -> Tensor:
        """Moments [B, 2 z, T, h, w] (mean, then log-variance) from the whole features [B, C, T, h, w]."""
        ...

    def call(
        self, load: Load, key: Hashable, function: Callable[[Tensor], Tensor], value: Tensor, agree: Agree
    ) -> Tensor:
        """``function(value)``, which puts ``load`` on this engine for a lone frame; an engine may record it and replay
        what it recorded.

        ``key`` names everything but the values in ``value`` that the result depends on. All who share the work call
        this alike, and so ``agree`` is called alike on all of them: once or twice.
        """
        ...

    def repeats(self, call: Callable[[], None]) -> bool:
        """If a recording is under way: leave ``call`` out of it, make it at this place of every replay, and say so.

        For what is not the engine's to record: it reads and writes the very tensors that it has now.
        """
        ...

    def kind(self, dtype: torch.dtype, device: torch.device) -> str:
        """Which way values of that dtype take there: "fast", or plain PyTorch in so many bits, "torch16", "torch32"."""
        ...

    def estimated_bytes(self, load: Load, dtype: torch.dtype, device: torch.device, *, stream: bool) -> int:
        """Peak over the weights of running ``load``, but for what it keeps: an estimate on the safe side.

        ``stream``: several latent frames, one after another.
        """
        ...
