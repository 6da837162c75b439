"""The demo's figure: the original, each decode, and below each mode how far it is from the one-rank decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from PIL import Image

from paravae.files import whole_file
from paravae.launch.demo_ranks import DecodeRow, Results

_COLOURS = "inferno"
_PANEL_INCHES = 2.9  # width of one picture
_DPI = 130


def draw_figure(path: Path, folder: Path, results: Results) -> None:
    """Draw the pictures in ``folder`` that ``results`` names."""
    reference, *modes = results.decodes
    pictures = {row.name: _levels(folder / row.file) for row in results.decodes}
    errors = {row.name: np.abs(pictures[row.name] - pictures[reference.name]).max(axis=2) for row in modes}
    largest = max(1, *(row.max_error for row in modes))
    scale = PowerNorm(0.5, 0, largest)  # square root: small errors show too
    panel_height = _PANEL_INCHES * results.height / results.width
    columns = 2 + len(modes)
    figure = Figure(figsize=(_PANEL_INCHES * columns + 0.9, 2 * panel_height + 1.3), dpi=_DPI, layout="constrained")
    grid = figure.add_gridspec(2, columns)
    above = [figure.add_subplot(grid[0, column]) for column in range(columns)]
    below = [figure.add_subplot(grid[1, column]) for column in range(2, columns)]
    _show(above[0], _levels(folder / "original.png"), f"original\n{results.width} x {results.height} pixels")
    for axis, row in zip(above[1:], results.decodes, strict=True):
        _show(axis, pictures[row.name], _title(row))
    for axis, row in zip(below, modes, strict=True):
        axis.imshow(errors[row.name], cmap=_COLOURS, norm=scale, interpolation="nearest")
        _bare(axis, _error_title(row))
    bar = figure.colorbar(ScalarMappable(scale, _COLOURS), ax=below, fraction=0.05, pad=0.02)
    bar.set_ticks([0, *(level for level in (1, 2, 5, 10, 20, 50, 100, 200) if level <= largest)])
    bar.set_label("absolute error against one rank, in levels\nof 255, the largest of the three colours")
    _explain(figure, grid[1, :2], results)
    with whole_file(path) as part:
        figure.savefig(part)


def _levels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(np.int16)


def _show(axis: Axes, levels: np.ndarray, title: str) -> None:
    axis.imshow(levels.astype(np.uint8), interpolation="lanczos")
    _bare(axis, title)


def _bare(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])


def _title(row: DecodeRow) -> str:
    rows, cols = row.grid
    if row.mode == "single":
        return f"{row.name}, {row.seconds:.2f} s\n{row.psnr_to_original:.1f} dB to the original"
    chosen = f" (chose {row.mode})" if row.name == "auto" else f", {rows} x {cols} windows"
    return f"{row.name}{chosen}\n{row.ranks} ranks, {row.seconds:.2f} s"


def _error_title(row: DecodeRow) -> str:
    if row.psnr_to_one_rank is None:
        return f"{row.name}: identical\nto the one-rank decode"
    levels = "level" if row.max_error == 1 else "levels"
    share = f"{row.differing:.2%}" if row.differing < 0.01 else f"{row.differing:.0%}"
    return f"{row.name}: at most {row.max_error} {levels}\n{share} of the values differ, {row.psnr_to_one_rank:.1f} dB"


def _explain(figure: Figure, panels: SubplotSpec, results: Results) -> None:
    axis = figure.add_subplot(panels)
    axis.set_axis_off()
    threads = f"{results.threads_a_rank} thread" + ("s" if results.threads_a_rank > 1 else "")
    axis.text(
        0.04,
        0.92,
        "To the right: how far each mode is\nfrom what one rank decodes.\n\n"
        "tiled: overlapping tiles, approximate\n"
        "patch: one window a rank, exact but for rounding\n"
        f"auto: chose {results.decodes[-1].mode}\n\n"
        f"Times: median of {results.repeats}, float32, CPU, {threads} a rank.",
        transform=axis.transAxes,
        va="top",
        fontsize=13,
        linespacing=1.5,
    )
