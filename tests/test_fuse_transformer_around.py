"""What stands around a fused transformer: copies, files, replaced layers, hooks, compilers; and what is refused."""

from __future__ import annotations

import copy
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paravae.layers import fuse_transformer, unfuse_transformer
from tests.builders import noise, perturb
from tests.fuse_cases import (
    CHANNELS,
    DEVICE,
    LAYERS,
    Model,
    arguments_of_block,
    cases,
    diffusers,
    inputs,
    relative_error,
    run,
    small,
)


class Scaled(nn.Module):
    """A stand-in for what LoRA puts in place of a layer."""

    def __init__(self, within: nn.Module) -> None:
        super().__init__()
        self.within = within

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.within(x)


def test_layers_replaced_later_are_used() -> None:
    def replaced(model: Model) -> Model:
        for block in model.transformer_blocks:
            for parent, name in (
                (block.attn, "to_q"),
                (block, "img_mod"),
                (block, "txt_mlp"),
                (model.norm_out, "linear"),
            ):
                setattr(parent, name, Scaled(getattr(parent, name)))
        return model

    given = inputs(True)
    plain, wanted = run(small(True), given), run(replaced(small(True)), given)
    assert relative_error(run(replaced(fuse_transformer(small(True))), given), wanted) <= 1e-6
    assert relative_error(plain, wanted) > 0.01


def test_affine_norms_lend_their_weights() -> None:
    def affine(model: Model) -> Model:
        for n, parent in enumerate([*model.transformer_blocks, model.norm_out]):
            for name in ("img_norm1", "txt_norm2") if n < LAYERS else ("norm",):
                norm = nn.LayerNorm(CHANNELS, eps=0.1, device=DEVICE)
                setattr(parent, name, norm)
                perturb(norm)
        return model

    given = inputs(True)
    wanted = run(affine(small(True)), given)
    assert relative_error(run(fuse_transformer(affine(small(True))), given), wanted) <= 1e-6


def test_what_else_a_caller_passes() -> None:
    """Residuals of a ControlNet, keyword arguments of the attention, one timestep for all."""

    class Processor(type(small(True).transformer_blocks[0].attn.processor)):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, factor: float = 1, **kwargs: Any) -> Any:
            image, text = super().__call__(attn, hidden_states, *args, **kwargs)
            return factor * image, text

    given = inputs(True)
    given["timestep"] = given["timestep"][:1]
    more = {"controlnet_block_samples": [noise(2, 8, CHANNELS, device=DEVICE)], "attention_kwargs": {"factor": 3.0}}
    model = small(True)
    model.set_attn_processor(Processor())
    wanted = run(model, given, **more)
    assert relative_error(run(fuse_transformer(model), given, **more), wanted) <= 1e-6
    assert relative_error(run(model, given, **{**more, "attention_kwargs": None}), wanted) > 0.01
    assert relative_error(run(model, given), wanted) > 0.01


def test_a_copy_runs_on_its_own_parameters() -> None:
    given, model = inputs(True), fuse_transformer(small(True))
    before, twin = run(model, given), copy.deepcopy(model)
    assert torch.equal(run(twin, given), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    unfused = small(True)
    unfused.load_state_dict(twin.state_dict())
    assert relative_error(run(twin, given), run(unfused, given)) <= 1e-6
    assert torch.equal(run(model, given), before)
    unfuse_transformer(twin)
    assert torch.equal(run(model, given), before)


def test_a_pickled_model_comes_back_as_diffusers_makes_it() -> None:
    given, model = inputs(True), small(True)
    before = run(model, given)
    restored = pickle.loads(pickle.dumps(fuse_transformer(model)))
    assert torch.equal(run(restored, given), before)
    assert torch.equal(run(fuse_transformer(restored), given), run(model, given))


def test_parameters_classes_and_files_stay(tmp_path: Path) -> None:
    model, given = small(True), inputs(True)
    before, state = run(model, given), {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    fuse_transformer(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    restored = type(model).from_pretrained(tmp_path).to(DEVICE)
    assert torch.equal(run(restored, given), before)


def test_first_block_cache_after_fusing() -> None:
    def cached(model: Model) -> list[Tensor]:
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
        given = inputs(True)
        with model.cache_context("cond"):
            return [run(model, {**given, "timestep": given["timestep"] * factor}) for factor in (1, 0.99)]

    model = fuse_transformer(small(True))
    exact = run(model, {**inputs(True), "timestep": inputs(True)["timestep"] * 0.99})
    found, wanted = cached(model), cached(small(True))
    assert all(relative_error(*pair) <= 1e-6 for pair in zip(found, wanted, strict=True))
    assert not torch.equal(found[1], exact), "the cache was not used"
    for change in (fuse_transformer, unfuse_transformer):
        with pytest.raises(ValueError, match=r"transformer_blocks\.0 .* but functools\.partial: take hooks"):
            change(model)
    model.disable_cache()
    assert torch.equal(run(model, inputs(True)), run(fuse_transformer(small(True)), inputs(True)))
    assert torch.equal(run(unfuse_transformer(model), inputs(True)), run(small(True), inputs(True)))


def test_layerwise_casting_after_fusing() -> None:
    def cast(model: Model) -> Tensor:
        model.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
        return run(model, inputs(True))

    exact, wanted = run(small(True), inputs(True)), cast(small(True))
    assert relative_error(cast(fuse_transformer(small(True))), wanted) <= 1e-6
    assert relative_error(exact, wanted) > 1e-3


@pytest.mark.interpreted
@pytest.mark.parametrize(("two_sets", "force"), [(False, None), (True, "cuda")])
def test_compiled_in_one_graph(two_sets: bool, force: str | None) -> None:
    torch.compiler.reset()
    model, given = fuse_transformer(small(two_sets, layers=1), force=force), inputs(two_sets)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert relative_error(run(compiled, given), run(model, given)) <= 1e-6


def test_fusing_reaches_blocks_that_are_compiled_already() -> None:
    torch.compiler.reset()
    model, given = small(True), inputs(True)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    before = run(model, given)
    assert "layer_norm" in "".join(graphs)
    graphs.clear()
    assert relative_error(run(fuse_transformer(model), given), before) <= 1e-6
    assert graphs
    assert "layer_norm" not in "".join(graphs)
    assert torch.equal(run(unfuse_transformer(model), given), before)


@cases
@pytest.mark.cuda
def test_block_in_a_cuda_graph(two_sets: bool) -> None:
    model = fuse_transformer(small(two_sets, torch.bfloat16))
    arguments = arguments_of_block(model, inputs(two_sets, dtype=torch.bfloat16))
    block, graph, stream = model.transformer_blocks[0], torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            block(**arguments)
        stream.synchronize()
        with torch.cuda.graph(graph):
            captured = block(**arguments)
        arguments["hidden_states"].mul_(2)
        arguments["encoder_hidden_states"].mul_(0.5)
        graph.replay()
        for found, wanted in zip(captured, block(**arguments), strict=True):
            assert torch.equal(found, wanted)


def hooked(model: Model) -> Model:
    model.transformer_blocks[1].forward = lambda *args, **kwargs: None
    return model


def with_foreign_norm(model: Model) -> Model:
    model.norm_out.norm = nn.RMSNorm(CHANNELS, device=DEVICE)
    return model


def with_hooked_norm(model: Model) -> Model:
    norm = model.transformer_blocks[1].txt_norm2
    norm.forward = types.MethodType(lambda self, x: x, norm)
    return model


def with_forward_of_another(model: Model) -> Model:
    model.transformer_blocks[1].forward = model.transformer_blocks[0].forward
    return model


def with_another_block(model: Model) -> Model:
    class Block(type(model.transformer_blocks[1])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.transformer_blocks[1].__class__ = Block
    return model


def without_part(model: Model) -> Model:
    del model.transformer_blocks[1].txt_mod
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: nn.Linear(2, 2), r"model is a torch.nn.modules.linear.Linear, not diffusers' QwenImageTransf"),
        (lambda model: nn.Sequential(model), r"Sequential, not .* of a wrapper or a compiled model the one within"),
        (torch.compile, r"OptimizedModule, not .* compiled model"),
        (hooked, r"transformer_blocks\.1 does not run .* but .*<lambda>: take hooks"),
        (with_forward_of_another, r"transformer_blocks\.1 does not run"),
        (with_another_block, r"transformer_blocks\.1 does not run .*Block.forward"),
        (with_foreign_norm, r"norm_out\.norm is RMSNorm.*, not LayerNorm"),
        (with_hooked_norm, r"transformer_blocks\.1\.txt_norm2 is LayerNorm.*<lambda>, not LayerNorm"),
        (without_part, rf"transformer_blocks\.1 has no txt_mod in diffusers {diffusers.__version__}: .* 0\.37"),
    ],
)
def test_refusals(change: Any, said: str) -> None:
    model = small(True)
    with pytest.raises(ValueError, match=said):
        fuse_transformer(change(model))
    assert "forward" not in vars(model.transformer_blocks[0]), "something was changed before the refusal"


def test_refuses_a_forward_with_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(True)
    kind = type(model.transformer_blocks[0])

    def forward(self: Any, hidden_states: Tensor, mask: Tensor) -> None: ...

    forward.__module__, forward.__qualname__ = kind.__module__, kind.forward.__qualname__
    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.0 takes hidden_states, mask, not hidden_states, encoder"
    ):
        fuse_transformer(model)


def test_refuses_an_unknown_force() -> None:
    with pytest.raises(ValueError, match="force is 'gpu', not one of cuda"):
        fuse_transformer(small(False), force="gpu")


def test_undoing_nothing_does_nothing() -> None:
    model, given = small(False), inputs(False)
    assert torch.equal(run(unfuse_transformer(model), given), run(small(False), given))
