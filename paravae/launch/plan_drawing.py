"""A picture's windows or tiles as text, to scale: boxes with the numbers of the ranks that decode them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paravae.vae.plan import Window

_MOST_COLUMNS, _MOST_LINES = 78, 32
_ASPECT = 2.0  # of a character: height over width
_LEFT, _RIGHT, _UP, _DOWN = 1, 2, 4, 8
_LINES = " ╴╶─╵┘└┴╷┐┌┬│┤├┼"  # by which ways lines leave a place: the sum of the above


@dataclass(frozen=True)
class Box:
    """A window of latents, and what is written into it."""

    window: Window
    label: str


def draw(boxes: Sequence[Box], height: int, width: int) -> str:
    """``boxes`` within a picture of ``height`` x ``width`` latents; they may overlap. A label stands in the middle of
    its box, where there is room for it that no line crosses."""
    columns, lines = _canvas(height, width)
    ways = [[0] * (columns + 1) for _ in range(lines + 1)]
    placed = []
    for box in boxes:
        left, right = (round(edge * columns / width) for edge in (box.window.cols.start, box.window.cols.stop))
        top, bottom = (round(edge * lines / height) for edge in (box.window.rows.start, box.window.rows.stop))
        _frame(ways, left, right, top, bottom)
        placed.append((box.label, (left + right) / 2, (top + bottom) // 2))
    canvas = [[_LINES[way] for way in row] for row in ways]
    for label, middle, line in placed:
        start = round(middle - len(label) / 2 + 0.25)
        place = slice(max(start - 1, 0), start + len(label) + 1)
        if start > 0 and set(canvas[line][place]) == {" "} and len(canvas[line][place]) == len(label) + 2:
            canvas[line][start : start + len(label)] = label
    return "\n".join("".join(row).rstrip() for row in canvas)


def _canvas(height: int, width: int) -> tuple[int, int]:
    """Columns and lines between the outer ones: as large as fits, in the picture's proportion."""
    columns = min(_MOST_COLUMNS, _MOST_LINES * _ASPECT * width / height)
    return max(2, round(columns)), max(2, round(columns * height / width / _ASPECT))


def _frame(ways: list[list[int]], left: int, right: int, top: int, bottom: int) -> None:
    """Add a box's four edges."""
    for line in (top, bottom):
        for column in range(left, right):
            ways[line][column] |= _RIGHT
            ways[line][column + 1] |= _LEFT
    for column in (left, right):
        for line in range(top, bottom):
            ways[line][column] |= _DOWN
            ways[line + 1][column] |= _UP
