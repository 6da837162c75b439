"""The figure of simulation.json: predicted time and efficiency over numbers of GPUs, a line for each link."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import StrMethodFormatter

from benchmarks.plot import dress_over_gpus
from benchmarks.simulation_tables import series_of

COLOURS = ("#0b6e4f", "#e08e45", "#7a8fb8")


def draw(report: dict[str, Any], path: Path) -> None:
    """A column for each decode: above milliseconds, below the share of ideal speed-up; rings where adding GPUs stops
    paying."""
    series = series_of(report)
    cases, links = (list(dict.fromkeys(key[index] for key in series)) for index in (0, 1))
    colours = dict(zip(links, COLOURS, strict=False))
    last = {(end["size"], end["frames"], end["link"]): end["faster_up_to"] for end in report["ends"]}
    figure, axes = plt.subplots(2, len(cases), figsize=(3.6 * len(cases), 6.6), squeeze=False, layout="constrained")
    for (case, link), rows in series.items():
        above, below = axes[:, cases.index(case)]
        ranks, colour = [row["ranks"] for row in rows], colours[link]
        above.plot(ranks, [row["ms"] for row in rows], "--", marker=".", color=colour, label=link)
        below.plot(ranks, [row["efficiency"] for row in rows], "--", marker=".", color=colour)
        for row in rows[:-1]:
            if row["ranks"] == last[row["size"], row["frames"], row["link"]]:
                above.plot(row["ranks"], row["ms"], "o", color=colour, fillstyle="none", markersize=10)
                below.plot(row["ranks"], row["efficiency"], "o", color=colour, fillstyle="none", markersize=10)
    for (above, below), case in zip(axes.T, cases, strict=True):
        rows = series[case, links[0]]
        ranks = [row["ranks"] for row in rows]
        above.plot(ranks, [rows[0]["ms"] / count for count in ranks], ":", color="#555555", label="ideal")
        below.axhline(1, linestyle=":", color="#555555")
        above.set_title(case, loc="left", fontweight="bold", fontsize=10)
        above.set_yscale("log", base=2)
        dress_over_gpus(above, below, ranks)
        above.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[0][0].set_ylabel("milliseconds, predicted")
    axes[1][0].set_ylabel("efficiency, predicted")
    handles, labels = axes[0][0].get_legend_handles_labels()
    ring = plt.Line2D([], [], marker="o", color="#555555", fillstyle="none", markersize=10, linestyle="none")
    labels.append("twice as many bring less than 5 %")
    figure.legend([*handles, ring], labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"PREDICTED by the cost model, not measured: Qwen-Image's VAE, {report['dtype']}, {report['gpu']}, batch 1",
        fontsize=10,
    )
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
