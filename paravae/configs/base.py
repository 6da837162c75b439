"""What a VAE is (its architecture) and how it is to be run: plain data, checked when made.

Every field carries one line of help with its unit; ``configs/cli.py`` makes one flag of each, and
``configs/files.py`` reads them from files.
Change a config with ``dataclasses.replace``, which runs the checks again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from paravae.configs.fields import check_fields, flag_name, option
from paravae.configs.trt import VAE_TYPES, TrtVAEConfig

ENGINES = ("auto", "fast", "torch")
PARALLEL_DECODE_MODES = ("auto", "patch", "spatial_shard", "tiled")


@dataclass(frozen=True, kw_only=True)
class VAEArchConfig:
    """The shape of a causal video VAE of the Wan 2.1 family, as its checkpoint's config.json states it.

    The field names are those of the published checkpoints, ``temperal_downsample`` included.
    """

    base_dim: int = option(96, "channels of the widest (pixel) level")
    z_dim: int = option(16, "channels of the latents")
    dim_mult: tuple[int, ...] = option((1, 2, 4, 4), "channels of each level, as a multiple of base_dim")
    num_res_blocks: int = option(2, "residual blocks a level in the encoder; the decoder has one more")
    temperal_downsample: tuple[bool, ...] = option(
        (False, True, True), "for each downsampling of the encoder: whether it halves time as well"
    )
    input_channels: int = option(3, "channels of the pixels")
    latents_mean: tuple[float, ...] = option((), "mean of each latent channel, for normalised latents")
    latents_std: tuple[float, ...] = option((), "standard deviation of each latent channel")

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
        for name in ("base_dim", "z_dim", "num_res_blocks", "input_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries, but dim_mult "
                f"{list(self.dim_mult)} needs {len(self.dim_mult) - 1}: one for each step between levels"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.z_dim):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, z_dim is {self.z_dim}")

    @property
    def spatial_ratio(self) -> int:
        """Pixels a latent covers, along height and along width."""
        return 2 ** len(self.temperal_downsample)

    @property
    def temporal_ratio(self) -> int:
        """Pixel frames a latent frame gives; the first latent frame gives one."""
        return 2 ** sum(self.temperal_downsample)

    def pixel_frames(self, lat_frames: int) -> int:
        """Pixel frames that ``lat_frames`` latent frames decode to: 4 T - 3 for the published models."""
        return 1 + (lat_frames - 1) * self.temporal_ratio


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """How to run a VAE. Names and defaults follow SGLang's ``VAEConfig``, except that parallel decode is
    off until asked for. Time is always streamed frame by frame, exactly, so there are no temporal tiles."""

    arch_config: VAEArchConfig = field(default_factory=VAEArchConfig)
    load_encoder: bool = option(True, "build and load the encoder")
    load_decoder: bool = option(True, "build and load the decoder")
    use_parallel_decode: bool = option(False, "share each decode among the ranks of the parallel group")
    parallel_decode_mode: str = option(
        "auto",
        "patch: exact windows, one a rank (spatial_shard is another name for it); "
        "tiled: overlapping tiles, approximate, least memory; auto: paravae chooses",
        choices=PARALLEL_DECODE_MODES,
    )
    use_parallel_encode: bool = option(True, "with use_parallel_decode: share each encode among the ranks too")
    use_tiling: bool = option(False, "decode alone in overlapping tiles when not in parallel: less memory, approximate")
    tile_sample_min_height: int = option(256, "least height of a tile, in pixels; lower pictures are one tile")
    tile_sample_min_width: int = option(256, "least width of a tile, in pixels; narrower pictures are one tile")
    tile_sample_stride_height: int = option(192, "largest step between tiles, in pixels down")
    tile_sample_stride_width: int = option(192, "largest step between tiles, in pixels across")
    engine: str = option(
        "auto",
        "what runs the network in PyTorch. fast: folded weights and fused kernels; torch: plainly, layer by layer; "
        "auto: fast on a GPU in bfloat16 and float16, torch elsewhere",
        choices=ENGINES,
    )
    vae_type: str = option(
        "pytorch",
        "tensorrt: the engines that trt_vae_config names run what they can, and PyTorch the rest",
        choices=VAE_TYPES,
    )
    trt_vae_config: TrtVAEConfig = field(default_factory=TrtVAEConfig)
    cuda_graphs: int = option(8, "CUDA graphs that an engine keeps, one for each shape of image; 0: none")
    memory_limit_gib: float | None = option(
        None, "refuse a decode or encode estimated to need more than this, in GiB a rank; default: all that is free"
    )
    cost_table: str | None = option(
        None,
        "JSON file of paravae bench calibrate, by which auto chooses; default: the constants shipped for this GPU",
        stands_for="FILE",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.cuda_graphs < 0:
            raise ValueError(f"cuda_graphs (--vae-config.cuda-graphs) is {self.cuda_graphs}, needs 0 or more")
        ratio = self.arch_config.spatial_ratio
        for side in ("height", "width"):
            tile_px, stride_px = getattr(self, f"tile_sample_min_{side}"), getattr(self, f"tile_sample_stride_{side}")
            for name, px in ((f"tile_sample_min_{side}", tile_px), (f"tile_sample_stride_{side}", stride_px)):
                if px < ratio or px % ratio:
                    raise ValueError(
                        f"{name} (--vae-config.{name.replace('_', '-')}) is {px} pixels, "
                        f"needs a positive multiple of {ratio}, the pixels a latent covers"
                    )
            if stride_px > tile_px:
                raise ValueError(
                    f"tile_sample_stride_{side} is {stride_px} pixels, more than tile_sample_min_{side} ({tile_px}): "
                    f"tiles would leave gaps; lower --vae-config.tile-sample-stride-{side} to at most {tile_px}"
                )
        if self.memory_limit_gib is not None and not 0 < self.memory_limit_gib < math.inf:
            raise ValueError(f"memory_limit_gib is {self.memory_limit_gib}, needs a positive number of GiB")
        if self.vae_type == "tensorrt" and self.trt_vae_config.trt_engine_path is None:
            raise ValueError(
                f"vae_type ({flag_name('vae_type')}) is tensorrt, which needs the folder of its engines: "
                f"{flag_name('trt_vae_config.trt_engine_path')} DIR; paravae engine build makes one"
            )
        self.trt_vae_config.check_sizes(ratio)
        if not (self.load_encoder or self.load_decoder):
            raise ValueError("load_encoder and load_decoder are both off: nothing would be left of the VAE")

    @property
    def exact_mode(self) -> str:
        """The parallel decode mode under its own name: ``spatial_shard`` is SGLang's for ``patch``."""
        return "patch" if self.parallel_decode_mode == "spatial_shard" else self.parallel_decode_mode
