"""The figure of modulation.json: how near each comes to the rate of a copy, and how long it takes, over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter

from benchmarks.modulation_tables import CHANNELS, EAGER, NAMES, OPS, OURS, OURS_LAZY, SGLANG, SHOWN, Found, by_op

COLOURS = {
    OURS: "#7fc4a8", OURS_LAZY: "#0b6e4f", SGLANG: "#e08e45", "compile": "#a9b7d6", "compile-lazy": "#5470a5",
    EAGER: "#b5b5b5",
}  # fmt: skip


def draw(report: dict[str, Any], path: Path, title: str) -> None:
    """A column for each op: above the share of the copy rate, below the time over that of paravae with lazy gates."""
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(4 * len(SHOWN), 6.6), sharex=True, sharey="row", squeeze=False,
                                layout="constrained")  # fmt: skip
    cases = by_op(report)
    for (above, below), op in zip(axes.T, SHOWN, strict=True):
        found = {key[2]: rows for key, rows in cases.items() if (key[0], key[1], key[3]) == (CHANNELS, 1, op)}
        _column(above, below, found)
        above.set_title(OPS[op], loc="left", fontweight="bold", fontsize=10)
        _dress(above, below, list(found))
    axes[0][0].set_ylabel("share of the copy rate")
    axes[1][0].set_ylabel("times as long as paravae's lazy gates")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{title}, batch 1, {CHANNELS} channels", fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _column(above: Any, below: Any, found: Mapping[int, Found]) -> None:
    for who, name in NAMES.items():
        rows = {tokens: rows[who] for tokens, rows in found.items() if "ms" in rows.get(who, {})}
        style = {"color": COLOURS[who], "marker": "o", "markersize": 4, "label": name}
        above.plot(list(rows), [row["copy_share"] for row in rows.values()], **style)
        over = {
            n: row["ms"] / found[n][OURS_LAZY]["ms"] for n, row in rows.items() if "ms" in found[n].get(OURS_LAZY, {})
        }
        below.plot(list(over), list(over.values()), **style)


def _dress(above: Any, below: Any, tokens: list[int]) -> None:
    for ax in (above, below):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e5e5")
        ax.margins(x=0.09)
    above.set_ylim(0, 1.05)
    above.axhline(1, linestyle=":", color="#555555")
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_xscale("log", base=2)
    below.set_xticks(tokens, [str(count) for count in tokens])
    below.xaxis.set_minor_formatter(NullFormatter())
    below.set_yscale("log", base=2)
    below.set_yticks([1, 1.5, 2, 3, 4, 6, 8])
    below.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    below.set_xlabel("tokens")
