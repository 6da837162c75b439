"""A 3x3 convolution of 96 channels with bias, residual, RMS norm and SiLU as its epilogue, in one kernel for Hopper.

At full resolution the decoder's 96 channels are too few for a library's convolution to reach the machine's rate, and
what follows it passes over the activations two to four times more. Here the nine taps' weights stay in shared memory
(conv96.cu says how), and the sums are normalised in the registers that they were computed in, unrounded.

Activations are dense and channels last, [N, H, W, 96] or [B, F, H, W, 96].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paravae.layers import hopper
from paravae.layers.dispatch import FusedOp
from paravae.layers.norm_silu import norm_silu

CHANNELS = 96
_SHARED_BYTES = 226_280  # of conv96.cu: weights, ring, bias, gamma, barriers
_TILE = (16, 8)  # rows and columns of pixels
_THREADS = 384


def column(n: int) -> int:
    """The output channel that column ``n`` of the kernel's matrix product stands for.

    wgmma leaves a thread with columns 8 i + 2 q and the next one, for i = 0 to 11 and q its place in a quad; these
    are made the channels 32 b + 8 q + (0 to 7) for b = 0, 1, 2, so that it moves 16 bytes of a pixel at a time.
    """
    i, q, odd = n // 8, n % 8 // 2, n % 2
    return i // 4 * 32 + q * 8 + i % 4 * 2 + odd


def pack_weight(weight: Tensor) -> Tensor:
    """A [96, 96, 3, 3] weight as the kernel's shared memory holds it, flat: to be done once, when loading.

    Outermost first: 16 input channels (6), kx (3), 8 of them (2), ky (3, descending), column (96), channel (8).
    """
    columns = torch.tensor([column(n) for n in range(CHANNELS)], device=weight.device)
    parts = weight[columns].flip(2).reshape(CHANNELS, 6, 2, 8, 3, 3)
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
        x: [N, H, W, 96] or [B, F, H, W, 96]; zeros are assumed around each picture.
        weight: [96, 96, 3, 3].
        packed: ``pack_weight(weight)``; None: the kernel is not wanted.
        bias: [96], fp32.
        gamma: [96], fp32; None: no norm and no SiLU, the result is ``total``.
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
    if tuple(weight.shape) != (CHANNELS, CHANNELS, 3, 3) or x.shape[-1] != CHANNELS:
        return f"the kernel takes 3x3 weights of 96 channels, not {list(weight.shape)}"
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
    if x.numel() == 0 or x.shape[-3] * x.shape[-2] * 12 >= 2**32 - 1 or _tiles(x) >= 2**30:
        return f"the kernel does not take the size {list(x.shape)}"
    return None


def _tiles(x: Tensor) -> int:
    height, width = x.shape[-3:-1]
    return x.numel() // (height * width * CHANNELS) * -(-height // _TILE[0]) * -(-width // _TILE[1])


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
    kernel = hopper.compiled("conv96", defines, _SHARED_BYTES, x.device)
    out = residual if residual is not None and gamma is None else torch.empty_like(x)
    height, width = x.shape[-3:-1]
    with torch.cuda.device(x.device):
        kernel(
            grid=(min(_tiles(x), hopper.multiprocessors(x.device)), 1, 1),
            block=(_THREADS, 1, 1),
            args=[
                x,
                packed,
                bias,
                bias if gamma is None else gamma,
                out if residual is None else residual,
                out,
                x.numel() // (height * width * CHANNELS),
                height,
                width,
            ],
            shared_mem=_SHARED_BYTES,
        )
    return out


fused_conv = FusedOp("fused_conv", _reference, _launch, _unfit, triton=False)
