"""Latents to pixels: local stages, an attention that sees the whole frame, then a longer tail of local stages."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from paravae.configs import VAEArchConfig
from paravae.vae.models.blocks import (
    Attention,
    CausalConv3d,
    FrameCache,
    MidBlock,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from paravae.vae.models.stage import Stage
from paravae.vae.plan import LocalStage


class UpBlock(nn.Module):
    """Residual blocks of one level and, but for the last level, the upsampling to the next."""

    def __init__(self, in_channels: int, out_channels: int, num_resnets: int, upsampler: Upsample | None) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_resnets
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(widths)])
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *(self.upsamplers or [])]


class Decoder(nn.Module):
    """[B, z_dim, T, h, w] -> [B, 3, F, 8 h, 8 w]; parameter names are those of the published checkpoints."""

    def __init__(self, arch: VAEArchConfig) -> None:
        super().__init__()
        widths = [arch.base_dim * m for m in reversed(arch.dim_mult)]
        in_time = list(reversed(arch.temperal_downsample))
        self.conv_in = CausalConv3d(arch.z_dim, widths[0], 3)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            upsampler = Upsample(width, in_time=in_time[level]) if level < len(in_time) else None
            self.up_blocks.append(UpBlock(channels, width, arch.num_res_blocks + 1, upsampler))
            channels = width // 2
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], arch.input_channels, 3)

    def front(self) -> tuple[Stage, ...]:
        """The local stages from latents to what the attention is given."""
        width = self.conv_in.out_channels
        work = 9 * self.conv_in.in_channels * width
        geometry = LocalStage("same", margin=1, channels=width, work=work)
        return (Stage(self.conv_in, geometry), Stage.of(self.mid_block.resnets[0]))

    @property
    def attention(self) -> Attention:
        """What sees the whole frame."""
        (attention,) = self.mid_block.attentions
        assert isinstance(attention, Attention)
        return attention

    def head(self, latents: Tensor, cache: FrameCache | None = None) -> Tensor:
        """All up to the attention, for the whole frame: [B, z_dim, T, h, w] -> features [B, C, T, h, w]."""
        for stage in self.front():
            latents = stage.run(latents, cache)
        return self.attention(latents)

    def tail(self) -> tuple[Stage, ...]:
        """The local stages from what the attention gives to pixels, in order."""
        stages = [Stage.of(self.mid_block.resnets[1])]
        for block in self.up_blocks:
            assert isinstance(block, UpBlock)
            stages += [Stage.of(layer) for layer in block.layers()]
        work = 9 * self.conv_out.in_channels * self.conv_out.out_channels
        geometry = LocalStage("same", margin=1, channels=self.conv_out.out_channels, work=work)
        return (*stages, Stage(self._to_pixels, geometry))

    def _to_pixels(self, x: Tensor, cache: FrameCache | None) -> Tensor:
        return self.conv_out(self.norm_out.silu(x), cache)
