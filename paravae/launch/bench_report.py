"""What the benchmark found, as JSON for scripts and as a table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from paravae import AutoencoderKLQwenImage
from paravae.files import whole_file
from paravae.launch.bench_contest import COMPARED_WORDS, Contest, Row
from paravae.launch.bench_cost import COST_WORDS
from paravae.launch.bench_errors import CORRECT_WORDS, OURS, is_ours
from paravae.launch.bench_peers import Peer, ours
from paravae.launch.bench_timing import MEMORY_WORDS
from paravae.launch.machine import describe

_TIME_WORDS = (
    "ms, p20_ms, p80_ms: median and percentiles over repeats of single calls, by CUDA events on a GPU (the clock on a "
    "CPU), the device idle before each, after the warm-up calls and one more; all contestants in turns, a call each a "
    "round (together: false: one after another, for want of memory); calls: how many were timed. On several ranks all "
    "start each call together and the slowest one's time counts. The input is on the device before, the result stays."
)
_HEADINGS = (
    "what", "size", "frames", "who", "ms", "p20..p80", "x", "RMS error", "max error", "peak GiB", "of matmul rate",
    "of copy rate", "correct",
)  # fmt: skip


def head_of(contest: Contest, args: Mapping[str, Any]) -> dict[str, Any]:
    """All of the result file but its rows. ``args``: the flags, as typed or by default."""
    with torch.device("meta"):  # only to say what they are
        own = [ours(AutoencoderKLQwenImage(run.config), run.name, alone=run.alone) for run in contest.own]
    ranks = contest.here.size
    return {
        "what": f"time, errors and memory at batch 1: {contest.model.name}",
        "machine": describe(contest.here.size),
        "args": {name: _plain_value(value) for name, value in args.items()},
        "contestants": {peer.name: _what_ran(peer, ranks) for peer in (*own, *contest.peers)},
        "notes": {
            "times": _TIME_WORDS,
            "errors": CORRECT_WORDS,
            "compared": COMPARED_WORDS,
            "memory": MEMORY_WORDS,
            "cost": COST_WORDS,
        },
        "rates": dict(contest.rates),
    }


def write(path: Path, head: Mapping[str, Any], rows: Sequence[Row], **more: Any) -> None:
    """Replace ``path`` as a whole."""
    report = {**head, "rows": list(rows), **more}
    with whole_file(path) as part:
        part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def table_of(rows: Sequence[Row], title: str) -> Table:
    """A line for each row; ``x``: how many times as long as paravae it took."""
    table = Table(title=title)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in ("what", "who") else "right", no_wrap=heading != "what")
    own: Row | None = None
    for row in rows:
        own = row if row["who"] == OURS else own
        table.add_row(*_cells(row, own or row))
    return table


def incorrect(rows: Sequence[Row]) -> list[str]:
    """paravae's own rows that are not correct, in words."""
    return [
        f"{row['what']} {row['size']}, frames {row['frames']}{_run_of(row)}: RMS error {row['rms_error']:.3g}"
        for row in rows
        if is_ours(row) and not row["correct"]
    ]


def _cells(row: Row, own: Row) -> tuple[str, ...]:
    case = (row["what"], row["size"], str(row["frames"])) if row is own else ("", "", "")
    if "failed" in row:
        return (*case, row["who"], "failed", *[""] * (len(_HEADINGS) - 5))
    peak = row["peak_gib"]
    return (
        *case,
        row["who"],
        f"{row['ms']:.2f}",
        f"{row['p20_ms']:.2f}..{row['p80_ms']:.2f}",
        f"{row['ms'] / own['ms']:.2f}",
        f"{row['rms_error']:.2g}",
        f"{row['max_error']:.2g}",
        "-" if peak is None else f"{peak:.2f}",
        f"{row['matmul_share']:.1%}",
        f"{row['copy_share']:.1%}",
        "yes" if row["correct"] else "NO",
    )


def _run_of(row: Row) -> str:
    return "" if row["who"] == OURS else f", {row['who']}"


def _what_ran(peer: Peer, ranks: int) -> str:
    return f"{peer.what_ran}; rank 0 alone, the others wait" if peer.alone and ranks > 1 else peer.what_ran


def _plain_value(value: Any) -> Any:
    """As JSON takes it."""
    return value if isinstance(value, bool | int | float | str | list | None) else str(value)
