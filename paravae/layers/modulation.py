"""The ops of a diffusion transformer's modulation, as a caller sees them; modulate.py computes them all.

    plain                             a token chooses of two sets    the same, and the gate written out
    FusedLayerNormScaleShift          ...Select01                    ...GateSelect01
    FusedResidualLayerNormScaleShift  ...Select01                    ...GateSelect01
    FusedResidual                     ...Select01

Those of the last column have the contract of SGLang's kernels: a gate comes out as [B, L, C], and goes so into the
next op. Those of the middle one leave gates what they are, two tables and an index: a block moves 9 tensors of
[B, L, C] through memory with them, and 13 with the others.

Shapes: x, residual [B, L, C], any strides. Tables (scale, shift, gate) [B, C], [1, C] or [B, L, C]. index [B, L] or
[1, L], integers or bool: 0 takes the first set. On a CPU anything but 0 and 1 is refused; on a GPU it takes the second
set, since looking would make the host wait. weight, bias [C] or None. Dtypes: float16, bfloat16, float32 (float64 in
plain PyTorch only); of tables, weight and bias that of x, or float32. Results are dense, in the dtype of x.

Rounding: all is computed in fp32 and rounded when it is stored. So residual_out is rounded once, and y is that of the
sum before it is rounded.

Where a gradient is asked for they run as plain PyTorch, which autograd takes through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from paravae.layers.custom_op import CustomOp
from paravae.layers.modulate import modulate

EPS = 1e-6  # of Qwen-Image's norms
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Modulation(CustomOp):
    """Args:
    norm: "layer", LayerNorm; "rms", RMSNorm: over the channels.
    force: see ``CustomOp``.
    """

    def __init__(self, norm: Literal["layer", "rms"] = "layer", *, force: str | None = None) -> None:
        super().__init__(force=force)
        if norm not in ("layer", "rms"):
            raise ValueError(f"norm is {norm!r}, not 'layer' or 'rms'")
        self.norm = norm

    def forward_native(self, x: Tensor, *args: Any) -> list[Tensor]:
        return modulate.reference(x, *args)

    def forward_cuda(self, x: Tensor, *args: Any) -> list[Tensor]:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors((x, *args))):
            return self.forward_native(x, *args)
        return list(torch.ops.paravae.modulate(x, *args))

    def kernel_unfit(self, device: torch.device) -> str | None:
        return modulate.unfit_on(device)

    def _run(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        residual_gates: tuple[Tensor, ...] = (),
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        scales: tuple[Tensor, ...] = (),
        shifts: tuple[Tensor, ...] = (),
        gates: tuple[Tensor, ...] = (),
        index: Tensor | None = None,
        eps: float = EPS,
    ) -> list[Tensor]:
        """The checked call."""
        tables = [*_named("residual_gate", residual_gates), *_named("scale", scales)]
        tables += [*_named("shift", shifts), *_named("gate", gates)]
        needed: list[tuple[str, Tensor | None]] = [("x", x), *tables]
        needed += [("residual", residual)] if residual_gates else []
        needed += [("index", index)] if max(map(len, (residual_gates, scales, gates))) == 2 else []
        for name, tensor in needed:
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} is {tensor!r}, not a tensor")
        if x.dim() != 3 or x.dtype not in DTYPES:
            raise ValueError(f"x is {_what(x)}, not [B, L, C] in {', '.join(map(str, DTYPES))}")
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            raise ValueError(f"residual is {_what(residual)}, not like x, {_what(x)}")
        for name, table in tables:
            _check_table(name, table, x)
        for name, vector in (("weight", weight), ("bias", bias)):
            if vector is not None and (vector.shape != x.shape[-1:] or vector.dtype not in (x.dtype, torch.float32)):
                raise ValueError(f"{name} is {_what(vector)}, not [C] in the dtype of x, {_what(x)}, or float32")
        if index is not None:
            _check_index(index, x)
        others = [("residual", residual), ("weight", weight), ("bias", bias), ("index", index), *tables]
        for name, tensor in others:
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        norm = self.norm if scales else "none"
        return self.dispatch(x, residual, residual_gates, weight, bias, scales, shifts, gates, index, eps, norm)


@CustomOp.register("layernorm_scale_shift")
class FusedLayerNormScaleShift(_Modulation):
    """y = norm(x) * (1 + scale) + shift."""

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float = EPS
    ) -> Tensor:
        (y,) = self._run(x, weight=weight, bias=bias, scales=(scale,), shifts=(shift,), eps=eps)
        return y


@CustomOp.register("layernorm_scale_shift_select01")
class FusedLayerNormScaleShiftSelect01(_Modulation):
    """The same, each token by the set that ``index`` names."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale0: Tensor,
        shift0: Tensor,
        scale1: Tensor,
        shift1: Tensor,
        index: Tensor,
        eps: float = EPS,
    ) -> Tensor:
        scales, shifts = (scale0, scale1), (shift0, shift1)
        (y,) = self._run(x, weight=weight, bias=bias, scales=scales, shifts=shifts, index=index, eps=eps)
        return y


@CustomOp.register("layernorm_scale_shift_gate_select01")
class FusedLayerNormScaleShiftGateSelect01(_Modulation):
    """The same, and the gate that ``index`` names, for each token: (y, gate)."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale0: Tensor,
        shift0: Tensor,
        gate0: Tensor,
        scale1: Tensor,
        shift1: Tensor,
        gate1: Tensor,
        index: Tensor,
        eps: float = EPS,
    ) -> tuple[Tensor, Tensor]:
        scales, shifts, gates = (scale0, scale1), (shift0, shift1), (gate0, gate1)
        y, gate = self._run(
            x, weight=weight, bias=bias, scales=scales, shifts=shifts, gates=gates, index=index, eps=eps
        )
        return y, gate


@CustomOp.register("residual_layernorm_scale_shift")
class FusedResidualLayerNormScaleShift(_Modulation):
    """residual_out = residual_gate * x + residual; y = norm(residual_out) * (1 + scale) + shift: (y, residual_out)."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        residual_gate: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float = EPS,
    ) -> tuple[Tensor, Tensor]:
        gates, scales, shifts = (residual_gate,), (scale,), (shift,)
        y, residual_out = self._run(
            x,
            residual=residual,
            residual_gates=gates,
            weight=weight,
            bias=bias,
            scales=scales,
            shifts=shifts,
            eps=eps,
        )
        return y, residual_out


@CustomOp.register("residual_layernorm_scale_shift_select01")
class FusedResidualLayerNormScaleShiftSelect01(_Modulation):
    """The same, each token by the set that ``index`` names, residual gate included: (y, residual_out)."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        residual_gate0: Tensor,
        residual_gate1: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale0: Tensor,
        shift0: Tensor,
        scale1: Tensor,
        shift1: Tensor,
        index: Tensor,
        eps: float = EPS,
    ) -> tuple[Tensor, Tensor]:
        y, residual_out = self._run(
            x,
            residual=residual,
            residual_gates=(residual_gate0, residual_gate1),
            weight=weight,
            bias=bias,
            scales=(scale0, scale1),
            shifts=(shift0, shift1),
            index=index,
            eps=eps,
        )
        return y, residual_out


@CustomOp.register("residual_layernorm_scale_shift_gate_select01")
class FusedResidualLayerNormScaleShiftGateSelect01(_Modulation):
    """The same with one residual gate, [B, L, C] or a table, and the gate that ``index`` names, for each token:
    (y, residual_out, gate)."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        residual_gate: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale0: Tensor,
        shift0: Tensor,
        gate0: Tensor,
        scale1: Tensor,
        shift1: Tensor,
        gate1: Tensor,
        index: Tensor,
        eps: float = EPS,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, residual_out, gate = self._run(
            x,
            residual=residual,
            residual_gates=(residual_gate,),
            weight=weight,
            bias=bias,
            scales=(scale0, scale1),
            shifts=(shift0, shift1),
            gates=(gate0, gate1),
            index=index,
            eps=eps,
        )
        return y, residual_out, gate


@CustomOp.register("residual")
class FusedResidual(_Modulation):
    """residual_out = residual_gate * x + residual: what closes a block."""

    def __call__(self, x: Tensor, residual: Tensor, residual_gate: Tensor) -> Tensor:
        (residual_out,) = self._run(x, residual=residual, residual_gates=(residual_gate,))
        return residual_out


@CustomOp.register("residual_select01")
class FusedResidualSelect01(_Modulation):
    """The same, each token by the gate that ``index`` names."""

    def __call__(
        self, x: Tensor, residual: Tensor, residual_gate0: Tensor, residual_gate1: Tensor, index: Tensor
    ) -> Tensor:
        gates = (residual_gate0, residual_gate1)
        (residual_out,) = self._run(x, residual=residual, residual_gates=gates, index=index)
        return residual_out


def _named(name: str, tables: tuple[Tensor, ...]) -> Iterable[tuple[str, Tensor]]:
    """As the caller knows them: scale, or scale0 and scale1."""
    return [(name, tables[0])] if len(tables) == 1 else [(f"{name}{n}", table) for n, table in enumerate(tables)]


def _check_table(name: str, table: Tensor, x: Tensor) -> None:
    batch, tokens, channels = x.shape
    rows = {2: [(1, batch)], 3: [(1, batch), (1, tokens)]}.get(table.dim())
    fits = rows is not None and all(size in sizes for size, sizes in zip(table.shape, rows, strict=False))
    if not fits or table.shape[-1] != channels or table.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{name} is {_what(table)}, not [B, C], [1, C] or [B, L, C] in the dtype of x, {_what(x)}, or float32"
        )


def _check_index(index: Tensor, x: Tensor) -> None:
    batch, tokens, _ = x.shape
    whole = not (index.is_floating_point() or index.is_complex())
    if index.dim() != 2 or index.shape[0] not in (1, batch) or index.shape[1] != tokens or not whole:
        raise ValueError(f"index is {_what(index)}, not integers or bool of [B, L] or [1, L] for x, {_what(x)}")
    looking_is_free = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if looking_is_free and bool(((index != 0) & (index != 1)).any()):
        raise ValueError(f"index has values from {int(index.min())} to {int(index.max())}, not only 0 and 1")


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from arg


def _what(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
