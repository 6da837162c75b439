"""What a decode or encode must compute and move, counted on the plain network without running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paravae import AutoencoderKLQwenImage, VAEConfig
from paravae.launch.bench_model import plain
from paravae.vae import plan
from paravae.vae.models.blocks import Attention, Downsample, ResidualBlock, Upsample

COST_WORDS = (
    "flops: of the plain network for this input, a multiply-add being 2, counted by FlopCounterMode on meta tensors "
    "(convolutions, attention; tiles and windows do more). block_bytes: every residual block's, resampling's and "
    "attention's output written once and read once, the input read and the result written, in the benched dtype: "
    "what must move if each block were one kernel; fusing across blocks would move less. "
    "matmul_share, copy_share: flops and block_bytes a second, as a share of the machine's rates."
)


@dataclass(frozen=True)
class Cost:
    """Of the whole input: ``flops``, and the ``values`` that are read and written."""

    flops: int
    values: int


@torch.no_grad()
def count(config: VAEConfig, what: str, latents: tuple[int, ...], pixels: tuple[int, ...]) -> Cost:
    """The cost of decoding latents [B, z, T, h, w] to pixels [B, 3, F, 8 h, 8 w], or of encoding them back.

    Meta tensors have shapes and no memory: so this takes a second at any size, video included.
    """
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(plain(config))
        given = torch.empty(latents if what == "decode" else pixels)
    outputs = 0

    def add(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal outputs
        outputs += output.numel()

    for module in vae.modules():
        if isinstance(module, ResidualBlock | Upsample | Downsample | Attention):
            module.register_forward_hook(add)
    with FlopCounterMode(display=False) as counter:
        result = _decode(vae, given) if what == "decode" else _encode(vae, given)
    return Cost(counter.get_total_flops(), 2 * outputs + given.numel() + result)


def _decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> int:
    """Run the decoder; the number of pixels' values."""
    trace = plan.whole(vae.engine.decoder_stages, latents.shape[-2], latents.shape[-1])
    return sum(piece.numel() for piece in vae.engine.decode(latents, trace))


def _encode(vae: AutoencoderKLQwenImage, pixels: Tensor) -> int:
    """Run the encoder; the number of moments' values."""
    trace = plan.whole(vae.engine.encoder_stages, pixels.shape[-2], pixels.shape[-1])
    features = torch.cat(list(vae.engine.encode_window(pixels, trace)), dim=2)
    return vae.engine.encode_features(features).numel()
