"""Which implementation of an op runs: by device, by force, by environment; and the list that says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from paravae.layers import CustomOp, custom_op, describe_ops, dispatch, references_only
from paravae.layers.modulate import modulate

OURS = (
    "layernorm_scale_shift",
    "layernorm_scale_shift_gate_select01",
    "layernorm_scale_shift_select01",
    "residual",
    "residual_layernorm_scale_shift",
    "residual_layernorm_scale_shift_gate_select01",
    "residual_layernorm_scale_shift_select01",
    "residual_select01",
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CustomOp, "_registered", CustomOp.registered())
    monkeypatch.delenv(custom_op.VARIABLE, raising=False)


def op_with(*ways: str, name: str = "an_op") -> type[CustomOp]:
    """A registered op with these implementations, which return their names."""

    def saying(way: str) -> Callable[[CustomOp, Tensor], str]:
        return lambda self, x: way

    return CustomOp.register(name)(type("AnOp", (CustomOp,), {f"forward_{way}": saying(way) for way in ways}))


def on(device: str) -> Tensor:
    """A tensor that says it is there, wherever that is."""
    with FakeTensorMode():
        return torch.empty(1, device=device)


def test_ops_are_found_by_name() -> None:
    assert tuple(sorted(CustomOp.registered())) == OURS
    made = op_with("native")
    assert CustomOp.registered()["an_op"] is made
    assert made.name == "an_op"


def test_a_name_is_given_once() -> None:
    made = op_with("native")
    with pytest.raises(ValueError, match="there is an op 'an_op' already: AnOp"):
        op_with("native")
    assert CustomOp.registered()["an_op"] is made


def test_the_list_that_is_handed_out_is_a_copy() -> None:
    CustomOp.registered().clear()
    assert tuple(sorted(CustomOp.registered())) == OURS


@pytest.mark.parametrize(
    ("hip", "device", "way"),
    [(None, "cuda", "cuda"), ("6.4", "cuda", "hip"), (None, "cpu", "cpu"), (None, "meta", "native")],
)
def test_the_device_decides(hip: str | None, device: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    made = op_with(*custom_op.WAYS)()
    assert made.way(torch.device(device)) == way
    assert made(on(device)) == way


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        (("native",), {"hip": "native", "cuda": "native", "cpu": "native", "native": "native"}),
        (("native", "cuda"), {"hip": "cuda", "cuda": "cuda", "cpu": "native", "native": "native"}),
        (("native", "hip"), {"hip": "hip", "cuda": "native", "cpu": "native", "native": "native"}),
        (("native", "cpu"), {"hip": "native", "cuda": "native", "cpu": "cpu", "native": "native"}),
    ],
)
def test_what_is_not_written_is_the_next_in_likeness(written: tuple[str, ...], taken: dict[str, str]) -> None:
    made = op_with(*written)
    assert {way: made(force=way)(torch.ones(1)) for way in taken} == taken


def test_an_op_without_any_says_so() -> None:
    with pytest.raises(NotImplementedError, match="AnOp has no forward_native"):
        op_with()()(torch.ones(1))


@pytest.mark.parametrize("force", ["fast", "", "CUDA"])
def test_force_names_an_implementation(force: str) -> None:
    with pytest.raises(ValueError, match=f"force is '{force}', not one of cuda, hip, cpu, native"):
        op_with("native")(force=force)


@pytest.mark.parametrize(
    ("variable", "taken"),
    [
        ("", "cpu"),
        ("native", "native"),
        ("an_op:hip", "hip"),
        ("another:hip", "cpu"),
        ("native, an_op:hip ,another:cuda,", "hip"),
        ("an_op:hip,native", "hip"),
    ],
)
def test_the_environment_forces(variable: str, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = op_with(*custom_op.WAYS), op_with(*custom_op.WAYS, name="another")
    before = made()
    monkeypatch.setenv(custom_op.VARIABLE, variable)
    assert made()(torch.ones(1)) == taken
    assert made(force="cuda")(torch.ones(1)) == "cuda"  # which goes before
    assert before(torch.ones(1)) == "cpu"  # made before the variable was set


@pytest.mark.parametrize("variable", ["fast", "an_op:fast", "no_op:native", "an_op=native", "native;cuda", ":"])
def test_a_wrong_environment_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = op_with("native")
    monkeypatch.setenv(custom_op.VARIABLE, f"native,{variable}")
    with pytest.raises(ValueError, match=f"{custom_op.VARIABLE} has '{variable}', .* one of an_op, layernorm"):
        made()


def test_the_list_says_what_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "triton", object())
    monkeypatch.setattr(modulate, "_broken", None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    op_with("native")

    def lines(device: str) -> dict[str, str]:
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in describe_ops(device).splitlines()}

    assert lines("cuda") == dict.fromkeys(OURS, "forward_cuda: the kernel") | {
        "an_op": "forward_cuda: plain PyTorch, as the op has none"
    }
    assert lines("cpu") == dict.fromkeys([*OURS, "an_op"], "forward_cpu: plain PyTorch")
    assert lines("meta")["residual"] == "forward_native: plain PyTorch"
    with references_only():
        assert lines("cuda")["residual"] == "forward_cuda: plain PyTorch, as references were asked for"
    monkeypatch.setenv(custom_op.VARIABLE, "cuda,residual:native")
    assert lines("cuda")["residual"] == "forward_native (forced; cuda otherwise): plain PyTorch"
    forced = "forward_cuda (forced; cpu otherwise): plain PyTorch, as Triton does not run on cpu"
    assert lines("cpu")["residual_select01"] == forced
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.delenv(custom_op.VARIABLE)
    assert lines("cuda")["residual"] == "forward_hip: the kernel"


def test_the_list_is_of_the_gpu_where_there_is_one() -> None:
    assert describe_ops() == describe_ops("cuda" if torch.cuda.is_available() else "cpu")
