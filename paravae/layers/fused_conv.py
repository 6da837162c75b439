"""A 3x3 convolution with bias, residual, RMS norm and SiLU as its epilogue, in one kernel for Hopper.

At high resolution the decoder's 96 channels are too few for a library's convolution to reach the machine's rate, and
what follows it, there and at 192 channels, passes over the activations two to four times more. Here the sums are
normalised in the registers that they were computed in, unrounded. conv96.cu keeps the nine taps' weights in shared
memory, conv192.cu streams them through it.

Activations are dense and channels last, [N, H, W, C] or [B, F, H, W, C]; C: 96 or 192.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paravae.layers import hopper
from paravae.layers.dispatch import FusedOp
from paravae.layers.norm_silu import norm_silu


@dataclass(frozen=True)
class _Kernel:
    name: str
    shared_bytes: int  # weights, pixels, bias, gamma, barriers
    cluster: int  # blocks that work together


_KERNELS = {96: _Kernel("conv96", 226_280, 1), 192: _Kernel("conv192", 220_656, 2)}
CHANNELS = tuple(_KERNELS)
_TILE = (16, 8)  # rows and columns of pixels
_THREADS = 384


def is_fusable(weight: Tensor) -> bool:
    """Whether there is a kernel for such a weight."""
    return weight.shape[0] in CHANNELS and tuple(weight.shape[1:]) == (weight.shape[0], 3, 3)


def column(n: int) -> int:
    """The output channel that column ``n`` of the kernel's matrix product stands for.

    wgmma leaves a thread with columns 8 i + 2 q and the next one, for i from 0 and q its place in a quad; these are
    made the channels 32 b + 8 q + (0 to 7) for b from 0, so that it moves 16 bytes of a pixel at a time.
    """
    i, q, odd = n // 8, n % 8 // 2, n % 2
    return i // 4 * 32 + q * 8 + i % 4 * 2 + odd


def pack_weight(weight: Tensor) -> Tensor:
    """A [C, C, 3, 3] weight as the kernel's shared memory holds it, flat: to be done once, when loading.

    Outermost first: 16 input channels (C / 16), kx (3), 8 of them (2), ky (3, descending), column (C), channel (8).
    """
    channels = weight.shape[0]
    columns = torch.tensor([column(n) for n in range(channels)], device=weight.device)
    parts = weight[columns].flip(2).reshape(channels, channels // 16, 2, 8, 3, 3)
    return parts.permute(1, 5, 2, 4, 0, 3).reshape(-1).contiguous()


def _reference(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``total = conv(x) + bias + residual``, then ``silu(rms_norm(total) * gamma)``.

    Args:
        x: [N, H, W, C] or [B, F, H, W, C]; zeros are assumed around each picture.
        weight: [C, C, 3, 3].
        packed: ``pack_weight(weight)``; None: the kernel is not wanted.
        bias: [C], fp32.
        gamma: [C], fp32; None: no norm and no SiLU, the result is ``total``.
        residual: like ``x``; overwritten by ``total``, rounded to its dtype, and without ``gamma`` the result itself.
    """
    images = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)
    raw = F.conv2d(images, weight, padding=1).permute(0, 2, 3, 1).contiguous().view(x.shape)
    return norm_silu(raw, gamma, bias, residual, out=raw if gamma is not None or residual is None else residual)


def _unfit(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
) -> str | None:
    if not is_fusable(weight) or x.shape[-1] != weight.shape[1]:
        return f"the kernel takes 3x3 weights of 96 or 192 channels, not {list(weight.shape)}"
    if packed is None:
        return "its weight is not packed"
    if reason := hopper.unfit(x):
        return reason
    if packed.dtype != x.dtype or packed.device != x.device:
        return f"its weight is packed as {packed.dtype} on {packed.device}"
    for name, tensor in (("x", x), ("residual", residual), ("bias", bias), ("gamma", gamma)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not dense"
    if any(tensor is not None and tensor.data_ptr() % 16 for tensor in (x, residual, packed)):
        return "it is not aligned to 16 bytes"
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (bias, gamma)):
        return "bias or gamma is not float32"
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return "the residual is not like x"
    if x.numel() == 0 or x.shape[-3] * x.shape[-2] * x.shape[-1] >= 2**35 - 8 or _tiles(x) >= 2**30:
        return f"the kernel does not take the size {list(x.shape)}"
    return None


def _tiles(x: Tensor) -> int:
    height, width, channels = x.shape[-3:]
    return x.numel() // (height * width * channels) * -(-height // _TILE[0]) * -(-width // _TILE[1])


def _launch(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    assert packed is not None  # or it is unfit
    defines = (
        ("HALF", int(x.dtype == torch.float16)),
        ("RESIDUAL", int(residual is not None)),
        ("NORM", int(gamma is not None)),
    )
    height, width, channels = x.shape[-3:]
    which = _KERNELS[channels]
    kernel = hopper.compiled(which.name, defines, which.shared_bytes, x.device)
    out = residual if residual is not None and gamma is None else torch.empty_like(x)
    clusters = min(-(-_tiles(x) // which.cluster), hopper.multiprocessors(x.device) // which.cluster)
    with torch.cuda.device(x.device):
        kernel(
            grid=(clusters * which.cluster, 1, 1),
            block=(_THREADS, 1, 1),
            args=[
                x,
                packed,
                bias,
                bias if gamma is None else gamma,
                out if residual is None else residual,
                out,
                x.numel() // (height * width * channels),
                height,
                width,
            ],
            shared_mem=which.shared_bytes,
        )
    return out


fused_conv = FusedOp("fused_conv", _reference, _launch, _unfit, triton=False)
