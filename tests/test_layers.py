"""Each fused op against its reference: Triton's interpreter on the CPU, the kernels themselves where there is a GPU.

Tolerances are relative to the truth: a kernel may err against the fp64 result by half as much again as plain
PyTorch does in the same dtype, and by one rounding to it (by two in the interpreter, which cuts bfloat16 off).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paravae.layers import hopper, upsample
from paravae.layers.attention import by_triton, wide_attention
from paravae.layers.norm_silu import merged, norm_silu
from paravae.layers.to_pixels import tap_columns, to_pixels
from tests.builders import max_error, noise

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# The interpreter multiplies bfloat16 matrices as if their bits were integers: there, products are in the others.
DOT_DTYPES = DTYPES if DEVICE == "cuda" else st.sampled_from([torch.float32, torch.float16])
# A failing example is reported as found: the interpreter is too slow to search for a smaller one.
few = settings(
    max_examples=12 if DEVICE == "cpu" else 60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise(*shape, dtype=dtype, device=DEVICE, seed=seed)


def assert_as_good(kernel: Tensor, reference: Tensor, truth: Tensor) -> None:
    """See the head of this file."""
    assert kernel.isfinite().all()
    rounding = torch.finfo(kernel.dtype).eps * (0.5 if DEVICE == "cuda" else 1)
    allowed = 1.5 * max_error(reference, truth) + (rounding + 1e-5) * float(truth.abs().max()) + 1e-6
    assert max_error(kernel, truth) <= allowed


def in_wider_memory(x: Tensor) -> Tensor:
    """A copy of [B, F, H, W, C] whose rows, frames and images do not follow one another in memory."""
    batch, frames, height, width, channels = x.shape
    wide = x.new_full((batch, frames + 1, height + 2, width + 1, channels), 7)
    view = wide[:, 1:, 1:-1, :width]
    return view.copy_(x)


sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
channels = st.sampled_from([2, 8, 16, 24, 40, 96, 192])


@few
@given(
    sizes,
    channels,
    DTYPES,
    st.integers(0, 99),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_norm_silu(
    size: tuple[int, ...], channels: int, dtype: torch.dtype, seed: int, options: tuple[bool, ...]
) -> None:
    with_bias, with_residual, silu, strided, in_place = options
    x = draw(seed, *size, channels, dtype=dtype)
    residual = draw(seed + 1, *size, channels, dtype=dtype) if with_residual else None
    gamma, bias = 1 + 0.2 * draw(seed + 2, channels), draw(seed + 3, channels) if with_bias else None

    def run(op: Callable[..., Tensor], wide: bool) -> tuple[Tensor, Tensor | None]:
        place = in_wider_memory if strided else Tensor.clone
        own_x, own_residual = place(x), None if residual is None else place(residual)
        if wide:
            own_x, own_residual = own_x.double(), None if own_residual is None else own_residual.double()
        out = own_x if in_place else None
        wide_bias = None if bias is None else bias.double() if wide else bias
        return op(own_x, gamma.double() if wide else gamma, wide_bias, own_residual, silu=silu, out=out), own_residual

    assert norm_silu._reason(x, gamma, bias, residual) is None
    (kernel, kernel_sum), (reference, reference_sum) = run(norm_silu.kernel, False), run(norm_silu.reference, False)
    truth, true_sum = run(norm_silu.reference, True)
    assert kernel.dtype == dtype
    assert_as_good(kernel, reference, truth)
    if with_residual:
        assert kernel_sum is not None
        assert reference_sum is not None
        assert true_sum is not None
        assert_as_good(kernel_sum, reference_sum, true_sum)


@few
@given(sizes, channels, DTYPES, st.integers(0, 99))
def test_sum_without_norm(size: tuple[int, ...], channels: int, dtype: torch.dtype, seed: int) -> None:
    """gamma None: bias and residual alone, here in place over the residual."""
    x, residual = draw(seed, *size, channels, dtype=dtype), draw(seed + 1, *size, channels, dtype=dtype)
    bias = draw(seed + 2, channels)
    truth, before = x.double() + residual.double() + bias.double(), residual.clone()
    out = norm_silu.kernel(x, None, bias, residual, out=residual)
    assert out.data_ptr() == residual.data_ptr()
    assert_as_good(out, norm_silu.reference(x, None, bias, before), truth)


@given(st.lists(st.integers(1, 4), min_size=4, max_size=4), st.integers(1, 3), st.lists(st.booleans(), min_size=3))
def test_merged_dimensions_reach_every_pixel(shape: list[int], channels: int, gaps: list[bool]) -> None:
    """Walking the joined dimensions gives the offsets that walking all four gives, in the same order."""
    batch, frames, height, width = shape
    room = [batch, frames + gaps[0], height + gaps[1], width + gaps[2]]
    x = torch.arange(batch * room[1] * room[2] * room[3] * channels).view(*room, channels)
    x = x[:, :frames, :height, :width]
    found, strides = merged(shape, [x.stride()[:-1]])
    joined = x.as_strided([*found, channels], [*strides[0], 1])
    assert torch.equal(joined.reshape(-1), x.reshape(-1))
    assert len(found) <= 4 - (gaps.count(False) == len(gaps)) * 3 or 1 in shape


def query_and_keys_values(
    seed: int, images: int, queries: int, tokens: int, channels: int, dtype: torch.dtype, layout: str = "views"
) -> tuple[Tensor, Tensor]:
    """``views`` of one matrix, as the networks have them; ``odd`` ones, whose rows no copy engine takes; ``dense``."""
    qkv = draw(seed, images, max(queries, tokens), 3 * channels + (layout == "odd"), dtype=dtype)
    query, keys_values = qkv[:, :queries, :channels], qkv[:, :tokens, -2 * channels :]
    return (query.contiguous(), keys_values.contiguous()) if layout == "dense" else (query, keys_values)


def attention_of(query: Tensor, keys_values: Tensor) -> Tensor:
    key, value = keys_values.chunk(2, dim=-1)
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value


@few
@given(
    st.integers(1, 2),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([16, 32, 48, 64]),
    DOT_DTYPES.filter(lambda dtype: DEVICE == "cpu" or dtype != torch.float32),
    st.sampled_from(["views", "odd", "dense"]),
    st.integers(0, 99),
)
@example(2, 1, 70, 48, torch.float16, "views", 0)
@example(2, 70, 33, 48, torch.float16, "views", 1)
@example(2, 40, 40, 48, torch.float16, "views", 2)
@example(1, 1, 1, 16, torch.float16, "odd", 3)
def test_wide_attention(
    images: int, queries: int, tokens: int, channels: int, dtype: torch.dtype, layout: str, seed: int
) -> None:
    query, keys_values = query_and_keys_values(seed, images, queries, tokens, channels, dtype, layout)
    query *= 4  # peaks
    assert wide_attention._unfit(query, keys_values) is None
    truth = attention_of(query.double(), keys_values.double())
    kernel, reference = wide_attention.kernel(query, keys_values), wide_attention.reference(query, keys_values)
    assert kernel.is_contiguous()
    assert reference.is_contiguous()
    assert_as_good(kernel, reference, truth)
    assert max_error(wide_attention.reference(query.double(), keys_values.double()), truth) <= 1e-12


@pytest.mark.parametrize("layout", ["views", "odd"])
@pytest.mark.parametrize("images", [1, 2])
def test_wide_attention_reads_views_where_they_are(layout: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys_values = query_and_keys_values(0, images, 40, 40, 384, torch.float16, layout)
    read: list[Tensor] = []
    fetchable = hopper.fetchable
    monkeypatch.setattr(hopper, "fetchable", lambda x: read.append(fetchable(x)) or read[-1])
    for op in (wide_attention, by_triton):
        op.kernel(query, keys_values)
        in_place = [x.data_ptr() == given.data_ptr() for x, given in zip(read, (query, keys_values), strict=True)]
        assert in_place == [layout == "views"] * 2
        read.clear()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("queries", "tokens"), [(1, 1), (63, 63), (1000, 1000), (116 * 208, 116 * 208), (20, 16384), (6241, 16384)]
)
def test_wide_attention_at_full_width(queries: int, tokens: int) -> None:
    query, keys_values = query_and_keys_values(0, 1, queries, tokens, 384, torch.bfloat16)
    truth = attention_of(query.float(), keys_values.float())
    for op in (wide_attention, by_triton):
        assert op._reason(query, keys_values) is None
        assert_as_good(op.kernel(query, keys_values), op.reference(query, keys_values), truth)


@few
@given(
    st.tuples(st.integers(1, 2), st.just(1), st.integers(1, 6), st.integers(1, 40)),
    st.sampled_from([16, 32, 48, 96]),
    DOT_DTYPES,
    st.booleans(),
    st.integers(0, 99),
)
def test_to_pixels(size: tuple[int, ...], channels: int, dtype: torch.dtype, with_residual: bool, seed: int) -> None:
    x = draw(seed, *size, channels, dtype=dtype)
    residual = draw(seed + 1, *size, channels, dtype=dtype) if with_residual else None
    weight = (draw(seed + 2, 3, channels, 3, 3) / (3 * channels**0.5)).to(dtype)
    bias, gamma, colour_bias = draw(seed + 3, channels), 1 + 0.2 * draw(seed + 4, channels), 0.1 * draw(seed + 5, 3)
    columns = tap_columns(weight)
    arguments = (x, residual, bias, gamma, columns, colour_bias)
    assert to_pixels._unfit(*arguments) is None
    wide = tuple(None if value is None else value.double() for value in arguments)
    truth = to_pixels.reference(*wide)
    kernel, reference = to_pixels.kernel(*arguments), to_pixels.reference(*arguments)
    assert kernel.shape == (size[0], 3, 1, *size[2:])
    assert_as_good(kernel, reference, truth)
    assert 0.02 < float(truth.abs().mean()) < 0.98
    # Of the unrounded values: at most the next level, where bf16's rounding alone would move by several.
    levels, wanted = to_pixels.kernel(*arguments, as_uint8=True), to_pixels.reference(*arguments, as_uint8=True)
    assert levels.dtype == torch.uint8
    assert max_error(levels, wanted) <= 1


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_upsample_conv_is_upsampling_then_convolution(channels: int, height: int, width: int, seed: int) -> None:
    x = draw(seed, 2, channels, height, width).double()
    weight = draw(seed + 1, 2, channels, 3, 3).double()
    out = upsample.upsample_conv(x, upsample.fold_upsample(weight))
    assert max_error(out, upsample.reference(x, weight)) <= 1e-12


def test_folded_upsample_weights_are_rounded_once() -> None:
    weight = draw(0, 4, 3, 3, 3, dtype=torch.bfloat16)
    folded = upsample.fold_upsample(weight)
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, upsample.fold_upsample(weight.float()).bfloat16())
