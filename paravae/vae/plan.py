"""Who decodes what: windows, halos, tiles, shares and their cost, in integers.

Every rank computes every rank's plan from the same few numbers, so no size ever travels. Positions are
half-open spans ``[start, stop)`` along one axis; rows and columns are planned independently.

The window calculus. A network's *local* stages (everything but the attention) see a bounded neighbourhood.
Walking them backwards from the output window that a rank owes gives the window that each stage must be fed:
a same-size stage of ``margin`` stacked 3x3 convolutions needs ``margin`` more on each side; a nearest 2x
upsampling followed by a 3x3 convolution needs one more of its output, halved outwards; a stride-2 3x3
convolution padded on the far side needs twice the span and one more. Windows are clipped at the picture's
border, where zero padding is the truth. Inside the picture a stage's own zero padding spoils at most its
margin, which is cropped away after every stage; so the result is exact, whatever the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class Span:
    """The positions ``start <= i < stop`` along one axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        return Span(self.start * factor, self.stop * factor)


@dataclass(frozen=True)
class Window:
    """A rectangle of latents, features or pixels."""

    rows: Span
    cols: Span

    @property
    def area(self) -> int:
        return self.rows.size * self.cols.size

    def scaled(self, factor: int) -> Window:
        return Window(self.rows.scaled(factor), self.cols.scaled(factor))


@dataclass(frozen=True)
class LocalStage:
    """One local step of a network, as far as planning is concerned.

    ``resize``: same keeps the size, up doubles it, down halves it. ``margin``: 3x3 convolutions in a row
    (1 for up and down). ``channels``: of its output. ``work``: multiply-adds per output position of one frame.
    """

    resize: Literal["same", "up", "down"]
    margin: int
    channels: int
    work: int

    def output_size(self, size: int) -> int:
        return {"same": size, "up": 2 * size, "down": size // 2}[self.resize]

    def needs(self, out: Span, in_size: int) -> Span:
        """The input span without which ``out`` cannot be computed exactly."""
        if out.size == 0:
            return Span(0, 0)
        if self.resize == "same":
            start, stop = out.start - self.margin, out.stop + self.margin
        elif self.resize == "up":
            start, stop = (out.start - 1) // 2, (out.stop + 2) // 2
        else:
            start, stop = 2 * out.start, 2 * out.stop + 1
        return Span(max(start, 0), min(stop, in_size))

    def gives(self, given: Span) -> Span:
        """The output span that running the stage on the input span ``given`` covers, spoilt edges included."""
        if self.resize == "same":
            return given
        return given.scaled(2) if self.resize == "up" else Span(given.start // 2, given.stop // 2)

    def gives_window(self, given: Window) -> Window:
        """``gives`` along both axes."""
        return Window(self.gives(given.rows), self.gives(given.cols))


Stages = tuple[LocalStage, ...]


def trace_span(stages: Stages, out: Span, in_size: int) -> tuple[Span, ...]:
    """The span each stage is fed, first to last, with ``out`` itself at the end."""
    sizes = [in_size]
    for stage in stages:
        sizes.append(stage.output_size(sizes[-1]))
    spans = [out]
    for stage, size in zip(reversed(stages), reversed(sizes[:-1]), strict=True):
        spans.append(stage.needs(spans[-1], size))
    return tuple(reversed(spans))


def trace_window(stages: Stages, out: Window, in_height: int, in_width: int) -> tuple[Window, ...]:
    """The window each stage is fed, first to last, with ``out`` itself at the end."""
    rows = trace_span(stages, out.rows, in_height)
    cols = trace_span(stages, out.cols, in_width)
    return tuple(Window(r, c) for r, c in zip(rows, cols, strict=True))


def whole(stages: Stages, in_height: int, in_width: int) -> tuple[Window, ...]:
    """The trace of one rank that computes everything."""
    height, width = in_height, in_width
    for stage in stages:
        height, width = stage.output_size(height), stage.output_size(width)
    return trace_window(stages, Window(Span(0, height), Span(0, width)), in_height, in_width)


def local_work(stages: Stages, trace: Sequence[Window]) -> int:
    """Multiply-adds of running ``stages`` along ``trace``, for one frame."""
    return sum(stage.work * stage.gives_window(fed).area for stage, fed in zip(stages, trace, strict=False))


def peak_elements(stages: Stages, trace: Sequence[Window]) -> int:
    """Elements of the largest activation along ``trace``, for one frame."""
    return max(stage.channels * stage.gives_window(fed).area for stage, fed in zip(stages, trace, strict=False))


def even_split(size: int, parts: int) -> tuple[Span, ...]:
    """``size`` positions cut into ``parts`` spans whose sizes differ by at most one; some are empty if too few."""
    base, extra = divmod(size, parts)
    starts = [i * base + min(i, extra) for i in range(parts + 1)]
    return tuple(Span(a, b) for a, b in pairwise(starts))


# ------------------------------------------------------------------------------------------------- patches


@dataclass(frozen=True)
class PatchPlan:
    """One exact window for each rank: a ``grid`` of (rows, columns), ranks left over having nothing to do."""

    grid: tuple[int, int]
    traces: tuple[tuple[Window, ...], ...]  # by rank; the last window of each is the output it owes
    work: int  # multiply-adds a frame of the busiest rank

    @property
    def outputs(self) -> tuple[Window, ...]:
        return tuple(trace[-1] for trace in self.traces)

    @property
    def shard_size(self) -> tuple[int, int]:
        """Rows and columns of the common shape that every rank's output is padded to."""
        return max(w.rows.size for w in self.outputs), max(w.cols.size for w in self.outputs)


@lru_cache(maxsize=512)
def plan_patches(stages: Stages, in_size: tuple[int, int], cells: tuple[int, int], ranks: int) -> PatchPlan:
    """Cut the output into the grid of windows whose busiest rank has least to do.

    ``in_size``: height and width of what the first stage is fed. ``cells``: the (height, width) in indivisible
    units, latents for encoder and decoder alike. ``ranks``: how many share; at most that many windows are cut.
    """
    out_height, out_width = (whole(stages, *in_size)[-1].rows.size, whole(stages, *in_size)[-1].cols.size)
    unit = (out_height // cells[0], out_width // cells[1])

    def grid_plan(grid_rows: int, grid_cols: int) -> PatchPlan:
        traces = [
            trace_window(stages, Window(rows.scaled(unit[0]), cols.scaled(unit[1])), *in_size)
            for rows in even_split(cells[0], grid_rows)
            for cols in even_split(cells[1], grid_cols)
        ]
        idle = trace_window(stages, Window(Span(0, 0), Span(0, 0)), *in_size)
        busiest = max(local_work(stages, trace) for trace in traces)
        return PatchPlan((grid_rows, grid_cols), (*traces, *[idle] * (ranks - len(traces))), busiest)

    grids = [
        grid_plan(rows, cols)
        for rows in range(1, min(ranks, cells[0]) + 1)
        for cols in range(1, min(ranks // rows, cells[1]) + 1)
    ]
    # Least work first; then the fewest windows, then whole rows, which are contiguous in memory.
    return min(grids, key=lambda plan: (plan.work, plan.grid[0] * plan.grid[1], plan.grid[1]))


# --------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class TilePlan:
    """Overlapping windows of one common shape, in latents, row by row."""

    tile: tuple[int, int]
    tiles: tuple[Window, ...]


def tile_starts(size: int, tile_min: int, stride: int) -> tuple[int, tuple[int, ...]]:
    """Common tile size and starts along one axis.

    As many tiles as keep them no smaller than ``tile_min`` (a shorter axis is one tile) and overlapping by
    ``tile_min - stride`` or more, spread evenly: so there is no sliver at the end, and no tile exceeds
    ``tile_min`` by a full stride. Where rounding up to the common size would cost more than an overlap, which
    takes many tiles, fewer and larger ones are made.
    """
    overlap = tile_min - stride

    def tile_of(count: int) -> int:
        return -(-(size + (count - 1) * overlap) // count)

    count = max(1, (size - overlap) // stride)
    while count > 1 and count * tile_of(count) > size + count * overlap and tile_of(count - 1) < tile_min + stride:
        count -= 1
    tile = tile_of(count)
    return tile, tuple(i * (size - tile) // max(count - 1, 1) for i in range(count))


@lru_cache(maxsize=512)
def plan_tiles(lat_size: tuple[int, int], tile_min: tuple[int, int], stride: tuple[int, int]) -> TilePlan:
    """Tiles over latents of ``lat_size`` (height, width); ``tile_min`` and ``stride`` likewise in latents."""
    (tile_h, tops), (tile_w, lefts) = (tile_starts(*axis) for axis in zip(lat_size, tile_min, stride, strict=True))
    tiles = [Window(Span(top, top + tile_h), Span(left, left + tile_w)) for top in tops for left in lefts]
    return TilePlan((tile_h, tile_w), tuple(tiles))
