"""The modulation ops under torch.compile, in CUDA graphs, under autograd, and by the rules of ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paravae.layers import CustomOp
from paravae.layers.modulate import modulate
from tests.builders import noise
from tests.modulation_cases import DEVICE, OPS, Call, step_by_step

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interpreted

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of x, for each call that the kernel has answered."""
    shapes: list[torch.Size] = []
    kernel: Callable[..., list[Tensor]] = modulate.kernel

    def counting(x: Tensor, *args: Any) -> list[Tensor]:
        outputs = kernel(x, *args)
        shapes.append(x.shape)
        return outputs

    monkeypatch.setattr(modulate, "kernel", counting)
    return shapes


def as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def gradient(outputs: tuple[Tensor, ...], leaf: Tensor) -> Tensor:
    """Of all outputs that depend on it."""
    cotangents = [noise(*output.shape, seed=n).to(output) for n, output in enumerate(outputs)]
    used = [n for n, output in enumerate(outputs) if output.requires_grad]
    return torch.autograd.grad([outputs[n] for n in used], leaf, [cotangents[n] for n in used])[0]


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("sets", [1, 2])
def test_keeps_the_rules_of_torch_library(norm: str, sets: int) -> None:
    given = Call(op=OPS[4], channels=5, dtype=torch.float16, in_fp32=("scale",)).arguments()
    residual_gates, scales, shifts = (
        [given[f"{name}{n}"] for n in range(sets)] for name in ("residual_gate", "scale", "shift")
    )
    gates, index = (shifts, given["index"]) if sets == 2 else ([], None)
    x, residual, weight = given["x"].mT.contiguous().mT, given["residual"], given["weight"]
    arguments = (x, residual, residual_gates, weight, None, scales, shifts, gates, index, 1e-6, norm)
    torch.library.opcheck(torch.ops.paravae.modulate.default, arguments)


@each_op
def test_compiles_without_a_break(op: type[CustomOp], launches: list[torch.Size]) -> None:
    """Once, for any number of tokens."""
    made = op(force="cuda")
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    fast = torch.compile(lambda **arguments: made(**arguments), fullgraph=True, dynamic=True, backend=backend)
    for tokens, stance in ((3, "default"), (5, "fail_on_recompile")):
        call = Call(op=op, tokens=tokens, channels=40, dtype=torch.float16)
        arguments = call.arguments()
        with torch.compiler.set_stance(stance):
            found = fast(**arguments)
        for one, wanted in zip(as_tuple(found), call.by("cuda", arguments), strict=True):
            assert torch.equal(one, wanted)
    assert launches == [(2, tokens, 40) for tokens in (3, 3, 5, 5)]


@pytest.mark.cuda
@each_op
def test_replays_in_a_cuda_graph(op: type[CustomOp]) -> None:
    call = Call(op=op, channels=3072, dtype=torch.bfloat16)
    arguments = call.arguments()
    call.by("cuda", arguments)  # compiles it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call.by("cuda", arguments)
    for value in arguments.values():  # other tokens, other tables, and each token of the other set
        value.copy_(1 - value)
    graph.replay()
    for one, wanted in zip(found, call.by("cuda", arguments), strict=True):
        assert torch.equal(one, wanted)


@each_op
def test_gradients_are_those_of_plain_pytorch(op: type[CustomOp], launches: list[torch.Size]) -> None:
    """Of each argument alone, that the op may not overlook it."""
    call = Call(op=op, channels=5)
    arguments = call.arguments()
    for name in set(arguments) - {"index"}:
        leaf = arguments[name].clone().requires_grad_()
        given = arguments | {name: leaf}
        found, wanted = (gradient(outputs, leaf) for outputs in (call.by("cuda", given), step_by_step(given)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not launches


def test_the_kernel_runs_where_no_gradient_is_asked_for(launches: list[torch.Size]) -> None:
    call = Call(op=OPS[0])
    arguments = call.arguments()
    arguments["x"].requires_grad_()
    with torch.no_grad():
        (y,) = call.by("cuda", arguments)
    assert not y.requires_grad
    assert launches == [(2, 3, 96)]
