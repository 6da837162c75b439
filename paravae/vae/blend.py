"""Shards become a picture: exact windows are pasted, overlapping tiles cross-faded. One code for one rank and many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from paravae.vae.plan import Span, Window


def paste(
    shards: Tensor, windows: Sequence[Window], images: Sequence[Span], batch: int, height: int, width: int
) -> Tensor:
    """Put each rank's images' window in its place: shards [R, n, C, T, rows, cols], padded -> [batch, C, T, height,
    width]."""
    picture = shards.new_empty((batch, *shards.shape[2:-2], height, width))
    for shard, window, of in zip(shards, windows, images, strict=True):
        if window.area:
            part = shard[: of.size, ..., : window.rows.size, : window.cols.size]
            rows, cols = slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop)
            picture[of.start : of.stop, ..., rows, cols] = part
    return picture


def cross_fade(tiles: Iterable[Tensor], windows: Sequence[Window], height: int, width: int) -> Tensor:
    """Weighted mean of overlapping tiles [B, C, T, rows, cols], in fp32 (fp64 for fp64 tiles).

    The weights are separable, sum to one at every pixel and fall smoothly to nearly nothing at a tile's inner
    edges, where its zero padding does most harm. Tiles are added in the order given, so that the result does
    not depend on who decoded which.
    """
    picture: Tensor | None = None
    rows, cols = tuple(w.rows for w in windows), tuple(w.cols for w in windows)
    for tile, window in zip(tiles, windows, strict=True):
        wide = tile.to(torch.promote_types(tile.dtype, torch.float32))
        if picture is None:
            picture = wide.new_zeros((*tile.shape[:-2], height, width))
            row_weights = _axis_weights(rows, height, wide.dtype, wide.device)
            col_weights = _axis_weights(cols, width, wide.dtype, wide.device)
        weight = row_weights[window.rows][:, None] * col_weights[window.cols]
        place = picture[..., window.rows.start : window.rows.stop, window.cols.start : window.cols.stop]
        place += wide * weight
    if picture is None:
        raise ValueError("no tiles to blend")
    return picture


@lru_cache(maxsize=64)
def _axis_weights(spans: tuple[Span, ...], size: int, dtype: torch.dtype, device: torch.device) -> dict[Span, Tensor]:
    """For each tile of one axis its weights, which sum to one at every position. Kept: a CUDA graph that is recorded
    can read them, and not copy them from the host."""
    ordered = sorted(set(spans), key=lambda span: span.start)
    overlap = max((a.stop - b.start for a, b in pairwise(ordered)), default=0)
    weights = {span: _window_function(span, size, overlap) for span in ordered}
    total = torch.zeros(size, dtype=torch.float64)
    for span, weight in weights.items():
        total[span.start : span.stop] += weight
    return {span: (weight / total[span.start : span.stop]).to(device, dtype) for span, weight in weights.items()}


def _window_function(span: Span, size: int, overlap: int) -> Tensor:
    """One inside, a raised cosine over ``overlap`` positions towards each edge that is not the picture's own."""
    distance = torch.arange(span.size, dtype=torch.float64) + 0.5
    weight = torch.ones(span.size, dtype=torch.float64)
    for edge, inner in ((distance, span.start > 0), (span.size - distance, span.stop < size)):
        if inner:
            weight *= torch.sin(torch.pi / 2 * (edge / overlap).clamp(max=1)) ** 2
    return weight
