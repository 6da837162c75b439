"""What ``paravae plan`` found, as tables and a drawing for people, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table

from paravae.launch.bench_cases import Case
from paravae.launch.plan_drawing import Box, draw
from paravae.launch.planned import candidates
from paravae.vae.choice import DecodeChoice, DecodePlan, DecodePlanner
from paravae.vae.cost import Machine
from paravae.vae.plan import PatchPlan, Span, TilePlan

_MOST_SHOWN = 24  # candidates; beside them what is chosen, and what does not share windows


@dataclass(frozen=True)
class Prediction:
    """A planned decode. ``gpu`` and ``memory``: in words; ``one_rank_ms``: of one rank that was started alone."""

    case: Case
    batch: int
    dtype: str
    gpu: str
    machine: Machine
    memory: str
    budget_bytes: int
    planner: DecodePlanner
    chosen: DecodePlan
    one_rank_ms: float

    @property
    def engine(self) -> str:
        """The one whose times are predicted, in words."""
        kind = self.planner.engine.kind(self.planner.dtype, self.planner.device)
        if self.planner.config.vae_type == "tensorrt":
            kind += " (PyTorch's, by which auto goes for vae_type tensorrt too: an engine's times are nowhere stated)"
        return kind

    @cached_property
    def candidates(self) -> list[dict[str, Any]]:
        """Each way there is, the fastest first; tiles, which are approximate, last."""
        rows = [self._candidate(found) for found in candidates(self.planner, self.budget_bytes)]
        return sorted(rows, key=lambda row: (row["mode"] == "tiled", row["ms"]))

    def _candidate(self, found: DecodePlan) -> dict[str, Any]:
        choice, speedup = found.choice, self.one_rank_ms / found.choice.ms
        return {
            "how": choice.how,
            "mode": choice.mode,
            "grid": list(choice.grid),
            "head": choice.head,
            "groups": choice.groups,
            "ms": choice.ms,
            "gib": choice.gib,
            "speedup": round(speedup, 3),
            "efficiency": round(speedup / choice.ranks, 3),
            "fits": found.needed_bytes <= self.budget_bytes,
            "exact": choice.mode != "tiled",
            "chosen": _way(choice) == _way(self.chosen.choice),
        }

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        """What each rank does. ``work``: its multiply-adds over those of the whole decode by one."""
        layout = self.chosen.layout
        if isinstance(layout, TilePlan):
            return [self._tiles_of(layout, rank, share) for rank, share in enumerate(layout.shares(self._size))]
        whole = self.planner.single().layout
        assert isinstance(whole, PatchPlan)
        work = self.planner.cost.rank_work(whole, 0)
        return [self._window_of(layout, rank, work) for rank in range(self._size)]

    @property
    def _size(self) -> int:
        return self.planner.ranks

    def _window_of(self, layout: PatchPlan, rank: int, work: int) -> dict[str, Any]:
        place = rank if len(layout.traces) > 1 else 0  # a lone window is everyone's
        window, ratio = layout.outputs[place], self.planner.config.arch_config.spatial_ratio
        head = None if layout.head_rows is None else layout.head_rows[rank]
        return {
            "rank": rank,
            "lat_rows": _ends(_shrunk(window.rows, ratio)),
            "lat_cols": _ends(_shrunk(window.cols, ratio)),
            "px_height": window.rows.size,
            "px_width": window.cols.size,
            "images": _ends(layout.images[place]),
            "head_rows": None if head is None else _ends(head),
            "work": round(self.planner.cost.rank_work(layout, place) / work, 4),
        }

    def _tiles_of(self, layout: TilePlan, rank: int, share: Span) -> dict[str, Any]:
        area = self.planner.lat_size[0] * self.planner.lat_size[1]
        tiles = layout.tiles[share.start : share.stop]
        return {
            "rank": rank,
            "tiles": _ends(share),
            "lat_rows": [_ends(tile.rows) for tile in tiles],
            "lat_cols": [_ends(tile.cols) for tile in tiles],
            "latents": round(sum(tile.area for tile in tiles) / area, 4),
        }

    @property
    def drawing(self) -> str:
        layout, ratio = self.chosen.layout, self.planner.config.arch_config.spatial_ratio
        height, width = self.planner.lat_size
        if isinstance(layout, TilePlan):
            owners = [rank for rank, share in enumerate(layout.shares(self._size)) for _ in range(share.size)]
            boxes = [Box(tile, str(owner)) for tile, owner in zip(layout.tiles, owners, strict=True)]
            return draw(boxes, height, width)
        if len(layout.traces) == 1:
            everyone = "0" if self._size == 1 else f"each of {self._size} ranks"
            return draw([Box(layout.outputs[0], everyone)], ratio * height, ratio * width)
        owners_of: dict[Any, list[str]] = {}
        for rank, window in enumerate(layout.outputs):
            if window.area:
                owners_of.setdefault(window, []).append(str(rank))
        boxes = [Box(window, " ".join(owners)) for window, owners in owners_of.items()]
        return draw(boxes, ratio * height, ratio * width)


def as_json(found: Prediction) -> dict[str, Any]:
    """All that is printed, but for the drawing."""
    return {
        "what": "a prediction by paravae plan: nothing of it was measured",
        "size": found.case.size,
        "frames": found.case.frames,
        "batch": found.batch,
        "dtype": found.dtype,
        "gpu": found.gpu,
        "constants": {"of": found.machine.name, "source": found.machine.source},
        "engine": found.engine,
        "memory": found.memory,
        "one_rank_ms": found.one_rank_ms,
        "chosen": asdict(found.chosen.choice),
        "candidates": found.candidates,
        "ranks": found.ranks,
    }


def show(found: Prediction) -> None:
    """Print it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=140, highlight=False)
    choice = found.chosen.choice
    batch = f", {found.batch} at once" if found.batch > 1 else ""
    for name, text in (
        ("decode", f"{found.case.size}, {_count(found.case.frames, 'frame')}{batch}, {found.dtype}"),
        ("ranks", f"{found.planner.ranks} x {found.gpu}"),
        ("memory", found.memory),
        ("constants", f"{found.machine.name}, engine {found.engine}: {found.machine.source}"),
        ("plan", f"{choice.how}: {choice.reason}"),
    ):
        console.print(f"{name:<10} {text}", soft_wrap=True, markup=False)
    console.print("\nPredicted, fastest first; speed-up and efficiency against one rank alone:")
    rows = [row for place, row in enumerate(found.candidates) if place < _MOST_SHOWN or not _is_one_of_many(row)]
    console.print(_candidates_table(rows))
    if more := len(found.candidates) - len(rows):
        console.print(f"{more} slower ways to share are not shown; --json has all.")
    if isinstance(layout := found.chosen.layout, TilePlan):
        ratio = found.planner.config.arch_config.spatial_ratio
        size = f"{ratio * layout.tile[1]} x {ratio * layout.tile[0]} pixels"
        console.print(f"\nThe ranks' tiles, numbered row by row, each {size}; latents decoded, of the picture's:")
        console.print(_tiles_table(found))
    else:
        console.print("\nThe ranks' windows; work, halos and head included, of the whole decode's:")
        console.print(_windows_table(found))
    console.print("\nWhich rank decodes what, to scale:")
    console.print(found.drawing, markup=False, no_wrap=True, overflow="ignore", crop=False)


def _is_one_of_many(row: dict[str, Any]) -> bool:
    return row["mode"] == "patch" and not row["chosen"]


def _candidates_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table(("", "plan", "ms", "GiB a rank", "speed-up", "efficiency", ""), left=("", "plan"))
    for row in rows:
        notes = ["approximate"] * (not row["exact"]) + ["does not fit"] * (not row["fits"])
        table.add_row(
            "→" if row["chosen"] else "",
            row["how"],
            f"{row['ms']:.2f}",
            f"{row['gib']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['efficiency']:.0%}",
            ", ".join(notes),
            style="bold" if row["chosen"] else None,
        )
    return table


def _windows_table(found: Prediction) -> Table:
    shared = found.chosen.choice.head == "shared"
    columns = ["rank", "latent rows", "latent columns", "pixels", "work"]
    table = _table([*columns, *["head rows"] * shared, *["images"] * (found.batch > 1)])
    for row in found.ranks:
        owned = row["px_height"] * row["px_width"] > 0
        cells = [str(row["rank"])]
        cells += [_range(row["lat_rows"]), _range(row["lat_cols"])] if owned else ["none", "none"]
        cells += [f"{row['px_width']} x {row['px_height']}", f"{row['work']:.1%}"]
        if shared:
            cells.append(_range(row["head_rows"]))
        if found.batch > 1:
            cells.append(_range(row["images"]))
        table.add_row(*cells)
    return table


def _tiles_table(found: Prediction) -> Table:
    table = _table(("rank", "tiles", "latents"))
    for row in found.ranks:
        table.add_row(str(row["rank"]), _range(row["tiles"]), f"{row['latents']:.1%}")
    return table


def _table(columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _way(choice: DecodeChoice) -> tuple[Any, ...]:
    return choice.mode, choice.grid, choice.head, choice.groups


def _shrunk(span: Span, ratio: int) -> Span:
    return Span(span.start // ratio, span.stop // ratio)


def _ends(span: Span) -> list[int]:
    return [span.start, span.stop]


def _range(ends: Sequence[int]) -> str:
    """Half-open in JSON; for people the first and the last."""
    first, last = ends[0], ends[1] - 1
    return "none" if last < first else f"{first}" if last == first else f"{first} to {last}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")
