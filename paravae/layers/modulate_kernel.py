"""The kernel of modulate.py: one program a token; and its launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paravae.layers.dispatch import jit, tl


class Modulation(NamedTuple):
    """What to compute: the arguments of the op, of its reference and of its kernel.

    x: [B, L, C], any strides. residual: like ``x``; with it the total is residual + residual_gate * x, else x.
    residual_gates, scales, shifts, gates: none, one table, or two of which ``select`` chooses: [B, C], [1, C], or
    [B, L, C], where a 1 stands for any B or L. weight, bias: [C], of the norm. select: [B, L] or [1, L]; 0: the first
    table of two; anything else: the second. norm: "layer" or "rms", over the channels of the total; "none": no y.
    """

    x: Tensor
    residual: Tensor | None = None
    residual_gates: Sequence[Tensor] = ()
    weight: Tensor | None = None
    bias: Tensor | None = None
    scales: Sequence[Tensor] = ()
    shifts: Sequence[Tensor] = ()
    gates: Sequence[Tensor] = ()
    select: Tensor | None = None
    eps: float = 0.0
    norm: str = "none"

    @property
    def outputs(self) -> tuple[bool, bool, bool]:
        """Which are asked for: y, total, gate."""
        return self.norm != "none", self.residual is not None, bool(self.gates)


@jit
def _load(ptr, at, inside, EVEN: tl.constexpr):
    """Values as fp32; without a mask where there is nothing to mask, so that loads are as wide as can be."""
    return tl.load(ptr + at, mask=None if EVEN else inside, other=None if EVEN else 0.0).to(tl.float32)


@jit
def _store(ptr, at, values, inside, EVEN: tl.constexpr):
    tl.store(ptr + at, values.to(ptr.dtype.element_ty), mask=None if EVEN else inside)


@jit
def _scale_shift(scale_ptr, shift_ptr, channels, scale_c, shift_c, inside, EVEN: tl.constexpr):
    scale = _load(scale_ptr, channels * scale_c, inside, EVEN)
    return scale, _load(shift_ptr, channels * shift_c, inside, EVEN)


@jit
def modulate_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,  # dense, like total and gate
    total_ptr,
    gate_ptr,
    weight_ptr,  # [C]
    bias_ptr,
    index_ptr,  # [B, L]
    rgate0_ptr,  # tables: [B, L, C] by strides
    rgate1_ptr,
    scale0_ptr,
    scale1_ptr,
    shift0_ptr,
    shift1_ptr,
    gate0_ptr,
    gate1_ptr,
    tokens,
    eps,
    x_b,  # strides in values, by dimension
    x_l,
    x_c,
    residual_b,
    residual_l,
    residual_c,
    weight_c,
    bias_c,
    index_b,
    index_l,
    rgate0_b,
    rgate0_l,
    rgate0_c,
    rgate1_b,
    rgate1_l,
    rgate1_c,
    scale0_b,
    scale0_l,
    scale0_c,
    scale1_b,
    scale1_l,
    scale1_c,
    shift0_b,
    shift0_l,
    shift0_c,
    shift1_b,
    shift1_l,
    shift1_c,
    gate0_b,
    gate0_l,
    gate0_c,
    gate1_b,
    gate1_l,
    gate1_c,
    C: tl.constexpr,
    PIECE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SELECT: tl.constexpr,
    NORM: tl.constexpr,  # 0: none, 1: layer, 2: rms
    LATE: tl.constexpr,  # load scale and shift when the sums are done
    EARLY: tl.constexpr,
):
    # One program: one token. Its channels are N1 + N2 pieces, so that 3072 of them need no lanes for 4096, and sums
    # over pieces stay within a thread.
    b = (tl.program_id(0) // tokens).to(tl.int64)
    t = (tl.program_id(0) % tokens).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    if EARLY:  # this kernel was started before the one in front of it was through; let the next one do so too
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    even1: tl.constexpr = N1 * PIECE <= C
    even2: tl.constexpr = (N1 + N2) * PIECE == C
    c1 = tl.arange(0, N1)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    in1 = c1 < C
    x_ptr += b * x_b + t * x_l
    total1 = _load(x_ptr, c1 * x_c, in1, even1)
    if N2:
        c2 = N1 * PIECE + tl.arange(0, N2)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
        in2 = c2 < C
        total2 = _load(x_ptr, c2 * x_c, in2, even2)
    if HAS_RESIDUAL:
        residual_ptr += b * residual_b + t * residual_l
        residual1 = _load(residual_ptr, c1 * residual_c, in1, even1)
        if N2:
            residual2 = _load(residual_ptr, c2 * residual_c, in2, even2)

    rgate_ptr = rgate0_ptr + (b * rgate0_b + t * rgate0_l)
    scale_ptr = scale0_ptr + (b * scale0_b + t * scale0_l)
    shift_ptr = shift0_ptr + (b * shift0_b + t * shift0_l)
    chosen_ptr = gate0_ptr + (b * gate0_b + t * gate0_l)
    rgate_c = rgate0_c
    scale_c = scale0_c
    shift_c = shift0_c
    gate_c = gate0_c
    if SELECT:  # noqa: SIM102 - the one when compiling, the other when running
        if tl.load(index_ptr + b * index_b + t * index_l) != 0:
            rgate_ptr = rgate1_ptr + (b * rgate1_b + t * rgate1_l)
            scale_ptr = scale1_ptr + (b * scale1_b + t * scale1_l)
            shift_ptr = shift1_ptr + (b * shift1_b + t * shift1_l)
            chosen_ptr = gate1_ptr + (b * gate1_b + t * gate1_l)
            rgate_c = rgate1_c
            scale_c = scale1_c
            shift_c = shift1_c
            gate_c = gate1_c

    if HAS_RESIDUAL:
        total1 = residual1 + _load(rgate_ptr, c1 * rgate_c, in1, even1) * total1
        if N2:
            total2 = residual2 + _load(rgate_ptr, c2 * rgate_c, in2, even2) * total2
    if NORM and not LATE:  # they are there when the statistics are
        scale1, shift1 = _scale_shift(scale_ptr, shift_ptr, c1, scale_c, shift_c, in1, even1)
        if N2:
            scale2, shift2 = _scale_shift(scale_ptr, shift_ptr, c2, scale_c, shift_c, in2, even2)
    if HAS_GATE:
        gate_ptr += row * C
        _store(gate_ptr, c1, _load(chosen_ptr, c1 * gate_c, in1, even1), in1, even1)
        if N2:
            _store(gate_ptr, c2, _load(chosen_ptr, c2 * gate_c, in2, even2), in2, even2)
    if HAS_RESIDUAL:
        total_ptr += row * C
        _store(total_ptr, c1, total1, in1, even1)
        if N2:
            _store(total_ptr, c2, total2, in2, even2)

    if NORM:
        if NORM == 1:
            sums = tl.sum(total1, 0)
            if N2:
                sums += tl.sum(total2, 0)
            mean = tl.sum(sums, 0) / C
            total1 = total1 - mean if even1 else tl.where(in1, total1 - mean, 0.0)
            if N2:
                total2 = total2 - mean if even2 else tl.where(in2, total2 - mean, 0.0)
        squares = tl.sum(total1 * total1, 0)
        if N2:
            squares += tl.sum(total2 * total2, 0)
        if LATE:
            scale1, shift1 = _scale_shift(scale_ptr, shift_ptr, c1, scale_c, shift_c, in1, even1)
            if N2:
                scale2, shift2 = _scale_shift(scale_ptr, shift_ptr, c2, scale_c, shift_c, in2, even2)
        factor = tl.rsqrt(tl.sum(squares, 0) / C + eps)
        total1 *= factor
        if HAS_WEIGHT:
            total1 *= _load(weight_ptr, c1 * weight_c, in1, even1)
        if HAS_BIAS:
            total1 += _load(bias_ptr, c1 * bias_c, in1, even1)
        y_ptr += row * C
        _store(y_ptr, c1, total1 * (1.0 + scale1) + shift1, in1, even1)
        if N2:
            total2 *= factor
            if HAS_WEIGHT:
                total2 *= _load(weight_ptr, c2 * weight_c, in2, even2)
            if HAS_BIAS:
                total2 += _load(bias_ptr, c2 * bias_c, in2, even2)
            _store(y_ptr, c2, total2 * (1.0 + scale2) + shift2, in2, even2)


_FEW_TOKENS = 4096
"""Below it the op with a residual is faster with the registers of scale and shift free until late (64 instead of 92,
so eight programs a multiprocessor instead of five): 9 % at 1,024 tokens, 2 % at 2,048; from here on 1 % slower, on an
H200. The op without a residual has registers to spare."""


@dataclass(frozen=True)
class Split:
    """How a program handles its channels: ``first`` + ``second`` pieces (powers of two, or none) of ``piece``."""

    piece: int
    first: int
    second: int
    warps: int

    @staticmethod
    def of(channels: int) -> Split:
        """Pieces of which each thread takes eight neighbouring values, what a load of 16 bytes brings in bf16."""
        piece = min(1 << (channels - 1).bit_length(), 1024 if channels <= 8192 else 2048)
        pieces = -(-channels // piece)
        first = 1 << (pieces.bit_length() - 1)
        rest = pieces - first
        return Split(piece, first, 1 << (rest - 1).bit_length() if rest else 0, max(1, piece // 256))


def launch(*arguments: Any, split: Split | None = None) -> list[Tensor]:
    """As ``modulate.reference``. ``split``: to try others than the usual one."""
    given = Modulation(*arguments)
    x, residual, residual_gates, weight, bias, scales, shifts, gates, index, eps, norm = given
    (batch, tokens, channels), split = x.shape, split or Split.of(x.shape[-1])
    y, total, gate = (x.new_empty(x.shape) if wanted else None for wanted in given.outputs)
    outputs = [output for output in (y, total, gate) if output is not None]
    if x.numel() == 0:
        return outputs
    pointers: list[Tensor] = []
    strides: list[int] = []
    for tables in (residual_gates, scales, shifts, gates):
        for table in (tables[0], tables[-1]) if tables else (x, x):
            pointers.append(table)
            strides += _strides(table) if tables else (0, 0, 1)
    early = _early_launch(x.device)
    modulate_kernel[(batch * tokens,)](
        x,
        *(x if tensor is None else tensor for tensor in (residual, y, total, gate, weight, bias, index)),
        *pointers,
        tokens,
        eps,
        *x.stride(),
        *(x if residual is None else residual).stride(),
        1 if weight is None else weight.stride(0),
        1 if bias is None else bias.stride(0),
        *((0, 0) if index is None else _strides(index)),
        *strides,
        C=channels,
        PIECE=split.piece,
        N1=split.first,
        N2=split.second,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_GATE=bool(gates),
        SELECT=index is not None,
        NORM=("none", "layer", "rms").index(norm),
        LATE=residual is not None and batch * tokens < _FEW_TOKENS,
        EARLY=bool(early),
        num_warps=split.warps,
        **early,
    )
    return outputs


@cache
def _early_launch(device: torch.device) -> dict[str, bool]:
    """Triton's option for a launch that overlaps the end of the kernel before (CUDA's programmatic dependent launch),
    where it can be had: it takes 0.5 to 1 us off a kernel of 5 to 50."""
    if device.type != "cuda" or torch.version.hip or not hasattr(tl.extra.cuda, "gdc_wait"):
        return {}
    return {"launch_pdl": True} if torch.cuda.get_device_capability(device) >= (9, 0) else {}


def _strides(table: Tensor) -> tuple[int, ...]:
    """Of a table, by batch, token and channel, of an index, by batch and token: 0 where one entry stands for all."""
    steps = [stride if size > 1 else 0 for size, stride in zip(table.shape, table.stride(), strict=True)]
    return (steps[0], 0, steps[1]) if table.dim() == 2 and table.is_floating_point() else tuple(steps)
