"""The benchmark of the modulation ops: a small run on a CPU, its file, the tables and the figure of such a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import modulation, modulation_tables, render
from benchmarks.modulation_cases import CASES, Inputs, Shape, Tables
from benchmarks.modulation_peers import Compiled, Eager, Ours, SGLang, sglang_from
from benchmarks.sglang_import import PeerUnavailable

QUICK = ("--device", "cpu", "--compile", "none", "--warmup", "1", "--repeats", "2", "--channels", "48")
SMALL = (*QUICK, "--batches", "2", "--tokens", "3")
WRITTEN, LAZY, EAGER = "paravae", "paravae-lazy", "diffusers"


def report_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where to; and as few sets of inputs and rounds as there can be."""
    monkeypatch.setattr(modulation, "_ROTATED", {"cpu": 1})
    monkeypatch.setattr(modulation, "_MOVED", {"cpu": 1})
    return tmp_path / "m.json"


def test_every_op_with_kernels_that_are_interpreted(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAVAE_CUSTOM_OPS", "cuda")
    assert modulation.main([*SMALL, "--dtype", "float32", "--sglang", "nowhere", "--output", str(output)]) == 0
    report = report_of(output)
    assert (report["kernel"] == "runs") is (os.environ.get("TRITON_INTERPRET") == "1")
    assert report["contestants"].keys() == {EAGER, WRITTEN, LAZY, "sglang"}
    assert "no sglang/ in nowhere" in report["contestants"]["sglang"]
    assert report["rates"]["copy_gb_per_s"] > 0
    assert report["skipped"] == []
    found = {(row["case"], row["who"]): row for row in report["rows"]}
    gateless = {(case, who) for case in ("plain", "residual_plain") for who in (LAZY, "sglang")}
    assert found.keys() == {(case, who) for case in CASES for who in report["contestants"]} - gateless
    for (_, who), row in found.items():
        assert (row["batch"], row["tokens"], row["channels"]) == (2, 3, 48)
        if who == "sglang":
            assert row["failed"].startswith("PeerUnavailable: no sglang/ in nowhere")
            continue
        assert row["correct"] is True
        assert 0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert (row["sets"], row["rounds"], row["replays"]) == (2, 1, 2)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6, rel=1e-4)
        assert all(one["rms_error"] < 1e-5 for one in row["errors"].values())
    assert found["block", WRITTEN]["errors"].keys() == {"y1", "y2", "residual1", "residual2", "gate1", "gate2"}
    assert found["block", LAZY]["errors"].keys() == {"y1", "y2", "residual1", "residual2"}
    assert found["select01", WRITTEN]["errors"]["gate"]["max_error"] == 0


def test_bytes_counted_by_hand() -> None:
    """bf16, B = 2, L = 10, C = 8: a tensor is 320 bytes, a table 32, the index 80."""
    shape = Shape(2, 10, 8)
    written = {name: case.moved(Ours()).bytes(shape, 2) for name, case in CASES.items()}
    lazy = {name: case.moved(Ours(lazy=True)).bytes(shape, 2) for name, case in CASES.items()}
    assert written["residual_select01"] == 6 * 320 + 6 * 32 + 80  # x, residual, gate; y, residual, gate
    assert lazy["residual_select01"] == 4 * 320 + 6 * 32 + 80
    assert written["plain"] == 2 * 320 + 2 * 32
    assert written["closing"] == 4 * 320
    assert written["block"] == written["select01"] + written["residual_select01"] + written["closing"]
    assert lazy["block"] == lazy["select01"] + lazy["residual_select01"] + lazy["closing"]
    assert (CASES["block"].written.tensors, CASES["block"].lazy.tensors) == (13, 9)  # type: ignore[union-attr]


def test_a_wrong_result_ends_the_run_with_1(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closing(self: Ours, x: Tensor, residual: Tensor, gate: Any, index: Any) -> Tensor:
        return Eager().closing(x, residual, gate, index) + 0.01

    monkeypatch.setattr(Ours, "closing", closing)
    assert modulation.main([*SMALL, "--cases", "select01", "closing", "--output", str(output)]) == 1
    assert "further from fp64 than PyTorch's eager ops: paravae closing, L=3, C=48" in capsys.readouterr().err
    correct = {(row["case"], row["who"]): row["correct"] for row in report_of(output)["rows"]}
    assert [key for key, fine in correct.items() if not fine] == [("closing", WRITTEN), ("closing", LAZY)]


def test_what_there_is_no_time_for_is_listed(output: Path) -> None:
    flags = ["--batches", "2", "--tokens", "6", "4", "--cases", "plain", "--minutes", "0"]
    assert modulation.main([*QUICK, *flags, "--output", str(output)]) == 0
    assert report_of(output)["rows"] == []
    assert report_of(output)["skipped"] == ["plain, B=2, L=6, C=48", "plain, B=2, L=4, C=48"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "0"], "--tokens 0: needs at least 1"),
        (["--batches", "two"], "got 'two', needs a whole number"),
        (["--cases", "rope"], "invalid choice: 'rope'"),
        (["--compile", "often"], "invalid choice: 'often'"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--output", "m.txt"], "give a name that ends in .json"),
    ],
)
def test_bad_flags(output: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    try:
        status = modulation.main([*SMALL, "--output", str(output), *flags])
    except SystemExit as ended:  # argparse's own
        status = ended.code  # type: ignore[assignment]
    assert status == 2
    assert words in capsys.readouterr().err
    assert not output.exists()


def test_one_compilation_is_for_any_number_of_tokens() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    generator = torch.Generator().manual_seed(0)
    way = Compiled(lazy=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for tokens in (8, 6, 11):
            given = Inputs.draw(Shape(2, tokens, 16), torch.float32, generator)
            found, expected = (CASES["block"].run(each, given) for each in (way, Eager()))
            torch.testing.assert_close(found["residual2"], expected["residual2"])
    assert len(seen) == 3  # norm; residual and norm; closing


def test_sglang_is_given_its_order_and_dense_tables() -> None:
    class Kernels:
        @staticmethod
        def fuse_layernorm_scale_shift_gate_select01_kernel(x: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
            scale0, shift0, gate0, scale1, shift1, gate1, index, _ = rest
            assert all(table.is_contiguous() for table in rest[:-1])
            return Eager().norm(x, Tables((shift0, shift1), (scale0, scale1), (gate0, gate1)), index)

        @staticmethod
        def fuse_scale_shift_kernel(x: Tensor, scale: Tensor, shift: Tensor, scale_constant: float) -> Tensor:
            return x * (scale_constant + scale) + shift

    way = SGLang(Kernels, "0")  # type: ignore[arg-type]
    given = Inputs.draw(Shape(2, 6, 16), torch.float64, torch.Generator().manual_seed(0))
    for name in ("select01", "closing"):
        expected = CASES[name].run(Eager(), given)
        torch.testing.assert_close(CASES[name].run(way, way.prepared(given)), expected)


def test_a_folder_without_sglang(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match=r"no sglang/ in .*fetch_sglang\.sh"):
        sglang_from(tmp_path)


def made_up(case: str, who: str, ms: float, **more: Any) -> dict[str, Any]:
    errors = {"y": {"max_error": 0.03, "rms_error": 0.002, "truth_std": 1.0}}
    row = {"case": case, "who": who, "batch": 1, "tokens": 4096, "channels": 3072, "ms": ms, "copy_share": 0.9}
    return {**row, "errors": errors, "correct": True, **more}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a made-up file."""
    failed = {"case": "closing", "who": "sglang", "batch": 1, "tokens": 4096, "channels": 3072, "failed": "KeyError: 1"}
    report = {
        "machine": {"device": "Some GPU", "ranks": 1, "torch": "2.11.0", "diffusers": None, "date": "2026-11-21"},
        "args": {"dtype": "bfloat16"},
        "contestants": dict.fromkeys((EAGER, WRITTEN, LAZY, "compile", "sglang"), ""),
        "rates": {"copy_gb_per_s": 4200.4},
        "skipped": ["plain, B=1, L=4096, C=3072"],
        "rows": [
            made_up("block", EAGER, 0.4), made_up("block", WRITTEN, 0.09), made_up("block", LAZY, 0.06),
            made_up("block", "compile", 0.12, correct=False), made_up("block", "sglang", 0.09),
            made_up("select01", WRITTEN, 0.02), made_up("select01", "sglang", 0.021, copy_share=0.86), failed,
            made_up("closing", LAZY, 0.01, tokens=1024),
        ],
    }  # fmt: skip
    (tmp_path / "modulation.json").write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "MODULATION_PLOT", tmp_path / "modulation.png")
    return tmp_path


def test_tables(results: Path) -> None:
    text = render.render("<!-- results: modulation -->\n<!-- end -->\n<!-- results: modulation-all -->\n<!-- end -->\n")
    assert "C = 3072; bfloat16, Some GPU, torch 2.11.0, 2026-11-21, copy 4200 GB/s." in text
    assert "| 1 | 4096 | 20.0 | 1.05x | 90% | - | - | - | 60.0 | 1.50x | 90% | 2.00x | 6.67x |" in text
    assert "| block | 1 | 4096 | 3072 | 90.0, 90% | 60.0, 90% | 90.0, 90% | 120.0, 90% **not correct** | 400.0" in text
    assert "| closing residual | 1 | 4096 | 3072 | - | - | failed | - | - |" in text
    assert "| select01 | y | 0.00200, 0.0300 | - | 0.00200, 0.0300 | - | - |" in text
    assert text.count("Not measured, for want of time: plain, B=1, L=4096, C=3072.") == 2


def test_shapes_are_in_order(results: Path) -> None:
    cases = modulation_tables.by_op(report_of(results / "modulation.json"))
    assert [key[2:] for key in cases] == [(1024, "closing"), (4096, "select01"), (4096, "closing"), (4096, "block")]


def test_the_figure(results: Path) -> None:
    render.plot()
    assert (results / "modulation.png").stat().st_size > 20_000


def test_without_results_blocks_stay(results: Path) -> None:
    (results / "modulation.json").unlink()
    text = (
        "<!-- results: modulation -->\nas it was\n<!-- end -->\n<!-- results: modulation-all -->\ntoo\n<!-- end -->\n"
    )
    assert render.render(text) == text
    render.plot()
    assert not (results / "modulation.png").exists()


def test_times_finer_than_a_microsecond_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a millisecond for 100 calls is 5 microseconds each, not 0.01 ms nor 0."""
    here = type("Here", (), {"device": torch.device("cpu"), "group": None})()
    monkeypatch.setattr(modulation, "_MOVED", {"cpu": 1000})
    monkeypatch.setattr(modulation, "turns_ms", lambda *_, **__: {"x": [0.5, 0.4, 0.6, 0.5, 0.5]})
    row = modulation.timed({"x": modulation.Turn(torch.neg, [torch.zeros(1)] * 10, 10)}, 5, here)["x"]
    assert (row["ms"], row["rounds"], row["replays"], row["gb_per_s"]) == (0.005, 10, 5, 0.002)
