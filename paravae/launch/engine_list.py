"""``paravae engine list``: which TensorRT engines a folder holds, and which of them are broken; needs no GPU and, but
for engines of LightX2V's, no TensorRT."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from paravae.launch.errors import agreed
from paravae.launch.world import Place
from paravae.vae.comm import RankGroup
from paravae.vae.engines.trt.directory import Entry, read_directory
from paravae.vae.engines.trt.flavour import NoTensorRTError, find_flavour
from paravae.vae.engines.trt.manifest import Manifest
from paravae.vae.engines.trt.runner import EngineError, Runner

logger = logging.getLogger("paravae")

_COLUMNS = ("file", "part", "takes", "dtype", "options", "built by", "for", "MB", "")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae engine list``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the engines, every one of which is read")


def run(args: argparse.Namespace, place: Place) -> None:
    """Print a table; started with several ranks, the first one does."""
    if place.rank > 0:
        return
    with agreed(RankGroup.alone(), "read the folder"):
        entries = read_directory(args.folder, check_hashes=True)
    table = Table()
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column == "MB" else "left", no_wrap=column != "takes")
    for entry in entries:
        table.add_row(str(entry.path.relative_to(args.folder)), *_cells(entry))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(width=180, highlight=False)).print(table)
    for entry in entries:
        if entry.trouble:
            logger.warning("%s", entry.trouble)
        elif entry.is_foreign:
            logger.warning("%s has no manifest, as LightX2V builds them: %s", entry.path, _own_words(entry.path))
    broken = sum(entry.trouble is not None for entry in entries)
    print(f"{args.folder}: engines: {len(entries)}, broken: {broken}", flush=True)


def _cells(entry: Entry) -> tuple[str, ...]:
    """Of the columns from the second on."""
    part = entry.part or "?"
    if entry.manifest is None:
        return (part, *[""] * 5, _megabytes(entry.path), "broken" if entry.trouble else "no manifest")
    found = entry.manifest
    sizes = str(found.profiles[0]) if found.is_static else "\n".join(map(str, found.profiles))
    return (
        part,
        sizes,
        found.dtype,
        _options(found),
        f"{found.flavour} {found.flavour_version}",
        ", ".join(found.compute_capabilities),
        _megabytes(entry.path),
        "",
    )


def _options(found: Manifest) -> str:
    words = ["denormalize"] * found.denormalize + ["uint8"] * (found.output == "uint8")
    return ", ".join([*words, *[f"batch {found.batch}"] * (found.batch > 1)])


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f}" if path.is_file() else ""


def _own_words(path: Path) -> str:
    """What an engine says of the sizes that it takes."""
    try:
        runner = Runner(find_flavour(), path.read_bytes(), torch.device("cuda"))
    except (NoTensorRTError, EngineError, OSError, TypeError) as error:  # TypeError: no Runtime without a GPU
        return f"what it takes cannot be read here: {error}"
    return f"it takes {', '.join(map(str, runner.profiles))}"
