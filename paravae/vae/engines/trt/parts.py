"""The networks at one frame, as TensorRT is given them: 2-D modules made of the plain networks' weights.

A lone frame's causal convolutions meet only their last tap in time (``models/blocks.py``), so here there are 2-D
convolutions of that tap, and nothing of five dimensions. A network is exported whole, or in the two parts that
exact windows need: one that sees the whole frame because it holds the attention, and one that is local.

Legend: B images, h and w of the latents, r and c of a window of features. A window is run as if it were a whole
picture: zeros beyond its edges are the truth at the picture's border and spoil no more than the halo elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paravae.configs import VAEArchConfig, VAEConfig
from paravae.vae.checks import check_half
from paravae.vae.models.blocks import Attention, CausalConv3d, Downsample, ResidualBlock, RMSNorm, Upsample
from paravae.vae.models.decoder import Decoder, UpBlock
from paravae.vae.models.encoder import Encoder
from paravae.vae.pixels import to_uint8

Part = Literal["decoder", "encoder", "decoder_head", "decoder_tail", "encoder_body", "encoder_head"]
"""decoder: latents [B, z, h, w] -> pixels [B, 3, 8h, 8w]. decoder_head: latents -> features [B, C, h, w], what the
attention gives. decoder_tail: features [B, C, r, c] -> pixels [B, 3, 8r, 8c], a window.
encoder: pixels -> moments [B, 2z, h, w]. encoder_body: pixels [B, 3, 8r, 8c], a window -> features [B, C, r, c].
encoder_head: features [B, C, h, w], the whole -> moments."""
PARTS: tuple[Part, ...] = get_args(Part)
PORTS: dict[Part, tuple[str, str]] = {
    "decoder": ("latents", "pixels"),
    "encoder": ("pixels", "moments"),
    "decoder_head": ("latents", "features"),
    "decoder_tail": ("features", "pixels"),
    "encoder_body": ("pixels", "features"),
    "encoder_head": ("features", "moments"),
}
"""What a part's input and output are called in its graph."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OUTPUTS = ("float", "uint8")


@dataclass(frozen=True)
class ExportOptions:
    """What a graph computes in, and what it does before and after the network.

    ``dtype``: of weights, activations, input and output; norms are computed in float32 inside.
    ``denormalize``: latents come as diffusion models hand them over, and z * std + mean is in the graph.
    ``output``: of pixels: "float", [B, 3, H, W] in [-1, 1]; or "uint8", [B, H, W, 3], 0..255 as ``pixels.to_uint8``.
    """

    dtype: str = "float16"
    denormalize: bool = False
    output: str = "float"

    def __post_init__(self) -> None:
        for name, choices in (("dtype", tuple(DTYPES)), ("output", OUTPUTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, needs one of {', '.join(choices)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def for_part(self, part: Part) -> ExportOptions:
        """These, without what ``part`` has no place for: latents to denormalise, pixels to round."""
        takes, gives = PORTS[part]
        return replace(
            self,
            denormalize=self.denormalize and takes == "latents",
            output=self.output if gives == "pixels" else "float",
        )


class ExportedVAE(Protocol):
    """What is exported: ``AutoencoderKLQwenImage``, which stands in a layer above this one."""

    @property
    def config(self) -> VAEConfig: ...
    @property
    def encoder(self) -> Encoder | None: ...
    @property
    def quant_conv(self) -> CausalConv3d | None: ...
    @property
    def post_quant_conv(self) -> CausalConv3d | None: ...
    @property
    def decoder(self) -> Decoder | None: ...


def part_module(vae: ExportedVAE, part: Part, options: ExportOptions) -> nn.Module:
    """``part`` of ``vae``, on the CPU: [B, C, H, W] in ``options.dtype`` -> see ``Part``.

    Weights are rounded to ``options.dtype`` once; those that are in it already are shared where nothing was cut.

    Raises:
        ValueError: the VAE lacks that half, or ``options`` hold what the part has no place for.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, needs one of {', '.join(PARTS)}")
    if options != options.for_part(part):
        raise ValueError(f"{part} takes {PORTS[part][0]} and gives {PORTS[part][1]}: it has no place for {options}")
    return nn.Sequential(*_layers(vae, part, options)).eval().requires_grad_(False)


def input_channels(vae: ExportedVAE, part: Part) -> int:
    """Channels of a part's input."""
    arch = vae.config.arch_config
    takes = PORTS[part][0]
    if takes == "features":
        return _half(vae, part).attention.channels
    return arch.z_dim if takes == "latents" else arch.input_channels


def _half(vae: ExportedVAE, part: Part) -> Decoder | Encoder:
    name = part.split("_")[0]
    half = vae.decoder if name == "decoder" else vae.encoder
    check_half(name, half is not None)
    assert half is not None
    return half


def _layers(vae: ExportedVAE, part: Part, options: ExportOptions) -> Iterator[nn.Module]:
    """The layers of ``part`` in order; a whole network is both of its parts."""
    dtype, network = options.torch_dtype, _half(vae, part)
    if isinstance(network, Decoder):
        if part != "decoder_tail":
            assert vae.post_quant_conv is not None
            if options.denormalize:
                yield _Denormalize(vae.config.arch_config, dtype)
            yield _conv(vae.post_quant_conv, dtype)
            yield from _up_to_attention(network, network.conv_in, dtype)
        if part != "decoder_head":
            yield from _decoder_tail(network, dtype)
            yield _Levels() if options.output == "uint8" else nn.Hardtanh(-1, 1)
    else:
        if part != "encoder_head":
            yield _conv(network.conv_in, dtype)
            yield from (_layer(layer, dtype) for layer in network.down_blocks)
        if part != "encoder_body":
            assert vae.quant_conv is not None
            yield from _up_to_attention(network, None, dtype)
            yield _layer(network.after_attention, dtype)
            yield _Norm(network.norm_out, dtype, silu=True)
            yield _conv(network.conv_out, dtype)
            yield _conv(vae.quant_conv, dtype)


def _up_to_attention(network: Decoder | Encoder, first: CausalConv3d | None, dtype: torch.dtype) -> Iterator[nn.Module]:
    if first is not None:
        yield _conv(first, dtype)
    yield _layer(network.mid_block.resnets[0], dtype)
    yield _Attention(network.attention, dtype)


def _decoder_tail(decoder: Decoder, dtype: torch.dtype) -> Iterator[nn.Module]:
    yield _layer(decoder.mid_block.resnets[1], dtype)
    for block in decoder.up_blocks:
        assert isinstance(block, UpBlock)
        yield from (_layer(layer, dtype) for layer in block.layers())
    yield _Norm(decoder.norm_out, dtype, silu=True)
    yield _conv(decoder.conv_out, dtype)


def _layer(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The 2-D form of a stage of the plain networks."""
    if isinstance(layer, ResidualBlock):
        return _Block(layer, dtype)
    assert isinstance(layer, Upsample | Downsample)
    resize, conv = layer.resample  # nearest 2x, or a row and a column of zeros at the far sides
    assert isinstance(conv, nn.Conv2d)
    return nn.Sequential(nn.Upsample(scale_factor=2) if isinstance(layer, Upsample) else resize, _conv(conv, dtype))


def _conv(conv: nn.Conv2d | nn.Conv3d, dtype: torch.dtype) -> nn.Conv2d:
    """The convolution that a lone frame meets: of a causal one, its last tap in time."""
    weight = conv.weight[:, :, -1] if isinstance(conv, nn.Conv3d) else conv.weight
    assert conv.bias is not None
    assert not isinstance(conv.padding, str)
    kernel, stride, padding = ((value[-2], value[-1]) for value in (conv.kernel_size, conv.stride, conv.padding))
    with torch.device("meta"):
        flat = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, stride, padding)
    flat.weight = nn.Parameter(_rounded(weight, dtype), requires_grad=False)
    flat.bias = nn.Parameter(_rounded(conv.bias, dtype), requires_grad=False)
    return flat


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to("cpu", dtype).contiguous()


class _Norm(nn.Module):
    """``blocks.RMSNorm``, alone or with SiLU: float32 between one cast and another, gamma and sqrt(C) one constant."""

    scale: Tensor

    def __init__(self, norm: RMSNorm, dtype: torch.dtype, *, silu: bool) -> None:
        super().__init__()
        gamma = _rounded(norm.gamma, dtype).float().reshape(-1, 1, 1)
        self.register_buffer("scale", gamma * gamma.shape[0] ** 0.5)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12)
        normed = wide / length * self.scale
        return (F.silu(normed) if self.silu else normed).to(x.dtype)


class _Block(nn.Module):
    """``blocks.ResidualBlock``."""

    def __init__(self, block: ResidualBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = _Norm(block.norm1, dtype, silu=True)
        self.conv1 = _conv(block.conv1, dtype)
        self.norm2 = _Norm(block.norm2, dtype, silu=True)
        self.conv2 = _conv(block.conv2, dtype)
        self.conv_shortcut = nn.Identity() if block.conv_shortcut is None else _conv(block.conv_shortcut, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm2(self.conv1(self.norm1(x)))) + self.conv_shortcut(x)


class _Attention(nn.Module):
    """``blocks.Attention`` in the products and the softmax that TensorRT looks for, [B, 1 head, tokens, C].

    The scale goes to the queries, before the product, as TensorRT's guide asks: scores stay in float16's range.
    """

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = _Norm(attention.norm, dtype, silu=False)
        self.to_qkv = _conv(attention.to_qkv, dtype)
        self.proj = _conv(attention.proj, dtype)
        self.channels = attention.channels

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).reshape(x.shape[0], 3, self.channels, -1)
        query, key, value = qkv.chunk(3, dim=1)  # [B, 1, C, tokens] each
        # In float32, for 384**-0.5 is no bfloat16; its rounding would tilt all scores alike.
        scaled = (query.transpose(2, 3).float() * self.channels**-0.5).to(x.dtype)
        scores = scaled @ key
        attended = scores.softmax(dim=-1) @ value.transpose(2, 3)  # [B, 1, tokens, C]
        return self.proj(attended.transpose(2, 3).reshape(x.shape)) + x


class _Denormalize(nn.Module):
    """z * std + mean by channel, in the graph's dtype, as ``AutoencoderKLQwenImage.denormalize`` has it."""

    mean: Tensor
    std: Tensor

    def __init__(self, arch: VAEArchConfig, dtype: torch.dtype) -> None:
        super().__init__()
        if not (arch.latents_mean and arch.latents_std):
            raise ValueError(
                "denormalize needs latents_mean and latents_std, which this checkpoint's config.json lacks; "
                "export without it"
            )
        self.register_buffer("mean", torch.tensor(arch.latents_mean, dtype=dtype).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(arch.latents_std, dtype=dtype).view(-1, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.std + self.mean


class _Levels(nn.Module):
    """[B, 3, H, W] -> 0..255, [B, H, W, 3]; the cast comes last, for TensorRT has uint8 at its outputs only."""

    def forward(self, pixels: Tensor) -> Tensor:
        return to_uint8(pixels.permute(0, 2, 3, 1))
