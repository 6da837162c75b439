"""A small Qwen-Image transformer of diffusers, fused: the same pictures and gradients, by the ops that it should take.

On the CPU the ops are plain PyTorch, or their kernel in Triton's interpreter where it is forced; with a GPU all of
this file runs there, with the kernel.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paravae.layers import fuse_transformer, unfuse_transformer
from paravae.layers.custom_op import CustomOp
from tests.builders import max_error, noise, rms_error
from tests.fuse_cases import (
    CHANNELS,
    DEVICE,
    LAYERS,
    ROUNDED,
    Model,
    cases,
    inputs,
    outputs_of_block,
    relative_error,
    run,
    small,
)


@cases
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_same_output_and_undone_to_the_bit(two_sets: bool, batch: int, dtype: torch.dtype, allowed: float) -> None:
    model, given = small(two_sets, dtype), inputs(two_sets, batch, dtype)
    before = run(model, given)
    assert fuse_transformer(model) is model
    fused = run(model, given)
    assert relative_error(fused, before) <= allowed
    assert unfuse_transformer(model) is model
    assert torch.equal(run(model, given), before)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_the_truth_than_before(two_sets: bool, dtype: torch.dtype) -> None:
    model = small(two_sets, dtype)
    given = inputs(two_sets, dtype=dtype)
    wide = {name: value.double() if name in ROUNDED else value for name, value in given.items()}
    truth = run(copy.deepcopy(model).double(), wide)
    before = rms_error(run(model, given), truth)
    fused = run(fuse_transformer(model), given)
    assert fused.dtype == dtype
    assert rms_error(fused, truth) <= 1.1 * before


class TokenTensors(TorchDispatchMode):
    """Counts, by op, the tensors of [B, L, C] that ops return; of [1, L, C] and [B, 1, C] too."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() == 3 and tensor.shape[-1] == CHANNELS:
                self.made[func.name()] = self.made.get(func.name(), 0) + 1
        return result


@cases
@pytest.mark.interpreted
def test_the_kernel_alone_touches_tokens_between_the_matrices(two_sets: bool) -> None:
    """For each block and stream y, the sum and y, the sum: 4 tensors; and y of the last norm. None is a gate."""
    pytest.importorskip("triton")
    model, given = small(two_sets), inputs(two_sets)
    before = run(model, given)
    fuse_transformer(model, force="cuda")
    with TokenTensors() as tokens:
        fused = run(model, given)
    assert relative_error(fused, before) <= 1e-6
    assert tokens.made.pop("paravae::modulate") == 8 * LAYERS + 1
    matrices_and_views = {"aten::view", "aten::slice.Tensor", "aten::clone", "aten::_unsafe_view", "aten::addmm"}
    assert tokens.made.keys() <= matrices_and_views, "something else computes on tokens"


@cases
def test_each_op_runs_where_it_should(two_sets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []
    dispatch = CustomOp.dispatch

    def recording(self: CustomOp, x: Tensor, *args: Any) -> Any:
        ran.append((self.name, self.way(x.device)))
        return dispatch(self, x, *args)

    monkeypatch.setattr(CustomOp, "dispatch", recording)
    run(fuse_transformer(small(two_sets), force="native"), inputs(two_sets))
    steps = ["layernorm_scale_shift", "residual_layernorm_scale_shift", "residual"]
    of_images = [f"{step}_select01" for step in steps] if two_sets else steps
    wanted = [*steps * LAYERS, *of_images * LAYERS, "layernorm_scale_shift"]
    assert sorted(ran) == sorted((name, "native") for name in wanted)
    ran.clear()
    model = fuse_transformer(fuse_transformer(small(two_sets), force="native"), force="cpu")
    run(model, inputs(two_sets))
    assert {way for _, way in ran} == {"cpu"}


@cases
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(two_sets: bool, checkpointing: bool) -> None:
    def gradients(model: Model) -> dict[str, Tensor]:
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        given = inputs(two_sets, dtype=torch.float64)
        given["hidden_states"].requires_grad_()
        model(**given).sample.square().sum().backward()
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return {**found, "hidden_states": given["hidden_states"].grad}

    wanted = gradients(small(two_sets, torch.float64))
    found = gradients(fuse_transformer(small(two_sets, torch.float64)))
    assert found.keys() == wanted.keys()
    assert all(max_error(found[name], wanted[name]) <= 1e-10 * float(wanted[name].abs().max()) for name in wanted)


@cases
def test_autocast_with_wide_residuals_of_a_controlnet(two_sets: bool) -> None:
    """From the second block on tokens are float32, and what the matrices return is not."""
    model, given = small(two_sets), inputs(two_sets)
    more = {"controlnet_block_samples": [noise(*given["hidden_states"].shape[:2], CHANNELS, device=DEVICE)]}
    truth = run(model, given, **more)
    with torch.autocast(DEVICE, torch.bfloat16):
        before, fused = run(model, given, **more), run(fuse_transformer(model), given, **more)
    assert 0 < rms_error(fused, truth) <= 1.1 * rms_error(before, truth)


def test_fp16_saturates() -> None:
    """As before: what would overflow is the largest float16, in both streams."""
    model, given = small(True, torch.float16), inputs(True, dtype=torch.float16)
    block = model.transformer_blocks[0]
    with torch.no_grad():
        for modulation, mlp in ((block.img_mod, block.img_mlp), (block.txt_mod, block.txt_mlp)):
            modulation[1].bias[-CHANNELS:] = torch.tensor([9.0, -9.0] * (CHANNELS // 2))
            mlp.net[2].bias.fill_(6e4)
    for block_outputs in (outputs_of_block(model, given), outputs_of_block(fuse_transformer(model), given)):
        for tokens in block_outputs:
            assert tokens.isfinite().all()
            assert {float(tokens.min()), float(tokens.max())} == {-65504.0, 65504.0}
