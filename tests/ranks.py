"""Run cases on N real ranks, each a process of its own, and collect what every rank returned or raised.

A world is started once and runs many cases, since starting it is what costs. Processes are forked from a
server that has imported torch but touched no device. Whatever happens, all are gone when ``run_ranks`` returns.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT_S = 30  # a rank left waiting gives up after this


@dataclass(frozen=True)
class Rank:
    """Where a case finds itself."""

    rank: int
    size: int
    device: torch.device


Case = Callable[[Rank], object]


@dataclass(frozen=True)
class Outcome:
    """What a case gave on one rank: a value, or the traceback of what it raised."""

    value: Any = None
    error: str | None = None


def run_ranks(
    cases: Mapping[str, Case],
    size: int,
    rendezvous: Path,
    *,
    backend: str = "gloo",
    timeout_s: float = 200,
    tidy: bool = True,
    preload: Sequence[str] = ("tests.parallel_cases",),
) -> dict[str, list[Outcome]]:
    """Run ``cases`` in order on ``size`` ranks: for each case the ranks' outcomes.

    Cases and their values must pickle. ``backend`` that names nccl gives each rank a GPU. Ranks that have not
    finished after ``timeout_s`` are killed, and the cases they owe are reported as such. ``tidy``: destroy the process
    group at the end, which on NCCL could wait for a rank that is gone. ``preload``: modules of the cases that are
    imported once for all ranks; what the first call of a process says holds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", *preload])
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(cases, rank, size, rendezvous, backend, tidy, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(list(cases), pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
            process.join()


def check(results: Mapping[str, list[Outcome]], name: str) -> None:
    """Fail unless ``name`` was fine on every rank, and gave one value on all."""
    broken = [case for case, outcomes in results.items() if any(outcome.error for outcome in outcomes)]
    for rank, outcome in enumerate(results[name]):
        if outcome.error:
            pytest.fail(f"rank {rank} of {len(results[name])} (first case to fail: {broken[0]})\n{outcome.error}")
    values = [outcome.value for outcome in results[name]]
    assert all(value == values[0] for value in values), f"the ranks differ: {values}"


def _run(
    cases: Mapping[str, Case], rank: int, size: int, rendezvous: Path, backend: str, tidy: bool, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if "nccl" in backend:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    for name, case in cases.items():
        try:
            outcome = Outcome(value=case(Rank(rank, size, device)))
        except Exception:
            outcome = Outcome(error=traceback.format_exc())
        pipe.send((name, outcome))
    if tidy:
        dist.destroy_process_group()
    pipe.close()
    if not tidy:
        os._exit(0)


def _collect(names: list[str], pipes: list[Connection], deadline: float) -> dict[str, list[Outcome]]:
    results = {name: [Outcome(error="no result: the rank hung or died before it")] * len(pipes) for name in names}
    waiting = set(range(len(pipes)))
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready = wait([pipes[rank] for rank in waiting], timeout=left)
        for rank in list(waiting):
            if pipes[rank] in ready:
                try:
                    name, outcome = pipes[rank].recv()
                    results[name][rank] = outcome
                except EOFError:
                    waiting.discard(rank)
    return results
