"""LayerNorm, scale, shift, gate and residual of a diffusion transformer, in one pass over the tokens.

A block of such a transformer normalises its tokens, moves them by a table that comes from the timestep, and adds what
its attention or MLP returns, times a gate, to the residual stream:

    total = residual + residual_gate * x          (or x itself)
    y = norm(total) * (1 + scale) + shift

Each is bound by memory: what counts is how many tensors of [B, L, C] are read and written. Tables are [B, C] (or
[1, C], or per token); where a token chooses between two sets by its entry in ``index``, a table is a pair of them. A
gate that is such a table is never written out for each token, unless it is asked for.

Everything is computed in fp32 (fp64 for fp64) and rounded once, when it is stored: the statistics are those of
``total`` before it is rounded. PyTorch's eager ops round after each step, so their error is larger.

B: batch, L: tokens, C: channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paravae.layers.dispatch import FusedOp
from paravae.layers.modulate_kernel import Modulation, launch

MOST_CHANNELS = 16_384


def _reference(*arguments: Any) -> list[Tensor]:
    """What is asked for of y, total and gate, dense and like x each; see ``Modulation``."""
    x, residual, residual_gates, weight, bias, scales, shifts, gates, index, eps, norm = Modulation(*arguments)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    outputs = []
    if residual is not None:
        total = residual.to(wide) + _chosen(residual_gates, index).to(wide) * total
    if norm != "none":
        y = total - total.mean(-1, keepdim=True) if norm == "layer" else total
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = y if weight is None else y * weight.to(wide)
        y = y if bias is None else y + bias.to(wide)
        y = y * (1 + _chosen(scales, index).to(wide)) + _chosen(shifts, index).to(wide)
        outputs.append(y.to(x.dtype))
    if residual is not None:
        outputs.append(total.to(x.dtype))
    if gates:
        outputs.append(_chosen(gates, index).to(x.dtype).expand(x.shape))
    return [output.contiguous() for output in outputs]


def _chosen(tables: Sequence[Tensor], index: Tensor | None) -> Tensor:
    """[B or 1, L or 1, C]."""
    first, *others = (table[:, None] if table.dim() == 2 else table for table in tables)
    if not others:
        return first
    assert index is not None
    return torch.where(index[..., None] == 0, first, others[0])


def _unfit(*arguments: Any) -> str | None:
    given = Modulation(*arguments)
    batch, tokens, channels = given.x.shape
    if not 0 < channels <= MOST_CHANNELS:
        return f"the kernel takes 1 to {MOST_CHANNELS} channels, not {channels}"
    if batch * tokens >= 2**31:
        return f"the kernel takes fewer than 2^31 tokens, not {batch * tokens}"
    sets = (given.residual_gates, given.scales, given.shifts, given.gates)
    if any(tables[0].dtype != tables[-1].dtype for tables in sets if tables):
        return "the kernel takes no table whose two sets differ in dtype"
    tensors = (given.x, given.residual, given.weight, given.bias, *(table for tables in sets for table in tables))
    if any(tensor is not None and tensor.stride(-1) * channels >= 2**31 for tensor in tensors):
        return "the kernel takes the channels of a token within 2^31 values"
    return None


modulate = FusedOp("modulate", _reference, launch, _unfit)

_SCHEMA = (
    "modulate(Tensor x, Tensor? residual, Tensor[] residual_gates, Tensor? weight, Tensor? bias, Tensor[] scales, "
    "Tensor[] shifts, Tensor[] gates, Tensor? index, float eps, str norm) -> Tensor[]"
)
_library = torch.library.Library("paravae", "FRAGMENT")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("modulate", modulate.__call__, "CompositeExplicitAutograd")


@torch.library.register_fake("paravae::modulate", lib=_library)
def _fake(*arguments: Any) -> list[Tensor]:
    given = Modulation(*arguments)
    return [given.x.new_empty(given.x.shape) for wanted in given.outputs if wanted]
