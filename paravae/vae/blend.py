"""Shards become a picture: exact windows are pasted, overlapping tiles cross-faded. One code for one rank and many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from paravae.vae.plan import Span, Window


def paste(shards: Tensor, windows: Sequence[Window], height: int, width: int) -> Tensor:
    """Put each rank's window in its place: shards [R, B, C, T, rows, cols], padded -> [B, C, T, height, width]."""
    picture = shards.new_empty((*shards.shape[1:-2], height, width))
    for shard, window in zip(shards, windows, strict=True):
        if window.area:
            part = shard[..., : window.rows.size, : window.cols.size]
            picture[..., window.rows.start : window.rows.stop, window.cols.start : window.cols.stop] = part
    return picture


def cross_fade(tiles: Iterable[Tensor], windows: Sequence[Window], height: int, width: int) -> Tensor:
    """Weighted mean of overlapping tiles [B, C, T, rows, cols], in fp32 (fp64 for fp64 tiles).

    The weights are separable, sum to one at every pixel and fall smoothly to nearly nothing at a tile's inner
    edges, where its zero padding does most harm. Tiles are added in the order given, so that the result does
    not depend on who decoded which.
    """
    row_weights = _axis_weights([w.rows for w in windows], height)
    col_weights = _axis_weights([w.cols for w in windows], width)
    picture: Tensor | None = None
    for tile, window in zip(tiles, windows, strict=True):
        wide = tile.to(torch.promote_types(tile.dtype, torch.float32))
        weight = row_weights[window.rows][:, None] * col_weights[window.cols]
        if picture is None:
            picture = wide.new_zeros((*tile.shape[:-2], height, width))
        place = picture[..., window.rows.start : window.rows.stop, window.cols.start : window.cols.stop]
        place += wide * weight.to(wide)
    if picture is None:
        raise ValueError("no tiles to blend")
    return picture


def _axis_weights(spans: Sequence[Span], size: int) -> dict[Span, Tensor]:
    """For each tile of one axis its weights, which sum to one at every position."""
    ordered = sorted(set(spans), key=lambda span: span.start)
    overlap = max((a.stop - b.start for a, b in pairwise(ordered)), default=0)
    weights = {span: _window_function(span, size, overlap) for span in ordered}
    total = torch.zeros(size, dtype=torch.float64)
    for span, weight in weights.items():
        total[span.start : span.stop] += weight
    return {span: weight / total[span.start : span.stop] for span, weight in weights.items()}


def _window_function(span: Span, size: int, overlap: int) -> Tensor:
    """One inside, a raised cosine over ``overlap`` positions towards each edge that is not the picture's own."""
    distance = torch.arange(span.size, dtype=torch.float64) + 0.5
    weight = torch.ones(span.size, dtype=torch.float64)
    for edge, inner in ((distance, span.start > 0), (span.size - distance, span.stop < size)):
        if inner:
            weight *= torch.sin(torch.pi / 2 * (edge / overlap).clamp(max=1)) ** 2
    return weight
