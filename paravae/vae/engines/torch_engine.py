"""The plain PyTorch engine: the networks, run eagerly, on any device and in any floating dtype."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paravae.vae.engines.base import Agree, HeadShare, Load
from paravae.vae.engines.graphs import EAGER
from paravae.vae.models.blocks import AttentionPart, CausalConv3d, FrameCache
from paravae.vae.models.decoder import Decoder
from paravae.vae.models.encoder import Encoder
from paravae.vae.models.stage import Stage, crop, run_local
from paravae.vae.pixels import to_uint8
from paravae.vae.plan import Span, Stages, Window, peak_elements, whole


class Networks(NamedTuple):
    """What an engine runs; a half that was not loaded is None. ``temporal_ratio``: pixel frames of a latent frame."""

    encoder: Encoder | None
    quant_conv: CausalConv3d | None
    post_quant_conv: CausalConv3d | None
    decoder: Decoder | None
    temporal_ratio: int


class TorchEngine:
    """Runs the networks it is given; implements ``engines.base.Engine``. Differentiable: it sets no grad mode."""

    shares_head = True

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        encoder, decoder = networks.encoder, networks.decoder
        self._body = () if encoder is None else encoder.body()
        self._tail = () if decoder is None else decoder.tail()
        self.encoder_stages = _geometry(self._body)
        self.encoder_front = () if encoder is None else _geometry(encoder.front())
        self.decoder_front = () if decoder is None else _geometry(decoder.front())
        self.decoder_stages = _geometry(self._tail)
        self.feature_channels = 0 if encoder is None else encoder.feature_channels
        self.attention_channels = 0 if decoder is None else decoder.attention.channels

    def decode(
        self, latents: Tensor, trace: Sequence[Window], *, as_uint8: bool = False, head: HeadShare | None = None
    ) -> Iterator[Tensor]:
        post_quant_conv, decoder = self._decoder_parts()
        front, part = self._head_plan(self.decoder_front, latents, trace[0], head)
        cache = self._stream(latents.shape[2])
        for index, frame in enumerate(latents.split(1, dim=2)):
            x = run_local(decoder.front(), post_quant_conv(cut(frame, front[0])), front, cache)
            x = decoder.attention(x, part)
            if head is not None:
                x = cut(head.gather(x, 3), trace[0])
            if not trace[-1].area:
                yield self.no_pixels(latents, index, as_uint8)
                continue
            pixels = run_local(self._tail, x, trace, cache).clamp(-1, 1)
            yield to_uint8(pixels) if as_uint8 else pixels

    def encode_window(self, pixels: Tensor, trace: Sequence[Window]) -> Iterator[Tensor]:
        self._encoder_parts()
        cache = self._stream(pixels.shape[2])
        for piece in self._pieces(pixels):
            yield run_local(self._body, cut(piece, trace[0]), trace, cache)

    def encode(self, pixels: Tensor) -> Tensor:
        trace = whole(self.encoder_stages, pixels.shape[-2], pixels.shape[-1])
        return self.encode_features(torch.cat(list(self.encode_window(pixels, trace)), dim=2))

    def encode_features(self, features: Tensor, head: HeadShare | None = None) -> Tensor:
        encoder, quant_conv = self._encoder_parts()
        front, part = self._head_plan(self.encoder_front, features, whole_of(features), head)
        cache = self._stream(features.shape[2])
        moments = []
        for frame in features.split(1, dim=2):
            x = run_local(encoder.front(), cut(frame, front[0]), front, cache)
            x = encoder.attention(x, part)
            moments.append(encoder.last(x if head is None else head.gather(x, 3), cache))
        return quant_conv(torch.cat(moments, dim=2))

    def call(
        self, load: Load, key: Hashable, function: Callable[[Tensor], Tensor], value: Tensor, agree: Agree
    ) -> Tensor:
        agree(EAGER)
        return function(value)

    def repeats(self, call: Callable[[], None]) -> bool:
        return False

    def kind(self, dtype: torch.dtype, device: torch.device) -> str:
        return "torch16" if dtype.itemsize == 2 else "torch32"

    def estimated_bytes(self, load: Load, dtype: torch.dtype, device: torch.device, *, stream: bool) -> int:
        """At the largest activation there live at once: its input, output and shortcut in ``dtype``, and the norm's
        copies in at least fp32. A stream runs ``temporal_ratio`` frames at a time, keeps two more for each of the
        seven convolutions of that level, and copies them together for each convolution, whose 3-D kernels take as
        much again to work in. Measured on an H200 at 512 x 512: 0.6 to 0.9 of this.
        """
        frames = self._networks.temporal_ratio if stream else 1
        narrow, wide = dtype.itemsize, max(dtype.itemsize, 4)
        frame_bytes = 4 * narrow + 3 * wide
        stream_bytes = 14 * narrow + 2 * (frames + 2) * narrow if stream else 0
        return self._peak_values(load) * (frames * frame_bytes + stream_bytes)

    def _peak_values(self, load: Load) -> int:
        """Numbers in the largest activation of one frame of all images."""
        stages = self.decoder_stages if load.half == "decoder" else self.encoder_stages
        return load.images * peak_elements(stages, load.trace)

    @staticmethod
    def _head_plan(
        stages: Stages, given: Tensor, wanted: Window, head: HeadShare | None
    ) -> tuple[Sequence[Window], AttentionPart]:
        """The front stages' trace, and the attention's part that is computed here."""
        if head is not None:
            return head.trace, AttentionPart(head.trace[-1], head.trace[-1], head.gather)
        front = whole(stages, given.shape[-2], given.shape[-1])
        return front, AttentionPart(front[-1], wanted)

    def no_pixels(self, latents: Tensor, index: int, as_uint8: bool) -> Tensor:
        """What an empty window gives for the latent frame number ``index``."""
        frames = self._networks.temporal_ratio if index else 1
        channels = self._decoder_parts()[1].conv_out.out_channels
        dtype = torch.uint8 if as_uint8 else latents.dtype
        return latents.new_empty((latents.shape[0], channels, frames, 0, 0), dtype=dtype)

    def _decoder_parts(self) -> tuple[CausalConv3d, Decoder]:
        post_quant_conv, decoder = self._networks.post_quant_conv, self._networks.decoder
        if decoder is None or post_quant_conv is None:
            raise ValueError("this VAE was built without its decoder (load_decoder=False), so it cannot decode")
        return post_quant_conv, decoder

    def _encoder_parts(self) -> tuple[Encoder, CausalConv3d]:
        encoder, quant_conv = self._networks.encoder, self._networks.quant_conv
        if encoder is None or quant_conv is None:
            raise ValueError("this VAE was built without its encoder (load_encoder=False), so it cannot encode")
        return encoder, quant_conv

    def _pieces(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The frames that make one latent frame each: the first alone, then ``temporal_ratio`` at a time."""
        lone, rest = pixels[:, :, :1], pixels[:, :, 1:]
        return (lone, *rest.split(self._networks.temporal_ratio, dim=2)) if rest.shape[2] else (lone,)

    @staticmethod
    def _stream(frames: int) -> FrameCache | None:
        """A lone frame leaves nothing to remember, so it needs no cache (and no copies)."""
        return {} if frames > 1 else None


def _geometry(stages: Sequence[Stage]) -> Stages:
    return tuple(stage.geometry for stage in stages)


def cut(x: Tensor, window: Window) -> Tensor:
    """``window`` of [..., H, W]."""
    return crop(x, whole_of(x), window)


def whole_of(x: Tensor) -> Window:
    """The window that [..., H, W] is."""
    return Window(Span(0, x.shape[-2]), Span(0, x.shape[-1]))
