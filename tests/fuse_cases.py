"""A small Qwen-Image transformer of diffusers, and inputs to it, for the tests of fuse_transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import noise, perturb, rms_error

diffusers = pytest.importorskip("diffusers")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS, LAYERS = 48, 2
CASES = [False, True]  # zero_cond_t: one conditioning set, or two of which a token takes one
cases = pytest.mark.parametrize("two_sets", CASES, ids=["one set", "two sets"])
ROUNDED = ("hidden_states", "encoder_hidden_states", "timestep")  # the inputs that have the model's dtype
Model = Any  # QwenImageTransformer2DModel


def small(two_sets: bool, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Model:
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        in_channels=8,
        out_channels=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
        zero_cond_t=two_sets,
    )
    perturb(model)
    return model.to(DEVICE, dtype).eval()


def inputs(two_sets: bool, batch: int = 2, dtype: torch.dtype = torch.float32, masked: bool = True) -> dict[str, Any]:
    """Texts of several lengths; with two sets each sample is a picture and another one, which it is made from."""
    shapes = [(1, 2, 3), (1, 2, 1)] if two_sets else [(1, 2, 3)]
    tokens = sum(height * width for _, height, width in shapes)
    mask = torch.ones(batch, 5, dtype=torch.bool, device=DEVICE)
    mask[-1, 3:] = False
    return {
        "hidden_states": noise(batch, tokens, 8, dtype=dtype, device=DEVICE),
        "encoder_hidden_states": noise(batch, 5, 32, dtype=dtype, device=DEVICE, seed=1),
        "encoder_hidden_states_mask": mask if masked else None,
        "timestep": torch.linspace(0.9, 0.3, batch).to(DEVICE, dtype),
        "img_shapes": [shapes] * batch,
    }


def run(model: Model, given: dict[str, Any], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**given, **more, return_dict=False)[0]


def relative_error(found: Tensor, truth: Tensor) -> float:
    return rms_error(found, truth) / float(truth.double().square().mean().sqrt())


def arguments_of_block(model: Model, given: dict[str, Any]) -> dict[str, Any]:
    caught: dict[str, Any] = {}
    block = model.transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda _, __, kwargs: caught.update(kwargs), with_kwargs=True)
    run(model, given)
    handle.remove()
    return caught


def outputs_of_block(model: Model, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    arguments = arguments_of_block(model, given)
    with torch.no_grad():
        return model.transformer_blocks[0](**arguments)
