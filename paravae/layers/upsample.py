"""Nearest 2x upsampling and the 3x3 convolution after it, as one transposed convolution.

Of the nine taps that an output pixel sees after nearest upsampling, some fall on the same input pixel: along one
axis the three taps meet two pixels, one of them twice. Added up beforehand they make a kernel of 4 with stride 2:
4/9 of the work, and the upsampled picture is never written. Exact in exact arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Along one axis, kernel position by tap of the 3x3 convolution: output 2i sees input i-1 with tap 0 and i with
# taps 1 and 2; output 2i + 1 sees input i with taps 0 and 1 and i+1 with tap 2. A transposed convolution of
# stride 2 and padding 1 puts input i at outputs 2i - 1 + (0 .. 3).
_TAPS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def fold_upsample(weight: Tensor) -> Tensor:
    """Weights [C', C, 3, 3] of a convolution after nearest 2x -> [C, C', 4, 4] of the transposed one, same dtype.

    The sums are taken in at least fp32 and rounded once.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    taps = torch.tensor(_TAPS, dtype=wide, device=weight.device)
    return torch.einsum("octu,yt,xu->coyx", weight.to(wide), taps, taps).to(weight.dtype)


def upsample_conv(x: Tensor, folded: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C', 2 H, 2 W], without bias, same padding; ``folded`` as ``fold_upsample`` gives it."""
    return F.conv_transpose2d(x, folded, stride=2, padding=1)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """What ``upsample_conv`` stands for: the picture upsampled, then convolved with [C', C, 3, 3]."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
