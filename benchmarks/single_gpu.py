"""Decode and encode on one GPU, beside diffusers, torch.compile and SGLang: what README.md's first table shows.

    python -m benchmarks.single_gpu --sglang FOLDER --minutes 9
    python -m benchmarks.single_gpu --sglang FOLDER --minutes 9 --resume     # the cases that were left

The loop, the checks and the file are those of ``paravae bench``; here are its cases and one more peer.
``benchmarks/fetch_sglang.sh FOLDER`` lays SGLang out. The file is replaced after every case, so a run that is cut
short leaves what it has; cases for which there was no time are listed in it under ``skipped``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.case_runner import VIDEO, add_video_flag, deadline, exit_status, run_cases
from benchmarks.peers import sglang_from
from paravae import QwenImageVAEConfig, VAEArchConfig
from paravae.configs.cli import number
from paravae.launch import bench, bench_report
from paravae.launch.bench_cases import WHATS, Case, make_cases
from paravae.launch.bench_contest import Row
from paravae.launch.bench_model import load
from paravae.launch.world import Place, World, world

RESULTS = Path(__file__).parent / "results/single_gpu.json"
VIDEO_FRAMES = (17, 81)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_case_flags(parser)
    bench.add_method_flags(parser)
    parser.set_defaults(peers=["diffusers", "compile"])
    parser.add_argument("--no-peers", action="store_const", const=[], dest="peers", help="time none of --peers")
    add_video_flag(parser, VIDEO_FRAMES)
    parser.add_argument("--sglang", type=Path, metavar="FOLDER", help="time SGLang's class too, from this folder")
    parser.add_argument("--minutes", type=number, metavar="X", help="start no case after this long (default: no limit)")
    parser.add_argument("--resume", action="store_true", help="keep the cases that --output already has")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: benchmarks/results/...)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Its exit status: 0 done, 1 a result of paravae is not correct or something failed, 2 bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("paravae").setLevel(logging.INFO)
    start = time.monotonic()
    parser = build_parser()
    args = parser.parse_args(arguments)

    def body() -> None:
        with world(Place(), args.device) as here:
            run(args, here, start)

    return exit_status(parser, body)


def run(args: argparse.Namespace, here: World, start: float) -> None:
    """Time all cases for which there is time, counted from ``start`` (of ``time.monotonic``)."""
    config = QwenImageVAEConfig()
    bench.check_flags(args, config, here)
    model = load(None, None, config)
    cases = all_cases(args, model.config.arch_config)
    others = [sglang_from(args.sglang)] if args.sglang else []
    contest = bench.prepare(args, model, here, others)
    head = bench_report.head_of(contest, bench.shown(args))
    kept = kept_rows(args.output, head) if args.resume else []
    rows = run_cases(contest, cases, kept, head, args.output, deadline(start, args.minutes))
    bench.show(head, rows)
    bench.raise_if_incorrect(rows)


def all_cases(args: argparse.Namespace, arch: VAEArchConfig) -> list[Case]:
    """Decodes first, pictures before videos: what matters most, should time run out."""
    cases = []
    for what in WHATS:
        if what in args.what:
            cases += make_cases([what], args.sizes, args.frames, arch)
            cases += make_cases([what], [VIDEO], args.video_frames, arch)
    return list(dict.fromkeys(cases))


def kept_rows(output: Path, head: Mapping[str, Any]) -> list[Row]:
    """The rows that ``output`` has.

    Raises:
        ValueError: they were measured with something else than ``head`` says.
    """
    if not output.exists():
        return []
    report = json.loads(output.read_text(encoding="utf-8"))
    for name, was, now in (
        ("machine", _undated(report["machine"]), _undated(head["machine"])),
        ("contestants", report["contestants"], head["contestants"]),
        ("model", report["what"], head["what"]),
        *((f"--{flag}", report["args"][flag], head["args"][flag]) for flag in ("dtype", "repeats", "warmup")),
    ):
        if was != now:
            raise ValueError(f"--resume: {output} is of another {name}: {was}; here it is {now}; move that file away")
    return list(report["rows"])


def _undated(machine: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in machine.items() if name != "date"}


if __name__ == "__main__":
    sys.exit(main())
