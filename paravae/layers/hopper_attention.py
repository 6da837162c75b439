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
_SHARED_BYTES = 229_648  # of attention384.cu: queries, ring, tensor map, barriers
_THREADS = 256
_TILE, _KEYS = 128, 64  # queries and keys
_ROWS = 8  # of a block of the kernel that adds up


@cache
def plan(images: int, tokens: int, most: int) -> tuple[int, int]:
    """(grid, waves): how many multiprocessors work, and how many whole tiles each takes.

    The key blocks of the tiles left over are shared out among all evenly, in runs. This costs a second kernel, memory
    traffic, and where a run reaches into another tile, a change of queries: here in key blocks' time, by trial on an
    H200.
    """
    tiles, blocks = images * -(-tokens // _TILE), -(-tokens // _KEYS)

    def cost(grid: int) -> float:
        waves, left_over = divmod(tiles, grid)
        if not left_over:
            return waves * blocks
        run = -(-left_over * blocks // grid)
        return waves * blocks + run + 2 + (grid + left_over) / 20 + (3 if blocks % run else 0)

    grid = min(range(1, most + 1), key=cost)
    return grid, tiles // grid


def unfit(qkv: Tensor) -> str | None:
    """Why the kernel does not take ``qkv``, or None."""
    if qkv.shape[-1] != 3 * CHANNELS:
        return f"the kernel takes a head of {CHANNELS} channels, not {qkv.shape[-1] // 3}"
    if reason := hopper.unfit(qkv):
        return reason
    images, tokens = qkv.shape[:2]
    if qkv.numel() == 0 or images * -(-tokens // _TILE) * -(-tokens // _KEYS) >= 2**31:
        return f"the kernel does not take the size {list(qkv.shape)}"
    return None


def launch(qkv: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(C)) V: [N, tokens, 3 C] -> [N, tokens, C], both float16 or bfloat16."""
    qkv = qkv.contiguous()
    if qkv.data_ptr() % 16:
        qkv = qkv.clone()
    images, tokens, _ = qkv.shape
    grid, waves = plan(images, tokens, hopper.multiprocessors(qkv.device))
    left_over = images * -(-tokens // _TILE) - waves * grid
    defines = (("HALF", int(qkv.dtype == torch.float16)),)

    out = qkv.new_empty((images, tokens, CHANNELS))
    slots = 2 * grid if left_over else 0
    partial = qkv.new_empty((slots, _TILE, CHANNELS), dtype=torch.float32)
    partial_weight = qkv.new_empty((slots, _TILE, 2), dtype=torch.float32)
    maps = qkv.new_empty((grid, 128), dtype=torch.uint8)
    with torch.cuda.device(qkv.device):
        attend = hopper.compiled("attention384", defines, _SHARED_BYTES, qkv.device)
        attend(
            grid=(grid, 1, 1),
            block=(_THREADS, 1, 1),
            args=[qkv, out, partial, partial_weight, maps, images, tokens, waves],
            shared_mem=_SHARED_BYTES,
        )
        if left_over:
            combine = hopper.compiled("attention384_combine", defines, _SHARED_BYTES, qkv.device, "attention384")
            combine(
                grid=(left_over * _TILE // _ROWS, 1, 1),
                block=(32 * _ROWS, 1, 1),
                args=[partial, partial_weight, out, images, tokens, waves, grid],
            )
    return out
