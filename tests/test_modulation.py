"""The kernel of the modulation ops against fp64: in Triton's interpreter on the CPU, itself where there is a GPU.

Tolerances are relative to the truth, value by value: the kernel may err by one rounding to the dtype of x (by two in
the interpreter, which cuts bfloat16 off), and by twice what plain PyTorch errs when everything is in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paravae.layers import CustomOp, modulate_kernel
from paravae.layers.modulate import modulate
from paravae.layers.modulate_kernel import launch
from tests.builders import max_error, noise, rms_error
from tests.modulation_cases import DEVICE, NONE, OPS, Call, cast, layouts_of, parameters, step_by_step

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interpreted

HALVES = [torch.float16, torch.bfloat16]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
# A failing example is reported as found: the interpreter is too slow to search for a smaller one.
few = settings(max_examples=40 if DEVICE == "cpu" else 30, deadline=None, phases=(Phase.reuse, Phase.generate))


@pytest.fixture(autouse=True)
def the_kernel_ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel that fails gives way to plain PyTorch, which would pass these tests."""
    monkeypatch.setattr(modulate, "_broken", None)
    yield
    assert modulate.unfit_on(torch.device(DEVICE)) is None


@st.composite
def calls(draw: st.DrawFn, op: type[CustomOp]) -> Call:
    names = parameters(op)
    layouts = {name: [*layouts_of(name), *([NONE] if name in ("weight", "bias") else [])] for name in names}
    tables = sorted({name.rstrip("01") for name in names} - {"x", "residual", "index"})
    channels = draw(st.sampled_from([1, 5, 96, 1000, 1024, 3000, 3072, 5120, 11000, 16384]))
    return Call(
        op=op,
        norm=draw(st.sampled_from(["layer", "rms"])),
        batch=draw(st.integers(0, 3)),
        tokens=draw(st.integers(0, 7 if channels < 5000 else 2)),
        channels=channels,
        dtype=draw(st.sampled_from([torch.float32, *HALVES])),
        layouts=tuple(draw(st.sampled_from(layouts[name])) for name in names),
        in_fp32=tuple(sorted(draw(st.sets(st.sampled_from(tables))))),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64, torch.bool, torch.uint8])),
        # Few channels may deviate little, and then the rounding of the mean would decide.
        mean=draw(st.sampled_from([0, 100] if channels > 5 else [0])),
    )


def assert_as_good(found: Tensor, in_fp32: Tensor, truth: Tensor, mean: float = 0) -> None:
    """See the head of this file. ``mean``: of the input, whose own rounding is left in what deviates from it."""
    assert found.shape == truth.shape
    if truth.numel():
        rounding = torch.finfo(found.dtype).eps * (0.5 if DEVICE == "cuda" else 1)
        arithmetic = 2 * max_error(in_fp32, truth) + 1e-7 * (10 + mean) * (1 + float(truth.abs().max()))
        assert ((found.double() - truth).abs() <= rounding * truth.abs() + arithmetic).all()


@each_op
@few
@given(st.data())
def test_the_kernel_is_right_for_any_layout(op: type[CustomOp], data: st.DataObject) -> None:
    call = data.draw(calls(op))
    arguments = call.arguments()
    before = {name: value.clone() for name, value in arguments.items() if value is not None}
    found = call.by("cuda", arguments)
    in_fp32, in_fp64 = (call.by("native", cast(arguments, dtype)) for dtype in (torch.float32, torch.float64))
    truth = step_by_step(cast(arguments, torch.float64), call.norm)
    for one, wanted32, wanted64, exact in zip(found, in_fp32, in_fp64, truth, strict=True):
        assert one.dtype == call.dtype
        assert_as_good(one, wanted32, exact, call.mean)
        torch.testing.assert_close(wanted64, exact, rtol=1e-9, atol=1e-9)
    for outputs in (found, call.by("native", arguments)):
        tensors = [*outputs, *(arguments[name] for name in before)]
        assert all(output.is_contiguous() for output in outputs)
        assert outputs[0].numel() == 0 or len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("op", [OPS[2], OPS[5]], ids=lambda op: op.name)
def test_the_kernel_errs_no_more_than_eager_steps(op: type[CustomOp], dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off, where a GPU rounds it")
    call = Call(op=op, tokens=4, channels=3072, dtype=dtype)
    arguments = call.arguments()
    truth = step_by_step(cast(arguments, torch.float64))
    # In fp32 there are as many roundings as eager PyTorch has, or more where that multiplies and adds in one.
    margin = 1.25 if dtype == torch.float32 else 1
    for found, eager, exact in zip(call.by("cuda", arguments), step_by_step(arguments), truth, strict=True):
        assert rms_error(found, exact) <= margin * rms_error(eager, exact)


def test_by_hand() -> None:
    """Two tokens of two channels, the second token of the second set; each norm is of two values 2 apart: -1/2, 1/2,
    as eps is 3 and their variance 1."""
    x = torch.tensor([[[1.0, 3.0], [1.0, 3.0]]], device=DEVICE)
    tables = {
        "scale": ([1, 1], [2, 2]),
        "shift": ([10, 10], [5, 5]),
        "gate": ([7, 8], [9, 6]),
        "residual_gate": ([2, 2], [4, 4]),
    }
    given = {"x": x, "residual": x.new_tensor([[[0, -2], [0, -6]]]), "index": torch.tensor([[0, 1]], device=DEVICE)}
    given |= {"weight": x.new_tensor([2, 4]), "bias": x.new_tensor([1, 1])}
    for name, (first, second) in tables.items():
        given |= {name: x.new_tensor([first]), f"{name}0": x.new_tensor([first]), f"{name}1": x.new_tensor([second])}
    one_set, two_sets = [[10, 16], [10, 16]], [[10, 16], [5, 14]]
    # With one residual gate the second token's sum falls from 2 to 0: its norm is 1/2, -1/2.
    wanted = {
        "layernorm_scale_shift": [one_set],
        "layernorm_scale_shift_select01": [two_sets],
        "layernorm_scale_shift_gate_select01": [two_sets, [[7, 8], [9, 6]]],
        "residual_layernorm_scale_shift": [[[10, 16], [14, 8]], [[2, 4], [2, 0]]],
        "residual_layernorm_scale_shift_select01": [two_sets, [[2, 4], [4, 6]]],
        "residual_layernorm_scale_shift_gate_select01": [[[10, 16], [11, 2]], [[2, 4], [2, 0]], [[7, 8], [9, 6]]],
        "residual": [[[2, 4], [2, 0]]],
        "residual_select01": [[[2, 4], [4, 6]]],
    }
    assert sorted(wanted) == sorted(op.name for op in OPS)
    for op in OPS:
        arguments = {name: given[name] for name in parameters(op)} | ({"eps": 3} if "weight" in parameters(op) else {})
        for way in ("native", "cuda"):
            for found, value in zip(Call(op=op).by(way, arguments), wanted[op.name], strict=True):
                torch.testing.assert_close(found, x.new_tensor([value]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("channels", [1000, 3072])
@pytest.mark.parametrize(
    "op", [op for op in OPS if {"residual", "weight"} <= {*parameters(op)}], ids=lambda op: op.name
)
def test_many_tokens_as_few(op: type[CustomOp], channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a residual, many tokens have scale and shift loaded before the sums, few after them."""
    call = Call(op=op, tokens=3, channels=channels)
    few_tokens = call.by("cuda", call.arguments())
    monkeypatch.setattr(modulate_kernel, "_FEW_TOKENS", 0)
    for found, wanted in zip(call.by("cuda", call.arguments()), few_tokens, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_any_index_but_0_takes_the_second_set_where_nobody_looks() -> None:
    x, tables = noise(1, 5, 8).to(DEVICE), noise(2, 8, seed=1).to(DEVICE).split(1)
    index = torch.tensor([[7, 0, -1, 1, 256]], device=DEVICE)
    (gate,) = launch(x, None, (), None, None, (), (), tables, index, 1e-6, "none")
    assert torch.equal(gate[0], torch.cat(tables)[[1, 0, 1, 1, 1]])


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "tokens", "channels"])
def test_values_may_lie_further_apart_than_int32_counts(far: int) -> None:
    call = Call(op=OPS[4], batch=3, tokens=3, channels=3, dtype=torch.float16)
    arguments = call.arguments()
    # On a CPU only those of its pages are ever taken that are written to.
    memory = torch.empty(2**31 + 40 * len(arguments), dtype=torch.float16, device=DEVICE)
    strides = [9, 3, 1]
    strides[far] = 2**30
    strides_by_dim = {1: strides[2:], 2: strides[::2], 3: strides}
    spread = {
        name: memory.as_strided(value.shape, strides_by_dim[value.dim()], 40 * place).copy_(value)
        for place, (name, value) in enumerate(arguments.items())
        if name != "index"
    }
    # Plain PyTorch takes channels that far apart, and may round otherwise.
    for found, wanted in zip(call.by("cuda", arguments | spread), call.by("cuda", arguments), strict=True):
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(call.dtype).eps, atol=1e-3)


@pytest.mark.cuda
def test_more_values_than_int32_counts() -> None:
    """The last tokens of tensors of more than 2^31 values, tables for each token among them."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    shape = (1, 2**31 // 3072 + 2, 3072)
    long, index = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16), torch.ones(shape[:2], device=DEVICE).int()
    arguments = Call(op=OPS[5], batch=1, channels=3072, dtype=torch.bfloat16).arguments()
    arguments |= {"x": long, "residual": long.flip(1), "residual_gate": long, "gate1": long, "index": index}
    found = OPS[5](force="cuda")(**arguments)
    last = {name: value[:, -2:] if value.shape[:2] == shape[:2] else value for name, value in arguments.items()}
    in_fp32, truth = (step_by_step(cast(last, dtype)) for dtype in (torch.float32, torch.float64))
    for one, wanted, exact in zip(found, in_fp32, truth, strict=True):
        assert_as_good(one[:, -2:], wanted, exact)
