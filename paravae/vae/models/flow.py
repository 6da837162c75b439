"""What runs between two blocks of a folded network, and the convolution that feeds it. See ``folded.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paravae.layers.fused_conv import fused_conv, is_fusable, pack_weight
from paravae.layers.norm_silu import norm_silu
from paravae.vae.models.blocks import CausalConv3d, FrameCache
from paravae.vae.models.stage import crop
from paravae.vae.plan import Window


@dataclass
class Flow:
    """The residual stream between two blocks, with what is still to be added to it.

    ``x``: [B, F, H, W, C], owned by whoever holds the flow, who may write to it; ``bias``: [C], at least fp32;
    ``branch``: like ``x``, or the convolution that will give it, left until it is known what follows. What has been
    added is let go of: at full resolution each of these is as large as all that the network holds elsewhere.
    """

    x: Tensor
    bias: Tensor | None = None
    branch: Tensor | Deferred | None = None

    def normed(self, gamma: Tensor, *, silu: bool = True, out: Tensor | None = None) -> Tensor:
        """Norm (and SiLU) of the sum. A branch is added to the stream by that, a lone bias still not."""
        if self.branch is None:
            return norm_silu(self.x, gamma, self.bias, silu=silu, out=out)
        if isinstance(self.branch, Deferred) and silu and out is None and self.bias is not None:
            result = self.branch.fused(self.bias, gamma, self.x)
        else:
            result = norm_silu(self._computed_branch(), gamma, self.bias, self.x, silu=silu, out=out)
        self.bias = self.branch = None
        return result

    def total(self) -> Tensor:
        """The stream, with everything added."""
        if isinstance(self.branch, Deferred) and self.bias is not None:
            self.branch.fused(self.bias, None, self.x)
        elif self.branch is not None:
            norm_silu(self._computed_branch(), None, self.bias, self.x, out=self.x)
        elif self.bias is not None:
            norm_silu(self.x, None, self.bias, out=self.x)
        self.bias = self.branch = None
        return self.x

    def total_to(self, out: Tensor) -> None:
        """Write the sum elsewhere, in any strides, and go on there."""
        if self.bias is None and self.branch is None:
            out.copy_(self.x)
        elif self.branch is None:
            norm_silu(self.x, None, self.bias, out=out)
        else:
            norm_silu(self._computed_branch(), None, self.bias, self.x, out=out)
        self.x, self.bias, self.branch = out, None, None

    def cropped(self, have: Window, want: Window) -> Flow:
        """``want`` of what covers ``have``."""
        if isinstance(self.branch, Deferred):
            self.total()  # one kernel with the sum

        def cut(x: Tensor) -> Tensor:
            return crop(x.movedim(-1, 0), have, want).movedim(0, -1)

        return Flow(cut(self.x), self.bias, None if self.branch is None else cut(self._computed_branch()))

    def _computed_branch(self) -> Tensor:
        if isinstance(self.branch, Deferred):
            self.branch = self.branch.now()
        assert self.branch is not None
        return self.branch


@dataclass(frozen=True)
class Deferred:
    """A convolution of a lone frame that has not been run: with what follows it, it is one kernel."""

    conv: FoldedConv
    activated: Tensor

    def now(self) -> Tensor:
        """Its raw output."""
        return self.conv(self.activated)

    def fused(self, bias: Tensor, gamma: Tensor | None, residual: Tensor) -> Tensor:
        """``fused_conv`` of it: ``residual`` becomes the sum, and is the result where there is no norm."""
        return self.conv.fused(self.activated, bias, gamma, residual)


def crop_flow(flow: Flow | Tensor, have: Window, want: Window) -> Flow | Tensor:
    """Cut ``want`` out of a flow, or of finished pixels [..., H, W], that covers ``have``."""
    if have == want:
        return flow
    return crop(flow, have, want) if isinstance(flow, Tensor) else flow.cropped(have, want)


class FoldedConv:
    """A causal convolution, same-padded in space, without its bias: 2-D for a lone frame, 3-D in a stream.

    It takes ``channels``: its own, or ``least_channels`` with zeros for those that it lacks.
    """

    def __init__(self, conv: CausalConv3d, least_channels: int = 0) -> None:
        missing = max(0, least_channels - conv.in_channels)
        self._weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else conv.weight
        self._lone = self._weight[:, :, -1].contiguous(memory_format=torch.channels_last)
        self._causal: Tensor | None = None
        self._padding = (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
        self.channels = self._weight.shape[1]
        self.history = conv.history
        self.bias = wide(conv.bias)
        # Where channels are few, library and norm take longer than one kernel; elsewhere they are as fast.
        self._packed = pack_weight(self._lone) if is_fusable(self._lone) else None

    @property
    def matrix(self) -> Tensor:
        """[C', C], in at least fp32, of a convolution of one tap."""
        return wide(self._lone.flatten(1))

    def room(self, like: Tensor, cache: FrameCache | None) -> tuple[Tensor, Tensor]:
        """Memory for an input of ``like``'s frames, and the part of it that these are to be written to: what
        stands before that part is the stream's history."""
        past = None if cache is None else cache.get(self)
        batch, frames, height, width = like.shape[:4]
        before = 0 if past is None else self.history
        whole = like.new_empty((batch, before + frames, height, width, self.channels))
        if past is not None:
            whole[:, :before] = past
        return whole, whole[:, before:]

    def in_stream(self, cache: FrameCache | None) -> bool:
        """Whether frames came before, so that the input needs ``room`` for them."""
        return cache is not None and self in cache

    def begin(self, first: Tensor, cache: FrameCache, *, remember: bool = True) -> None:
        """Start a stream with the frame ``first``, which is not remembered where the network forgets it."""
        past = first.new_zeros((first.shape[0], self.history, *first.shape[2:]))
        if remember:
            past[:, -1:] = first
        cache[self] = past

    def can_fuse(self, cache: FrameCache | None) -> bool:
        """Whether this is a lone frame's convolution for which ``fused`` is the better way."""
        return cache is None and self._packed is not None

    def fused(self, activated: Tensor, bias: Tensor, gamma: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """``fused_conv`` with these weights: convolution, bias, residual, norm and SiLU."""
        return fused_conv(activated, self._lone, self._packed, bias, gamma, residual)

    def __call__(self, whole: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Convolve what ``room`` made room for: [B, history + F, H, W, C] -> [B, F, H, W, C']."""
        if cache is None or not self.history or self not in cache:
            if cache is not None and self.history:
                self.begin(whole, cache)
            return each_frame(lambda x: F.conv2d(x, self._lone, padding=self._padding[1:]), whole)
        cache[self].copy_(whole[:, -self.history :])
        if self._causal is None:
            self._causal = self._weight.contiguous(memory_format=torch.channels_last_3d)
        convolved = F.conv3d(whole.permute(0, 4, 1, 2, 3), self._causal, padding=self._padding)
        return convolved.permute(0, 2, 3, 4, 1).contiguous()


def wide(parameter: Tensor | None) -> Tensor:
    """A parameter, which is there, in at least fp32."""
    assert parameter is not None
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def each_frame(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a 2-D op on every frame: [B, F, H, W, C] -> [B, F, H', W', C']."""
    y = run(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
    return y.unflatten(0, x.shape[:2])
