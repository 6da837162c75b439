"""The decoder's last steps as two kernels: bias, residual, norm, SiLU, 3x3 convolution to RGB, clamp, conversion.

A convolution to three channels keeps a matrix unit busy with padding. Turned round, it is one small product per
pixel, [C] x [C, 9 taps x 3 colours], taken while the normalised pixel is still in registers, and then a sum of nine
shifted planes. So the widest activation of the network is neither written again nor read nine times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paravae.layers.dispatch import FusedOp, jit, split_channels, tl, triton
from paravae.layers.norm_silu import EPSILON, norm_silu, rms_scale, silu_of
from paravae.vae.pixels import to_uint8

_COLOURS = 3
_COLUMNS = 32  # 27 used: matrix units take powers of two


def tap_columns(weight: Tensor) -> Tensor:
    """Weights [3, C, 3, 3] of the convolution -> [C, 32], column 3 (3 dy + dx) + colour, the last five zero."""
    columns = weight.permute(1, 2, 3, 0).flatten(1)
    return F.pad(columns, (0, _COLUMNS - columns.shape[1])).contiguous()


def _reference(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor,
    gamma: Tensor,
    columns: Tensor,
    colour_bias: Tensor,
    *,
    as_uint8: bool = False,
) -> Tensor:
    """Pixels of a frame from its last features: [B, 1, H, W, C] -> [B, 3, 1, H, W], clamped to [-1, 1].

    Args:
        x: raw output of the last block's convolution.
        residual: like ``x``; left as it is.
        bias: [C], fp32, to be added to both before the norm; gamma: [C], fp32, of the norm.
        columns: [C, 32] in x's dtype, as ``tap_columns`` gives it; colour_bias: [3], fp32.
        as_uint8: pixels as levels 0..255, from the unrounded values; else in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + bias if residual is None else x.to(wide) + bias + residual
    activated = norm_silu.reference(total, gamma).to(x.dtype)
    weight = columns[:, : 9 * _COLOURS].unflatten(1, (3, 3, _COLOURS)).permute(3, 0, 1, 2)
    pixels = F.conv2d(activated[:, 0].permute(0, 3, 1, 2).to(wide), weight.to(wide), colour_bias, padding=1)
    pixels = pixels.clamp(-1, 1)[:, :, None].contiguous()
    return to_uint8(pixels) if as_uint8 else pixels.to(x.dtype)


@jit
def project_kernel(
    x_ptr,  # [pixels, C]
    residual_ptr,
    bias_ptr,  # [C]
    gamma_ptr,
    columns_ptr,  # [C, COLUMNS]
    planes_ptr,  # [27, pixels], fp32
    pixels,
    C: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EPSILON: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    x_ptr += first * C
    residual_ptr += first * C
    pixel = tl.arange(0, BLOCK)
    inside = (first + pixel < pixels)[:, None]
    column = tl.arange(0, COLUMNS)
    c1 = tl.arange(0, C1)
    at1 = pixel[:, None] * C + c1[None, :]
    total1 = tl.load(x_ptr + at1, mask=inside, other=0.0).to(tl.float32) + tl.load(bias_ptr + c1)[None, :]
    if HAS_RESIDUAL:
        total1 += tl.load(residual_ptr + at1, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(total1 * total1, 1)
    if C2:
        c2 = C1 + tl.arange(0, C2)
        at2 = pixel[:, None] * C + c2[None, :]
        total2 = tl.load(x_ptr + at2, mask=inside, other=0.0).to(tl.float32) + tl.load(bias_ptr + c2)[None, :]
        if HAS_RESIDUAL:
            total2 += tl.load(residual_ptr + at2, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(total2 * total2, 1)
    scale = rms_scale(squares, C, EPSILON)[:, None]
    total1 = silu_of(total1 * scale * tl.load(gamma_ptr + c1)[None, :])
    weight1 = tl.load(columns_ptr + c1[:, None] * COLUMNS + column[None, :])
    planes = tl.dot(total1.to(weight1.dtype), weight1, input_precision="ieee")
    if C2:
        total2 = silu_of(total2 * scale * tl.load(gamma_ptr + c2)[None, :])
        weight2 = tl.load(columns_ptr + c2[:, None] * COLUMNS + column[None, :])
        planes = tl.dot(total2.to(weight2.dtype), weight2, planes, input_precision="ieee")
    at = column.to(tl.int64)[None, :] * pixels + first + pixel[:, None]
    tl.store(planes_ptr + at, planes, mask=inside & (column < PLANES)[None, :])


@jit
def gather_kernel(
    planes_ptr,  # [9 taps, 3 colours, B, H, W], fp32
    bias_ptr,  # [3]
    out_ptr,  # [B, 3, H, W]
    height,
    width,
    images,
    COLOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    AS_UINT8: tl.constexpr,
):
    # One program: BLOCK pixels of one row of one colour.
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1) + tl.zeros((BLOCK,), tl.int32)
    image = tl.program_id(2) // COLOURS
    colour = tl.program_id(2) % COLOURS
    total = tl.zeros((BLOCK,), tl.float32) + tl.load(bias_ptr + colour)
    for tap in tl.static_range(9):
        row = i + tap // 3 - 1
        col = j + tap % 3 - 1
        plane = ((tap * COLOURS + colour) * images + image).to(tl.int64) * height
        seen = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        total += tl.load(planes_ptr + (plane + row) * width + col, mask=seen, other=0.0)
    total = tl.minimum(tl.maximum(total, -1.0), 1.0)
    at = ((image * COLOURS + colour).to(tl.int64) * height + i) * width + j
    if AS_UINT8:  # halves round to even, as torch.round does: adding 2^23 leaves no room for a fraction
        level = total * 127.5 + 127.5
        level = (level + 8388608.0) - 8388608.0
        tl.store(out_ptr + at, level.to(tl.uint8), mask=j < width)
    else:
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=j < width)


def _unfit(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor,
    gamma: Tensor,
    columns: Tensor,
    colour_bias: Tensor,
    *,
    as_uint8: bool = False,
) -> str | None:
    channels, height = x.shape[-1], x.shape[2]
    first, second = split_channels(channels)
    if first + second != channels or min(first, second or first) < 16 or channels > 256:
        return f"the kernel takes channels of one or two powers of two from 16 to 256, not {channels}"
    if height > 65535 or _COLOURS * x.shape[0] > 65535:
        return f"{list(x.shape)} exceeds the grid of a kernel"
    return None


def _launch(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor,
    gamma: Tensor,
    columns: Tensor,
    colour_bias: Tensor,
    *,
    as_uint8: bool = False,
) -> Tensor:
    images, _, height, width, channels = x.shape
    first, second = split_channels(channels)
    pixels = images * height * width
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    planes = torch.empty((9 * _COLOURS, pixels), dtype=torch.float32, device=x.device)
    block = 16
    project_kernel[(triton.cdiv(pixels, block),)](
        x,
        x if residual is None else residual,
        bias,
        gamma,
        columns,
        planes,
        pixels,
        C=channels,
        C1=first,
        C2=second,
        COLUMNS=_COLUMNS,
        PLANES=9 * _COLOURS,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        EPSILON=EPSILON,
        num_warps=1,
    )
    dtype = torch.uint8 if as_uint8 else x.dtype
    out = torch.empty((images, _COLOURS, 1, height, width), dtype=dtype, device=x.device)
    block = min(256, triton.next_power_of_2(width))
    gather_kernel[(triton.cdiv(width, block), height, images * _COLOURS)](
        planes, colour_bias, out, height, width, images, COLOURS=_COLOURS, BLOCK=block, AS_UINT8=as_uint8, num_warps=4
    )
    return out


to_pixels = FusedOp("to_pixels", _reference, _launch, _unfit)
