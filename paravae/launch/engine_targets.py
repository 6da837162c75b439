"""Which engines ``paravae engine build`` makes: for given sizes, for any size, or for ranks that share a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch

from paravae import AutoencoderKLQwenImage
from paravae.launch.planned import planner_of
from paravae.vae.choice import EncodePlanner
from paravae.vae.cost import Machine
from paravae.vae.engines.base import Engine, Half, Load
from paravae.vae.engines.trt.needs import Need, needs_of
from paravae.vae.engines.trt.parts import DTYPES, PORTS, Part
from paravae.vae.engines.trt.shapes import Size, Target, multi_profile_target, static_target, window_targets
from paravae.vae.plan import PatchPlan

_ANY_MEMORY = 2**62


@dataclass(frozen=True)
class Sharing:
    """How ``ranks`` of a ``machine`` share a decode: ``mode``, auto or patch. ``uint8``: pixels come as levels."""

    ranks: int
    mode: str
    machine: Machine
    uint8: bool


def unit_px(part: Part, ratio: int) -> int:
    """Pixels that stand for one unit of a part's input along each axis; ``ratio``: for a latent."""
    return 1 if PORTS[part][0] == "pixels" else ratio


def static_targets(halves: Iterable[Half], sizes_px: Sequence[Size], ratio: int) -> list[Target]:
    return [static_target(half, size, unit_px(half, ratio)) for half in halves for size in dict.fromkeys(sizes_px)]


def multi_profile_targets(halves: Iterable[Half], ratio: int) -> list[Target]:
    return [multi_profile_target(half, unit_px(half, ratio)) for half in halves]


def parallel_targets(
    vae: AutoencoderKLQwenImage, halves: Iterable[Half], sizes_px: Sequence[Size], dtype: str, sharing: Sharing
) -> list[Target]:
    """All that any of the ranks needs for any of the pictures; ``vae``: its weights are not looked at."""
    ratio = vae.config.arch_config.spatial_ratio
    planned = {"decoder": _decoder_needs, "encoder": _encoder_needs}
    needs = {need for half in halves for size in sizes_px for need in planned[half](vae, size, dtype, sharing)}
    wholes = sorted(need for need in needs if need[0] in ("decoder", "encoder"))
    units = [(part, unit_px(part, ratio), size) for part, size in wholes]
    lone = [static_target(part, (unit * size[0], unit * size[1]), unit) for part, unit, size in units]
    return lone + window_targets(need for need in needs if need not in wholes)


def _decoder_needs(vae: AutoencoderKLQwenImage, size_px: Size, dtype: str, sharing: Sharing) -> set[Need]:
    """Of a lone picture: exact windows, or the whole where one rank alone is predicted to be as fast."""
    arch, gpu = vae.config.arch_config, torch.device("cuda")
    lat_size = size_px[0] // arch.spatial_ratio, size_px[1] // arch.spatial_ratio
    shape = (1, arch.z_dim, 1, *lat_size)
    pixel_bytes = 1 if sharing.uint8 else None
    planner = planner_of(vae, sharing.machine, shape, DTYPES[dtype], gpu, sharing.ranks, pixel_bytes)
    layout = replace(planner, engine=_as_tensorrt(vae)).plan(sharing.mode, _ANY_MEMORY).layout
    assert isinstance(layout, PatchPlan)  # tiles are for little memory only
    return _needs(vae, "decoder", layout, lat_size)


def _encoder_needs(vae: AutoencoderKLQwenImage, size_px: Size, dtype: str, sharing: Sharing) -> set[Need]:
    arch = vae.config.arch_config
    planner = EncodePlanner(
        config=vae.config,
        engine=_as_tensorrt(vae),
        machine=sharing.machine,
        shape=(1, arch.input_channels, 1, *size_px),
        dtype=DTYPES[dtype],
        device=torch.device("cuda"),
        ranks=sharing.ranks,
    )
    return _needs(vae, "encoder", planner.patches(_ANY_MEMORY), planner.lat_size)


def _as_tensorrt(vae: AutoencoderKLQwenImage) -> Engine:
    """The engine to plan by: ranks cannot exchange anything in the middle of a TensorRT engine."""
    engine = copy(vae.engine)
    engine.shares_head = False
    return engine


def _needs(vae: AutoencoderKLQwenImage, half: Half, layout: PatchPlan, lat_size: Size) -> set[Need]:
    engine = vae.engine
    loads = [Load(half, trace, 1, lat_frame=lat_size) for trace in layout.traces]
    return {need for load in loads for need in needs_of(load, engine.decoder_stages, engine.encoder_stages)[0]}
