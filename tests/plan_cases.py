"""Every way in which the ranks may share, not only those that ``auto`` would choose: all give what one rank gives."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from paravae import RankError
from paravae.layers import references_only
from paravae.vae.choice import DecodePlan
from paravae.vae.share import Sharer
from tests.builders import digest, max_error, pictures, small_vae
from tests.case_tools import TILES, alone, latents_for, parallel_vae, plan_chosen, plan_with, table_for_shared_heads
from tests.fault_cases import error_of, expect, still_works
from tests.ranks import Case, Rank


def every_plan_equals_alone(here: Rank, batch: int, frames: int, engine: str) -> list[str]:
    """Each of the exact plans there are for these latents: grids, heads shared or not, images dealt to groups."""
    vae = parallel_vae(here, engine=engine)
    latents = latents_for(here, "6x5", frames, batch, torch.float32)
    truth = alone(vae, latents) if here.rank == 0 else None
    tried: list[str] = []
    found: list[str] = []
    plans: Sequence[DecodePlan] = [None]  # type: ignore[list-item]
    while len(tried) < len(plans):

        def next_one(offered: Sequence[DecodePlan]) -> DecodePlan:
            nonlocal plans
            plans = offered
            return offered[len(tried)]

        vae.config = replace(vae.config)  # a config that is new is planned for anew
        with plan_chosen(next_one), references_only() if engine == "fast" else nullcontext():
            pixels = vae.decode(latents)
        assert vae.last_choice is not None
        tried.append(vae.last_choice.how)
        found.append("each its own" if vae.last_choice.mode == "single" else digest(pixels))
        assert truth is None or max_error(pixels, truth) <= 2e-5, tried[-1]
    assert any("head shared" in how for how in tried)
    assert any(f"dealt to {min(batch, here.size)} groups" in how for how in tried)
    assert any("single" in how for how in tried)
    return [*tried, *found]


WAYS: dict[str, tuple[Callable[[Rank], AbstractContextManager[Any]], dict[str, Any]]] = {
    "patch": (lambda here: plan_with((here.size, 1)), {}),
    "head": (lambda here: plan_with((1, here.size), head="shared"), {}),
    "batch": (lambda here: plan_with((1, 1), groups=min(3, here.size)), {}),
    "single": (lambda here: plan_with((1, 1)), {}),
    "tiled": (lambda here: nullcontext(), {"parallel_decode_mode": "tiled"}),
}


def gathers_to_one(here: Rank, way: str, frames: int, output_type: str) -> str:
    """The rank that is named gets what all would get, the others nothing; as a whole and in a stream."""
    around, options = WAYS[way]
    vae = parallel_vae(here, **options, **TILES)
    latents = latents_for(here, "9x7", frames, 3 if way == "batch" else 1, torch.float32)
    with around(here):
        everyones = vae.decode(latents, output_type=output_type)
        assert torch.equal(everyones, vae.decode(latents, output_type=output_type, gather_to="all"))
        for receiver in {0, here.size - 1}:
            pieces: list[Tensor] = []
            pixels = vae.decode(latents, output_type=output_type, gather_to=receiver)
            vae.decode(latents, output_type=output_type, gather_to=receiver, on_frames=pieces.append)
            if here.rank == receiver:
                assert torch.equal(pixels, everyones)
                assert torch.equal(torch.cat(pieces, dim=2), everyones)
            else:
                assert pixels is None
                assert pieces == []
    if here.rank == 0 and output_type == "float":
        assert max_error(everyones, vae.tiled_decode(latents) if way == "tiled" else alone(vae, latents)) <= 2e-5
    return digest(everyones) if way != "single" else "each its own"


def nobody_to_gather_to(here: Rank) -> str:
    """A receiver that is not there is refused by all; receivers that differ are refused too."""
    vae = parallel_vae(here, parallel_decode_mode="patch")
    latents = latents_for(here, "6x5", 1, 1, torch.float32)
    for decode in (vae.decode, vae.parallel_patch_decode, vae.parallel_tiled_decode):
        for wrong in (here.size, -1, "everyone", 1.0, None):
            error = error_of(lambda d=decode, w=wrong: d(latents, gather_to=w))
            expect(error, ValueError, f"gather_to is {wrong!r}", "'all'", "a rank of the group, 0 to")
    error = error_of(lambda: vae.decode(latents, gather_to=min(here.rank, 1)))
    expect(error, RankError, "asked for different things", "to 0", "to 1")
    still_works(vae)
    return "fine"


def encode_shares_its_head(here: Rank, frames: int, batch: int, engine: str) -> str:
    """With a table by which that pays, which is heeded from the moment that the config names it."""
    pixels = pictures(batch, 3, frames, 56, 40, device=here.device)
    truth = small_vae(device=here.device).encode(pixels)
    vae = parallel_vae(here, engine=engine)
    together, calls = Sharer._rows_together, [0]

    def counted(*arguments: Any) -> Tensor:
        calls[0] += 1
        return together(*arguments)

    with patch.object(Sharer, "_rows_together", counted), references_only() if engine == "fast" else nullcontext():
        assert max_error(vae.encode(pixels).mean, truth.mean) <= 2e-5
        assert calls == [0], "so small a picture is not worth it"
        with tempfile.TemporaryDirectory() as folder:
            vae.config = replace(vae.config, cost_table=table_for_shared_heads(Path(folder) / "table.json"))
            posterior = vae.encode(pixels)
    lat_frames = 1 + (frames - 1) // 4
    assert calls[0] >= 2 * lat_frames  # keys and values, then the attention
    assert max_error(posterior.mean, truth.mean) <= 2e-5
    assert max_error(posterior.logvar, truth.logvar) <= 2e-5
    return "fine"


def _cases() -> dict[str, tuple[int, Case]]:
    """Name -> (fewest ranks it needs, the case)."""
    cases: dict[str, tuple[int, Case]] = {}
    for batch, frames, engine in ((2, 1, "torch"), (3, 1, "fast"), (5, 1, "torch"), (2, 2, "fast"), (3, 2, "torch")):
        case = partial(every_plan_equals_alone, batch=batch, frames=frames, engine=engine)
        cases[f"plans-B{batch}-T{frames}-{engine}"] = (2, case)
    for way, frames, output_type in (
        ("patch", 1, "float"),
        ("patch", 2, "uint8"),
        ("head", 2, "float"),
        ("batch", 1, "uint8"),
        ("batch", 2, "float"),
        ("single", 2, "float"),
        ("tiled", 1, "float"),
        ("tiled", 2, "uint8"),
    ):
        case = partial(gathers_to_one, way=way, frames=frames, output_type=output_type)
        cases[f"gather-to-{way}-T{frames}-{output_type}"] = (2, case)
    cases["gather-to-nobody"] = (2, nobody_to_gather_to)
    for frames, batch, engine in ((1, 2, "torch"), (5, 1, "torch"), (1, 1, "fast")):
        case = partial(encode_shares_its_head, frames=frames, batch=batch, engine=engine)
        cases[f"encode-head-F{frames}-B{batch}-{engine}"] = (2, case)
    return cases


PLAN_CASES = _cases()
