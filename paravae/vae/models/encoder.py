"""Pixels to latents: local stages first, then an attention that sees the whole frame, and little after it."""

from __future__ import annotations

from torch import Tensor, nn

from paravae.configs import VAEArchConfig
from paravae.vae.models.blocks import (
    Attention,
    CausalConv3d,
    Downsample,
    FrameCache,
    MidBlock,
    ResidualBlock,
    RMSNorm,
)
from paravae.vae.models.stage import Stage
from paravae.vae.plan import LocalStage


class Encoder(nn.Module):
    """[B, 3, F, 8 h, 8 w] -> [B, 2 z_dim, T, h, w]; parameter names are those of the published checkpoints."""

    def __init__(self, arch: VAEArchConfig) -> None:
        super().__init__()
        widths = [arch.base_dim * m for m in arch.dim_mult]
        self.conv_in = CausalConv3d(arch.input_channels, arch.base_dim, 3)
        self.down_blocks = nn.ModuleList()  # one flat list, as published
        channels = arch.base_dim
        for level, width in enumerate(widths):
            for _ in range(arch.num_res_blocks):
                self.down_blocks.append(ResidualBlock(channels, width))
                channels = width
            if level < len(arch.temperal_downsample):
                self.down_blocks.append(Downsample(width, in_time=arch.temperal_downsample[level]))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * arch.z_dim, 3)

    def body(self) -> tuple[Stage, ...]:
        """The local stages from pixels to features, in order."""
        width = self.conv_in.out_channels
        geometry = LocalStage("same", margin=1, channels=width, work=9 * self.conv_in.in_channels * width)
        return (Stage(self.conv_in, geometry), *map(Stage.of, self.down_blocks))

    def front(self) -> tuple[Stage, ...]:
        """The local stages from features to what the attention is given."""
        return (Stage.of(self.mid_block.resnets[0]),)

    @property
    def attention(self) -> Attention:
        """What sees the whole frame."""
        (attention,) = self.mid_block.attentions
        assert isinstance(attention, Attention)
        return attention

    @property
    def after_attention(self) -> ResidualBlock:
        """The block that the attention's result goes to."""
        block = self.mid_block.resnets[1]
        assert isinstance(block, ResidualBlock)
        return block

    def last(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """What the attention gives for the whole frame, [B, C, T, h, w] -> [B, 2 z_dim, T, h, w]."""
        return self.conv_out(self.norm_out.silu(self.after_attention(x, cache)), cache)

    @property
    def feature_channels(self) -> int:
        return self.conv_out.in_channels
