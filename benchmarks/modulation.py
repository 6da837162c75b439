"""The fused modulation ops beside PyTorch, torch.compile and SGLang's Triton kernels, on one GPU.

    python -m benchmarks.modulation --sglang FOLDER --output benchmarks/results/modulation.json

Each op, and the three of a transformer's block in a row, over inputs that are many times the L2 cache: one CUDA graph
goes through all of them, and everyone's graphs take turns. Checked against fp64 first. The file is replaced after every
op, so a run that is cut short leaves what it has; those for which there was no time are in it under ``skipped``.
`benchmarks/fetch_sglang.sh FOLDER` lays SGLang out. On a CPU everything runs as well, in plain PyTorch and small.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.case_runner import deadline, exit_status
from benchmarks.modulation_cases import CASES, Case, Inputs, Outputs, Shape, Way
from benchmarks.modulation_peers import COMPILING, Eager, contestants
from paravae.configs.cli import number, whole_number
from paravae.launch import bench, bench_report
from paravae.launch.bench_errors import errors, is_ours, judge
from paravae.launch.bench_timing import spread, turns_ms
from paravae.launch.machine import describe
from paravae.launch.models import DTYPES
from paravae.launch.world import Place, World, world
from paravae.layers.dispatch import fallbacks
from paravae.layers.modulate import modulate

RESULTS = Path(__file__).parent / "results/modulation.json"
TOKENS = (4096, 6889, 16384, 1024)  # 4096 first: torch.compile tunes its kernels on the first that it meets
CHANNELS = (3072, 5120)
BATCHES = (1, 2)
_ROTATED = {"cuda": 256e6, "cpu": 1e5}
"""Bytes of x in all sets of inputs, at least: five times the L2 cache of an H200."""
_MOVED = {"cuda": 4e9, "cpu": 1e5}
"""Bytes that a timed replay moves, at least: a millisecond, beside which starting it is nothing."""
_COPIED = {"cuda": 2**28, "cpu": 2**20}
_SECONDS = 0.05  # of replays, each contestant: for all repeats of the fast, and some of the slow
_NOTES = {
    "times": "ms, p20_ms, p80_ms: of one op, median and percentiles over replays of a CUDA graph that goes through all "
    "sets of inputs, rounds times; replays: how many were timed, all contestants in turns. Each set's outputs have "
    "memory of their own. On a CPU the same calls by the clock.",
    "bytes": "what an op must move, each tensor, table and index once, with gates written or lazy; gb_per_s: these in "
    "the median time; copy_share: of copy_gb_per_s, a tensor's copy_ timed alike, its bytes read and written.",
    "errors": "of each output, against the same ops in fp64 on the same input. correct: RMS error of none more than "
    "1.05 x that of PyTorch's eager ops (others than paravae: 1.5 x). Checked before any time counts.",
    "sglang": "without an index (plain, residual_plain) SGLang runs kernels in CuTe DSL on NVIDIA's GPUs, not timed.",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """``call`` on each of ``sets``, which moves ``moved`` bytes each time."""

    call: Callable[[Any], object]
    sets: Sequence[Any]
    moved: int

    def rounds(self, device: torch.device) -> int:
        return math.ceil(_MOVED[device.type] / (self.moved * len(self.sets)))


def timed(turns: Mapping[str, Turn], repeats: int, here: World) -> dict[str, Row]:
    """Time and rate of a call of each."""
    pool = torch.cuda.graph_pool_handle() if here.device.type == "cuda" else None
    replays = {name: _replay(turn, here.device, pool) for name, turn in turns.items()}
    found = turns_ms(replays, repeats, here.device, here.group, seconds=_SECONDS, together=True)
    rows = {}
    for name, turn in turns.items():
        rounds, sets = turn.rounds(here.device), len(turn.sets)
        us = spread([1e3 * ms / rounds / sets for ms in found[name]])  # it rounds to thousandths: nanoseconds
        times = {key: round(value / 1e3, 6) for key, value in us.items()}
        rate = float(f"{turn.moved / times['ms'] / 1e6:.6g}")
        counts = {"sets": sets, "rounds": rounds, "replays": len(found[name])}
        rows[name] = {**times, **counts, "bytes": turn.moved, "gb_per_s": rate}
    return rows


def _replay(turn: Turn, device: torch.device, pool: Any) -> Callable[[], object]:
    """All rounds through all sets: one CUDA graph on a GPU."""

    def run() -> None:
        for _ in range(turn.rounds(device)):
            outputs = [turn.call(given) for given in turn.sets]  # all alive, so none takes another's place
            del outputs

    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def copy_rates(repeats: int, here: World) -> dict[str, float]:
    """What a copy in this device's memory reaches, timed as all else is; named as ``machine_rates`` names it."""
    size = _COPIED[here.device.type]
    sets = [torch.zeros(size, dtype=torch.uint8, device=here.device) for _ in range(4)]
    row = timed({"copy": Turn(torch.clone, sets, 2 * size)}, repeats, here)["copy"]
    return {"copy_bytes": row["bytes"], "copy_gb_per_s": row["gb_per_s"]}


class Modulation:
    """Rows of one op after another, for one shape at a time."""

    def __init__(self, ways: Sequence[Way], dtype: torch.dtype, args: argparse.Namespace, here: World) -> None:
        self._ways, self._dtype, self._args, self._here = ways, dtype, args, here
        self.rates = copy_rates(args.repeats, here)

    def sets(self, shape: Shape) -> list[Inputs]:
        """Enough for all to find the L2 cache full of something else."""
        one = shape.batch * shape.tokens * shape.channels * self._dtype.itemsize
        generator = torch.Generator(self._here.device).manual_seed(1)
        count = max(2, math.ceil(_ROTATED[self._here.device.type] / one))
        return [Inputs.draw(shape, self._dtype, generator) for _ in range(count)]

    def run(self, name: str, shape: Shape, sets: Sequence[Inputs]) -> list[Row]:
        """A row for each contestant: checked, then timed."""
        case = CASES[name]
        rows = [{"case": name, **shape.head(), "who": way.name} for way in self._ways if case.has(way)]
        truth = case.run(Eager(), sets[0].double())
        turns = {}
        for row in rows:
            way = next(way for way in self._ways if way.name == row["who"])
            try:
                given = [way.prepared(one) for one in sets]
                row["errors"] = self._checked(case, way, given[0], truth)
            except Exception as error:  # whatever a peer raises: the benchmark goes on without it
                if is_ours(row) or isinstance(error, torch.OutOfMemoryError):
                    raise
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            moved = case.moved(way).bytes(shape, self._dtype.itemsize)
            turns[way.name] = Turn(_call(case, way), given, moved)
        del truth
        _judge(rows)
        for who, found in timed(turns, self._args.repeats, self._here).items():
            row = next(row for row in rows if row["who"] == who)
            row |= {**found, "copy_share": round(found["gb_per_s"] / self.rates["copy_gb_per_s"], 4)}
        return rows

    def _checked(self, case: Case, way: Way, given: Inputs, truth: Outputs) -> dict[str, dict[str, float]]:
        """{output: its errors}, of the last of the calls before any is timed or recorded."""
        for _ in range(self._args.warmup):
            outputs = case.run(way, given)
        return {name: errors(out[:, :, None], truth[name][:, :, None]) for name, out in outputs.items()}


def _call(case: Case, way: Way) -> Callable[[Inputs], Outputs]:
    return lambda given: case.run(way, given)


def _judge(rows: Sequence[Row]) -> None:
    """Say of every row that was checked whether it is ``correct``: each of its outputs, beside the reference's."""
    outputs = {output for row in rows for output in row.get("errors", ())}
    for output in outputs:
        judged = [{"who": row["who"], **row["errors"][output]} for row in rows if output in row.get("errors", ())]
        judge(judged)
        for row in rows:
            fine = next((one["correct"] for one in judged if one["who"] == row["who"]), True)
            if "errors" in row:
                row["correct"] = row.get("correct", True) and fine


def every(args: argparse.Namespace) -> Iterator[tuple[Shape, str]]:
    for channels in dict.fromkeys(args.channels):
        for batch in dict.fromkeys(args.batches):
            for tokens in dict.fromkeys(args.tokens):
                for name in dict.fromkeys(args.cases):
                    yield Shape(batch, tokens, channels), name


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, values in (("--batches", BATCHES), ("--tokens", TOKENS), ("--channels", CHANNELS)):
        text = f"(default: {' '.join(map(str, values))})"
        parser.add_argument(flag, type=whole_number, nargs="+", default=list(values), metavar="N", help=text)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="(default: all)")
    parser.add_argument("--compile", choices=COMPILING, default="dynamic", help="torch.compile: once for all numbers "
                        "of tokens, for each, which takes minutes, or not at all (default: dynamic)")  # fmt: skip
    parser.add_argument("--sglang", type=Path, metavar="FOLDER", help="time SGLang's kernels too, from this folder")
    bench.add_timing_flags(parser)
    parser.set_defaults(repeats=30)
    parser.add_argument("--minutes", type=number, metavar="X", help="start no op after this long (default: no limit)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: benchmarks/results/...)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Its exit status: 0 done, 1 a result of paravae is not correct or not its kernel's, 2 bad input."""
    start = time.monotonic()
    parser = build_parser()
    args = parser.parse_args(arguments)

    def body() -> None:
        with world(Place(), args.device) as here, torch.no_grad():
            for flag in ("batches", "tokens", "channels"):
                if min(getattr(args, flag)) < 1:
                    raise ValueError(f"--{flag} {min(getattr(args, flag))}: needs at least 1")
            bench.check_timing_and_output(args, here)
            run(args, here, deadline(start, args.minutes))

    return exit_status(parser, body)


def run(args: argparse.Namespace, here: World, out_of_time: Callable[[], bool]) -> None:
    """Time all for which there is time.

    Raises:
        RuntimeError: a result of paravae is not correct, or on a GPU not its kernel's; all is written by then.
    """
    ways = contestants(args.compile, args.sglang)
    contest = Modulation(ways, DTYPES[args.dtype], args, here)
    head = {
        "what": "the modulation ops of a diffusion transformer's block",
        "machine": describe(1),
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "contestants": {way.name: way.words for way in ways},
        "notes": _NOTES,
        "rates": contest.rates,
        "kernel": modulate.unfit_on(here.device) or "runs",
    }
    rows: list[Row] = []
    left, sets, drawn = list(every(args)), list[Inputs](), None
    while left and not out_of_time():
        shape, name = left.pop(0)
        if shape != drawn:
            sets.clear()
            _give_back(here)
            sets, drawn = contest.sets(shape), shape
        found = contest.run(name, shape, sets)
        _give_back(here)
        rows += found
        bench_report.write(args.output, head, rows, skipped=[f"{name}, {shape}" for shape, name in left])
        print(f"{name}, {shape}: " + _line(found), flush=True)
    bench_report.write(args.output, head, rows, skipped=[f"{name}, {shape}" for shape, name in left])
    _raise_if_wrong(rows)


def _give_back(here: World) -> None:
    """What is no longer in use, such as the memory that graphs were recorded in."""
    if here.device.type == "cuda":
        torch.cuda.empty_cache()


def _line(rows: Sequence[Row]) -> str:
    return "; ".join(
        f"{row['who']} failed: {row['failed']}"
        if "failed" in row
        else f"{row['who']} {1e3 * row['ms']:.1f} us, {row['copy_share']:.0%}{'' if row['correct'] else ' NOT CORRECT'}"
        for row in rows
    )


def _raise_if_wrong(rows: Sequence[Row]) -> None:
    wrong = [row for row in rows if is_ours(row) and not row["correct"]]
    if wrong:
        words = "; ".join(f"{row['who']} {row['case']}, L={row['tokens']}, C={row['channels']}" for row in wrong)
        raise RuntimeError(f"further from fp64 than PyTorch's eager ops: {words}")
    if reasons := fallbacks().get(modulate.name):
        raise RuntimeError(f"paravae's kernel did not run: {'; '.join(sorted(reasons))}")


if __name__ == "__main__":
    sys.exit(main())
