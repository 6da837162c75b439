"""Attention with one head of 384 channels, in CUDA C++ for Hopper: the plan of its work, and its launch.

attention384.cu says how it computes. Its unit of work is a tile of 128 queries by a block of 64 keys; a tile is
computed by one multiprocessor, or by several, whose sums a second kernel adds up.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from paravae.layers import hopper

CHANNELS = 384
_SHARED_BYTES = 229_776  # of attention384.cu: queries, ring, tensor maps, barriers
_THREADS = 256
_TILE, _KEYS = 128, 64  # queries and keys
_ROWS = 8  # of a block of the kernel that adds up
_UNIT = 8  # values: strides are passed in 16 bytes


@cache
def plan(images: int, queries: int, tokens: int, most: int) -> tuple[int, int]:
    """(grid, waves): how many multiprocessors work, and how many whole tiles each takes.

    The key blocks of the tiles left over are shared out among all evenly, in runs. This costs a second kernel, memory
    traffic, and where a run reaches into another tile, a change of queries: here in key blocks' time, by trial on an
    H200.
    """
    tiles, blocks = images * -(-queries // _TILE), -(-tokens // _KEYS)

    def cost(grid: int) -> float:
        waves, left_over = divmod(tiles, grid)
        if not left_over:
            return waves * blocks
        run = -(-left_over * blocks // grid)
        return waves * blocks + run + 2 + (grid + left_over) / 20 + (3 if blocks % run else 0)

    grid = min(range(1, most + 1), key=cost)
    return grid, tiles // grid


def unfit(query: Tensor, keys_values: Tensor) -> str | None:
    """Why the kernel does not take these, or None."""
    if query.shape[-1] != CHANNELS:
        return f"the kernel takes a head of {CHANNELS} channels, not {query.shape[-1]}"
    if reason := hopper.unfit(query):
        return reason
    (images, queries, _), tokens = query.shape, keys_values.shape[1]
    work = images * -(-queries // _TILE) * -(-tokens // _KEYS)
    if not 0 < work < 2**31 or max(query.numel(), keys_values.numel()) >= _UNIT * 2**31:
        return f"the kernel does not take the sizes {list(query.shape)} and {list(keys_values.shape)}"
    return None


def launch(query: Tensor, keys_values: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(C)) V: [N, queries, C] and [N, tokens, 2 C] -> [N, queries, C], float16 or bfloat16."""
    (images, queries, _), tokens = query.shape, keys_values.shape[1]
    assert keys_values.shape == (images, tokens, 2 * CHANNELS)
    assert keys_values.dtype == query.dtype
    query, keys_values = hopper.fetchable(query), hopper.fetchable(keys_values)
    grid, waves = plan(images, queries, tokens, hopper.multiprocessors(query.device))
    left_over = images * -(-queries // _TILE) - waves * grid
    defines = (("HALF", int(query.dtype == torch.float16)),)

    out = query.new_empty((images, queries, CHANNELS))
    slots = 2 * grid if left_over else 0
    partial = query.new_empty((slots, _TILE, CHANNELS), dtype=torch.float32)
    partial_weight = query.new_empty((slots, _TILE, 2), dtype=torch.float32)
    maps = query.new_empty((grid, 2, 128), dtype=torch.uint8)
    strides = [x.stride(axis) // _UNIT for x in (query, keys_values) for axis in (1, 0)]
    sizes = [images, queries, tokens]
    with torch.cuda.device(query.device):
        attend = hopper.compiled("attention384", defines, _SHARED_BYTES, query.device)
        attend(
            grid=(grid, 1, 1),
            block=(_THREADS, 1, 1),
            args=[query, keys_values, out, partial, partial_weight, maps, *sizes, *strides, waves],
            shared_mem=_SHARED_BYTES,
        )
        if left_over:
            combine = hopper.compiled("attention384_combine", defines, _SHARED_BYTES, query.device, "attention384")
            combine(
                grid=(left_over * _TILE // _ROWS, 1, 1),
                block=(32 * _ROWS, 1, 1),
                args=[partial, partial_weight, out, *sizes, waves, grid],
            )
    return out
