"""Attention in CUDA C++ for Hopper: its plan and its addresses on the CPU, the kernel itself on such a GPU.

No interpreter runs CUDA C++: what a block computes, and where, is followed in numpy instead.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paravae.layers import hopper, hopper_attention
from paravae.layers.attention import by_cuda, by_triton, wide_attention
from paravae.layers.dispatch import references_only
from paravae.layers.hopper_attention import CHANNELS, plan
from tests.builders import max_error, noise, rms_error

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TILE, KEYS, BOX = 128, 64, 64 * 128


def truth_of(query: Tensor, keys_values: Tensor, rows: Tensor) -> Tensor:
    """[N, rows, C] in fp64, of these queries alone."""
    key, value = keys_values.double().chunk(2, dim=-1)
    return torch.softmax(query[:, rows].double() @ key.mT * CHANNELS**-0.5, -1) @ value


def pieces(block: int, grid: int, waves: int, tiles: int, blocks: int) -> list[tuple[int, int, int, int]]:
    """(tile, first and last key block, slot) of each piece of a block of the grid: Piece of attention384.cu."""
    length, longer = divmod((tiles - waves * grid) * blocks, grid)
    start, end = (run * length + min(run, longer) for run in (block, block + 1))
    found = [(wave * grid + block, 0, blocks, -1) for wave in range(waves)]
    for i in range(tiles + 1):
        left_over = start // blocks + i
        first, last = max(start - left_over * blocks, 0), min(end - left_over * blocks, blocks)
        if first >= last:
            return found
        found.append((waves * grid + left_over, first, last, -1 if last - first == blocks else 2 * block + (i > 0)))
    raise AssertionError("its pieces do not end")


@given(st.integers(1, 3), st.integers(1, 30_000), st.integers(1, 30_000), st.sampled_from([1, 7, 114, 132]))
def test_plan_covers_every_block_of_keys_once(images: int, queries: int, tokens: int, most: int) -> None:
    tiles, blocks = images * -(-queries // TILE), -(-tokens // KEYS)
    grid, waves = plan(images, queries, tokens, most)
    assert 1 <= grid <= most
    assert waves * grid <= tiles
    length, longer = divmod((tiles - waves * grid) * blocks, grid)
    done = np.zeros((tiles, blocks), dtype=int)
    slots: dict[int, int] = {}
    for block in range(grid):
        for tile, first, last, slot in pieces(block, grid, waves, tiles, blocks):
            done[tile, first:last] += 1
            if slot >= 0:
                assert slot not in slots
                slots[slot] = tile
    assert (done == 1).all()
    for left_over in range(tiles - waves * grid):  # as attention384_combine finds them
        runs = [
            n // (length + 1) if n < longer * (length + 1) else longer + (n - longer * (length + 1)) // length
            for n in (left_over * blocks, (left_over + 1) * blocks - 1)
        ]
        own = [] if runs[0] == runs[1] else range(runs[0], runs[1] + 1)
        found = [2 * run + (left_over > (run * length + min(run, longer)) // blocks) for run in own]
        assert found == [slot for slot, tile in slots.items() if tile == waves * grid + left_over]


def test_plan_at_sizes_in_use() -> None:
    def square(side: int) -> tuple[int, int]:
        return plan(1, side**2, side**2, 132)

    assert square(128) == (128, 1)  # 1024 x 1024 pixels: whole tiles
    assert square(64) == (128, 0)  # 32 tiles, each in four
    assert square(166) == (132, 1)
    assert square(1) == (1, 1)
    assert plan(1, 79 * 79, 128 * 128, 132) == (131, 0)  # a rank's part: 49 tiles
    assert plan(1, 20, 128 * 128, 132) == (64, 0)  # one tile: more parts would take longer to add up


def test_addresses_of_the_kernel() -> None:
    """A tile of attention384.cu in numpy: where the copy engine puts rows, what the matrix instructions read of them,
    and which query, key and channel each thread's registers are."""
    queries, tokens, first = 210, 200, 128  # the image's second tile: 82 queries, and 8 keys in its last block
    query, keys_values = noise(2, queries, CHANNELS), noise(2, tokens, 2 * CHANNELS, seed=1)
    truth = truth_of(query, keys_values, torch.arange(first, queries)).numpy()[1]
    past = np.zeros((TILE, 2 * CHANNELS))  # past the image: zeros, not the next one's
    query_rows = np.concatenate([query[1].numpy(), past[:, :CHANNELS]])
    token_rows = np.concatenate([keys_values[1].numpy(), past])
    memory = np.full((229_376 // 16, 8), np.nan)

    def swizzled(address: np.ndarray) -> np.ndarray:
        return (address ^ (address >> 7 & 7) << 4) // 16

    def load(to: int, source: np.ndarray, part: int, row: int) -> None:
        for box in range(2):
            at = np.arange(64)[:, None] * 128 + np.arange(8) * 16
            values = source[row : row + 64, part * 128 + box * 64 :][:, :64]
            memory[swizzled(to + box * BOX + at)] = values.reshape(64, 8, 8)

    def k_major(start: int) -> np.ndarray:
        """[64 rows, 16 channels]"""
        row = np.arange(64)[:, None]
        return memory[swizzled(start + row // 8 * 1024 + row % 8 * 128 + np.arange(2) * 16)].reshape(64, 16)

    def mn_major(start: int) -> np.ndarray:
        """[16 rows, 128 channels]"""
        row, unit = np.arange(16)[:, None], np.arange(16)
        return memory[swizzled(start + unit // 8 * BOX + row // 8 * 1024 + row % 8 * 128 + unit % 8 * 16)].reshape(
            16, 128
        )

    for i in range(6):
        load(i * 2 * BOX, query_rows, i % 3, first + i // 3 * 64)
    found = np.full((queries - first, CHANNELS), np.nan)
    for group in range(2):
        own = group * 6 * BOX
        sums, weights = np.zeros((64, CHANNELS)), np.zeros(64)
        for block in range(-(-tokens // KEYS)):
            slots = [12 * BOX + (block * 6 + part) % 8 * 2 * BOX for part in range(6)]
            for part in range(6):
                load(slots[part], token_rows, part, block * KEYS)
            scores = np.zeros((64, KEYS))
            for part in range(3):
                for i in range(8):
                    q = k_major(own + (part * 2 + i // 4) * BOX + i % 4 * 32)
                    scores += q @ k_major(slots[part] + i // 4 * BOX + i % 4 * 32).T
            p = np.zeros((4, 64, 16))  # as the second product's operand: 16 keys at a time
            for thread in range(128):
                warp, lane = thread >> 5, thread & 31
                for i in range(32):
                    row, key = warp * 16 + (lane >> 2) + 8 * (i // 2 % 2), i // 4 * 8 + lane % 4 * 2 + i % 2
                    inside = block * KEYS + key < tokens
                    pair, column = i // 2, 2 * (lane % 4) + i % 2  # register pair % 4 of operand pair / 4
                    p[pair // 4, row, column + 8 * (pair % 4 // 2)] = inside * np.exp(scores[row, key] * CHANNELS**-0.5)
                    assert row == warp * 16 + (lane >> 2) + 8 * (pair % 2)
            weights += p.sum((0, 2))
            for part in range(3):
                for i in range(4):
                    sums[:, part * 128 :][:, :128] += p[i] @ mn_major(slots[3 + part] + i * 16 * 128)
        rows = group * 64 + np.arange(64)
        found[rows[rows < queries - first]] = (sums / weights[:, None])[rows < queries - first]
    np.testing.assert_allclose(found, truth, atol=1e-5)


def test_what_the_kernel_does_not_take() -> None:
    def reason(channels: int, dtype: torch.dtype = torch.bfloat16) -> str:
        query, keys_values = torch.zeros(1, 4, channels, dtype=dtype), torch.zeros(1, 9, 2 * channels, dtype=dtype)
        return str(hopper_attention.unfit(query, keys_values))

    assert "384 channels, not 256" in reason(256)
    assert "float16 and bfloat16" in reason(384, torch.float32)
    assert "Hopper" in reason(384)


def test_what_is_copied_for_the_copy_engine() -> None:
    """Only what it cannot fetch: rows that do not begin at multiples of 16 bytes, or are not whole."""
    x = noise(2, 6, 24, dtype=torch.float16)
    for view in (x, x[..., :8], x[:, 1:4, 8:], x[1:], x[:, ::2], x[:, :1]):
        assert hopper.fetchable(view) is view
    odd = [x[..., 4:12], x[..., ::2], x.mT, x.view(2, 12, 12)[..., :8], x[:1, :1].expand(2, 3, 24)]
    for view in (*odd, x.view(1, -1)[:, 1:2].as_strided((1, 1, 8), (3, 3, 1))):
        copy = hopper.fetchable(view)
        assert torch.equal(copy, view)
        assert copy.stride() == torch.empty(view.shape).stride()


def test_each_kernel_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[str] = []

    def kernel(name: str, fails: bool) -> object:
        def run(query: Tensor, keys_values: Tensor) -> Tensor:
            went.append(name)
            if fails:
                raise RuntimeError("it does not compile")
            return query

        return run

    query, keys_values = torch.zeros(1, 4, 3 * CHANNELS, dtype=torch.bfloat16).tensor_split((CHANNELS,), dim=-1)
    monkeypatch.setattr(hopper_attention, "unfit", lambda query, keys_values: None)
    monkeypatch.setattr(by_cuda, "_unfit", lambda query, keys_values: None)
    monkeypatch.setattr(by_cuda, "_broken", None)
    monkeypatch.setattr(by_cuda, "kernel", kernel("CUDA", fails=True))
    monkeypatch.setattr(by_triton, "_reason", lambda query, keys_values: None)
    monkeypatch.setattr(by_triton, "kernel", kernel("Triton", fails=False))
    for _ in range(2):
        assert wide_attention(query, keys_values).shape == (1, 4, CHANNELS)
    assert went == ["CUDA", "Triton", "Triton"]
    with references_only():
        wide_attention(query, keys_values)
    assert len(went) == 3


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="the kernel is for Hopper GPUs")
@pytest.mark.parametrize("scale", [1, 3], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("images", "queries", "tokens"),
    [
        *((1, size, size) for size in (1, 63, 64, 129, 4096, 16384, 166 * 166)),
        *((3, 129, 129), (2, 1000, 1000)),
        *((1, 1, 16384), (1, 20, 16384), (1, 79 * 79, 16384), (3, 300, 1000)),  # fewer queries
        *((1, 1000, 1), (1, 16384, 20), (3, 1000, 300)),  # more
    ],
)
def test_kernel(images: int, queries: int, tokens: int, dtype: torch.dtype, scale: int) -> None:
    """As near to fp64 as PyTorch's own, the same at every repetition, nothing left unwritten; on views of a matrix
    whose other rows, not a number, it must not meet."""
    qkv = noise(images, max(queries, tokens), 3 * CHANNELS, device="cuda", seed=tokens)
    qkv[..., : 2 * CHANNELS] *= scale
    qkv = qkv.to(dtype)
    qkv[:, queries:, :CHANNELS] = qkv[:, tokens:, CHANNELS:] = torch.nan
    query, keys_values = qkv[:, :queries, :CHANNELS], qkv[:, :tokens, CHANNELS:]
    rows = torch.arange(queries, device="cuda")
    rows = torch.cat([rows[:: queries // 500 + 1], rows[-200:]])
    truth = truth_of(query, keys_values, rows)
    parts = query, *keys_values.chunk(2, dim=-1)
    reference = F.scaled_dot_product_attention(*(part[:, None].contiguous() for part in parts))[:, 0]
    assert hopper_attention.unfit(query, keys_values) is None
    seen: list[Tensor] = []
    for _ in range(3):
        poison = [torch.full((images, queries, CHANNELS), torch.nan, dtype=dtype, device="cuda")]
        poison.append(torch.full((2 * 132, TILE, CHANNELS), torch.nan, device="cuda"))
        del poison  # their memory is what the result and the sums of parts will be written to
        out = by_cuda.kernel(query, keys_values)
        assert out.isfinite().all()
        rounding = torch.finfo(dtype).eps / 2 * float(truth.abs().max())
        assert rms_error(out[:, rows], truth) <= 1.15 * rms_error(reference[:, rows], truth)
        assert max_error(out[:, rows], truth) <= 1.5 * max_error(reference[:, rows], truth) + rounding
        seen.append(out)
    assert all(torch.equal(seen[0], other) for other in seen[1:])
