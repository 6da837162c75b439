"""A rank in trouble that lives on: out of memory between two gathers, stopped for a while, without lines to others."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor

from paravae import RankError
from paravae.vae import presence
from paravae.vae.share import Sharer
from tests.builders import max_error, pictures, small_vae
from tests.case_tools import alone, latents_for, parallel_vae, plan_with
from tests.fault_cases import BrokenEngine, error_of, expect, nan_on_one_rank
from tests.ranks import Case, Rank

STOPPED_S = 1.5
ERRORS: dict[str, type[Exception]] = {
    "MemoryError": MemoryError,
    "OutOfMemoryError": torch.OutOfMemoryError,
}


def out_of_memory(here: Rank, what: str, before: int, error_name: str) -> str:
    """One rank fails after ``before`` gathers, with the others waiting in the next; then all do the same again."""
    victim, kind = here.size // 2, ERRORS[error_name]
    vae = parallel_vae(here, parallel_decode_mode="patch")
    latents = latents_for(here, "9x6", 2 if what == "video" else 1, 1, torch.float32)
    pixels = pictures(1, 3, 1, 72, 48, device=here.device)
    gather, count = Sharer.gather, [0]

    def failing(*arguments: Any) -> Tensor | None:
        count[0] += 1
        if count[0] > before:
            raise kind("no memory left")
        return gather(*arguments)

    def call() -> Tensor:
        return vae.encode(pixels).mean if what == "encode" else vae.decode(latents)

    with plan_with((here.size, 1), head="shared") if what == "head" else nullcontext():
        with patch.object(Sharer, "gather", failing) if here.rank == victim else nullcontext():
            error = error_of(call)
        if here.rank == victim:
            expect(error, kind, "no memory left")
        else:
            expect(error, RankError, f"rank {victim} of {here.size} failed: {error_name}: no memory left")
        result = call()
    truth = small_vae(device=here.device).encode(pixels).mean if what == "encode" else alone(vae, latents)
    assert max_error(result, truth) <= 2e-5
    return "fine"


def stopped_for_a_while(here: Rank) -> str:
    """A rank that stands still in its share is waited for: its lines are open."""
    vae = parallel_vae(here, parallel_decode_mode="patch")
    latents = latents_for(here, "9x6", 1, 1, torch.float32)

    def stop() -> None:
        own = os.getpid()
        subprocess.Popen(["sh", "-c", f"sleep {STOPPED_S}; kill -CONT {own}"])
        os.kill(own, signal.SIGSTOP)

    if here.rank == here.size - 1:
        vae.use_engine(BrokenEngine(vae.engine, "decode", fail=stop))
    assert max_error(vae.decode(latents), alone(vae, latents)) <= 2e-5
    return "fine"


def without_lines(here: Rank) -> str:
    """Where one rank cannot reach the others, all say so once and go by gloo: what fails on one still reaches all."""

    def no_route(*_: object) -> NoReturn:
        raise OSError("no route to host")

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("paravae").addHandler(handler)
    lost = here.rank == here.size - 1
    try:
        with (
            patch.object(presence, "_MEETING_S", 0.5),
            patch.object(presence, "_call", no_route) if lost else nullcontext(),
        ):
            nan_on_one_rank(here, "parallel_patch_decode")
    finally:
        logging.getLogger("paravae").removeHandler(handler)
    (warning,) = warnings
    assert "cannot connect to the others" in warning
    assert "killed" in warning
    return warning


def _cases() -> dict[str, tuple[int, Case]]:
    """Name -> (fewest ranks it needs, the case)."""
    cases: dict[str, tuple[int, Case]] = {}
    for what, before, error_name in (
        ("head", 0, "OutOfMemoryError"),
        ("head", 1, "MemoryError"),
        ("head", 2, "OutOfMemoryError"),
        ("image", 0, "MemoryError"),
        ("video", 1, "OutOfMemoryError"),
        ("encode", 0, "OutOfMemoryError"),
    ):
        case = partial(out_of_memory, what=what, before=before, error_name=error_name)
        cases[f"memory-{what}-after-{before}-{error_name}"] = (2, case)
    cases["trouble-stopped"] = (2, stopped_for_a_while)
    cases["trouble-without-lines"] = (2, without_lines)
    return cases


TROUBLE_CASES = _cases()
