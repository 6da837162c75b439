"""Decode on one or several GPUs, beside SGLang, DistVAE and diffusers: README.md's table of ranks.

    torchrun --nproc-per-node 4 -m benchmarks.scaling --sglang FOLDER --minutes 9
    python -m benchmarks.scaling --sglang FOLDER --minutes 9             # one GPU

The loop, the checks and the file are those of ``paravae bench``. Every rank takes part in what is shared; what is one
GPU's work (diffusers' class, paravae alone) is rank 0's, while the others wait. The file is replaced after every case,
so a run that is cut short leaves what it has; cases for which there was no time are listed in it under ``skipped``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.case_runner import VIDEO, add_video_flag, deadline, run_cases
from paravae import QwenImageVAEConfig, VAEArchConfig
from paravae.configs.cli import number
from paravae.launch import bench, bench_report
from paravae.launch.bench import OtherPeer
from paravae.launch.bench_cases import Case, make_cases
from paravae.launch.bench_contest import Contest, Own
from paravae.launch.bench_model import Model, load
from paravae.launch.bench_peers import Peer, diffusers_peer
from paravae.launch.cli import Parser
from paravae.launch.errors import agreed, leave_at_once, report
from paravae.launch.models import DTYPES
from paravae.launch.planned import Way
from paravae.launch.world import Place, World, place_from_environment, world

RESULTS = Path(__file__).parent / "results"
SIZES = ("1024x1024", "1328x1328", "2048x2048", "4096x4096")
VIDEO_FRAMES = (81,)
PEERS = ("diffusers", "sglang-spatial_shard", "sglang-auto", "distvae-rows", "distvae-tiles")
IF_ASKED = ("sglang-patch", "paravae-in-sglang-auto")
"""Timed if --peers names them: SGLang's inexact mode, and paravae through SGLang's own calls."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_sizes_flag(parser, SIZES, at_least_one=False)
    add_video_flag(parser, VIDEO_FRAMES)
    parser.add_argument(
        "--peers",
        choices=(*PEERS, *IF_ASKED),
        nargs="*",
        help=f"who else is timed (default: all that the ranks and --sglang allow, but for {', '.join(IF_ASKED)})",
    )
    parser.add_argument(
        "--sglang", type=Path, metavar="FOLDER", help="where benchmarks/fetch_sglang.sh laid SGLang out"
    )
    parser.add_argument("--tiled", action="store_true", help="time paravae's tiles too")
    parser.add_argument(
        "--plans",
        action="store_true",
        help="time every way that auto chooses from: each grid of windows, head shared or not, each rank alone, tiles",
    )
    bench.add_timing_flags(parser)
    parser.add_argument(
        "--seconds",
        type=number,
        default=4.0,
        metavar="X",
        help="of one whose calls take long, time only as many as fit, but five (default: %(default)s)",
    )
    parser.add_argument("--minutes", type=number, metavar="X", help="start no case after this long (default: no limit)")
    parser.add_argument("--model", metavar="DIR_OR_REPO", help="checkpoint (default: full size, random weights)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/scaling_RANKS.json)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Its exit status: 0 done, 1 a result of paravae is not correct or something failed, 2 bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start, place, status = time.monotonic(), Place(), 0
    try:
        place = place_from_environment()
        logging.getLogger("paravae").setLevel(logging.WARNING if place.rank else logging.INFO)
        args = build_parser().parse_args(arguments)
        with world(place, args.device) as here:
            run(args, here, start)
    except Exception as error:
        status = report(error, place, debug=not isinstance(error, ValueError))
    if place.size > 1:
        leave_at_once(status)
    return status


def run(args: argparse.Namespace, here: World, start: float) -> None:
    """Time all cases for which there is time, counted from ``start`` (of ``time.monotonic``)."""
    args.output = args.output or RESULTS / f"scaling_{here.size}.json"
    with agreed(here.group, "check the flags"):
        bench.check_timing_and_output(args, here)
        args.peers = chosen_peers(args, here.size)
        model = load(args.model, None, QwenImageVAEConfig())
        cases = all_cases(args, model.config.arch_config)
    contest = prepare(args, model, here)
    logging.getLogger("paravae").info("everyone is built after %.0f s", time.monotonic() - start)
    head = bench_report.head_of(contest, bench.shown(args))
    rows = run_cases(contest, cases, [], head, args.output, deadline(start, args.minutes))
    if here.rank == 0:
        bench.show(head, rows)
    bench.raise_if_incorrect(rows)


def all_cases(args: argparse.Namespace, arch: VAEArchConfig) -> list[Case]:
    """Images, then videos."""
    images = make_cases(["decode"], args.sizes, [1], arch)
    return [*images, *make_cases(["decode"], [VIDEO], args.video_frames, arch)]


def chosen_peers(args: argparse.Namespace, ranks: int) -> list[str]:
    """Those asked for, or all that can run: on one rank SGLang's modes are one, and DistVAE has nothing to share.

    Raises:
        ValueError: one that was asked for cannot run.
    """
    alone = ("diffusers", "sglang-spatial_shard")
    possible = [
        name for name in (*PEERS, *IF_ASKED) if (ranks > 1 or name in alone) and (args.sglang or "sglang" not in name)
    ]
    if impossible := [name for name in args.peers or () if name not in possible]:
        raise ValueError(
            f"--peers {' '.join(impossible)} on {ranks} rank{'s' if ranks > 1 else ''}: possible here are "
            f"{' '.join(possible)}; SGLang's need --sglang FOLDER, distvae and sglang-auto need several ranks"
        )
    return [name for name in possible if name not in IF_ASKED] if args.peers is None else args.peers


def own_runs(args: argparse.Namespace, config: QwenImageVAEConfig, ranks: int) -> list[Own]:
    """paravae as users get it, as one GPU of several has it, and the ways that were asked for."""
    shared = replace(config, use_parallel_decode=True)
    alone = [Own(config, "paravae-alone", alone=True)] if ranks > 1 else []
    ways = [Own(shared, f"paravae-{way.name}", way=way) for way in (Way.all_of(ranks) if args.plans else ())]
    tiled = [Own(replace(shared, parallel_decode_mode="tiled"), "paravae-tiled")] * (args.plans or args.tiled)
    return [Own(shared), *alone, *ways, *tiled]


def prepare(args: argparse.Namespace, model: Model, here: World) -> Contest:
    """Everyone, loaded. A peer that cannot be is in the results with its reason."""
    dtype = DTYPES[args.dtype]
    built = [peers.or_reason(name, builder_of(name, args.sglang))(model, dtype, here.device) for name in args.peers]
    gc.collect()
    own, timing = own_runs(args, model.config, here.size), {"repeats": args.repeats, "warmup": args.warmup}
    return Contest.prepare(model, built, dtype, here, own=own, seconds=args.seconds, **timing)


def builder_of(name: str, sglang: Path) -> OtherPeer:
    kind, _, mode = name.removeprefix("paravae-in-").partition("-")
    if kind == "sglang":
        return peers.shared_sglang(sglang, mode, plugin=name.startswith("paravae-in-"))
    return peers.distvae(mode) if kind == "distvae" else _diffusers


def _diffusers(model: Model, dtype: torch.dtype, device: torch.device) -> Peer:
    return diffusers_peer(model.config.arch_config, model.state, dtype, device)


if __name__ == "__main__":
    sys.exit(main())
