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
from functools import cache, lru_cache
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
    ``frames_up``: by how much it multiplies the frames of a stream, but for the first.
    """

    resize: Literal["same", "up", "down"]
    margin: int
    channels: int
    work: int
    frames_up: int = 1

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

_MOST_EXTRA = 16  # rows that a window at the border may have over one inside: a halo is 15 latents


def trace_span(stages: Stages, out: Span, in_size: int) -> tuple[Span, ...]:
    """The span each stage is fed, first to last, with ``out`` itself at the end."""
    sizes = [in_size]
    for stage in stages:
        sizes.append(stage.output_size(sizes[-1]))
    spans = [out]
    for stage, size in zip(reversed(stages), reversed(sizes[:-1]), strict=True):
        spans.append(stage.needs(spans[-1], size))
    return tuple(reversed(spans))


def roomy_span(stages: Stages, spans: Sequence[Span]) -> tuple[Span, ...]:
    """The trace ``spans``, cut to what is needed before a stage that resizes and at the end only.

    Cutting copies, or leaves tensors that kernels do not take; computing a few more positions costs less.
    """
    found = [spans[0]]
    for index, stage in enumerate(stages):
        uncut = index + 1 < len(stages) and stages[index + 1].resize == "same"
        found.append(stage.gives(found[-1]) if uncut else spans[index + 1])
    return tuple(found)


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


def work_by_size(stages: Stages, trace: Sequence[Window], *, stream: bool = False) -> tuple[int, ...]:
    """``local_work`` by how large a stage's output is: at latent size, at twice that, at four times, ...

    ``stream``: for a later latent frame of a stream, whose convolutions meet three frames each.
    """
    work, doublings, frames = [0], 0, 1
    for stage, fed in zip(stages, trace, strict=False):
        frames *= stage.frames_up
        if stage.resize == "up":
            doublings += 1
            work.append(0)
        work[doublings] += stage.work * stage.gives_window(fed).area * (3 * frames if stream else 1)
    return tuple(work)


def attention_work(channels: int, queries: int, tokens: int) -> int:
    """Multiply-adds of one head's scores and sums, for one frame."""
    return 2 * channels * queries * tokens


def projections_work(channels: int, tokens: int) -> int:
    """Multiply-adds of the products before and after one head's attention, for one frame."""
    return 4 * channels * channels * tokens


def peak_elements(stages: Stages, trace: Sequence[Window]) -> int:
    """Elements of the largest activation along ``trace``, for one frame."""
    return max(stage.channels * stage.gives_window(fed).area for stage, fed in zip(stages, trace, strict=False))


def even_split(size: int, parts: int) -> tuple[Span, ...]:
    """``size`` positions cut into ``parts`` spans whose sizes differ by at most one; some are empty if too few."""
    base, extra = divmod(size, parts)
    starts = [i * base + min(i, extra) for i in range(parts + 1)]
    return tuple(Span(a, b) for a, b in pairwise(starts))


def balanced_split(stages: Stages, cells: int, unit: int, in_size: int, parts: int) -> tuple[Span, ...]:
    """``cells`` along one axis cut into ``parts`` spans, so that the most expensive is as cheap as can be.

    Of ``unit`` output positions each. A span at the picture's border has a halo on one side only, so it is made
    ``extra`` larger than those inside, by the ``extra`` that serves best. Where cells are too few, some are empty.
    """
    if parts < 3 or cells <= parts:
        return even_split(cells, parts)

    @cache
    def cost(start: int, stop: int) -> int:
        out, scale, total = Span(start * unit, stop * unit), 1.0, 0.0
        for stage, fed in zip(stages, roomy_span(stages, trace_span(stages, out, in_size)), strict=False):
            scale *= {"same": 1, "up": 2, "down": 0.5}[stage.resize]
            total += stage.work * scale * stage.gives(fed).size
        return round(total)

    def split(extra: int) -> tuple[Span, ...]:
        inner = even_split(cells - 2 * extra, parts)
        sizes = [span.size + extra * (index in (0, parts - 1)) for index, span in enumerate(inner)]
        starts = [sum(sizes[:index]) for index in range(parts + 1)]
        return tuple(Span(a, b) for a, b in pairwise(starts))

    most = min((cells - parts) // 2, _MOST_EXTRA)
    splits = [split(extra) for extra in range(most + 1)]
    return min(splits, key=lambda spans: max(cost(span.start, span.stop) for span in spans))


@lru_cache(maxsize=512)  # of many grids for many ranks most have an axis in common
def _axis_traces(stages: Stages, cells: int, unit: int, in_size: int, parts: int) -> tuple[tuple[Span, ...], ...]:
    """For each span of a ``balanced_split`` what the stages are fed, roomily, and last itself."""
    spans = balanced_split(stages, cells, unit, in_size, parts)
    return tuple(roomy_span(stages, trace_span(stages, span.scaled(unit), in_size)) for span in spans)


# ------------------------------------------------------------------------------------------------- patches


@dataclass(frozen=True)
class PatchPlan:
    """One exact window for each rank: the images of a batch dealt to ``groups`` of ranks, the pictures of each group
    cut into a ``grid`` of (rows, columns); ranks left over have nothing to do.

    ``traces``: by rank; the last window of each is the output it owes. ``images``: by rank, those that it decodes.
    ``head_rows``: by rank the latent rows for which it runs the head, or None: each rank runs it for itself.
    """

    grid: tuple[int, int]
    traces: tuple[tuple[Window, ...], ...]
    images: tuple[Span, ...]
    groups: int = 1
    head_rows: tuple[Span, ...] | None = None

    @property
    def outputs(self) -> tuple[Window, ...]:
        return tuple(trace[-1] for trace in self.traces)

    @property
    def shard_size(self) -> tuple[int, int, int]:
        """Images, rows and columns of the common shape that every rank's output is padded to."""
        return (
            max(span.size for span in self.images),
            max(w.rows.size for w in self.outputs),
            max(w.cols.size for w in self.outputs),
        )


def plan_patches(
    stages: Stages,
    in_size: tuple[int, int],
    cells: tuple[int, int],
    grid: tuple[int, int],
    ranks: int,
    *,
    batch: int = 1,
    groups: int = 1,
    head_rows: tuple[Span, ...] | None = None,
) -> PatchPlan:
    """Cut the output into a ``grid`` of windows, for each of ``groups`` that share the ``batch`` evenly.

    ``in_size``: height and width of what the first stage is fed. ``cells``: the (height, width) in indivisible
    units, latents for encoder and decoder alike; a grid has no more rows and columns than those. ``ranks``: how many
    there are, at least as many as windows in all groups.
    """
    out = whole(stages, *in_size)[-1]
    unit = (out.rows.size // cells[0], out.cols.size // cells[1])
    axes = [_axis_traces(stages, cells[axis], unit[axis], in_size[axis], grid[axis]) for axis in (0, 1)]
    windows = [tuple(Window(r, c) for r, c in zip(rows, cols, strict=True)) for rows in axes[0] for cols in axes[1]]
    idle = trace_window(stages, Window(Span(0, 0), Span(0, 0)), *in_size)
    left_over = ranks - groups * len(windows)
    images = [span for span in even_split(batch, groups) for _ in windows]
    return PatchPlan(
        grid, (*windows * groups, *[idle] * left_over), (*images, *[Span(0, 0)] * left_over), groups, head_rows
    )


def grids(cells: tuple[int, int], ranks: int) -> tuple[tuple[int, int], ...]:
    """The grids for ``ranks`` windows: as near to that many as the picture's shape allows, whole rows first."""
    found = [(rows, min(ranks // rows, cells[1])) for rows in range(min(ranks, cells[0]), 0, -1)]
    return tuple(dict.fromkeys(grid for grid in found if 2 * grid[0] * grid[1] > min(ranks, cells[0] * cells[1])))


# --------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class TilePlan:
    """Overlapping windows of one common shape, in latents, row by row; ``batch``: how many are decoded at once."""

    tile: tuple[int, int]
    tiles: tuple[Window, ...]
    batch: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles down and across."""
        down = len({tile.rows for tile in self.tiles})
        return down, len(self.tiles) // down

    def shares(self, ranks: int) -> tuple[Span, ...]:
        """By rank, the tiles that it decodes."""
        return even_split(len(self.tiles), ranks)


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
def plan_tiles(
    lat_size: tuple[int, int], tile_min: tuple[int, int], stride: tuple[int, int], batch: int = 1
) -> TilePlan:
    """Tiles over latents of ``lat_size`` (height, width); ``tile_min`` and ``stride`` likewise in latents."""
    (tile_h, tops), (tile_w, lefts) = (tile_starts(*axis) for axis in zip(lat_size, tile_min, stride, strict=True))
    tiles = [Window(Span(top, top + tile_h), Span(left, left + tile_w)) for top in tops for left in lefts]
    return TilePlan((tile_h, tile_w), tuple(tiles), batch)
