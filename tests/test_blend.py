"""Pasting and cross-fading, against plain numpy."""

from __future__ import annotations

from itertools import pairwise
from math import pi, sin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paravae.vae.blend import cross_fade, paste
from paravae.vae.plan import Span, Window, plan_tiles
from tests.builders import max_error, noise

fixed = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def tile_plans(draw: st.DrawFn) -> tuple[tuple[Window, ...], int, int]:
    """Tiles over a picture, and its size; strides down to a quarter of a tile, so that up to eight overlap."""
    height, width, tile = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(4, 12))
    stride = draw(st.integers(max(1, tile // 4), tile))
    return plan_tiles((height, width), (tile, tile), (stride, stride)).tiles, height, width


def tiles_of(windows: tuple[Window, ...], seed: int = 0) -> list[torch.Tensor]:
    return [noise(2, 3, 1, w.rows.size, w.cols.size, seed=seed + i) for i, w in enumerate(windows)]


def reference(tiles: list[torch.Tensor], windows: tuple[Window, ...], height: int, width: int) -> np.ndarray:
    """Weighted mean, position by position: weights are one inside, a raised cosine towards inner edges."""
    total = np.zeros((*tiles[0].shape[:-2], height, width))
    weights = np.zeros((height, width))
    tops = sorted({(w.rows.start, w.rows.stop) for w in windows})
    lefts = sorted({(w.cols.start, w.cols.stop) for w in windows})
    overlaps = [max((a[1] - b[0] for a, b in pairwise(spans)), default=0) for spans in (tops, lefts)]

    def ramp(distance: float, overlap: int) -> float:
        return 1.0 if distance >= overlap else sin(pi / 2 * distance / overlap) ** 2

    def weight(position: int, span: Span, size: int, overlap: int) -> float:
        before = ramp(position + 0.5 - span.start, overlap) if span.start > 0 else 1.0
        after = ramp(span.stop - position - 0.5, overlap) if span.stop < size else 1.0
        return before * after

    for tile, window in zip(tiles, windows, strict=True):
        for i in range(window.rows.start, window.rows.stop):
            for j in range(window.cols.start, window.cols.stop):
                w = weight(i, window.rows, height, overlaps[0]) * weight(j, window.cols, width, overlaps[1])
                total[..., i, j] += w * tile[..., i - window.rows.start, j - window.cols.start].double().numpy()
                weights[i, j] += w
    return total / weights


@fixed
@given(tile_plans())
def test_weights_sum_to_one(case: tuple[tuple[Window, ...], int, int]) -> None:
    windows, height, width = case
    tiles = [torch.full((1, 3, 2, w.rows.size, w.cols.size), 0.7) for w in windows]
    picture = cross_fade(tiles, windows, height, width)
    assert picture.shape == (1, 3, 2, height, width)
    assert max_error(picture, torch.full_like(picture, 0.7)) <= 1e-6


@settings(derandomize=True, deadline=None, max_examples=12)
@given(tile_plans())
def test_equals_the_reference(case: tuple[tuple[Window, ...], int, int]) -> None:
    windows, height, width = case
    tiles = tiles_of(windows)
    assert max_error(cross_fade(tiles, windows, height, width), torch.from_numpy(reference(tiles, *case))) <= 1e-5


def test_halfway_between_two_tiles() -> None:
    """Two tiles, four columns shared: symmetric about the middle, nearly nothing at a tile's inner edge."""
    windows = (Window(Span(0, 1), Span(0, 8)), Window(Span(0, 1), Span(4, 12)))
    tiles = [torch.zeros(1, 1, 1, 1, 8), torch.ones(1, 1, 1, 1, 8)]
    row = cross_fade(tiles, windows, 1, 12).flatten()
    assert row[:4].tolist() == [0.0] * 4
    assert row[8:].tolist() == [1.0] * 4
    expected = [sin(pi / 2 * (i + 0.5) / 4) ** 2 for i in range(4)]
    assert max_error(row[4:8], torch.tensor(expected)) <= 1e-6
    assert row[4] < 0.04


def test_one_tile_is_the_picture() -> None:
    tile = noise(2, 3, 1, 5, 6)
    assert torch.equal(cross_fade([tile], (Window(Span(0, 5), Span(0, 6)),), 5, 6), tile)


@pytest.mark.parametrize(
    ("dtype", "blended"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_blends_in_at_least_fp32(dtype: torch.dtype, blended: torch.dtype) -> None:
    windows = plan_tiles((20, 20), (8, 8), (6, 6)).tiles
    tiles = [tile.to(dtype) for tile in tiles_of(windows)]
    picture = cross_fade(tiles, windows, 20, 20)
    assert picture.dtype == blended
    assert max_error(picture, cross_fade([tile.double() for tile in tiles], windows, 20, 20)) <= 1e-6


def test_no_tiles() -> None:
    with pytest.raises(ValueError, match="no tiles"):
        cross_fade([], (), 4, 4)


def test_paste_puts_each_window_in_its_place() -> None:
    """Padded shards, one of a rank with nothing to do: only each window's own corner is taken."""
    windows = [Window(Span(0, 2), Span(0, 4)), Window(Span(2, 5), Span(0, 3)), Window(Span(2, 5), Span(3, 4))]
    windows += [Window(Span(0, 0), Span(0, 0))]
    truth = noise(2, 3, 1, 5, 4)
    shards = torch.full((4, 2, 3, 1, 3, 4), torch.nan)
    for shard, w in zip(shards, windows, strict=True):
        own = truth[..., w.rows.start : w.rows.stop, w.cols.start : w.cols.stop]
        shard[..., : w.rows.size, : w.cols.size] = own
    both = [Span(0, 2)] * 3 + [Span(0, 0)]
    assert torch.equal(paste(shards, windows, both, 2, 5, 4), truth)
    assert paste(shards.to(torch.bfloat16), windows, both, 2, 5, 4).dtype == torch.bfloat16


def test_paste_puts_each_image_in_its_place() -> None:
    """A batch of three, dealt unevenly: the padding of the smaller share is left out."""
    truth = noise(3, 3, 1, 2, 4)
    shards = torch.full((2, 2, 3, 1, 2, 4), torch.nan)
    shards[0], shards[1, :1] = truth[:2], truth[2:]
    whole = Window(Span(0, 2), Span(0, 4))
    assert torch.equal(paste(shards, [whole, whole], [Span(0, 2), Span(2, 3)], 3, 2, 4), truth)
