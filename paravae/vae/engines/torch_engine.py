"""The plain PyTorch engine: the networks, run eagerly, on any device and in any floating dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paravae.vae.models.blocks import CausalConv3d, FrameCache
from paravae.vae.models.decoder import Decoder
from paravae.vae.models.encoder import Encoder
from paravae.vae.models.stage import crop, run_local
from paravae.vae.pixels import to_uint8
from paravae.vae.plan import Span, Window


class Networks(NamedTuple):
    """What an engine runs; a half that was not loaded is None. ``temporal_ratio``: pixel frames of a latent frame."""

    encoder: Encoder | None
    quant_conv: CausalConv3d | None
    post_quant_conv: CausalConv3d | None
    decoder: Decoder | None
    temporal_ratio: int


class TorchEngine:
    """Runs the networks it is given; implements ``engines.base.Engine``. Differentiable: it sets no grad mode."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        encoder, decoder = networks.encoder, networks.decoder
        self._body = () if encoder is None else encoder.body()
        self._tail = () if decoder is None else decoder.tail()
        self.encoder_stages = tuple(stage.geometry for stage in self._body)
        self.decoder_stages = tuple(stage.geometry for stage in self._tail)
        self.feature_channels = 0 if encoder is None else encoder.feature_channels

    def decode(self, latents: Tensor, trace: Sequence[Window], *, as_uint8: bool = False) -> Iterator[Tensor]:
        post_quant_conv, decoder = self._decoder_parts()
        cache = self._stream(latents.shape[2])
        for frame in latents.split(1, dim=2):
            features = decoder.head(post_quant_conv(frame), cache)
            pixels = run_local(self._tail, cut(features, trace[0]), trace, cache).clamp(-1, 1)
            yield to_uint8(pixels) if as_uint8 else pixels

    def encode_window(self, pixels: Tensor, trace: Sequence[Window]) -> Iterator[Tensor]:
        self._encoder_parts()
        cache = self._stream(pixels.shape[2])
        for piece in self._pieces(pixels):
            yield run_local(self._body, cut(piece, trace[0]), trace, cache)

    def encode_features(self, features: Tensor) -> Tensor:
        encoder, quant_conv = self._encoder_parts()
        cache = self._stream(features.shape[2])
        moments = [encoder.head(frame, cache) for frame in features.split(1, dim=2)]
        return quant_conv(torch.cat(moments, dim=2))

    def head_work(self, lat_height: int, lat_width: int) -> int:
        decoder = self._networks.decoder
        return 0 if decoder is None else decoder.head_work(lat_height, lat_width)

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


def cut(x: Tensor, window: Window) -> Tensor:
    """``window`` of [..., H, W]."""
    return crop(x, whole_of(x), window)


def whole_of(x: Tensor) -> Window:
    """The window that [..., H, W] is."""
    return Window(Span(0, x.shape[-2]), Span(0, x.shape[-1]))
