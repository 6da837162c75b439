"""Planning: windows cover, halos suffice, shares are balanced, tiles are sound. Integers, by properties."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paravae import AutoencoderKLQwenImage
from paravae.vae import plan
from paravae.vae.models.stage import Stage, run_local
from paravae.vae.plan import LocalStage, Span, Stages, Window
from tests.builders import noise, small_vae

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("fixed")

sizes = st.integers(1, 40)
ranks_counts = st.integers(1, 12)


@pytest.fixture(scope="module")
def published() -> AutoencoderKLQwenImage:
    """The full-size model, without its memory."""
    with torch.device("meta"):
        return AutoencoderKLQwenImage()


# ------------------------------------------------------------------------------------------------- windows


@st.composite
def stage_lists(draw: st.DrawFn) -> Stages:
    """Random local stages, their sizes staying whole."""
    stages = []
    for _ in range(draw(st.integers(0, 7))):
        resize = draw(st.sampled_from(["same", "same", "up", "down"]))
        margin = draw(st.integers(0, 3)) if resize == "same" else 1
        stages.append(LocalStage(resize, margin, channels=draw(st.integers(1, 9)), work=draw(st.integers(1, 99))))
    return tuple(stages)


def toy(geometry: LocalStage) -> Stage:
    """A stage of that geometry whose output depends on all that a 3 x 3 convolution sees, in exact arithmetic:
    odd weights, integers modulo 2^64, zero padding."""

    def conv(x: Tensor, stride: int = 1) -> Tensor:
        height, width = x.shape[-2] - 2, x.shape[-1] - 2
        taps = [(i, j, 2 * (3 * i + j) + 3) for i in range(3) for j in range(3)]
        y = torch.stack([weight * x[..., i : i + height, j : j + width] for i, j, weight in taps]).sum(0)
        return y[..., ::stride, ::stride]

    def run(x: Tensor, cache: object) -> Tensor:
        if geometry.resize == "same":
            for _ in range(geometry.margin):
                x = conv(F.pad(x, (1, 1, 1, 1)))
        elif geometry.resize == "up":
            x = conv(F.pad(x.repeat_interleave(2, -1).repeat_interleave(2, -2), (1, 1, 1, 1)))
        else:
            x = conv(F.pad(x, (0, 1, 0, 1)), stride=2)
        return x

    return Stage(run, geometry)


def multiple_for(stages: Stages) -> int:
    """A size that stays whole through all ``down`` of ``stages``."""
    return 2 ** sum(stage.resize == "down" for stage in stages)


def span_within(draw: st.DrawFn, size: int) -> Span:
    start = draw(st.integers(0, size - 1))
    return Span(start, draw(st.integers(start + 1, size)))


@given(st.data(), stage_lists(), st.integers(1, 9), st.integers(1, 9))
def test_a_window_needs_no_more_than_its_trace(data: st.DataObject, stages: Stages, height: int, width: int) -> None:
    """Running the stages on a window's trace gives exactly what cutting it from the whole would give."""
    height, width = height * multiple_for(stages), width * multiple_for(stages)
    x = torch.randint(-(2**62), 2**62, (1, 1, 1, height, width), generator=torch.Generator().manual_seed(0))
    run = [toy(stage) for stage in stages]
    whole = run_local(run, x, plan.whole(stages, height, width), None)
    out = data.draw(st.composite(lambda draw: Window(*(span_within(draw, n) for n in whole.shape[-2:])))())
    trace = plan.trace_window(stages, out, height, width)
    fed = trace[0]
    given_x = x[..., fed.rows.start : fed.rows.stop, fed.cols.start : fed.cols.stop]
    part = run_local(run, given_x, trace, None)
    assert torch.equal(part, whole[..., out.rows.start : out.rows.stop, out.cols.start : out.cols.stop])


@given(st.data(), stage_lists(), st.integers(1, 30))
def test_a_trace_is_no_larger_than_needed(data: st.DataObject, stages: Stages, size: int) -> None:
    """Each end of the span fed first either is the picture's border or matters to some output."""
    size *= multiple_for(stages)
    out_size = plan.whole(stages, size, size)[-1].rows.size
    out = data.draw(st.composite(lambda draw: span_within(draw, out_size))())
    fed = plan.trace_span(stages, out, size)[0]
    for edge in {fed.start, fed.stop - 1}:
        x = torch.zeros(size, dtype=torch.int64)
        x[edge] = 1
        for stage in stages:
            x = reached(stage, x)
        assert x[out.start : out.stop].any(), f"position {edge} of {fed} does not matter to {out}"


def reached(stage: LocalStage, marks: Tensor) -> Tensor:
    """The positions along one axis that marked positions reach through ``stage``."""
    if stage.resize == "down":
        return F.pad(marks, (0, 1)).unfold(0, 3, 2).amax(1)
    if stage.resize == "up":
        marks = marks.repeat_interleave(2)
    for _ in range(stage.margin):
        marks = F.pad(marks, (1, 1)).unfold(0, 3, 1).amax(1)
    return marks


@given(st.data(), stage_lists(), st.integers(1, 12), st.integers(1, 12), ranks_counts, st.integers(1, 4))
def test_patches_cover_every_output_once(
    data: st.DataObject, stages: Stages, height: int, width: int, ranks: int, batch: int
) -> None:
    """Whatever the stages, sizes and grid: each output position of each image belongs to one rank, and traces stay
    inside."""
    height, width = height * multiple_for(stages), width * multiple_for(stages)
    whole = plan.whole(stages, height, width)[-1]
    cells = (whole.rows.size, whole.cols.size)
    groups = data.draw(st.integers(1, min(ranks, batch)))
    grid = data.draw(st.sampled_from(plan.grids(cells, ranks // groups)))
    patches = plan.plan_patches(stages, (height, width), cells, grid, ranks, batch=batch, groups=groups)
    check_patches(stages, patches, (height, width), whole, ranks, batch)


@given(st.data(), sizes, sizes, ranks_counts)
def test_decoder_patches_cover_every_pixel_once(data: st.DataObject, height: int, width: int, ranks: int) -> None:
    grid = data.draw(st.sampled_from(plan.grids((height, width), ranks)))
    patches = plan.plan_patches(DECODER_STAGES, (height, width), (height, width), grid, ranks)
    whole = Window(Span(0, 8 * height), Span(0, 8 * width))
    check_patches(DECODER_STAGES, patches, (height, width), whole, ranks, 1)
    assert all(edge % 8 == 0 for w in patches.outputs for edge in (w.rows.start, w.rows.stop, w.cols.start))


DECODER_STAGES = small_vae().engine.decoder_stages


def check_patches(
    stages: Stages, patches: plan.PatchPlan, in_size: tuple[int, int], whole: Window, ranks: int, batch: int
) -> None:
    owned: Counter[tuple[int, int, int]] = Counter()
    assert len(patches.traces) == len(patches.images) == ranks
    for trace, images in zip(patches.traces, patches.images, strict=True):
        window = trace[-1]
        owned.update(
            (k, i, j) for k in positions(images) for i in positions(window.rows) for j in positions(window.cols)
        )
        height, width = in_size
        for stage, fed in zip([*stages, None], trace, strict=True):
            assert 0 <= fed.rows.start <= fed.rows.stop <= height
            assert 0 <= fed.cols.start <= fed.cols.stop <= width
            height, width = (stage.output_size(height), stage.output_size(width)) if stage else (height, width)
        exact = plan.trace_window(stages, window, *in_size)
        assert all(covers(roomy, needed) for roomy, needed in zip(trace, exact, strict=True))
        assert (images.size, window.rows.size, window.cols.size) <= patches.shard_size
    assert len(owned) == batch * whole.area
    assert set(owned.values()) == {1}


def covers(large: Window, small: Window) -> bool:
    return not small.area or (
        large.rows.start <= small.rows.start
        and large.rows.stop >= small.rows.stop
        and large.cols.start <= small.cols.start
        and large.cols.stop >= small.cols.stop
    )


def positions(span: Span) -> range:
    return range(span.start, span.stop)


def test_more_ranks_than_cells() -> None:
    """One latent on seven ranks: one decodes it, six have nothing to do."""
    assert plan.grids((1, 1), 7) == ((1, 1),)
    patches = plan.plan_patches(DECODER_STAGES, (1, 1), (1, 1), (1, 1), 7)
    assert [w.area for w in patches.outputs] == [64, 0, 0, 0, 0, 0, 0]
    assert patches.shard_size == (1, 8, 8)
    idle = plan.local_work(DECODER_STAGES, patches.traces[-1])
    assert idle == 0


@given(st.integers(1, 60), st.integers(1, 60), ranks_counts)
def test_grids_use_the_ranks(height: int, width: int, ranks: int) -> None:
    """Rows only, columns only and what is between are there to choose from; none leaves half of the ranks without
    work that there is."""
    found = plan.grids((height, width), ranks)
    useful = min(ranks, height * width)
    assert all(rows <= height and cols <= width and useful / 2 < rows * cols <= ranks for rows, cols in found)
    assert (ranks, 1) in found or height < ranks
    assert (1, ranks) in found or width < ranks


@given(st.integers(1, 120), st.integers(1, 12))
def test_balanced_shares_are_no_worse_than_even_ones(cells: int, parts: int) -> None:
    """A window at the border has one halo less, so it may be larger: the most expensive one is never dearer for it."""

    def dearest(spans: tuple[Span, ...]) -> int:
        traces = [plan.trace_span(DECODER_STAGES, span.scaled(8), cells) for span in spans]
        windows = [tuple(Window(span, Span(0, 1)) for span in trace) for trace in traces]
        return max(plan.local_work(DECODER_STAGES, trace) for trace in windows)

    spans = plan.balanced_split(DECODER_STAGES, cells, 8, cells, parts)
    assert [i for span in spans for i in positions(span)] == list(range(cells))
    assert dearest(spans) <= dearest(plan.even_split(cells, parts)) * 1.02  # it reckons with roomy traces
    assert {span.size for span in spans} == {span.size for span in reversed(spans)}


def test_border_windows_take_more_rows() -> None:
    spans = plan.balanced_split(DECODER_STAGES, 128, 8, 128, 4)
    assert spans[0].size > spans[1].size
    assert spans[-1].size > spans[2].size
    assert max(span.size for span in spans[1:3]) - min(span.size for span in spans[1:3]) <= 1


def test_halo_of_the_decoder_is_15_latents(published: AutoencoderKLQwenImage) -> None:
    """From the attention on: 13 latents on each side after the block that follows it, 2 for that block; 3 before it."""
    assert {halo(published.engine.decoder_front, Span(a, a + 1), 100, 1, 1) for a in (40, 43)} == {(3, 3)}
    stages = published.engine.decoder_stages
    assert {halo(stages, Span(8 * a, 8 * b), 100, 8, 1) for a, b in ((40, 41), (40, 55), (43, 60))} == {(15, 15)}
    stages = stages[1:]
    assert {halo(stages, Span(8 * a, 8 * b), 100, 8, 1) for a, b in ((40, 41), (40, 55), (43, 60))} == {(13, 13)}
    assert plan.trace_span(stages, Span(0, 8), 100)[0] == Span(0, 14)
    assert plan.trace_span(stages, Span(8 * 99, 8 * 100), 100)[0] == Span(86, 100)


def test_halo_of_the_encoder_in_pixels(published: AutoencoderKLQwenImage) -> None:
    """From the latents back: 61 pixels before and 68 after, since the stride-2 convolutions look ahead."""
    stages = published.engine.encoder_stages
    assert {halo(stages, Span(a, b), 800, 1, 8) for a, b in ((40, 41), (40, 55), (43, 60))} == {(61, 68)}


def halo(stages: Stages, out: Span, in_size: int, shrink: int, grow: int) -> tuple[int, int]:
    fed = plan.trace_span(stages, out, in_size)[0]
    return out.start // shrink * grow - fed.start, fed.stop - out.stop // shrink * grow


def test_the_network_needs_what_its_stages_say() -> None:
    """On the network itself: NaN features 15 away from a latent reach its pixels, those 16 away do not."""
    vae = small_vae()
    assert vae.decoder is not None
    tail = vae.decoder.tail()
    trace = plan.whole(DECODER_STAGES, 40, 1)

    def reaches(row: int) -> bool:
        features = noise(1, vae.decoder.conv_in.out_channels, 1, 40, 1)
        features[..., row, :] = torch.nan
        return bool(run_local(tail, features, trace, None)[..., 8 * 20 : 8 * 21, :].isnan().any())

    assert [reaches(20 + away) for away in (-16, -15, 15, 16)] == [False, True, True, False]


@given(st.integers(0, 200), st.integers(1, 40))
def test_even_split_is_complete_and_balanced(size: int, parts: int) -> None:
    spans = plan.even_split(size, parts)
    assert len(spans) == parts
    assert [i for span in spans for i in positions(span)] == list(range(size))
    assert max(span.size for span in spans) - min(span.size for span in spans) <= 1


def test_work_and_memory_counts() -> None:
    """By hand: a margin-1 stage on 4 x 4 and an upsampling after it."""
    stages = (LocalStage("same", 1, channels=5, work=7), LocalStage("up", 1, channels=3, work=11))
    trace = plan.whole(stages, 4, 4)
    assert plan.local_work(stages, trace) == 7 * 16 + 11 * 64
    assert plan.peak_elements(stages, trace) == max(5 * 16, 3 * 64)
    corner = plan.trace_window(stages, Window(Span(0, 2), Span(0, 2)), 4, 4)
    assert corner == (Window(Span(0, 3), Span(0, 3)), Window(Span(0, 2), Span(0, 2)), Window(Span(0, 2), Span(0, 2)))
    assert plan.local_work(stages, corner) == 7 * 9 + 11 * 16


# --------------------------------------------------------------------------------------------------- tiles


def grid_work_of_diffusers(size: int, tile_min: int, stride: int) -> int:
    """Positions decoded along one axis by diffusers' grid, whose last tiles are cut off at the border."""
    return sum(min(tile_min, size - start) for start in range(0, size, stride))


@st.composite
def tilings(draw: st.DrawFn, largest: int = 700) -> tuple[int, int, int]:
    tile_min = draw(st.integers(1, 60))
    return draw(st.integers(1, largest)), tile_min, draw(st.integers(1, tile_min))


@given(tilings())
def test_tiles_are_sound(tiling: tuple[int, int, int]) -> None:
    size, tile_min, stride = tiling
    tile, starts = plan.tile_starts(size, tile_min, stride)
    assert min(size, tile_min) <= tile < tile_min + stride
    assert starts[0] == 0
    assert starts[-1] + tile == size
    assert all(start + tile <= size for start in starts)
    overlaps = [a + tile - b for a, b in pairwise(starts)]
    assert all(overlap >= tile_min - stride for overlap in overlaps)
    assert sorted(starts) == list(starts)


@given(tilings())
def test_tiles_are_no_more_work_than_diffusers(tiling: tuple[int, int, int]) -> None:
    """With the overlap of two or more that any blending needs; with less, a common shape can cost its rounding."""
    size, tile_min, stride = tiling
    tile, starts = plan.tile_starts(size, tile_min, stride)
    rounding = len(starts) - 1 if tile_min - stride < 2 else 0
    assert tile * len(starts) <= grid_work_of_diffusers(size, tile_min, stride) + rounding


def test_default_tiles_are_no_more_work_than_diffusers() -> None:
    """256 pixels, 192 apart, for every picture side up to 8,800."""
    for size in range(1, 1101):
        tile, starts = plan.tile_starts(size, 256 // 8, 192 // 8)
        assert tile * len(starts) <= grid_work_of_diffusers(size, 256 // 8, 192 // 8), size


def test_tiles_of_1024_pixels() -> None:
    """Five by five of 32 latents, against diffusers' 36 with slivers of 8."""
    tiles = plan.plan_tiles((128, 128), (32, 32), (24, 24))
    assert tiles.tile == (32, 32)
    assert len(tiles.tiles) == 25
    assert {window.rows.start for window in tiles.tiles} == {0, 24, 48, 72, 96}


@given(tilings(largest=90), tilings(largest=90))
def test_tile_plan_is_the_product_of_its_axes(down: tuple[int, int, int], across: tuple[int, int, int]) -> None:
    (height, min_h, step_h), (width, min_w, step_w) = down, across
    tiles = plan.plan_tiles((height, width), (min_h, min_w), (step_h, step_w))
    (tile_h, tops), (tile_w, lefts) = plan.tile_starts(*down), plan.tile_starts(*across)
    assert tiles.tile == (tile_h, tile_w)
    starts = [(window.rows.start, window.cols.start) for window in tiles.tiles]
    assert starts == [(top, left) for top in tops for left in lefts]
    assert {(window.rows.size, window.cols.size) for window in tiles.tiles} == {tiles.tile}
