"""Which ranks take part, and what travels between them."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paravae import AutoencoderKLQwenImage
from paravae.vae import comm
from paravae.vae.comm import RankGroup
from paravae.vae.pixels import to_uint8
from paravae.vae.plan import grids, local_work, plan_patches
from paravae.vae.presence import Presence
from paravae.vae.rows import ROW_BYTES
from tests.builders import max_error, pictures
from tests.case_tools import TILES, alone, latents_for, parallel_vae, plan_with
from tests.fault_cases import error_of, expect
from tests.ranks import Case, Rank


def split_in_pairs(here: Rank) -> str:
    """Two groups of two decode different latents in different ways at the same time, each at its own pace."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, rank = divmod(here.rank, 2)
    vae = parallel_vae(here, **TILES)
    vae.set_parallel_group(pairs[mine])
    assert (vae.parallel_group.rank, vae.parallel_group.size) == (rank, 2)
    latents = latents_for(here, ("5x7", "12x9")[mine], 1 + mine, 2, torch.float32, seed=mine)
    truth = alone(vae, latents)
    levels, tiled = to_uint8(truth), vae.tiled_decode(latents)
    ways: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"grid": (2, 1)}, {}),
        ({"grid": (1, 2), "head": "shared"}, {}),
        ({"grid": (1, 1), "groups": 2}, {"output_type": "uint8"}),
        ({"grid": (2, 1), "head": "shared"}, {"gather_to": mine}),
        ({"grid": (1, 2)}, {"gather_to": 1 - mine, "output_type": "uint8"}),
    )
    pace = random.Random(here.rank)
    for turn in range(5 * len(ways)):
        plan, options = ways[(turn + 2 * mine) % len(ways)]
        vae.config = replace(vae.config)  # a config that is new is planned for anew
        time.sleep(pace.uniform(0, 0.03))
        with plan_with(**plan):
            pixels = vae.decode(latents, **options)
        if options.get("gather_to", rank) != rank:
            assert pixels is None
        elif "output_type" in options:
            assert max_error(pixels, levels) <= 1
        else:
            assert max_error(pixels, truth) <= 2e-5
    assert torch.equal(vae.parallel_tiled_decode(latents), tiled)
    shared = RankGroup.of(pairs[mine]).all_gather(tiled)
    assert torch.equal(shared[0], shared[1])
    return "fine"


def one_rank_outside(here: Rank) -> str:
    """All ranks but rank 1 form a group; rank 1 may not join it, and decodes by itself meanwhile."""
    members = [rank for rank in range(here.size) if rank != 1]
    group = dist.new_group(members)
    vae = parallel_vae(here)
    latents = latents_for(here, "6x5", 1, 1, torch.float32, seed=int(here.rank == 1))
    truth = alone(vae, latents)
    if here.rank == 1:
        error = error_of(lambda: vae.set_parallel_group(group))
        expect(error, ValueError, "rank 1 of the world is not in the parallel group")
        return "fine"
    vae.set_parallel_group(group)
    assert vae.parallel_group.rank == members.index(here.rank)
    assert max_error(vae.parallel_patch_decode(latents), truth) <= 2e-5
    assert vae.last_choice is not None
    assert vae.last_choice.ranks == here.size - 1
    return "fine"


def group_of_one(here: Rank) -> str:
    """A group of this rank only sends nothing: each rank decodes its own latents."""
    groups = [dist.new_group([rank]) for rank in range(here.size)]
    vae = parallel_vae(here)
    vae.set_parallel_group(groups[here.rank])
    latents = latents_for(here, f"3x{4 + here.rank}", 1, 1, torch.float32)
    assert torch.equal(vae.parallel_patch_decode(latents), alone(vae, latents))
    return "fine"


# ----------------------------------------------------------------------------------------------- collectives


def collectives_counted(here: Rank, method: str, agreements: int) -> str:
    """Gathers of exactly the padded shards, one for each latent frame (tiled, and an encode: one in all), besides small
    status rows; nothing else is called."""
    vae = parallel_vae(here, **TILES)
    latents = latents_for(here, "9x14", 2, 1, torch.float32)
    pixels = pictures(1, 3, 1, 72, 112, device=here.device)

    def call() -> None:
        vae.encode(pixels) if method == "encode" else getattr(vae, method)(latents)

    call()  # the first call also agrees on the memory that all have
    gathers: list[int] = []
    others: list[str] = []
    original = comm._all_gather_single
    names = [name for name in dir(dist) if name.startswith(("all_", "broadcast", "gather", "scatter", "reduce"))]
    names += [
        name for name in ("send", "recv", "isend", "irecv", "barrier", "monitored_barrier") if hasattr(dist, name)
    ]
    kept = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def counted(output: Tensor, shard: Tensor, **options: Any) -> Any:
        gathers.append(shard.numel() * shard.element_size())
        return original(output, shard, **options)

    rows: list[int] = []
    exchange = Presence.exchange

    def counted_rows(presence: Presence, row: bytes) -> dict[int, bytes]:
        rows.append(len(row))
        return exchange(presence, row)

    comm._all_gather_single = counted  # type: ignore[assignment]
    Presence.exchange = counted_rows  # type: ignore[method-assign]
    for name in kept:
        setattr(dist, name, lambda *_, name=name, **__: others.append(name))
    try:
        call()
    finally:
        comm._all_gather_single = original
        Presence.exchange = exchange  # type: ignore[method-assign]
        for name, function in kept.items():
            setattr(dist, name, function)
    assert others == []
    if here.size == 1:
        assert gathers == rows == []
        return "fine"
    assert rows == [ROW_BYTES] * agreements
    assert gathers == _shard_bytes(vae, method, here.size), gathers
    return "fine"


def _shard_bytes(vae: AutoencoderKLQwenImage, method: str, ranks: int) -> list[int]:
    """Bytes of one rank's padded shards, by arithmetic of its own."""
    if method == "encode":
        stages = vae.engine.encoder_stages
        candidates = [plan_patches(stages, (72, 112), (9, 14), grid, ranks) for grid in grids((9, 14), ranks)]
        best = min(candidates, key=lambda patches: max(local_work(stages, trace) for trace in patches.traces))
        _, rows, cols = best.shard_size
        return [32 * rows * cols * 4]  # base_dim 8 x 4 channels, one frame, fp32
    if method == "parallel_patch_decode":
        assert vae.last_choice is not None
        _, rows, cols = plan_patches(
            vae.engine.decoder_stages, (9, 14), (9, 14), vae.last_choice.grid, ranks
        ).shard_size
        return [3 * frames * rows * cols * 4 for frames in (1, 4)]
    most = -(-2 // ranks)  # 9 x 14 latents in tiles of at least 8, 6 apart: two of 9 x 8
    return [most * 3 * 5 * (8 * 9) * (8 * 8) * 4]


def _cases() -> dict[str, tuple[int, Case]]:
    """Name -> (fewest ranks it needs, the case)."""
    cases: dict[str, tuple[int, Case]] = {}
    for method, agreements in (("parallel_patch_decode", 4), ("parallel_tiled_decode", 3), ("encode", 3)):
        case = partial(collectives_counted, method=method, agreements=agreements)
        cases[f"collectives-{method}"] = (1, case)
    cases["groups-of-one"] = (1, group_of_one)
    cases["groups-one-outside"] = (2, one_rank_outside)
    cases["groups-two-pairs"] = (4, split_in_pairs)
    return cases


GROUP_CASES = _cases()
