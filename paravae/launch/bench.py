"""``paravae bench``: decode and encode timed over sizes, checked first, alone or beside diffusers' own class."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from paravae import QwenImageVAEConfig
from paravae.configs.cli import add_vae_flags, flag_values, vae_config_from, whole_number
from paravae.files import check_writable
from paravae.launch import bench_report
from paravae.launch.bench_cases import SIZES, WHATS, make_cases, pixel_size
from paravae.launch.bench_contest import Contest, Row
from paravae.launch.bench_model import Model, load
from paravae.launch.bench_peers import PEERS, Peer, check_peers
from paravae.launch.decode import warn_if_alone
from paravae.launch.errors import agreed
from paravae.launch.models import DTYPES, add_device_flag
from paravae.launch.world import Place, World, world

_NARROW_DTYPES = [name for name in DTYPES if name != "float64"]  # the truth is fp32
_LEAST_WARMUP = {"cpu": 1, "cuda": 3}

OtherPeer = Callable[[Model, torch.dtype, torch.device], Peer]
"""A peer that is no flag of this command, built before any work starts; raises ValueError if it cannot be."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae bench``."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="checkpoint in diffusers' layout: a directory or a Hugging Face repository (default: the full-size "
        "architecture with random weights, whose times are the same)",
    )
    parser.add_argument("--subfolder", help="folder of the checkpoint within --model, such as vae")
    add_case_flags(parser)
    add_method_flags(parser)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="JSON file to write (default: only the table)")
    add_vae_flags(parser, QwenImageVAEConfig)


def add_case_flags(parser: argparse.ArgumentParser) -> None:
    """What is timed."""
    add_sizes_flag(parser, SIZES, at_least_one=True)
    parser.add_argument(
        "--frames",
        type=whole_number,
        nargs="+",
        default=[1],
        metavar="N",
        help="pixel frames, 4 k + 1: 1 is an image, 17 or 81 a video (default: 1)",
    )
    parser.add_argument(
        "--what", choices=WHATS, nargs="+", default=list(WHATS), help="what to time (default: decode encode)"
    )


def add_sizes_flag(parser: argparse.ArgumentParser, sizes: Sequence[str], *, at_least_one: bool) -> None:
    """``--sizes``, by default ``sizes``."""
    parser.add_argument(
        "--sizes",
        type=pixel_size,
        nargs="+" if at_least_one else "*",
        default=[pixel_size(size) for size in sizes],
        metavar="WxH",
        help=f"width x height in pixels (default: {' '.join(sizes)})",
    )


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """How it is timed, and beside whom."""
    parser.add_argument(
        "--peers",
        choices=PEERS,
        nargs="+",
        default=[],
        help="time these in the same run: diffusers, its own class as it comes; compile, the same with channels-last "
        "weights and torch.compile (default: none)",
    )
    add_timing_flags(parser)


def add_timing_flags(parser: argparse.ArgumentParser) -> None:
    """How it is timed."""
    parser.add_argument(
        "--dtype", choices=_NARROW_DTYPES, default="bfloat16", help="dtype of weights and input (default: bfloat16)"
    )
    parser.add_argument(
        "--repeats", type=whole_number, default=20, metavar="N", help="timed calls of each (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup",
        type=whole_number,
        default=3,
        metavar="N",
        help="calls of each before (default and least on a GPU: 3)",
    )
    add_device_flag(parser)


def run(args: argparse.Namespace, place: Place) -> None:
    """Check and time on every rank; rank 0 writes.

    Raises:
        RuntimeError: a result of paravae was not correct; all is written by then.
    """
    with world(place, args.device) as here:
        with agreed(here.group, "check the flags"):
            config = vae_config_from(args, QwenImageVAEConfig)
            check_flags(args, config, here)
        warn_if_alone(here, config.use_parallel_decode)
        with agreed(here.group, "load the model"):
            model = load(args.model, args.subfolder, config)
            cases = make_cases(args.what, args.sizes, args.frames, model.config.arch_config)
        contest = prepare(args, model, here)
        head = bench_report.head_of(contest, shown(args) | flag_values(config))
        rows: list[Row] = []
        for case in cases:
            rows += contest.run(case)
            with here.group.agreement("write the results"):
                if args.output and here.rank == 0:
                    bench_report.write(args.output, head, rows)
        if here.rank == 0:
            show(head, rows)
        raise_if_incorrect(rows)


def check_flags(args: argparse.Namespace, config: QwenImageVAEConfig, here: World) -> None:
    """Raise ValueError or OSError for what can be known to be wrong before anything is loaded."""
    check_timing_and_output(args, here)
    if args.peers and here.size > 1:
        raise ValueError(
            f"--peers {' '.join(args.peers)} with {here.size} ranks: peers run on one GPU; "
            "time them without torchrun, or leave --peers out"
        )
    check_peers(args.peers, here.device)
    for what, half in (("decode", "decoder"), ("encode", "encoder")):
        if not getattr(config, f"load_{half}") and (what in args.what or args.peers):
            who = "--peers need both halves" if what not in args.what else f"--what {what} needs the {half}"
            raise ValueError(f"--vae-config.load-{half} is false, but {who}")


def check_timing_and_output(args: argparse.Namespace, here: World) -> None:
    """Raise ValueError or OSError if results cannot be measured or written so."""
    for name, least in (("repeats", 1), ("warmup", _LEAST_WARMUP[here.device.type])):
        if getattr(args, name) < least:
            why = ": the second call of a shape may capture a CUDA graph" if least == 3 else ""
            raise ValueError(f"--{name} is {getattr(args, name)}, needs at least {least}{why}")
    if args.output:
        if args.output.suffix != ".json":
            raise ValueError(f"--output {args.output}: results are written as JSON; give a name that ends in .json")
        if here.rank == 0:
            check_writable(args.output)


def prepare(args: argparse.Namespace, model: Model, here: World, others: Sequence[OtherPeer] = ()) -> Contest:
    """The contest that the flags describe, with ``others`` after the peers that they name."""
    dtype = DTYPES[args.dtype]
    names = dict.fromkeys(args.peers)
    peers = [PEERS[name](model.config.arch_config, model.state, dtype, here.device) for name in names]
    peers += [build(model, dtype, here.device) for build in others]
    gc.collect()
    return Contest.prepare(model, peers, dtype, here, repeats=args.repeats, warmup=args.warmup)


def show(head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Print the table and the machine's rates."""
    machine, rates = head["machine"], head["rates"]
    ranks = f"{machine['ranks']} rank{'s' if machine['ranks'] > 1 else ''}"
    title = f"{head['what']}, {head['args']['dtype']}; {ranks}, {machine['device']}, torch {machine['torch']}"
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(bench_report.table_of(rows, title))
    console.print(
        f"x: time over paravae's. This machine's rates: bf16 product {rates['bf16_matmul_tflops']:g} TFLOP/s, "
        f"copy {rates['copy_gb_per_s']:g} GB/s.",
        highlight=False,
    )


def raise_if_incorrect(rows: Sequence[Row]) -> None:
    """Raise RuntimeError if a result of paravae was not correct."""
    wrong = bench_report.incorrect(rows)
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} result{'s' if len(wrong) > 1 else ''} of paravae not correct, too far from fp32: "
            + "; ".join(wrong)
        )


def shown(args: argparse.Namespace) -> dict[str, Any]:
    """The flags for the result file."""
    shown = {name: value for name, value in vars(args).items() if name not in ("run", "debug", "output")}
    return {**shown, "sizes": [f"{width}x{height}" for width, height in args.sizes]}
