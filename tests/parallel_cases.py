"""What a decode or encode must give on any number of ranks: each case runs on every rank, on CPU or GPU.

A case asserts against a decode that the rank makes alone, and returns what must be the same on all ranks.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paravae.layers import references_only
from paravae.vae.pixels import to_uint8
from paravae.vae.plan import plan_tiles
from tests.builders import digest, max_error, pictures, rms_error, small_vae
from tests.case_tools import TILE_FITS_GIB, TILES, alone, latents_for, parallel_vae
from tests.fault_cases import FAULT_CASES
from tests.group_cases import GROUP_CASES
from tests.plan_cases import PLAN_CASES
from tests.ranks import Case, Rank
from tests.trouble_cases import TROUBLE_CASES

BOUNDS = {torch.float32: 2e-5, torch.float64: 1e-10}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


def check_size(pixels: Tensor, latents: Tensor, dtype: torch.dtype) -> None:
    batch, _, frames, height, width = latents.shape
    assert pixels.shape == (batch, 3, 4 * frames - 3, 8 * height, 8 * width)
    assert pixels.dtype == dtype
    assert pixels.device.type == latents.device.type


def patch_equals_alone(here: Rank, size: str, frames: int, batch: int, dtype: str) -> str:
    vae = parallel_vae(here, DTYPES[dtype])
    latents = latents_for(here, size, frames, batch, vae.dtype)
    pixels = vae.parallel_patch_decode(latents)
    check_size(pixels, latents, vae.dtype)
    assert pixels.std() > 0.05
    if here.rank == 0:  # the others have the very same: their digests tell
        assert max_error(pixels, alone(vae, latents)) <= BOUNDS[vae.dtype]
    assert vae.last_choice is not None
    assert vae.last_choice.mode == "patch"
    assert vae.last_choice.grid[0] * vae.last_choice.grid[1] <= here.size
    return digest(pixels)


def tiled_equals_serial(here: Rank, size: str, frames: int, batch: int, dtype: str) -> str:
    vae = parallel_vae(here, DTYPES[dtype], **TILES)
    latents = latents_for(here, size, frames, batch, vae.dtype)
    pixels = vae.parallel_tiled_decode(latents)
    check_size(pixels, latents, vae.dtype)
    assert vae.last_choice is not None
    grid = vae.last_choice.grid
    if here.rank > 0:  # they have the very same: their digests tell
        return digest(pixels)
    serial = vae.tiled_decode(latents)
    if vae.dtype == torch.bfloat16 and latents.is_cuda:  # the fast engine's algorithms depend on the tiles in a batch
        assert rms_error(pixels, serial) <= 0.01
    else:
        assert torch.equal(pixels, serial)
    whole = alone(vae, latents)
    if max(latents.shape[-2:]) <= 8:  # within one tile: no tiling at all
        assert grid == (1, 1)
        assert torch.equal(pixels, whole)
    else:
        assert grid[0] * grid[1] > 1
        assert 0 < rms_error(pixels, whole) < 0.5 * float(whole.float().std()), "tiles are misplaced or not used"
    return digest(pixels)


def encode_equals_alone(here: Rank, size: str, frames: int, batch: int, dtype: str) -> str:
    vae = parallel_vae(here, DTYPES[dtype])
    height, width = map(int, size.split("x"))
    pixels = pictures(batch, 3, frames, height, width, dtype=vae.dtype, device=here.device)
    posterior = vae.encode(pixels)
    assert posterior.mean.shape == (batch, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    assert posterior.mean.dtype == vae.dtype
    assert posterior.mean.std() > 0.01
    if here.rank == 0:  # the others have the very same: their digests tell
        truth = small_vae(vae.dtype, here.device).encode(pixels)
        assert max_error(posterior.mean, truth.mean) <= BOUNDS[vae.dtype]
        assert max_error(posterior.logvar, truth.logvar) <= BOUNDS[vae.dtype]
    return digest(posterior.mean, posterior.logvar)


def encode_alone_when_told(here: Rank) -> str:
    vae = parallel_vae(here, use_parallel_encode=False)
    if here.rank == 0:  # the others take no part, and are not waited for
        vae.encode(pictures(1, 3, 1, 16, 16, device=here.device))
    return "fine"


def uint8_equals_float(here: Rank, mode: str) -> str:
    on = mode != "off"
    vae = small_vae(device=here.device, use_parallel_decode=on, parallel_decode_mode=mode if on else "auto", **TILES)
    latents = latents_for(here, "9x20", 1, 1, torch.float32)
    levels = vae.decode(latents, output_type="uint8")
    check_size(levels, latents, torch.uint8)
    assert torch.equal(levels, to_uint8(vae.decode(latents)))
    assert len(levels.unique()) > 50
    return digest(levels)


def fast_engine_equals_alone(here: Rank, size: str, frames: int) -> str:
    """Patch mode through the fast engine (on a CPU its references), against the plain engine alone."""
    vae = parallel_vae(here, engine="fast")
    latents = latents_for(here, size, frames, 2, vae.dtype)
    with references_only():
        pixels = vae.parallel_patch_decode(latents)
        levels = vae.decode(latents, output_type="uint8")
        moments = vae.encode(pixels.clamp(-1, 1)).mean
    assert max_error(pixels, alone(vae, latents)) <= BOUNDS[vae.dtype]
    assert max_error(levels, to_uint8(pixels)) <= 1
    assert max_error(moments, small_vae(vae.dtype, here.device).encode(pixels).mean) <= BOUNDS[vae.dtype]
    return digest(pixels)


def stream_equals_whole(here: Rank, mode: str, frames: int, output_type: str) -> str:
    """Frames handed out as they are ready are those of the whole decode, in pieces of 1, 4, 4, ..."""
    on = mode != "off"
    vae = small_vae(device=here.device, use_parallel_decode=on, parallel_decode_mode=mode if on else "auto", **TILES)
    latents = latents_for(here, "9x20", frames, 1, torch.float32)
    pieces: list[Tensor] = []
    steps: list[tuple[int, int]] = []
    returned = vae.decode(
        latents,
        output_type=output_type,
        on_frames=pieces.append,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    whole = vae.decode(latents, output_type=output_type)
    assert returned is None
    assert [piece.shape[2] for piece in pieces] == [1] + [4] * (frames - 1)
    assert all(done <= total for done, total in steps)
    assert not steps or steps[-1][0] == steps[-1][1]  # a rank without a tile has none
    assert torch.equal(torch.cat(pieces, dim=2), whole)
    return digest(whole)


def config_chooses_mode(here: Rank, mode: str, method: str) -> str:
    vae = parallel_vae(here, parallel_decode_mode=mode, **TILES)
    latents = latents_for(here, "9x20", 1, 1, torch.float32)
    pixels = vae.decode(latents)
    choice = vae.last_choice
    assert choice is not None
    assert (choice.mode, choice.ranks, choice.reason) == (method, here.size, "as configured")
    assert torch.equal(pixels, getattr(vae, f"parallel_{method}_decode")(latents))
    return digest(pixels)


def auto_picks(here: Rank, size: str, limit_gib: float | None) -> tuple[Any, ...]:
    vae = parallel_vae(here, memory_limit_gib=limit_gib, **TILES)
    latents = latents_for(here, size, 1, 1, torch.float32)
    pixels = vae.decode(latents)
    choice = vae.last_choice
    assert choice is not None
    assert choice.ranks == here.size
    if limit_gib is not None:
        assert choice.mode == "tiled"
        assert "GiB" in choice.reason
        assert torch.equal(pixels, vae.tiled_decode(latents))
    else:
        slow = here.device.type == "cpu"  # there sharing pays; so small a picture a GPU decodes before it is shared
        assert choice.mode == ("patch" if here.size > 1 and size != "1x1" and slow else "single")
        assert ("one rank" if here.size == 1 else "predicted") in choice.reason
        assert max_error(pixels, alone(vae, latents)) <= 2e-5
    return (*asdict(choice).values(), digest(pixels))


def bf16_is_as_good(here: Rank) -> str:
    """A patch decode in bf16 is no farther from the truth than one rank's decode in bf16."""
    vae = parallel_vae(here, torch.bfloat16)
    latents = latents_for(here, "16x16", 1, 1, torch.bfloat16)
    truth = small_vae(torch.bfloat16, here.device).double().decode(latents.double())
    pixels = vae.parallel_patch_decode(latents)
    check_size(pixels, latents, torch.bfloat16)
    assert rms_error(pixels, truth) <= 1.05 * rms_error(alone(vae, latents), truth)
    return digest(pixels)


def off_by_default(here: Rank) -> str:
    """Without use_parallel_decode a rank decodes alone, whatever the others do."""
    if here.rank == 0:
        vae = small_vae(device=here.device, **TILES)
        latents = latents_for(here, "9x9", 1, 1, torch.float32)
        vae.decode(latents)
        assert vae.last_choice is not None
        assert (vae.last_choice.mode, vae.last_choice.ranks) == ("single", 1)
        vae.tiled_decode(latents)
        assert (vae.last_choice.mode, vae.last_choice.ranks) == ("tiled", 1)
    return "fine"


def progress_counts_up(here: Rank) -> str:
    """Each rank is told of its own share: an image at once, a video by latent frames of its window or tiles."""
    vae = parallel_vae(here, **TILES)
    film, picture = (latents_for(here, size, frames, 1, torch.float32) for size, frames in (("17x20", 2), ("9x14", 1)))
    pixels = pictures(1, 3, 5, 128, 16, device=here.device)
    tiles = plan_tiles((17, 20), (8, 8), (6, 6)).shares(here.size)[here.rank].size  # of six
    for call, value, totals in (
        (vae.parallel_patch_decode, film, (2,)),
        (vae.parallel_tiled_decode, film, (2 * tiles,)),
        (vae.parallel_patch_decode, picture, (1,)),
        (vae.parallel_tiled_decode, picture, (1,)),
        (vae.encode, pixels, (2,)),
    ):
        steps: list[tuple[int, int]] = []
        call(value, on_progress=lambda done, total, steps=steps: steps.append((done, total)))
        assert [done for done, _ in steps] == sorted({done for done, _ in steps}), steps
        assert all(total in totals for _, total in steps), steps
        assert not steps or steps[-1][0] == steps[-1][1]
        assert steps or here.rank > 0
    return "fine"


# ----------------------------------------------------------------------------------------------------- list


def _cases() -> dict[str, tuple[int, Case]]:
    """Name -> (fewest ranks it needs, the case)."""
    cases: dict[str, tuple[int, Case]] = {}
    for size, frames, batch, dtype in (
        ("1x1", 1, 1, "fp32"),
        ("1x5", 2, 2, "fp32"),
        ("2x3", 3, 1, "fp64"),
        ("5x7", 1, 2, "fp64"),
        ("5x7", 3, 1, "fp32"),
        ("16x16", 1, 1, "fp64"),
        ("9x11", 2, 1, "fp32"),
        ("33x20", 1, 2, "fp32"),
        ("3x64", 1, 1, "fp64"),
        ("64x3", 2, 1, "fp32"),
    ):
        case = partial(patch_equals_alone, size=size, frames=frames, batch=batch, dtype=dtype)
        cases[f"patch-{size}-T{frames}-B{batch}-{dtype}"] = (1, case)
    for size, frames, batch, dtype in (
        ("1x1", 1, 1, "fp32"),
        ("5x7", 2, 1, "fp32"),
        ("8x14", 1, 1, "fp32"),
        ("9x14", 2, 2, "fp32"),
        ("33x20", 1, 1, "fp32"),
        ("17x16", 1, 1, "fp64"),
        ("16x16", 1, 2, "bf16"),
    ):
        case = partial(tiled_equals_serial, size=size, frames=frames, batch=batch, dtype=dtype)
        cases[f"tiled-{size}-T{frames}-B{batch}-{dtype}"] = (1, case)
    for size, frames, batch, dtype in (
        ("8x8", 1, 1, "fp32"),
        ("40x56", 5, 2, "fp32"),
        ("24x16", 9, 1, "fp64"),
        ("128x160", 1, 1, "fp64"),
        ("8x264", 1, 2, "fp32"),
    ):
        case = partial(encode_equals_alone, size=size, frames=frames, batch=batch, dtype=dtype)
        cases[f"encode-{size}-F{frames}-B{batch}-{dtype}"] = (1, case)
    for mode in ("off", "auto", "patch", "tiled"):
        cases[f"uint8-{mode}"] = (1, partial(uint8_equals_float, mode=mode))
    for size, frames in (("9x20", 1), ("5x4", 2)):
        cases[f"fast-{size}-T{frames}"] = (1, partial(fast_engine_equals_alone, size=size, frames=frames))
    for mode, frames, output_type in (
        ("off", 3, "float"),
        ("patch", 3, "float"),
        ("patch", 1, "uint8"),
        ("tiled", 2, "uint8"),
    ):
        case = partial(stream_equals_whole, mode=mode, frames=frames, output_type=output_type)
        cases[f"stream-{mode}-T{frames}-{output_type}"] = (1, case)
    for mode, method in (("patch", "patch"), ("spatial_shard", "patch"), ("tiled", "tiled")):
        cases[f"config-{mode}"] = (1, partial(config_chooses_mode, mode=mode, method=method))
    cases["auto-fits"] = (1, partial(auto_picks, size="33x20", limit_gib=None))
    cases["auto-tiny"] = (1, partial(auto_picks, size="1x1", limit_gib=None))
    cases["auto-little-memory"] = (1, partial(auto_picks, size="32x32", limit_gib=TILE_FITS_GIB))
    cases["bf16"] = (1, bf16_is_as_good)
    cases["off-by-default"] = (1, off_by_default)
    cases["encode-alone"] = (1, encode_alone_when_told)
    cases["progress"] = (1, progress_counts_up)
    return cases | GROUP_CASES | PLAN_CASES | FAULT_CASES | TROUBLE_CASES


_CASES = _cases()


# What takes no other rank, and what shows on two and four ranks all that it would show on three.
_ALONE = ("stream-off", "uint8-off")
_NOT_ON_THREE = ("auto", "bf16", "config", "gather-to", "memory", "progress", "stream", "trouble", "uint8")


def cases_for(size: int) -> dict[str, Case]:
    """The cases for a world of ``size`` ranks. Pairs need exactly four."""
    spared = (*(_ALONE if size > 1 else ()), *(_NOT_ON_THREE if size == 3 else ()))
    return {name: case for name, (fewest, case) in _CASES.items() if fewest <= size and not name.startswith(spared)}
