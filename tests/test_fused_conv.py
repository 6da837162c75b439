"""The fused convolution: its reference on any device, its kernel on a Hopper GPU.

The kernels are CUDA C++, which no interpreter runs: on the CPU their weight order and shared-memory addresses are
followed in numpy instead, one tile of a picture against a plain convolution.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paravae.layers.fused_conv import CHANNELS, column, fused_conv, pack_weight
from tests.builders import max_error, noise, rms_error

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
MODES = {"norm": (False, True), "residual-norm": (True, True), "residual": (True, False), "bias": (False, False)}
SHAPES = [(1, 1, 1), (1, 8, 8), (1, 16, 8), (2, 17, 9), (1, 129, 70), (3, 5, 33)]
modes = pytest.mark.parametrize("mode", MODES)
widths = pytest.mark.parametrize("channels", CHANNELS)


def truth_of(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, residual: Tensor | None) -> list[Tensor]:
    """[result, sum] in fp64."""
    channels = x.shape[-1]
    pictures = x.double().movedim(-1, -3).reshape(-1, channels, *x.shape[-3:-1])
    total = F.conv2d(pictures, weight.double(), padding=1).permute(0, 2, 3, 1).reshape(x.shape) + bias.double()
    total = total if residual is None else total + residual.double()
    if gamma is None:
        return [total, total]
    return [F.silu(F.normalize(total, dim=-1) * (gamma.double() * channels**0.5)), total]


def arguments(
    shape: tuple[int, ...], channels: int, mode: str, dtype: torch.dtype, device: str, seed: int = 0
) -> list[Tensor | None]:
    """x, weight, bias, gamma, residual."""
    with_residual, norm = MODES[mode]
    x, residual = (noise(*shape, channels, dtype=dtype, device=device, seed=seed + i) for i in range(2))
    weight = (noise(channels, channels, 3, 3, device=device, seed=seed + 2) / (9 * channels) ** 0.5).to(dtype)
    bias, gamma = (noise(channels, device=device, seed=seed + 3 + i) for i in range(2))
    return [x, weight, bias, gamma if norm else None, residual if with_residual else None]


@modes
@widths
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 2, 3, 4)])
def test_reference(shape: tuple[int, ...], channels: int, mode: str) -> None:
    x, weight, bias, gamma, residual = arguments(shape, channels, mode, torch.float32, "cpu")
    result, total = truth_of(x, weight, bias, gamma, residual)
    own = None if residual is None else residual.clone()
    out = fused_conv(x, weight, None, bias, gamma, own)
    assert max_error(out, result) <= 1e-4
    if own is not None:
        assert max_error(own, total) <= 1e-4
        assert (out.data_ptr() == own.data_ptr()) is (gamma is None)


@widths
def test_columns_are_every_channel_once(channels: int) -> None:
    assert sorted(column(n) for n in range(channels)) == list(range(channels))
    for quad in range(4):  # what one thread has of a pixel: runs of eight neighbours
        own = sorted(column(8 * i + 2 * quad + odd) for i in range(channels // 8) for odd in range(2))
        assert own == [32 * b + 8 * quad + c for b in range(channels // 32) for c in range(8)]


@pytest.mark.parametrize(("channels", "loaders"), [(96, 128), (192, 32)])
@pytest.mark.parametrize(("tile_y", "tile_x"), [(0, 0), (16, 8)])
def test_addresses_of_the_kernels(tile_y: int, tile_x: int, channels: int, loaders: int) -> None:
    """conv96.cu's and conv192.cu's shared memory in numpy, as if there were room for all slices: where pixels and
    weights lie, what the matrix instructions read of them, and which pixel and channel each thread's registers are.

    ``loaders``: threads that load a tile."""
    height, width = 29, 13  # a tile of 16 x 8 reaches over both edges
    slices = channels // 32
    x, weight = noise(height, width, channels), noise(channels, channels, 3, 3, seed=1)
    truth = F.conv2d(x.movedim(-1, 0)[None].double(), weight.double(), padding=1)[0].movedim(0, -1).numpy()
    chunk, halo_width = 186 * 16, 10
    slice_ = 4 * chunk
    w_tap = channels * 16
    w_chunk, w_kx, w_half, w_slice = 3 * w_tap, 6 * w_tap, 18 * w_tap, 36 * w_tap
    weights = pack_weight(weight).numpy().reshape(-1, 8)  # in 16 bytes of 8 channels, as the copies go
    source = x.numpy().reshape(-1, 8)
    ring = np.full((slices * slice_ // 16, 8), np.nan)
    for thread in range(loaders):
        own = thread & 3
        for i in range(-(-180 * 4 // loaders)):
            pixel = i * (loaders // 4) + (thread >> 2)
            if pixel >= 180:
                continue
            y, x_ = tile_y - 1 + pixel // halo_width, tile_x - 1 + pixel % halo_width
            for s in range(slices):
                to = own * chunk + (thread >> 2) * 16 + s * slice_ + i * (loaders * 4)
                inside = 0 <= y < height and 0 <= x_ < width
                ring[to // 16] = source[(y * width + x_) * (channels // 8) + own + 4 * s] if inside else 0

    def operand(memory: np.ndarray, start: int, between_chunks: int, between_eights: int, rows: int) -> np.ndarray:
        """[rows, 16 channels] as a matrix instruction reads them: 8 rows of 16 bytes side by side."""
        units = [
            [start + k * between_chunks + r // 8 * between_eights + r % 8 * 16 for k in range(2)] for r in range(rows)
        ]
        return memory[np.array(units) // 16].reshape(rows, 16)

    even, odd = np.zeros((64, channels)), np.zeros((64, channels))
    for s in range(slices):
        for i in range(18):
            half, kx, ky = i // 9, i // 3 % 3, i % 3
            pixels = s * slice_ + half * 2 * chunk + (ky * halo_width + kx) * 16
            tap = s * w_slice + half * w_half + kx * w_kx + (2 - ky) * w_tap
            columns = operand(weights, tap, w_chunk, 128, channels).T
            even += operand(ring, pixels, chunk, 2 * halo_width * 16, 64) @ columns
            odd += operand(ring, pixels + halo_width * 16, chunk, 2 * halo_width * 16, 64) @ columns

    found = np.full((height, width, channels), np.nan)
    for warp in range(4):
        for lane in range(32):
            x_, y, quad = tile_x + (lane >> 2), tile_y + 4 * warp, lane & 3
            for m in range(4):
                if y + m >= height or x_ >= width:
                    continue
                rows = (odd if m & 1 else even)[16 * warp + (lane >> 2) + 8 * (m >> 1)]
                for b in range(slices):
                    for e in range(4):
                        register = b * 4 + e  # of pairs: matrix column 8 register + 2 quad
                        to = (quad + b * 4) * 8 + 2 * e
                        found[y + m, x_, to : to + 2] = rows[8 * register + 2 * quad :][:2]
    tile = (slice(tile_y, min(tile_y + 16, height)), slice(tile_x, min(tile_x + 8, width)))
    assert np.isfinite(found[tile]).all()
    assert np.isfinite(found).sum() == np.isfinite(found[tile]).sum()
    np.testing.assert_allclose(found[tile], truth[tile], atol=1e-4)


def test_what_the_kernel_does_not_take() -> None:
    x, weight, bias, gamma, residual = arguments((1, 4, 4), 96, "residual-norm", torch.bfloat16, "cpu")
    packed = pack_weight(weight)
    unfit = fused_conv._unfit
    assert "96 or 192 channels" in str(unfit(x[..., :64], weight, packed, bias))
    assert "96 or 192 channels" in str(unfit(x, weight[:64, :64], packed, bias))
    assert "float16 and bfloat16" in str(unfit(x.float(), weight, packed, bias))
    assert "not packed" in str(unfit(x, weight, None, bias))
    assert "Hopper" in str(unfit(x, weight, packed, bias, gamma, residual))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="the kernel is for Hopper GPUs")
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("shape", "channels"),
    [*((shape, channels) for shape in SHAPES for channels in CHANNELS), ((1, 1024, 1024), 96), ((1, 512, 512), 192)],
    ids=str,
)
def test_kernel(shape: tuple[int, ...], channels: int, dtype: torch.dtype, mode: str) -> None:
    """As near to fp64 as one rounding allows, the same at every repetition, nothing left unwritten."""
    x, weight, bias, gamma, residual = arguments(shape, channels, mode, dtype, "cuda", seed=sum(shape))
    result, total = truth_of(x, weight, bias, gamma, residual)
    packed = pack_weight(weight)
    assert fused_conv._unfit(x, weight, packed, bias, gamma, residual) is None
    seen: list[Tensor] = []
    for _ in range(3):
        own = None if residual is None else residual.clone()
        poison = torch.full_like(x, torch.nan)
        del poison  # its memory is what the result will be written to
        out = fused_conv.kernel(x, weight, packed, bias, gamma, own)
        for values, truth in ((out, result), *([] if own is None else [(own, total)])):
            assert values.isfinite().all()
            assert rms_error(values, truth) <= 0.6 * torch.finfo(dtype).eps * float(truth.square().mean().sqrt())
            allowed = 1.05 * torch.finfo(dtype).eps * truth.abs() + 2e-4
            assert bool(((values.double() - truth).abs() <= allowed).all())
        seen.append(out.clone())
    assert all(torch.equal(seen[0], other) for other in seen[1:])
