"""The figure of single_gpu.json: time for each megapixel, so that all sizes share one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, PercentFormatter

Cases = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{size and length: {who: row}}"""

COLOURS = {"paravae": "#0b6e4f", "sglang": "#e08e45", "compile": "#7a8fb8", "diffusers": "#b5b5b5"}
_BAR_INCHES, _HEAD_INCHES = 0.2, 1.5


def draw(panels: Mapping[str, Cases], names: Mapping[str, str], path: Path, title: str) -> None:
    """One panel each for ``panels`` (decode, encode), a group of bars for each size, milliseconds beside each bar."""
    shown = {what: cases for what, cases in panels.items() if cases}
    who = [name for name in names if any(name in found for cases in shown.values() for found in cases.values())]
    most = max(len(cases) for cases in shown.values())
    size = (7.0 * len(shown), _HEAD_INCHES + most * (len(who) + 1) * _BAR_INCHES)
    figure, axes = plt.subplots(1, len(shown), figsize=size, squeeze=False, layout="constrained")
    for ax, (what, cases) in zip(axes[0], shown.items(), strict=True):
        _panel(ax, cases, who, names)
        ax.set_title(what, loc="left", fontweight="bold")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(who), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _panel(ax: Any, cases: Cases, who: list[str], names: Mapping[str, str]) -> None:
    group = len(who) + 1  # a bar's width is left free between groups
    longest = 0.0
    for index, name in enumerate(who):
        places, lengths, texts = [], [], []
        for place, found in enumerate(cases.values()):
            row = found.get(name, {})
            if "ms" not in row:
                continue
            places.append(place * group + index)
            lengths.append(row["ms"] / _megapixels(row))
            texts.append(f"{row['ms']:.1f} ms" + ("" if row["correct"] else " (not correct)"))
        bars = ax.barh(places, lengths, height=0.9, color=COLOURS[name], label=names[name])
        ax.bar_label(bars, texts, padding=3, fontsize=7)
        longest = max([longest, *lengths])
    ax.set_yticks([place * group + (len(who) - 1) / 2 for place in range(len(cases))], list(cases))
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_xlim(0, 1.18 * longest or 1)
    ax.set_xlabel("milliseconds a megapixel (shorter is better)")
    ax.spines[["top", "right"]].set_visible(False)


def _megapixels(row: Mapping[str, Any]) -> float:
    """Of all frames together."""
    width, height = (int(side) for side in row["size"].split("x"))
    return width * height * row["frames"] / 1e6


def dress_over_gpus(above: Any, below: Any, gpus: Sequence[int]) -> None:
    """Axes of times, and below them of efficiencies, over numbers of GPUs."""
    for ax in (above, below):
        ax.set_xscale("log", base=2)
        ax.set_xticks(gpus, [str(count) for count in gpus])
        ax.spines[["top", "right"]].set_visible(False)
    above.yaxis.set_minor_formatter(NullFormatter())
    below.set_ylim(0, 1.1)
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_xlabel("GPUs")
