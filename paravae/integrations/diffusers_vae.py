"""VAEs that diffusers' pipelines take for their own, decoding and encoding by paravae's.

Each is a diffusers model around a ``ParallelTiledVAE`` whose networks are its own: so dtype, ``to``, offloading by
``enable_model_cpu_offload`` and ``save_pretrained`` are diffusers'. The two classes bear the names of diffusers', for
these go into config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from typing_extensions import Self

from paravae.configs import VAEConfig
from paravae.integrations.driving import DECODE, ENCODE, Call, announce, of_rank_zero
from paravae.integrations.weights import vae_on_weights_of
from paravae.vae.checks import check_latents, check_pixels
from paravae.vae.comm import GatherTo, RankGroup
from paravae.vae.parallel import ParallelTiledVAE

_TILE_PX = ("tile_sample_min_height", "tile_sample_min_width", "tile_sample_stride_height", "tile_sample_stride_width")


def _tile_px(index: int) -> property:
    """To be read; ``enable_tiling`` sets and checks all four."""
    return property(lambda vae: vae.tiles_px[index])


class PipelineVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """What the two classes below have in common. Latents are [B, z_dim, T, h, w], pixels [B, 3, F, H, W] in [-1, 1].

    ``paravae`` is what decodes and encodes, ``leads`` whether this rank drives others that follow (driving.py).
    """

    config_name: Any = "config.json"
    _supports_group_offloading = False
    counterpart: Any
    """diffusers' class of the same name."""
    paravae: ParallelTiledVAE

    tile_sample_min_height, tile_sample_min_width, tile_sample_stride_height, tile_sample_stride_width = map(
        _tile_px, range(4)
    )

    def __init__(self, paravae: ParallelTiledVAE, config: Mapping[str, Any]) -> None:
        """``config``: the fields of diffusers' class."""
        super().__init__()
        self.register_to_config(**config)
        for name in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
            setattr(self, name, getattr(paravae, name))
        arch = paravae.config.arch_config
        self.z_dim, self.spatial_compression_ratio = arch.z_dim, arch.spatial_ratio
        self.temperal_downsample = list(arch.temperal_downsample)
        self.temperal_upsample = self.temperal_downsample[::-1]
        self.use_tiling, self.use_slicing = paravae.config.use_tiling, False
        paravae.config = replace(paravae.config, use_tiling=False)  # use_tiling here is what holds
        self.tiles_px = tuple(getattr(paravae.config, name) for name in _TILE_PX)
        object.__setattr__(self, "paravae", paravae)  # not as a submodule: its networks are submodules already
        self.leads = False

    @classmethod
    def on_weights_of(
        cls,
        theirs: Any,
        vae_config: VAEConfig | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> Self:
        """Around diffusers' VAE ``theirs``, sharing its weights, tiling and slicing; see ``paravae_vae_for``."""
        inner = vae_on_weights_of(theirs, vae_config)
        if group is not None:
            inner.config = replace(inner.config, use_parallel_decode=True)
            inner.set_parallel_group(group)
        vae = cls(inner, theirs.config)
        if theirs.use_tiling:
            vae.enable_tiling(*(getattr(theirs, name) for name in _TILE_PX))
        vae.use_slicing = theirs.use_slicing
        if inner.config.vae_type == "tensorrt":
            inner.warm_up(inner.config.trt_vae_config.warm_up_sizes)
        return vae

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        vae_config: VAEConfig | None = None,
        group: torch.distributed.ProcessGroup | None = None,
        **options: Any,
    ) -> Self:
        """As diffusers loads its own, with its ``options`` (``subfolder``, ``torch_dtype`` ...).

        Raises:
            ValueError: as ``paravae_vae_for`` does; and what diffusers raises.
        """
        theirs = cls.counterpart.from_pretrained(pretrained_model_name_or_path, **options)
        return cls.on_weights_of(theirs, vae_config, group)

    # ------------------------------------------------------------------------------- what pipelines call

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Denormalised latents -> pixels, in the weights' dtype.

        Raises:
            ValueError: the latents do not fit the weights, hold NaN or Inf, need too much memory, or where all ranks
                drive are not those of rank 0.
            RankError: another rank failed, is gone, or is at something else.
        """
        pixels = self._each(DECODE, z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pixels -> the distribution of their latents, never in tiles.

        Raises: as ``decode`` does.
        """
        posterior = DiagonalGaussianDistribution(self._each(ENCODE, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode."""
        posterior = DiagonalGaussianDistribution(self._each(ENCODE, sample))
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Decode in paravae's tiles from now on, in pixels: the whole size, clamped, shared by the ranks if they share.

        Raises:
            ValueError: a size is no multiple of 8, or a stride is more than its tile.
        """
        given = (tile_sample_min_height, tile_sample_min_width, tile_sample_stride_height, tile_sample_stride_width)
        tiles_px = tuple(int(px or now) for px, now in zip(given, self.tiles_px, strict=True))
        self._with_tiles(tiles_px)
        self.tiles_px, self.use_tiling = tiles_px, True

    # ------------------------------------------------------------------------------- by one rank or by all

    @property
    def shares(self) -> bool:
        """Whether decodes are shared among the ranks of ``group``."""
        return self.paravae.config.use_parallel_decode

    @property
    def group(self) -> RankGroup:
        return self.paravae.parallel_group

    def take_part(self, call: Call) -> None:
        """Do what rank 0 does, on a rank that follows it."""
        self.use_tiling, self.tiles_px = call.tiled, call.tiles_px
        value = of_rank_zero(self.group, call.to_text(), lambda: call.blank(self._ready()), alike=False)
        self._compute(call.name, value, 0)

    def _each(self, name: str, value: Tensor) -> Tensor:
        if self.use_slicing and isinstance(value, Tensor) and value.dim() and len(value) > 1:
            return torch.cat([self._run(name, part) for part in value.split(1)])
        return self._run(name, value)

    def _run(self, name: str, value: Tensor) -> Tensor:
        """Decode or encode, ``name``, by this rank alone or with the others."""
        config = self.paravae.config
        if not self.shares or (name == ENCODE and not config.use_parallel_encode) or self.group.size == 1:
            return self._compute(name, self._checked(name, value))
        if self.leads:
            call = self._call(name, self._checked(name, value))
            announce(self.group, call)
            return self._compute(name, of_rank_zero(self.group, call.to_text(), lambda: value, alike=False), 0)
        words = self._call(name, value).to_text() if isinstance(value, Tensor) else name
        return self._compute(name, of_rank_zero(self.group, words, lambda: self._checked(name, value), alike=True))

    def _call(self, name: str, value: Tensor) -> Call:
        dtype = str(value.dtype).removeprefix("torch.")
        return Call(name, tuple(value.shape), dtype, bool(self.use_tiling), self.tiles_px)

    def _with_tiles(self, tiles_px: tuple[int, ...]) -> VAEConfig:
        fields: dict[str, Any] = dict(zip(_TILE_PX, tiles_px, strict=True))
        return replace(self.paravae.config, **fields)

    def _compute(self, name: str, value: Tensor, gather_to: GatherTo = "all") -> Tensor:
        """[B, 3, F, H, W] of latents, [B, 2 z_dim, T, h, w] of pixels; anything where it is not gathered."""
        if name == ENCODE:
            return self.paravae.encode(value).moments
        config = self._with_tiles(self.tiles_px)
        if config != self.paravae.config:  # set here, in step with all ranks: plans are kept for the very object
            self.paravae.config = config
        if self.use_tiling and not self.shares:
            return self.paravae.tiled_decode(value)
        decode = self.paravae.parallel_tiled_decode if self.use_tiling else self.paravae.decode
        return decode(value, gather_to=gather_to)

    def _checked(self, name: str, value: Tensor) -> Tensor:
        device, dtype = self._ready(), next(self.parameters()).dtype
        check = check_latents if name == DECODE else check_pixels
        check(value, self.paravae.config.arch_config, dtype, device)
        return value

    @apply_forward_hook
    def _ready(self) -> torch.device:
        """Where the weights are, now that the hook of enable_model_cpu_offload has run."""
        device = next(self.parameters()).device
        if device.type == "meta":
            raise ValueError(
                "the VAE's weights are on the meta device: enable_sequential_cpu_offload brings them a layer at a "
                "time, which paravae's engines do not wait for; use enable_model_cpu_offload"
            )
        return device


class AutoencoderKLQwenImage(PipelineVAE):
    """Qwen-Image's."""

    counterpart = diffusers.AutoencoderKLQwenImage


class AutoencoderKLWan(PipelineVAE):
    """Wan 2.1's."""

    counterpart = diffusers.AutoencoderKLWan
