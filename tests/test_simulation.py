"""The simulation of many GPUs: its links, where it says that more stop paying, its tables and its figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import render, simulate, simulation_plot
from paravae.launch.bench_cases import Case
from paravae.vae.cost import machines

H200 = machines()["NVIDIA H200"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return simulate.simulate(H200, torch.bfloat16, 3.6, [Case("decode", 512, 512, 1)])


def test_every_link_and_number_of_gpus_has_a_row(rows: list[dict[str, Any]]) -> None:
    assert [(row["link"], row["ranks"]) for row in rows] == [
        (wire.name, ranks) for wire in simulate.WIRES for ranks in simulate.RANKS
    ]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["efficiency"] * row["ranks"], abs=0.01)
        assert row["cost"] == pytest.approx(row["ranks"] * row["ms"] * 1e-6, rel=1e-3)  # 3.6 an hour: 1e-6 a ms
    alone = {row["ms"] for row in rows if row["ranks"] == 1}
    assert len(alone) == 1, "a GPU alone needs no link"
    assert {row["efficiency"] for row in rows if row["ranks"] == 1} == {1}
    by_link = [[row["ms"] for row in rows if row["link"] == wire.name] for wire in simulate.WIRES]
    assert all(nv <= pcie <= net for nv, pcie, net in zip(*by_link, strict=True)), "a slower link gains nothing"


def test_nvlink_is_the_machines_own_between_two() -> None:
    nvlink, *others = (wire.link(H200.link, 2) for wire in simulate.WIRES)
    assert nvlink == replace(H200.link, latency_ms=pytest.approx(H200.link.latency_ms))
    assert all(link.latency_ms > nvlink.latency_ms and link.gb_per_s < nvlink.gb_per_s for link in others)
    many = simulate.WIRES[0].link(H200.link, 64)
    assert many.latency_ms == pytest.approx(H200.link.latency_ms + 62 * 3.4e-3)


def test_where_more_gpus_stop_paying() -> None:
    head = {"what": "decode", "size": "8x8", "frames": 1, "link": "x"}
    series = [(1, 100.0, 1.0), (2, 60.0, 0.83), (4, 45.0, 0.55), (8, 43.0, 0.29), (16, 20.0, 0.31)]
    rows = [{**head, "ranks": ranks, "ms": ms, "efficiency": used} for ranks, ms, used in series]
    assert simulate.ends(rows) == [{**head, "faster_up_to": 4, "efficient_up_to": 4}]
    assert simulate.ends(rows[:3])[0]["faster_up_to"] == 4


def test_the_file_the_tables_and_the_figure_say_that_it_is_a_prediction(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulate, "simulate", lambda *_: rows)
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "SIMULATION_PLOT", tmp_path / "simulation.png")
    assert simulate.main(["--output", str(tmp_path / "simulation.json"), "--price", "3.6"]) == 0
    assert "decode 512x512, 1 frame over NVLink: faster up to" in capsys.readouterr().out
    report = json.loads((tmp_path / "simulation.json").read_text(encoding="utf-8"))
    assert report["what"] == "a prediction of the cost model, not a measurement"
    assert report["assumptions"].startswith("For each picture")
    assert report["constants"]["source"] == H200.source
    text = render.render("<!-- results: simulation -->\n<!-- end -->\n")
    assert "**Predicted, not measured**" in text
    assert f"| 512x512 | NVLink | {rows[0]['ms']:.1f}, 100% |" in text
    assert "at an assumed 3.6 an hour" in text
    simulation_plot.draw(report, tmp_path / "simulation.png")
    assert (tmp_path / "simulation.png").stat().st_size > 20_000


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--price", "0"], "--price is 0"),
        (["--cost-table", str(tmp_path / "no.json")], "cost_table"),
    ):
        with pytest.raises(SystemExit):
            simulate.main([*flags, "--output", str(tmp_path / "x.json")])
        assert words in capsys.readouterr().err
