"""The benchmark of several ranks: two real ones on a CPU, their file, the tables and the figure of such files."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers, render, scaling
from paravae import QwenImageVAEConfig
from paravae.launch.bench_model import random_model
from tests.builders import SMALL
from tests.command_bench import Bench

ROOT = Path(__file__).parent.parent
QUICK = ("--device", "cpu", "--repeats", "2", "--warmup", "1", "--sizes", "64x48", "--video-frames")
WAYS = {f"paravae-{way}" for way in ("single", "2x1-own", "2x1-shared", "1x2-own", "1x2-shared")}
OWN = {"paravae", "paravae-alone", "paravae-tiled"} | WAYS
needs_distvae = pytest.mark.skipif(
    importlib.util.find_spec("distvae") is None, reason="DistVAE is not installed: pip install --no-deps distvae==0.1.0"
)


def run(ranks: int, bench: Bench, *flags: str, output: str = "out/s.json") -> subprocess.CompletedProcess[str]:
    """``torchrun -m benchmarks.scaling`` with the small model."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    files = ["--model", bench.path("model"), "--output", bench.path(output)]
    return subprocess.run(
        [*launcher, "-m", "benchmarks.scaling", *files, *QUICK, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def report_of(bench: Bench) -> dict[str, Any]:
    return json.loads((bench.folder / "out/s.json").read_text(encoding="utf-8"))


def test_two_ranks_beside_diffusers(bench: Bench) -> None:
    ended = run(2, bench, "--plans", "--peers", "diffusers", "--dtype", "float32")
    assert ended.returncode == 0, ended.stderr
    report = report_of(bench)
    rows = {row["who"]: row for row in report["rows"]}
    assert rows.keys() == OWN | {"diffusers"} == report["contestants"].keys()
    assert report["machine"]["ranks"] == 2
    assert report["skipped"] == []
    for row in rows.values():
        assert (row["size"], row["frames"], row["calls"]) == ("64x48", 1, 2)
        assert row["correct"] is True
        assert 0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["max_error"] < 1e-4
    assert rows["paravae"]["ran"].endswith("2 ranks")  # shared or not, as auto finds better for so small a picture
    assert rows["paravae-alone"]["ran"] == "single on 1 rank"
    assert rows["paravae-1x2-shared"]["ran"] == "patch, 1 x 2 windows, head shared, on 2 ranks"
    assert rows["paravae-single"]["ran"] == "single on each of 2 ranks"
    assert len({rows[who]["ran"] for who in WAYS}) == len(WAYS)
    assert {rows["paravae"]["ran"]} < {rows[who]["ran"] for who in WAYS}
    assert all(rows[who]["predicted_ms"] > 0 for who in OWN)
    assert rows["paravae-tiled"]["mode"] == "tiled"
    assert all(rows[who]["from_alone_rms"] <= rows[who]["from_alone_max"] < 1e-4 for who in WAYS)
    assert "from_alone_max" not in rows["paravae-alone"]
    assert "rank 0 alone, the others wait" in report["contestants"]["diffusers"]
    assert "parallel_decode_mode='auto'" in report["contestants"]["paravae"]
    assert ended.stdout.count("RMS error") == 1


@needs_distvae
def test_distvae_is_exact_in_rows_and_diffusers_tiles_in_tiles(bench: Bench) -> None:
    flags = ("--peers", "distvae-rows", "distvae-tiles", "--dtype", "float32", "--sizes", "320x264")
    ended = run(2, bench, *flags)
    assert ended.returncode == 0, ended.stderr
    rows = {row["who"]: row for row in report_of(bench)["rows"]}
    assert rows["distvae-rows"]["max_error"] < 1e-4
    assert rows["distvae-tiles"]["max_error"] < 1e-4  # against diffusers' tiles
    assert rows["distvae-tiles"]["from_exact_max"] > 1e-3
    assert rows["distvae-tiles"]["correct"] is True
    assert "parallelize_decoder (QwenImageDecoderAdapter)" in report_of(bench)["contestants"]["distvae-rows"]


def test_ranks_stop_together_and_list_what_is_left(bench: Bench) -> None:
    ended = run(2, bench, "--minutes", "0", "--video-frames", "5", "--peers")
    assert ended.returncode == 0, ended.stderr
    assert report_of(bench)["rows"] == []
    assert report_of(bench)["skipped"] == ["decode 64x48, 1 frame", "decode 832x480, 5 frames"]
    assert ended.stderr.count("skipped, no time left: decode 64x48") == 1


def test_a_peer_that_cannot_be_built_has_a_row_that_says_why(bench: Bench) -> None:
    folder = bench.folder / "out"
    ended = run(2, bench, "--sglang", str(folder), "--peers", "sglang-auto", "diffusers")
    assert ended.returncode == 0, ended.stderr
    failed, fine = report_of(bench)["rows"][2:]
    assert failed["who"] == "sglang-auto"
    assert f"no sglang/ in {folder}" in failed["failed"]
    assert fine["correct"] is True


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peers", "sglang-auto"], "--peers sglang-auto on 1 rank: possible here are diffusers"),
        (["--peers", "distvae-rows"], "distvae and sglang-auto need several ranks"),
        (["--sizes", "65x48"], "--sizes 65x48: the width is 65 pixels"),
        (["--repeats", "0"], "--repeats is 0"),
    ],
)
def test_wrong_flags(bench: Bench, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    files = ["--model", bench.path("model"), "--output", bench.path("out/s.json")]
    assert scaling.main([*files, *QUICK, *flags]) == 2
    assert words in capsys.readouterr().err
    assert bench.written() == []


def test_a_peer_that_fails_to_build_is_one_that_refuses() -> None:
    def build(*_: object) -> peers.Peer:
        raise ImportError("no\nsuch package")

    model = random_model(QwenImageVAEConfig(arch_config=SMALL))
    peer = peers.or_reason("x", build)(model, torch.float32, torch.device("cpu"))
    assert peer.what_ran == "not built: ImportError: no such package"
    with pytest.raises(RuntimeError, match="not built: ImportError: no such package"):
        peer.decode(torch.zeros(1))


def row(who: str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "who": who, "what": "decode", "size": "1024x1024", "frames": 1, "ms": ms, "p20_ms": ms, "p80_ms": ms,
        "calls": 20, "max_error": 0.04, "rms_error": 0.006, "correct": True, "peak_gib": 0.5, **more,
    }  # fmt: skip


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with made-up files of one and two ranks."""
    one = {
        "machine": {"device": "Some GPU", "ranks": 1, "torch": "2.11.0", "diffusers": "0.42.0", "date": "2026-11-21"},
        "args": {"dtype": "bfloat16"},
        "skipped": [],
        "rows": [
            row("paravae", 8.0, ran="single on 1 rank"),
            row("diffusers", 64.0),
            row("sglang-spatial_shard", 40.0),
        ],
    }
    two = copy.deepcopy(one)
    two["machine"]["ranks"] = 2
    two["skipped"] = ["decode 4096x4096, 1 frame"]
    two["rows"] = [
        row("paravae", 5.0, ran="patch, 2 x 1 windows on 2 ranks", from_alone_max=0.02), row("paravae-alone", 8.0),
        row("diffusers", 64.0), row("sglang-spatial_shard", 25.0), row("sglang-auto", 40.0),
        {"who": "distvae-rows", "what": "decode", "size": "1024x1024", "frames": 1, "failed": "RuntimeError: a | b"},
        row("distvae-tiles", 250.0, from_exact_max=1.03, from_exact_rms=0.061),
    ]  # fmt: skip
    for ranks, report in ((1, one), (2, two)):
        (tmp_path / f"scaling_{ranks}.json").write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "SCALING_PLOT", tmp_path / "scaling.png")
    return tmp_path


def test_tables_of_the_worlds_that_were_run(results: Path) -> None:
    text = render.render("<!-- results: scaling -->\n<!-- end -->\n<!-- results: scaling-all -->\n<!-- end -->\n")
    assert "1, 2 ranks: bfloat16, Some GPU, torch 2.11.0" in text
    assert "| 1024x1024 | 1 | 8.0 | 40.0 | - | 64.0 | 5.00x | - | 8.00x | 1.00x, 100% |" in text
    assert "| 1024x1024 | 2 | 5.0 | 25.0 | failed | 64.0 | 5.00x | - | 12.80x | 1.60x, 80% |" in text
    assert "Not run: 4 and 8 ranks. Not measured, for want of time: decode 4096x4096, 1 frame on 2." in text
    assert "| 0.0400 | 0.00600 | yes | 0.0200 | 0.50 | patch, 2 x 1 windows on 2 ranks |" in text
    assert "| 1.0300 | 0.06100 | as tiles | - |" in text
    assert "| DistVAE rows | failed |  |  |  |  |  |  |  | RuntimeError: a / b |" in text


def test_plans_are_shown_beside_their_predictions(results: Path) -> None:
    empty = "<!-- results: scaling-plans -->\nas it was\n<!-- end -->\n"
    assert render.render(empty) == empty
    report = json.loads((results / "scaling_2.json").read_text(encoding="utf-8"))
    ran = report["rows"][0]["ran"]
    report["rows"] += [
        row("paravae-single", 8.1, ran="single on each of 2 ranks", predicted_ms=8.0, mode="single"),
        row("paravae-2x1-own", 5.0, ran=ran, predicted_ms=4.5, mode="patch"),
    ]
    (results / "scaling_2.json").write_text(json.dumps(report), encoding="utf-8")
    text = render.render("<!-- results: scaling-plans -->\n<!-- end -->\n<!-- results: scaling-all -->\n<!-- end -->\n")
    assert f"| 1024x1024 | 2 | {ran} | 5.00 | 4.50 | -10% | chosen |" in text
    assert "| 1024x1024 | 2 | single on each of 2 ranks | 8.10 | 8.00 | -1% |  |" in text
    assert "paravae-2x1-own" not in text


def test_the_figure(results: Path) -> None:
    render.plot()
    assert (results / "scaling.png").stat().st_size > 20_000


def test_blocks_without_results_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    text = "<!-- results: scaling -->\nas it was\n<!-- end -->\n<!-- results: scaling-all -->\ntoo\n<!-- end -->\n"
    assert render.render(text) == text
