"""The networks as they run fast: weights folded once, activations channels last, no pass for a bias alone.

They compute what ``decoder.py`` and ``encoder.py`` compute, from the same weights, to rounding:

- A lone frame's causal convolutions meet only their last tap in time: they are 2-D.
- Convolutions leave their bias to whoever reads their output next. What is still to be added to the residual
  stream, a bias and a branch, travels with it (``Flow``) until a norm has to read it anyway (``norm_silu``).
- Upsampling and its convolution are one transposed convolution; the projection after the attention is part of the
  values; the last norm, convolution and clamp are ``to_pixels``.

Activations are [B, F, H, W, C]. As in ``blocks.py`` a stream's state stands in a ``FrameCache``, ``None`` for a
lone frame; the first piece of a stream is one frame.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paravae.layers.attention import wide_attention
from paravae.layers.norm_silu import norm_silu
from paravae.layers.to_pixels import tap_columns, to_pixels
from paravae.layers.upsample import fold_upsample, upsample_conv
from paravae.vae.models.blocks import (
    Attention,
    AttentionPart,
    CausalConv3d,
    Downsample,
    FrameCache,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from paravae.vae.models.decoder import Decoder
from paravae.vae.models.encoder import Encoder
from paravae.vae.models.flow import Deferred, Flow, FoldedConv, each_frame, wide
from paravae.vae.models.stage import Stage
from paravae.vae.pixels import to_uint8

_PIXEL_CHANNELS = 8  # cuDNN's channels-last kernels for matrix units take multiples of 8, so not 3


class FoldedResidual:
    """``ResidualBlock``: its second convolution's output stays a branch of the flow."""

    def __init__(self, block: ResidualBlock) -> None:
        self._gamma1, self._gamma2 = _gamma(block.norm1), _gamma(block.norm2)
        self._conv1, self._conv2 = FoldedConv(block.conv1), FoldedConv(block.conv2)
        self._shortcut = None if block.conv_shortcut is None else FoldedConv(block.conv_shortcut)

    def __call__(self, flow: Flow, cache: FrameCache | None = None) -> Flow:
        if self._conv1.in_stream(cache):
            whole, new = self._conv1.room(flow.x, cache)
            flow.normed(self._gamma1, out=new)
        else:
            whole = flow.normed(self._gamma1)
        if self._conv1.can_fuse(cache):
            activated = self._conv1.fused(whole, self._conv1.bias, self._gamma2)
        else:
            activated = self._between(whole, cache)
        del whole  # as large as anything here: let the next take its place
        x, bias = self._way_round(flow)
        deferred = self._conv2.can_fuse(cache)
        return Flow(x, bias, Deferred(self._conv2, activated) if deferred else self._conv2(activated, cache))

    def _between(self, whole: Tensor, cache: FrameCache | None) -> Tensor:
        """First convolution, norm and SiLU: what the second convolution reads, its history included."""
        middle = self._conv1(whole, cache)
        if self._conv2.in_stream(cache):
            whole, new = self._conv2.room(middle, cache)
        else:
            whole = new = middle
        norm_silu(middle, self._gamma2, self._conv1.bias, out=new)
        return whole

    def _way_round(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """The stream beside the block, and all bias that stream and branch still lack."""
        x, bias = flow.x, self._conv2.bias
        if self._shortcut is None:
            return x, bias if flow.bias is None else bias + flow.bias
        bias = bias + self._shortcut.bias
        if flow.bias is not None:
            bias = bias + self._shortcut.matrix @ flow.bias
        return self._shortcut(x), bias


class FoldedAttention:
    """``Attention``, the projection taken into the values: the rows of softmax add up to one, so their bias too."""

    def __init__(self, attention: Attention) -> None:
        weight, bias = attention.to_qkv.weight.flatten(1), attention.to_qkv.bias
        assert bias is not None
        projection = wide(attention.proj.weight).flatten(1)
        query_key, value = weight.tensor_split((2 * weight.shape[1],))
        query_key_bias, value_bias = bias.tensor_split((2 * weight.shape[1],))
        self._weight = torch.cat([query_key, (projection @ wide(value)).to(weight.dtype)])
        self._qkv_bias = torch.cat([query_key_bias, torch.zeros_like(value_bias)])
        self._bias = projection @ wide(value_bias) + wide(attention.proj.bias)
        self._gamma = _gamma(attention.norm)

    def __call__(self, flow: Flow, part: AttentionPart | None = None) -> Flow:
        """The flow of the whole frame, or of ``part.wanted`` only."""
        normed = flow.normed(self._gamma, silu=False)
        qkv = F.linear(normed.flatten(0, 1), self._weight, self._qkv_bias)  # [B F, H, W, 3 C]
        query, keys_values = qkv.tensor_split((qkv.shape[-1] // 3,), dim=-1)  # views
        if part is not None:
            keys_values, query = part.together(keys_values, 1), part.cut(query, 1)
            flow = flow.cropped(part.given, part.wanted)
        branch = wide_attention(query.flatten(1, 2), keys_values.flatten(1, 2)).view(flow.x.shape)
        return Flow(flow.x, self._bias if flow.bias is None else self._bias + flow.bias, branch)


class FoldedUpsample:
    """``Upsample``."""

    def __init__(self, upsample: Upsample) -> None:
        conv = upsample.resample[1]
        assert isinstance(conv, nn.Conv2d)
        self._weight = fold_upsample(conv.weight).contiguous(memory_format=torch.channels_last)
        self._bias = wide(conv.bias)
        self._time_conv = None if upsample.time_conv is None else FoldedConv(upsample.time_conv)

    def __call__(self, flow: Flow, cache: FrameCache | None = None) -> Flow:
        x = flow.total()
        if self._time_conv is not None and cache is not None:
            if self._time_conv.in_stream(cache):
                x = self._double_frames(self._time_conv, x, cache)
            else:
                self._time_conv.begin(x, cache, remember=False)
        return Flow(each_frame(lambda picture: upsample_conv(picture, self._weight), x), self._bias)

    @staticmethod
    def _double_frames(time_conv: FoldedConv, x: Tensor, cache: FrameCache) -> Tensor:
        """[B, F, H, W, C] -> [B, 2 F, H, W, C]: the halves of the convolution's channels are even and odd frames."""
        whole, new = time_conv.room(x, cache)
        new.copy_(x)
        doubled = Flow(time_conv(whole, cache), time_conv.bias).total()
        return doubled.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2).contiguous()


class FoldedDownsample:
    """``Downsample``."""

    def __init__(self, downsample: Downsample) -> None:
        conv = downsample.resample[1]
        assert isinstance(conv, nn.Conv2d)
        self._weight = conv.weight.contiguous(memory_format=torch.channels_last)
        self._bias = wide(conv.bias)
        self._time_conv = downsample.time_conv
        if downsample.time_conv is not None:
            self._time_weight = downsample.time_conv.weight.contiguous(memory_format=torch.channels_last_3d)
            self._time_bias = wide(downsample.time_conv.bias)

    def __call__(self, flow: Flow, cache: FrameCache | None = None) -> Flow:
        batch, frames, height, width, channels = flow.x.shape
        if isinstance(flow.branch, Deferred):
            flow.total()  # fused with the sum, and before there is one more tensor of this size
        padded = flow.x.new_empty((batch, frames, height + 1, width + 1, channels))
        padded[:, :, height] = 0
        padded[:, :, :, width] = 0
        flow.total_to(padded[:, :, :height, :width])
        flow = Flow(each_frame(lambda x: F.conv2d(x, self._weight, stride=2), padded), self._bias)
        if self._time_conv is None or cache is None:
            return flow
        x, past = flow.total(), cache.get(self)
        cache[self] = x[:, -1:].clone()
        if past is None:
            return Flow(x)
        stream = torch.cat([past, x], dim=1).permute(0, 4, 1, 2, 3)
        halved = F.conv3d(stream, self._time_weight, stride=(2, 1, 1)).permute(0, 2, 3, 4, 1)
        return Flow(halved.contiguous(), self._time_bias)


_FOLDED: dict[type[nn.Module], Callable[..., Callable[[Flow, FrameCache | None], Flow]]] = {
    ResidualBlock: FoldedResidual,
    Upsample: FoldedUpsample,
    Downsample: FoldedDownsample,
}


class FoldedDecoder:
    """``Decoder`` with the convolution before it: latents [B, z, 1, h, w] to pixels, a latent frame at a time."""

    def __init__(self, post_quant_conv: CausalConv3d, decoder: Decoder) -> None:
        self._post_quant_conv = post_quant_conv
        self._conv_in = FoldedConv(decoder.conv_in)
        self._gamma, self._conv_out = _gamma(decoder.norm_out), FoldedConv(decoder.conv_out)
        self._columns = tap_columns(decoder.conv_out.weight[:, :, -1])
        first, *front = decoder.front()
        self._front = (Stage(self._enter, first.geometry), *map(_folded, front))
        self.attention = FoldedAttention(decoder.attention)
        *local, last = decoder.tail()
        self._local = tuple(map(_folded, local))
        self._last_geometry = last.geometry

    def front(self) -> tuple[Stage, ...]:
        """The local stages from latents [B, z, 1, h, w] to what the attention is given."""
        return self._front

    def _enter(self, latents: Tensor, cache: FrameCache | None) -> Flow:
        z = self._post_quant_conv(latents, cache)
        whole, new = self._conv_in.room(z.movedim(1, -1), cache)
        _channels_last(z, new)
        return Flow(self._conv_in(whole, cache), self._conv_in.bias)

    def tail(self, *, as_uint8: bool) -> tuple[Stage, ...]:
        """The local stages, the last of which gives pixels [B, 3, F, H, W], clamped."""
        return (*self._local, Stage(partial(self._to_pixels, as_uint8=as_uint8), self._last_geometry))

    def _to_pixels(self, flow: Flow, cache: FrameCache | None, *, as_uint8: bool) -> Tensor:
        if cache is None:
            branch = flow.branch
            if isinstance(branch, Deferred):
                flow.total()
                branch = None
            x, residual = (flow.x, None) if branch is None else (branch, flow.x)
            bias = flow.x.new_zeros(self._gamma.shape, dtype=self._gamma.dtype) if flow.bias is None else flow.bias
            return to_pixels(x, residual, bias, self._gamma, self._columns, self._conv_out.bias, as_uint8=as_uint8)
        whole, new = self._conv_out.room(flow.x, cache)
        flow.normed(self._gamma, out=new)
        raw = self._conv_out(whole, cache)
        pixels = (raw.to(self._conv_out.bias.dtype) + self._conv_out.bias).clamp_(-1, 1).movedim(-1, 1)
        return to_uint8(pixels) if as_uint8 else pixels.to(raw.dtype)


class FoldedEncoder:
    """``Encoder`` with the convolution after it."""

    def __init__(self, encoder: Encoder, quant_conv: CausalConv3d) -> None:
        self._conv_in = FoldedConv(encoder.conv_in, _PIXEL_CHANNELS)
        self._gamma, self._conv_out = _gamma(encoder.norm_out), FoldedConv(encoder.conv_out)
        self._quant_conv = quant_conv
        first, *local = encoder.body()
        self._body = (Stage(self._enter, first.geometry), *map(_folded, local))
        self._front = tuple(map(_folded, encoder.front()))
        self.attention = FoldedAttention(encoder.attention)
        self._after_attention = FoldedResidual(encoder.after_attention)

    def body(self) -> tuple[Stage, ...]:
        """The local stages, the first of which takes pixels [B, 3, F, H, W]."""
        return self._body

    def _enter(self, pixels: Tensor, cache: FrameCache | None) -> Flow:
        whole, new = self._conv_in.room(pixels.movedim(1, -1), cache)
        _channels_last(pixels, new)
        return Flow(self._conv_in(whole, cache), self._conv_in.bias)

    def front(self) -> tuple[Stage, ...]:
        """The local stages from a flow of features to what the attention is given."""
        return self._front

    def last(self, flow: Flow, cache: FrameCache | None) -> Tensor:
        """What the attention gives for the whole frame -> moments [B, 2 z, 1, h, w]."""
        flow = self._after_attention(flow, cache)
        whole, new = self._conv_out.room(flow.x, cache)
        flow.normed(self._gamma, out=new)
        moments = Flow(self._conv_out(whole, cache), self._conv_out.bias).total()
        return self._quant_conv(moments.movedim(-1, 1), cache)


def _folded(stage: Stage) -> Stage:
    assert isinstance(stage.run, nn.Module)
    return Stage(_FOLDED[type(stage.run)](stage.run), stage.geometry)


def _gamma(norm: RMSNorm) -> Tensor:
    return wide(norm.gamma.flatten())


def _channels_last(x: Tensor, out: Tensor) -> None:
    """Write [B, C, F, H, W] to ``out``, [B, F, H, W, C'] with C' >= C; zeros for the channels that x lacks."""
    channels = x.shape[1]
    out[..., :channels] = x.movedim(1, -1)
    out[..., channels:] = 0
