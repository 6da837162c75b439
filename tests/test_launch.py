"""The commands on several ranks: under torchrun, and the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paravae.launch.cli import main
from tests.command_bench import Bench, expect_one_line

ROOT = Path(__file__).parent.parent


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node RANKS -m paravae ...``"""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "-m", "paravae", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


PATCH = ("--device", "cpu", "--vae-config.use-parallel-decode", "--vae-config.parallel-decode-mode", "patch")


def test_three_ranks_write_the_picture_of_one(bench: Bench) -> None:
    assert bench.decode(output="out/one.png") == 0
    files = ("--latents", bench.path("z.safetensors"), "--output", bench.path("out/three.png"))
    ended = torchrun(3, "decode", *files, "--model", bench.path("model"), *PATCH)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1
    assert "patch, 3 x 1 windows on 3 ranks" in ended.stdout
    assert bench.written() == ["one.png", "three.png"]
    difference = abs(bench.picture("one.png").astype(int) - bench.picture("three.png").astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


@pytest.mark.parametrize(
    ("latents", "output", "words"),
    [
        ("cut.safetensors", "out/x.png", "is not a whole safetensors file"),  # all ranks see it
        ("z.safetensors", "nodir/x.png", "there is no folder"),  # rank 0 sees it
    ],
)
def test_ranks_fail_together_and_say_so_once(bench: Bench, latents: str, output: str, words: str) -> None:
    files = ("--latents", bench.path(latents), "--output", bench.path(output))
    ended = torchrun(2, "decode", *files, "--model", bench.path("model"), *PATCH)
    assert ended.returncode != 0
    expect_one_line(ended.stderr, words)
    assert ended.stderr.count("exitcode  : 2 ") == 2, ended.stderr  # torchrun's own report of both ranks
    assert bench.written() == []


def test_the_demo_measures_what_it_writes(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.folder / "out" / "demo"
    flags = ["--picture", bench.path("odd.png"), "--model", bench.path("model"), "--output", str(folder)]
    assert main(["demo", *flags]) == 0
    results = json.loads((folder / "demo.json").read_text())
    assert [(row["name"], row["ranks"]) for row in results["decodes"]] == [
        ("one rank", 1),
        ("tiled", 2),
        ("patch", 2),
        ("auto", 2),
    ]
    reference = np.asarray(Image.open(folder / "one-rank.png")).astype(int)
    for row in results["decodes"]:
        picture = np.asarray(Image.open(folder / row["file"]))
        assert picture.shape == (40, 32, 3)
        assert abs(picture - reference).max() == row["max_error"]
    patch = results["decodes"][2]
    assert patch["max_error"] <= 1
    assert patch["mode"] == "patch"
    assert Image.open(folder / "figure.png").width > 1000
    assert "| patch |" in (folder / "table.md").read_text()
    assert str(folder / "figure.png") in "".join(capsys.readouterr().out.split("\n"))


def test_a_demo_that_cannot_be_says_why(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--ranks", "0", "--output", bench.path("out/d")]) == 2
    expect_one_line(capsys.readouterr().err, "--ranks is 0, needs at least 1")
    assert main(["demo", "--output", bench.path("nodir/d")]) == 2
    expect_one_line(capsys.readouterr().err, "nodir")
    flags = ["--ranks", "1", "--model", bench.path("model-cut"), "--output", bench.path("out/d")]
    assert main(["demo", *flags]) == 2
    expect_one_line(capsys.readouterr().err, "is not a whole safetensors file")
