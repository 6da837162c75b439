"""SGLang's VAE config -> paravae's, and whether paravae has the network that it describes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from sglang.multimodal_gen.runtime.server_args import get_global_server_args
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

from paravae.configs import VAEConfig
from paravae.vae.models.checkpoint import variant_of

logger = init_logger(__name__)

Config = TypeVar("Config", bound=VAEConfig)

# Where paravae's name of a mode is another than SGLang's.
MODES = {"spatial": "spatial_shard"}
# Fields of SGLang's with nothing to steer here: time is streamed exactly, so it has no tiles; auto weighs a plan by its
# predicted time, not by a number of latents; and every rank encodes by itself.
IGNORED = (
    "tile_sample_min_num_frames",
    "tile_sample_stride_num_frames",
    "blend_num_frames",
    "use_temporal_tiling",
    "use_parallel_tiling",
    "use_temporal_scaling_frames",
    "use_feature_cache",
    "auto_parallel_decode_min_latent_elements_per_rank",
)


# Where every rank of the decode group is known to decode when one does: modules of SGLang's pipeline configs. Others
# use the same class too (MOVA, on its first rank alone; Cosmos 3 and LingBot, in realtime sessions): SGLang's serves.
QWEN_IMAGE_PIPELINES = ("qwen_image", "krea2", "anima", "ming_image")
WAN_PIPELINES = ("wan",)


def unknown_pipeline(known: tuple[str, ...]) -> str | None:
    """Why the pipeline of this server is none that paravae serves; None if it is, or if there is no server."""
    try:
        pipeline = type(get_global_server_args().pipeline_config)
    except ValueError:  # a VAE by itself: a script, a test
        return None
    stages_of_its_own = "Animate" in pipeline.__name__
    if pipeline.__module__.split(".")[-1] in known and not stages_of_its_own:
        return None
    return f"paravae was not tried with {pipeline.__name__}"


def foreign_reason(arch: Any) -> str | None:
    """Why paravae does not have the network of ``arch``, an arch config of SGLang's; None if it does.

    Several networks share a class name: Wan 2.2's 5B VAE is an AutoencoderKLWan, that of Qwen-Image-Layered an
    AutoencoderKLQwenImage.
    """
    if (variant := variant_of({**arch.extra_attrs, **vars(arch)})) is not None:  # extra: fields that SGLang has not
        name, value = variant
        return f"{name} is {value}"
    channels = getattr(arch, "input_channels", 3)
    return None if channels == 3 else f"its pictures have {channels} channels"


def translate(config: Any, config_class: type[Config]) -> Config:
    """SGLang's ``config`` as one of paravae's; parallel decode as asked for, encode always on each rank alone.

    Raises:
        ValueError: a value that paravae has no use for, such as a stride above its tile.
    """
    arch_class: Any = next(field.default_factory for field in fields(config_class) if field.name == "arch_config")
    arch = {field.name: getattr(config.arch_config, field.name, None) for field in fields(arch_class)}
    arch["input_channels"] = 3
    own = {field.name for field in fields(config_class)} & {field.name for field in fields(config)}
    values = {name: getattr(config, name) for name in own - {"arch_config"}}
    values["parallel_decode_mode"] = MODES.get(config.parallel_decode_mode, config.parallel_decode_mode)
    values["use_parallel_encode"] = False
    _say_what_is_ignored(config)
    known = {name: value for name, value in arch.items() if value is not None}
    return config_class(arch_config=arch_class(**known), **values)


def _say_what_is_ignored(config: Any) -> None:
    usual = type(config)()
    ignored = [
        f"{name} = {getattr(config, name)}"
        for name in IGNORED
        if hasattr(config, name) and getattr(config, name) != getattr(usual, name)
    ]
    if ignored:
        logger.info("paravae: time is decoded frame by frame, exactly; no use for %s", ", ".join(ignored))
