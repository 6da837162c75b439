"""Cases one after another while there is time; the result file is replaced after each."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paravae.configs.cli import whole_number
from paravae.launch import bench_report
from paravae.launch.bench_cases import Case
from paravae.launch.bench_contest import Contest, Row

VIDEO = (832, 480)  # width x height in pixels


def add_video_flag(parser: argparse.ArgumentParser, frames: Sequence[int]) -> None:
    """``--video-frames``, by default ``frames``."""
    parser.add_argument(
        "--video-frames",
        type=whole_number,
        nargs="*",
        default=list(frames),
        metavar="N",
        help=f"pixel frames of {VIDEO[0]}x{VIDEO[1]} videos, besides --sizes (default: {' '.join(map(str, frames))})",
    )


def exit_status(parser: argparse.ArgumentParser, body: Callable[[], object]) -> int:
    """Of a benchmark: 0 done, 1 a result of paravae is not correct or something failed, 2 (by ``parser``) bad input."""
    try:
        body()
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_cases(
    contest: Contest,
    cases: Sequence[Case],
    kept: Sequence[Row],
    head: Mapping[str, Any],
    output: Path,
    out_of_time: Callable[[], bool],
) -> list[Row]:
    """The rows of ``kept`` and of all other cases; ``output`` has them after each.

    Every rank calls; as soon as one is out of time, none begins another case.
    """
    rows = list(kept)
    done = {(row["what"], row["size"], row["frames"]) for row in kept}
    left = [case for case in cases if (case.what, case.size, case.frames) not in done]

    def write() -> None:
        with contest.here.group.agreement("write the results"):
            if contest.here.rank == 0:
                bench_report.write(output, head, rows, skipped=[str(case) for case in left])

    while left and contest.here.group.minimum("time left", int(not out_of_time())):
        rows += contest.run(left.pop(0))
        write()
    write()
    for case in left if contest.here.rank == 0 else ():
        print(f"skipped, no time left: {case}", file=sys.stderr)
    return rows


def deadline(start: float, minutes: float | None) -> Callable[[], bool]:
    """Whether ``minutes`` have passed since ``start`` (of ``time.monotonic``)."""
    return lambda: minutes is not None and time.monotonic() > start + 60 * minutes
