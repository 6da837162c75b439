"""The modulation of diffusers' Qwen-Image transformer, done by the ops of modulation.py.

Each block, and the norm after the last one, gets a ``forward`` of its own on the instance; without that attribute the
model is what it was. Classes, parameters and the keys of the state dict stay, so what diffusers finds by them it still
finds: LoRA, caches, offloading, compile_repeated_blocks. Submodules are looked up at each call, so one that is replaced
later is used. Of a norm only weight, bias and eps are used: its own forward, and hooks on it, do not run.

The ops are the lazy ones: with two conditioning sets (``zero_cond_t``) no gate of [B, L, C] is written. They round
less often than diffusers does, so in float16 and bfloat16 results are not the same, but closer to the truth.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from paravae.layers.modulation import (
    FusedLayerNormScaleShift,
    FusedLayerNormScaleShiftSelect01,
    FusedResidual,
    FusedResidualLayerNormScaleShift,
    FusedResidualLayerNormScaleShiftSelect01,
    FusedResidualSelect01,
)

MODEL, BLOCK, LAST_NORM = "QwenImageTransformer2DModel", "QwenImageTransformerBlock", "AdaLayerNormContinuous"
NORMS = {BLOCK: ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2"), LAST_NORM: ("norm",)}
# What else the forwards below ask a module for.
PARTS = {BLOCK: ("zero_cond_t", "attn", "img_mod", "txt_mod", "img_mlp", "txt_mlp"), LAST_NORM: ("silu", "linear")}
HIGHEST = torch.finfo(torch.float16).max

Model = TypeVar("Model", bound=nn.Module)


def fuse_transformer(model: Model, force: str | None = None) -> Model:
    """Has ``model`` do its modulation with fused ops, in place. A second call does so anew, with its own ``force``.

    To be called before anything that wraps the forward of a block: hooks of caches, offloading and accelerate. A deep
    copy of a fused model is fused as well; one that was pickled whole is as diffusers makes it.

    Args:
        model: a ``QwenImageTransformer2DModel`` of diffusers 0.37 or newer, with or without ``zero_cond_t``.
        force: which implementation all ops take, see ``CustomOp``.

    Returns:
        ``model``.

    Raises:
        ValueError: another model, or one with a block or norm that is not as diffusers makes it (nothing is changed
            then); ``force`` names no implementation.
    """
    forwards = {BLOCK: _block_forward(force), LAST_NORM: _last_norm_forward(force)}
    modules = _modulated(model)
    for where, module, kind in modules:
        _check_parts(where, module, kind, forwards[kind])
    for _, module, kind in modules:
        vars(module)["forward"] = MethodType(forwards[kind], module)
    return model


def unfuse_transformer(model: Model) -> Model:
    """Takes back what ``fuse_transformer`` did, if it did, and returns ``model``.

    Raises:
        ValueError: another model, or hooks that were put on since: they hold on to the fused forward.
    """
    for _, module, _ in _modulated(model):
        vars(module).pop("forward", None)
    return model


class _Ops(NamedTuple):
    """Of one column of the table in modulation.py, in the order in which a stream of a block meets them."""

    norm: Callable[..., Any]
    residual_norm: Callable[..., Any]
    residual: Callable[..., Any]


class _Stream:
    """One of a block's two streams, on both sides of the attention that they share.

    Args:
        tokens: [B, L, C].
        parameters: [B, 6 * C], for each norm its shift, scale and gate; with ``index`` [2 * B, 6 * C], set after set.
        index: [B, L], which set a token takes.
    """

    def __init__(self, ops: _Ops, tokens: Tensor, parameters: Tensor, index: Tensor | None = None) -> None:
        self.ops, self.tokens, self.index = ops, tokens, () if index is None else (index,)
        # Under autocast tokens may be wider than what comes out of a matrix (here, of the attention and of the MLP).
        tables = parameters.to(tokens.dtype).chunk(6, dim=-1)
        shift1, scale1, self.gates1, shift2, scale2, self.gates2 = (t.chunk(1 + len(self.index)) for t in tables)
        self.tables1, self.tables2 = self._by_set(scale1, shift1), self._by_set(scale2, shift2)

    def _by_set(self, scales: tuple[Tensor, ...], shifts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """scale, shift; or scale0, shift0, scale1, shift1, index."""
        return (*(table for pair in zip(scales, shifts, strict=True) for table in pair), *self.index)

    def before_attention(self, norm: nn.Module) -> Tensor:
        return self.ops.norm(self.tokens, norm.weight, norm.bias, *self.tables1, eps=norm.eps)

    def after_attention(self, attended: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        affine, dtype = (norm.weight, norm.bias), self.tokens.dtype
        attended = attended.to(dtype)
        y, total = self.ops.residual_norm(attended, self.tokens, *self.gates1, *affine, *self.tables2, eps=norm.eps)
        total = self.ops.residual(mlp(y).to(dtype), total, *self.gates2, *self.index)
        # Qwen-Image in float16 saturates where it would overflow.
        return total.clamp(-HIGHEST, HIGHEST) if dtype == torch.float16 else total


def _block_forward(force: str | None) -> Callable[..., tuple[Tensor, Tensor]]:
    of_plain = (FusedLayerNormScaleShift, FusedResidualLayerNormScaleShift, FusedResidual)
    of_two = (FusedLayerNormScaleShiftSelect01, FusedResidualLayerNormScaleShiftSelect01, FusedResidualSelect01)
    plain, select01 = (_Ops(*(op(force=force) for op in column)) for column in (of_plain, of_two))

    # Named as what it replaces: pickle finds a method by its name.
    def forward(
        block: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(text [B, T, C], image [B, L, C]); temb [B, C], with ``zero_cond_t`` [2 * B, C], of which text takes half."""
        ops = plain if modulate_index is None else select01
        image = _Stream(ops, hidden_states, block.img_mod(temb), modulate_index)
        text_temb = temb.chunk(2)[0] if block.zero_cond_t else temb
        text = _Stream(plain, encoder_hidden_states, block.txt_mod(text_temb))
        image_attended, text_attended = block.attn(
            hidden_states=image.before_attention(block.img_norm1),
            encoder_hidden_states=text.before_attention(block.txt_norm1),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        image_out = image.after_attention(image_attended, block.img_norm2, block.img_mlp)
        return text.after_attention(text_attended, block.txt_norm2, block.txt_mlp), image_out

    return forward


def _last_norm_forward(force: str | None) -> Callable[..., Tensor]:
    op = FusedLayerNormScaleShift(force=force)

    def forward(last: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """[B, L, C], of x [B, L, C] and a conditioning of [B, D]."""
        tables = last.linear(last.silu(conditioning_embedding).to(x.dtype)).to(x.dtype)
        scale, shift = tables.chunk(2, dim=-1)
        return op(x, last.norm.weight, last.norm.bias, scale, shift, eps=last.norm.eps)

    return forward


def _modulated(model: Any) -> list[tuple[str, nn.Module, str]]:
    """(where, module, kind) of all whose forward is replaced; each has now diffusers' own or the one that is here."""
    if not any(_is_diffusers(kind, MODEL) for kind in type(model).__mro__):
        raise ValueError(
            f"model is a {_described(type(model))}, not diffusers' {MODEL}: of a pipeline pass the transformer, "
            "of a wrapper or a compiled model the one within"
        )
    modules = [(f"transformer_blocks.{n}", block, BLOCK) for n, block in enumerate(model.transformer_blocks)]
    modules.append(("norm_out", model.norm_out, LAST_NORM))
    for where, module, kind in modules:
        function = getattr(module.forward, "__func__", None)
        known = getattr(function, "__module__", None) == __name__ or _is_diffusers(function, f"{kind}.forward")
        if not known or module.forward.__self__ is not module:
            raise ValueError(
                f"{where} does not run the forward of diffusers' {kind} but {_described(module.forward)}: take hooks "
                "(caches, offloading, accelerate) off first, and put them on after fuse_transformer"
            )
    return modules


def _check_parts(where: str, module: Any, kind: str, forward: Callable[..., Any]) -> None:
    """Whether ``forward`` can stand for that of diffusers."""
    theirs, ours = (list(inspect.signature(f).parameters)[1:] for f in (type(module).forward, forward))
    lacking = [name for name in (*PARTS[kind], *NORMS[kind]) if not hasattr(module, name)]
    if theirs != ours or lacking:
        found = f"has no {', '.join(lacking)}" if lacking else f"takes {', '.join(theirs)}, not {', '.join(ours)}"
        version = getattr(sys.modules.get("diffusers"), "__version__", "(unknown)")
        raise ValueError(f"{where} {found} in diffusers {version}: fuse_transformer is written for 0.37 to 0.42")
    for name in NORMS[kind]:
        norm = getattr(module, name)
        plain = isinstance(norm, nn.LayerNorm) and getattr(norm.forward, "__func__", None) is nn.LayerNorm.forward
        if not plain or len(norm.normalized_shape) != 1:
            raise ValueError(f"{where}.{name} is {norm} with {_described(norm.forward)}, not LayerNorm over channels")


def _is_diffusers(thing: Any, name: str) -> bool:
    return (getattr(thing, "__module__", None) or "").startswith("diffusers.") and thing.__qualname__ == name


def _described(thing: Any) -> str:
    named = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
