"""``paravae demo``: a photograph, encoded and decoded on two CPU ranks in every mode, and what differs."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch.multiprocessing
from rich.console import Console
from rich.table import Table

from paravae.configs.cli import whole_number
from paravae.files import check_writable, whole_file
from paravae.launch.demo_ranks import DecodeRow, Job, Results, run_rank
from paravae.launch.errors import InputError
from paravae.launch.models import TINY
from paravae.launch.world import Place

PHOTOGRAPH = "grace_hopper.jpg"  # ships with matplotlib; in the public domain; paravae-tiny never saw it in training
_HEADINGS = ("decode", "ran as", "ranks", "seconds", "max error", "PSNR to one rank", "PSNR to original")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae demo``."""
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="DIR", help="folder to write to (default: demo)"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="picture to use (default: a portrait that ships with matplotlib)"
    )
    parser.add_argument("--ranks", type=whole_number, default=2, metavar="N", help="ranks to share by (default: 2)")
    parser.add_argument(
        "--model", default=str(TINY), metavar="DIR", help="checkpoint in diffusers' layout (default: paravae-tiny)"
    )


def run(args: argparse.Namespace, place: Place) -> None:
    """Start the ranks, collect what they measured, draw and tell."""
    if place.size > 1:
        raise ValueError("paravae demo starts its ranks itself: run it without torchrun (--ranks N)")
    if args.ranks < 1:
        raise ValueError(f"--ranks is {args.ranks}, needs at least 1")
    start = time.perf_counter()
    picture = args.picture or _photograph()
    _make_folder(args.output)
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(args.model, picture, args.output, args.ranks, _threads(args.ranks), Path(scratch))
        results = _on_ranks(job)
    from paravae.launch.demo_figure import draw_figure  # matplotlib: half a second that other commands need not wait

    figure = args.output / "figure.png"
    draw_figure(figure, args.output, results)
    _write_tables(args.output, results)
    console = Console()
    console.print(_rich_table(results))
    console.print(_notes(results), highlight=False)
    names = ["figure.png", "table.md", "demo.json", "original.png", *(row.file for row in results.decodes)]
    console.print(f"Written to {args.output}/: {', '.join(names)}, {results.latents_file}", highlight=False)
    console.print(f"Look at {figure} ({time.perf_counter() - start:.0f} s in all).", highlight=False)


def _photograph() -> Path:
    from matplotlib.cbook import get_sample_data

    return Path(get_sample_data(PHOTOGRAPH, asfileobj=False))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
        check_writable(path / "figure.png")
    except OSError as error:
        raise InputError(f"--output {path}: cannot write there: {error}") from error


def _threads(ranks: int) -> int:
    """Threads for each rank, so that one rank alone and many have equal cores a rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def _on_ranks(job: Job) -> Results:
    """Run ``job`` on its ranks, processes of their own; what rank 0 found."""
    with suppress(torch.multiprocessing.ProcessRaisedException):  # a traceback; the rank left its error in plain words
        torch.multiprocessing.spawn(run_rank, (job,), nprocs=job.ranks)
    if job.error_file.exists():
        kind, message = json.loads(job.error_file.read_text(encoding="utf-8"))
        raise InputError(message) if kind == "input" else RuntimeError(message)
    return Results.from_json(job.results_file.read_text(encoding="utf-8"))


def _cells(row: DecodeRow) -> tuple[str, ...]:
    rows, cols = row.grid
    windows = "" if row.mode == "single" else f" {rows}x{cols}"
    error = f"{row.max_error} / 255"
    to_one = "identical" if row.psnr_to_one_rank is None else f"{row.psnr_to_one_rank:.1f} dB"
    if row.name == "one rank":
        error = to_one = "-"
    return (
        row.name,
        row.mode + windows,
        str(row.ranks),
        f"{row.seconds:.2f}",
        error,
        to_one,
        f"{row.psnr_to_original:.1f} dB",
    )


def _rich_table(results: Results) -> Table:
    table = Table(title=f"{results.picture}, {results.width} x {results.height} pixels, float32 on the CPU")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in ("decode", "ran as") else "right")
    for row in results.decodes:
        table.add_row(*_cells(row))
    return table


def _notes(results: Results) -> str:
    threads = f"{results.threads_a_rank} thread" + ("s" if results.threads_a_rank > 1 else "")
    one, many = results.encode_seconds
    return (
        f"Seconds: median of {results.repeats} after a warm-up; {threads} a rank, with one rank as with "
        f"{results.ranks}. Max error: from one rank's picture, in levels of 255.\n"
        f"Encode: {one:.2f} s on one rank, {many:.2f} s on {results.ranks}; the latents differ by at most "
        f"{results.encode_max_error:.1e} (they reach {results.latents_peak:.1f})."
    )


def _write_tables(folder: Path, results: Results) -> None:
    lines = [f"| {' | '.join(cells)} |" for cells in (_HEADINGS, ("---",) * len(_HEADINGS))]
    lines += [f"| {' | '.join(_cells(row))} |" for row in results.decodes]
    with whole_file(folder / "table.md") as part:
        part.write_text("\n".join([*lines, "", _notes(results), ""]), encoding="utf-8")
    with whole_file(folder / "demo.json") as part:
        part.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
