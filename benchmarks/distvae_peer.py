"""DistVAE as a peer: diffusers' own class, its decodes shared by DistVAE among all ranks.

rows: ``parallelize_decoder`` swaps the decoder for one of sharded layers; a rank keeps a band of rows and has its
neighbours' edges before each convolution, and keys and values of all rows for the attention. Exact.
tiles: diffusers' tiles (256 px, stride 192), a run of them a rank, decoded and blended there. Approximate: held
against diffusers' own tiled decode on one device.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from paravae.launch.bench_model import Model
from paravae.launch.bench_peers import Peer, diffusers_calls, diffusers_vae, refusing
from paravae.launch.machine import version_of

MODES = ("rows", "tiles")
_ROWS_OF_LATENTS = -2


def build(model: Model, dtype: torch.dtype, device: torch.device, mode: str) -> Peer:
    """The peer ``distvae-rows`` or ``distvae-tiles``, on the world group of torch.distributed, which must be set up.

    Raises:
        RuntimeError: DistVAE is not installed, or has nothing for this class.
    """
    if importlib.util.find_spec("distvae") is None:
        raise RuntimeError("DistVAE is not installed; pip install --no-deps distvae==0.1.0")
    arch, state = model.config.arch_config, model.state
    vae, diffusers = diffusers_vae(arch, state, dtype, device)
    how = _share_rows(vae) if mode == "rows" else _share_tiles(vae)
    tiles = None
    if mode == "tiles":
        one, _ = diffusers_vae(arch, state, dtype, device)
        one.enable_tiling()
        tiles, _ = diffusers_calls(one)
    ranks = torch.distributed.get_world_size()
    what_ran = (
        f"DistVAE {version_of('distvae')} over diffusers {diffusers}'s AutoencoderKLQwenImage, eager, {how}, on "
        f"{ranks} ranks of the world group ({torch.distributed.get_backend_config()})"
    )
    decode, _ = diffusers_calls(vae)
    return Peer(f"distvae-{mode}", what_ran, decode, refusing("DistVAE shares decodes only"), tiles=tiles)


def _share_rows(vae: Any) -> str:
    from distvae.vae import parallelize_decoder

    return f"rows by parallelize_decoder ({parallelize_decoder(vae, torch.distributed.group.WORLD)})"


def _share_tiles(vae: Any) -> str:
    from distvae.utils import parallel_context
    from distvae.vae import sharing, tiled_decode_for

    context = parallel_context(torch.distributed.group.WORLD, _ROWS_OF_LATENTS, ndim=5)
    vae.enable_tiling()
    vae.tiled_decode = tiled_decode_for(vae, *sharing(context))
    if vae.tiled_decode is None:
        raise RuntimeError(f"DistVAE has no tiled decode for {type(vae).__name__}")
    window = f"{vae.tile_sample_min_height} px, stride {vae.tile_sample_stride_height}"
    return f"tiles ({window}) by tiled_decode_for with sharing()'s assembly"
