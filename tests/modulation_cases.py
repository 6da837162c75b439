"""Calls of the modulation ops, their arguments laid out in memory in every way that is allowed; and what they return.

B: batch, L: tokens, C: channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paravae.layers import (
    CustomOp,
    FusedLayerNormScaleShift,
    FusedLayerNormScaleShiftGateSelect01,
    FusedLayerNormScaleShiftSelect01,
    FusedResidual,
    FusedResidualLayerNormScaleShift,
    FusedResidualLayerNormScaleShiftGateSelect01,
    FusedResidualLayerNormScaleShiftSelect01,
    FusedResidualSelect01,
)
from tests.builders import noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
OPS: tuple[type[CustomOp], ...] = (
    FusedLayerNormScaleShift,
    FusedLayerNormScaleShiftSelect01,
    FusedLayerNormScaleShiftGateSelect01,
    FusedResidualLayerNormScaleShift,
    FusedResidualLayerNormScaleShiftSelect01,
    FusedResidualLayerNormScaleShiftGateSelect01,
    FusedResidual,
    FusedResidualSelect01,
)

Make = Callable[..., Tensor]  # of a shape
Layout = Callable[[Make, int, int, int], Tensor]  # of B, L, C

TOKENS: dict[str, Layout] = {
    "dense": lambda make, b, t, c: make(b, t, c),
    "within B and L": lambda make, b, t, c: make(b + 1, t + 3, c)[1:, 2:-1],
    "part of 3C": lambda make, b, t, c: make(b, t, 3 * c).chunk(3, -1)[1],
    "channels apart": lambda make, b, t, c: make(b, t, 2 * c)[..., ::2],
    "channels before tokens": lambda make, b, t, c: make(b, c, t).mT,
    "tokens before batch": lambda make, b, t, c: make(t, b, c).transpose(0, 1),
    "one token": lambda make, b, t, c: make(b, 1, c).expand(b, t, c),
    "one batch": lambda make, b, t, c: make(1, t, c).expand(b, t, c),
}
TABLES: dict[str, Layout] = {
    "[B, C]": lambda make, b, t, c: make(b, c),
    "[1, C]": lambda make, b, t, c: make(1, c),
    "[B, L, C]": lambda make, b, t, c: make(b, t, c),
    "[B, 1, C]": lambda make, b, t, c: make(b, 1, c),
    "[1, L, C]": lambda make, b, t, c: make(1, t, c),
    "part of [B, 6C]": lambda make, b, t, c: make(b, 6 * c).chunk(6, 1)[4],
    "part of [2B, 6C]": lambda make, b, t, c: make(2 * b, 6 * c).chunk(6, 1)[2][b:],
    "part of [B, L, 6C]": lambda make, b, t, c: make(b, t, 6 * c).chunk(6, 2)[5],
    "channels before tokens": lambda make, b, t, c: make(b, c, t).mT,
    "channels apart": lambda make, b, t, c: make(b, 2 * c)[:, ::2],
    "one row": lambda make, b, t, c: make(1, c).expand(b, c),
    "one channel": lambda make, b, t, c: make(b, 1).expand(b, c),
}
INDICES: dict[str, Layout] = {
    "[B, L]": lambda make, b, t, c: make(b, t),
    "[1, L]": lambda make, b, t, c: make(1, t),
    "tokens apart": lambda make, b, t, c: make(b, 2 * t)[:, ::2],
    "tokens before batch": lambda make, b, t, c: make(t, b).mT,
    "one row": lambda make, b, t, c: make(1, t).expand(b, t),
    "one token": lambda make, b, t, c: make(b, 1).expand(b, t),
}
VECTORS: dict[str, Layout] = {
    "dense": lambda make, b, t, c: make(c),
    "channels apart": lambda make, b, t, c: make(2 * c)[::2],
    "one channel": lambda make, b, t, c: make(1).expand(c),
}
NONE = "None"


def layouts_of(name: str) -> dict[str, Layout]:
    """Of an argument, by its name."""
    return {"x": TOKENS, "residual": TOKENS, "weight": VECTORS, "bias": VECTORS, "index": INDICES}.get(name, TABLES)


def parameters(op: type[CustomOp]) -> list[str]:
    """The names of the tensors that an op takes."""
    return [name for name in inspect.signature(op.__call__).parameters if name not in ("self", "eps")]


@dataclass(frozen=True, kw_only=True)
class Call:
    """Of an op, with random numbers that are the same for equal calls."""

    op: type[Any]  # one of OPS
    norm: str = "layer"
    batch: int = 2
    tokens: int = 3
    channels: int = 96
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, ...] | None = None  # by parameter; None: dense ones, weight and bias included
    in_fp32: tuple[str, ...] = ()  # tables and vectors, both sets of them, whatever the dtype of x
    index_dtype: torch.dtype = torch.int64
    mean: float = 0  # of x and residual; their standard deviation is 1

    def arguments(self) -> dict[str, Any]:
        names = parameters(self.op)
        layouts = self.layouts or tuple(next(iter(layouts_of(name))) for name in names)
        return {
            name: None if layout == NONE else self._tensor(seed, name, layout)
            for seed, (name, layout) in enumerate(zip(names, layouts, strict=True))
        }

    def _tensor(self, seed: int, name: str, layout: str) -> Tensor:
        def make(*shape: int) -> Tensor:
            values = noise(*shape, seed=seed).to(DEVICE)
            if name == "index":
                return (values > 0).to(self.index_dtype)
            values = values + self.mean if name in ("x", "residual") else values
            return values.to(torch.float32 if name.rstrip("01") in self.in_fp32 else self.dtype)

        return layouts_of(name)[layout](make, self.batch, self.tokens, self.channels)

    def by(self, way: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        found = self.op(self.norm, force=way)(**arguments)
        return found if isinstance(found, tuple) else (found,)


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if value is not None and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def step_by_step(arguments: dict[str, Any], norm: str = "layer") -> tuple[Tensor, ...]:
    """What an op with these arguments returns, as eager PyTorch has it: each step rounded. In fp64 it is the truth."""

    def rows(name: str) -> Tensor:
        table: Tensor = arguments[name]
        return table[:, None] if table.dim() == 2 else table

    def chosen(name: str) -> Tensor:
        if name in arguments:
            return rows(name)
        return torch.where(arguments["index"].bool()[..., None], rows(f"{name}1"), rows(f"{name}0"))

    x, weight, bias = arguments["x"], arguments.get("weight"), arguments.get("bias")
    outputs = []
    if "residual" in arguments:
        x = arguments["residual"] + chosen("residual_gate") * x
        outputs.append(x)
    if "weight" in arguments:
        if norm == "layer":
            y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        else:
            y = F.rms_norm(x, x.shape[-1:], weight, EPS)
            y = y if bias is None else y + bias
        outputs.insert(0, y * (1 + chosen("scale")) + chosen("shift"))
    if "gate0" in arguments:
        outputs.append(chosen("gate").expand(x.shape))
    return tuple(outputs)
