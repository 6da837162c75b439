"""One rank's share of a decode or encode: its window or tiles, through the engine, into a shard of the common shape.

Every rank's shard has one shape, so that one gather brings them together; a smaller window fills its shard from the
top left, and a rank without work hands in zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paravae.configs import VAEArchConfig
from paravae.vae import plan
from paravae.vae.engines.base import Engine
from paravae.vae.plan import PatchPlan, Span, TilePlan, Window

Progress = Callable[[int, int], None]
"""Told (steps done, steps in all) of this rank's share after each step: a latent frame of a window or tile."""


def window_pieces(
    engine: Engine,
    arch: VAEArchConfig,
    latents: Tensor,
    trace: Sequence[Window],
    shard_size: tuple[int, int],
    as_uint8: bool,
) -> Iterator[Tensor]:
    """The pixels of one window, a latent frame at a time: [B, 3, f, *shard_size]."""
    window = trace[-1]
    if (window.rows.size, window.cols.size) == shard_size:
        yield from engine.decode(latents, trace, as_uint8=as_uint8)
        return
    pieces = engine.decode(latents, trace, as_uint8=as_uint8) if window.area else iter(())
    for step in range(latents.shape[2]):
        size = (latents.shape[0], arch.input_channels, arch.temporal_ratio if step else 1, *shard_size)
        shard = latents.new_zeros(size, dtype=torch.uint8 if as_uint8 else latents.dtype)
        if window.area:
            shard[..., : window.rows.size, : window.cols.size] = next(pieces)
        yield shard


def decode_window(
    engine: Engine,
    arch: VAEArchConfig,
    latents: Tensor,
    trace: Sequence[Window],
    shard_size: tuple[int, int],
    as_uint8: bool,
    on_progress: Progress | None,
) -> Tensor:
    """The pixels of one window, [B, 3, F, *shard_size]."""
    lat_frames = latents.shape[2]
    told = on_progress if trace[-1].area else None
    pieces = window_pieces(engine, arch, latents, trace, shard_size, as_uint8)
    if lat_frames == 1:
        (shard,) = pieces
        if told:
            told(1, 1)
        return shard
    size = (latents.shape[0], arch.input_channels, arch.pixel_frames(lat_frames), *shard_size)
    shard = latents.new_empty(size, dtype=torch.uint8 if as_uint8 else latents.dtype)
    first = 0
    for step, piece in enumerate(pieces, start=1):
        shard[:, :, first : first + piece.shape[2]] = piece
        first += piece.shape[2]
        if told:
            told(step, lat_frames)
    return shard


def decode_tiles(
    engine: Engine,
    arch: VAEArchConfig,
    latents: Tensor,
    tiles: TilePlan,
    share: Span,
    slots: int,
    on_progress: Progress | None,
) -> Tensor:
    """The tiles of ``share``, each as if it were the whole picture: [slots, B, 3, F, rows, cols]."""
    trace = plan.whole(engine.decoder_stages, *tiles.tile)
    tile_size = (trace[-1].rows.size, trace[-1].cols.size)
    frames = arch.pixel_frames(latents.shape[2])
    shard = latents.new_zeros((slots, latents.shape[0], arch.input_channels, frames, *tile_size))
    for slot, tile in enumerate(tiles.tiles[share.start : share.stop]):
        cut = latents[..., tile.rows.start : tile.rows.stop, tile.cols.start : tile.cols.stop].contiguous()
        told = _part_of(on_progress, slot, share.size)
        shard[slot] = decode_window(engine, arch, cut, trace, tile_size, False, told)
    return shard


def encode_window(
    engine: Engine, pixels: Tensor, lat_frames: int, patches: PatchPlan, rank: int, on_progress: Progress | None
) -> Tensor:
    """Features of one rank's window, [B, C, T, rows, cols]."""
    trace = patches.traces[rank]
    if lat_frames == 1 and (trace[-1].rows.size, trace[-1].cols.size) == patches.shard_size:
        (shard,) = engine.encode_window(pixels, trace)
        if on_progress:
            on_progress(1, 1)
        return shard
    shard = pixels.new_zeros((pixels.shape[0], engine.feature_channels, lat_frames, *patches.shard_size))
    if trace[-1].area:
        for index, features in enumerate(engine.encode_window(pixels, trace)):
            shard[:, :, index : index + 1, : features.shape[-2], : features.shape[-1]] = features
            if on_progress:
                on_progress(index + 1, lat_frames)
    return shard


def _part_of(on_progress: Progress | None, index: int, count: int) -> Progress | None:
    """Progress of one tile among ``count``."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(index * total + done, count * total)
