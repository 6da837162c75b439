"""The parts that encoder and decoder are made of. Tensors are [B, C, T, H, W] throughout.

Convolutions are causal in time: a frame sees itself and the two before it, zero frames standing in before the
first. A stream of frames is fed piece by piece, and what a layer must remember between pieces stands in a
``FrameCache`` that the caller makes, passes down and drops: one for each stream, ``None`` for a lone frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paravae.vae.plan import LocalStage, Window

FrameCache = dict[object, Tensor]
"""By causal layer, its memory of its stream: its own last one or two input frames."""


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution, same-padded in space, that looks only backwards in time."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        self.history = self.kernel_size[0] - 1  # frames before its own that an output frame sees
        self.padding = (0, self.kernel_size[1] // 2, self.kernel_size[2] // 2)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Convolve the next frames of a stream: [B, C, T, H, W] -> [B, C', T, H, W]."""
        past = None if cache is None else cache.get(self)
        alone = past is None and x.shape[2] == 1
        if alone and cache is None:
            return self._lone_frame(x)
        padded = self._after(past, x)
        if cache is not None and self.history:
            cache[self] = padded[:, :, -self.history :].clone()
        return self._lone_frame(x) if alone else super().forward(padded)

    def _after(self, past: Tensor | None, x: Tensor) -> Tensor:
        """``x`` with the ``history`` frames before it, zeros where there were none."""
        if past is None:
            return F.pad(x, (0, 0, 0, 0, self.history, 0))
        return torch.cat([past, x], dim=2)

    def _lone_frame(self, x: Tensor) -> Tensor:
        """A frame with nothing before it meets only the last tap in time: a 2-D convolution, a third of the work."""
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])[:, :, None]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel, in at least fp32."""

    def __init__(self, channels: int, *, frames: bool = True) -> None:
        super().__init__()
        # Published checkpoints store gamma broadcastable to [C, T, H, W], the attention's to [C, H, W].
        self.gamma = nn.Parameter(torch.ones((channels, 1, 1, 1) if frames else (channels, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, ...] over C."""
        return self._in_fp32(x).to(x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the normalised values, rounded to x's dtype once, at the end."""
        return F.silu(self._in_fp32(x)).to(x.dtype)

    def _in_fp32(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return F.normalize(wide, dim=1) * (self.gamma.to(wide.dtype) * x.shape[1] ** 0.5)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and the way round them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = RMSNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None
        work = (
            9 * out_channels * (in_channels + out_channels) + (in_channels != out_channels) * in_channels * out_channels
        )
        self.geometry = LocalStage("same", margin=2, channels=out_channels, work=work)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(self.norm1.silu(x), cache)
        return self.conv2(self.norm2.silu(x), cache) + shortcut


Together = Callable[[Tensor, int], Tensor]
"""Takes this rank's rows of a map of the whole frame, and the axis they stand along; gives the whole."""


@dataclass(frozen=True)
class AttentionPart:
    """The part of an attention that is computed here: ``given`` is what its input covers, ``wanted`` what attends.

    ``gather``: brings all ranks' rows of keys and values together; None: the input covers the whole frame.
    """

    given: Window
    wanted: Window
    gather: Together | None = None

    def together(self, rows: Tensor, axis: int) -> Tensor:
        """The whole frame's, of what is had here; ``axis``: of the rows."""
        return rows if self.gather is None else self.gather(rows, axis)

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """``wanted`` of what covers ``given``; ``axis``: of the rows, the columns' is the next."""
        for place, have, want in (
            (axis, self.given.rows, self.wanted.rows),
            (axis + 1, self.given.cols, self.wanted.cols),
        ):
            x = x.narrow(place, want.start - have.start, want.size)
        return x


class Attention(nn.Module):
    """One attention head over all positions of a frame: the only part of the network that is not local."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm = RMSNorm(channels, frames=False)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, part: AttentionPart | None = None) -> Tensor:
        """[B, C, T, H, W] -> the same, or of ``part.wanted`` only."""
        batch, channels, frames, height, width = x.shape
        pictures = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        qkv = self.to_qkv(self.norm(pictures)).movedim(1, -1)  # [B T, H, W, 3 C]
        query, keys_values = qkv.tensor_split((channels,), dim=-1)
        if part is not None:
            keys_values = part.together(keys_values, 1)
            query, x = part.cut(query, 1), part.cut(x, 3)
            height, width = x.shape[-2:]
        # Clones, not .contiguous(), which leaves a lone token the strides that no CUDA kernel takes.
        tokens = [
            some.flatten(1, 2)[:, None].clone(memory_format=torch.contiguous_format)  # [B T, 1 head, tokens, C]
            for some in (query, *keys_values.chunk(2, dim=-1))
        ]
        attended = F.scaled_dot_product_attention(*tokens)
        attended = attended[:, 0].transpose(1, 2).reshape(batch * frames, channels, height, width)
        return self.proj(attended).view(batch, frames, channels, height, width).transpose(1, 2) + x


class MidBlock(nn.Module):
    """Residual block, attention, residual block. What runs them: ``decoder.py`` and ``encoder.py``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])
        self.attentions = nn.ModuleList([Attention(channels)])


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a 2-D layer on every frame of [B, C, T, H, W]."""
    batch, _, frames = x.shape[:3]
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (batch, frames)).transpose(1, 2)


class Nearest2x(nn.Upsample):
    """Repeat every pixel 2 x 2. fp64 passes through fp32, as in the published network: other dtypes lose nothing."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).double() if x.dtype == torch.float64 else super().forward(x)


class Upsample(nn.Module):
    """Double height and width and halve the channels; with ``in_time``, double the frames after the first too."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(Nearest2x(), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None
        self.geometry = LocalStage(
            "up", margin=1, channels=channels // 2, work=9 * channels * (channels // 2), frames_up=1 + in_time
        )

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        if self.time_conv is not None and cache is not None:
            if self.time_conv in cache:
                x = self._double_frames(self.time_conv(x, cache))
            else:  # the stream's first frame stays one frame and is not remembered
                history = (*x.shape[:2], self.time_conv.history, *x.shape[3:])
                cache[self.time_conv] = x.new_zeros(history)
        return _each_frame(self.resample, x)

    @staticmethod
    def _double_frames(x: Tensor) -> Tensor:
        """[B, 2 C, T, H, W] -> [B, C, 2 T, H, W]: the channel halves are the even and the odd frames."""
        return x.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)


class Downsample(nn.Module):
    """Halve height and width; with ``in_time``, halve the frames after the first too."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if in_time else None
        self.geometry = LocalStage("down", margin=1, channels=channels, work=9 * channels * channels)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        x = _each_frame(self.resample, x)
        if self.time_conv is None or cache is None:
            return x
        past = cache.get(self.time_conv)
        cache[self.time_conv] = x[:, :, -1:].clone()
        return x if past is None else self.time_conv(torch.cat([past, x], dim=2))
