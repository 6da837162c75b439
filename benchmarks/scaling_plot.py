"""The figure of the scaling_*.json: time and efficiency over ranks, measured points only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from benchmarks.plot import dress_over_gpus
from benchmarks.scaling_tables import DIFFUSERS, NAMES, OURS, OURS_ALONE, WORLDS, Found, Reports, each_case

LINES = {OURS: "#0b6e4f", "sglang-spatial_shard": "#e08e45", "distvae-rows": "#7a8fb8"}
"""Who shares decodes, and in which colour."""
ONE_GPU = {OURS: OURS_ALONE, "sglang-spatial_shard": "sglang-auto", "distvae-rows": DIFFUSERS}
"""The same code's time on one GPU, in the same run on several: SGLang's auto shares nothing."""
ONE_GPU_OF_ONE = {OURS: OURS, "sglang-spatial_shard": "sglang-spatial_shard", "distvae-rows": DIFFUSERS}
"""The same in a run on one."""

Points = dict[int, float]
"""{ranks: value}"""


def draw(reports: Reports, path: Path, title: str) -> None:
    """A column for each case: above milliseconds, below the share of ideal speed-up over the same code on one GPU."""
    cases: dict[str, dict[int, Found]] = {}
    for case, ranks, found in each_case(reports):
        cases.setdefault(case, {})[ranks] = found
    size = (max(10, 3.4 * len(cases)), 6.4)
    figure, axes = plt.subplots(2, len(cases), figsize=size, squeeze=False, layout="constrained")
    for (above, below), (case, worlds) in zip(axes.T, cases.items(), strict=True):
        above.set_title(case, loc="left", fontweight="bold", fontsize=10)
        for who, colour in LINES.items():
            times, shares = times_of(who, worlds), efficiencies_of(who, worlds)
            above.plot(list(times), list(times.values()), "o-", color=colour, label=NAMES[who], markersize=4)
            below.plot(list(shares), list(shares.values()), "o-", color=colour, markersize=4)
            if who == OURS:
                _annotate(above, times)
        _draw_references(above, below, worlds)
        above.set_yscale("log")
        dress_over_gpus(above, below, WORLDS)
        above.yaxis.set_major_formatter(ScalarFormatter())
        for ax in (above, below):
            ax.set_xlim(0.85, WORLDS[-1] / 0.85)
    axes[0][0].set_ylabel("milliseconds (lower is better)")
    axes[1][0].set_ylabel("efficiency against itself on one GPU")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def times_of(who: str, worlds: dict[int, Found]) -> Points:
    """Milliseconds over ranks; on one GPU as the run on one has it, else that on fewest."""
    times = {ranks: found[who]["ms"] for ranks, found in worlds.items() if ranks > 1 and "ms" in found.get(who, {})}
    one = _one_gpu_ms(who, worlds, min(worlds))
    return {**({} if one is None else {1: one}), **times}


def efficiencies_of(who: str, worlds: dict[int, Found]) -> Points:
    """One GPU's time over ranks x time, both of one run."""
    shares = {}
    for ranks, found in worlds.items():
        one, row = _one_gpu_ms(who, worlds, ranks), found.get(who, {})
        if ranks > 1 and one is not None and "ms" in row:
            shares[ranks] = one / (ranks * row["ms"])
    return shares


def _one_gpu_ms(who: str, worlds: dict[int, Found], ranks: int) -> float | None:
    name = (ONE_GPU_OF_ONE if ranks == 1 else ONE_GPU)[who]
    return worlds[ranks].get(name, {}).get("ms")


def _draw_references(above: Any, below: Any, worlds: dict[int, Found]) -> None:
    """diffusers' time on one GPU, and what ideal sharing would make of paravae's."""
    one = times_of(OURS, worlds).get(1)
    if one is not None:
        above.plot(WORLDS, [one / ranks for ranks in WORLDS], ":", color=LINES[OURS], label="ideal")
    diffusers = worlds[min(worlds)].get(DIFFUSERS, {}).get("ms")
    if diffusers is not None:
        above.axhline(diffusers, color="#b5b5b5", label=NAMES[DIFFUSERS])
    below.axhline(1, linestyle=":", color="#555555")


def _annotate(ax: Any, times: Points) -> None:
    for ranks, ms in times.items():
        ax.annotate(f"{ms:.1f}", (ranks, ms), (0, 5), textcoords="offset points", ha="center", fontsize=7)
