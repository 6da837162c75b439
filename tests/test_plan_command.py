"""``paravae plan``: it prints what a real decode chooses, for GPUs that are not there, and refuses what cannot be."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch

from paravae.launch.bench_cases import Case as Decode
from paravae.launch.cli import main
from paravae.launch.plan_drawing import Box, draw
from paravae.vae.choice import DecodeChoice
from paravae.vae.plan import Span, Window
from tests.builders import small_vae
from tests.command_bench import Bench, Refused
from tests.ranks import Rank, run_ranks

TILES = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
TILES |= {"tile_sample_stride_height": 24, "tile_sample_stride_width": 24}
DECODES: dict[str, tuple[tuple[int, int], int, int, dict[str, Any]]] = {
    "small": ((16, 24), 1, 1, {}),
    "image": ((96, 384), 1, 1, {}),
    "wide": ((384, 64), 1, 1, {}),
    "batch": ((96, 96), 1, 3, {}),
    "video": ((96, 128), 5, 1, {}),
    "patch": ((64, 96), 1, 1, {"parallel_decode_mode": "patch"}),
    "tiled": ((64, 96), 1, 1, {"parallel_decode_mode": "tiled", **TILES}),
    "little memory": ((96, 96), 1, 1, {"memory_limit_gib": 2e-3, **TILES}),
}
"""Name -> size, pixel frames, batch, config."""


def planned(bench: Bench, name: str, ranks: int, *flags: str) -> dict[str, Any]:
    """What ``paravae plan`` writes of that decode by CPU ranks."""
    (width, height), frames, batch, options = DECODES[name]
    output = bench.folder / "out/plan.json"
    flags = (*flags, "--size", f"{width}x{height}", "--frames", str(frames), "--batch", str(batch))
    flags += ("--ranks", str(ranks), "--dtype", "float32", "--gpu", "cpu", "--model", bench.path("model"))
    for option, value in options.items():
        flags += (f"--vae-config.{option.replace('_', '-')}", str(value))
    assert main(["plan", *flags, "--json", str(output)]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def choose(here: Rank, name: str) -> DecodeChoice:
    """What a real decode among these ranks chooses."""
    (width, height), frames, batch, options = DECODES[name]
    vae = small_vae(use_parallel_decode=True, **options)
    shape = (batch, *Decode("decode", width, height, frames).latents_shape(vae.config.arch_config)[1:])
    vae.decode(torch.zeros(shape))
    assert vae.last_choice is not None
    return vae.last_choice


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], DecodeChoice]:
    """{(name of decode, ranks): what rank 0 chose}"""
    found = {}
    for ranks in (2, 3):
        cases = {name: partial(choose, name=name) for name in DECODES}
        results = run_ranks(cases, ranks, tmp_path_factory.mktemp("ranks") / "rendezvous")
        for name, outcomes in results.items():
            assert outcomes[0].error is None, outcomes[0].error
            found[name, ranks] = outcomes[0].value
    return found


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", DECODES)
def test_a_real_decode_chooses_what_is_planned(
    bench: Bench, choices: dict[tuple[str, int], DecodeChoice], name: str, ranks: int
) -> None:
    chosen = planned(bench, name, ranks)["chosen"]
    assert DecodeChoice(**{**chosen, "grid": tuple(chosen["grid"])}) == choices[name, ranks]


def test_the_choices_are_not_all_alike(choices: dict[tuple[str, int], DecodeChoice]) -> None:
    assert {choice.mode for choice in choices.values()} == {"single", "patch", "tiled"}
    assert choices["batch", 3].groups == 3


def test_of_engines_it_predicts_what_pytorch_would_take(bench: Bench) -> None:
    engines = ("--vae-config.vae-type", "tensorrt", "--vae-config.trt-vae-config.trt-engine-path", str(bench.folder))
    by_pytorch, by_engines = planned(bench, "image", 2), planned(bench, "image", 2, *engines)
    assert by_pytorch["engine"] == "torch32"
    assert by_engines["engine"].startswith("torch32 (PyTorch's, by which auto goes for vae_type tensorrt too")
    assert by_engines["one_rank_ms"] == by_pytorch["one_rank_ms"]


def test_a_gpu_that_is_not_here(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """The full-size model, without its memory: candidates are sorted, marked and related to one rank."""
    output = bench.folder / "out/plan.json"
    flags = ("--size", "1328x1328", "--ranks", "8", "--gpu", "NVIDIA H200", "--json", str(output))
    assert main(["plan", *flags]) == 0
    report, told = json.loads(output.read_text(encoding="utf-8")), capsys.readouterr().out
    exact = [row for row in report["candidates"] if row["exact"]]
    assert [row["ms"] for row in exact] == sorted(row["ms"] for row in exact)
    assert [row["mode"] for row in report["candidates"] if not row["exact"]] == ["tiled"]
    (chosen,) = [row for row in report["candidates"] if row["chosen"]]
    assert chosen["how"] in told
    assert chosen["ms"] == report["chosen"]["ms"]
    assert chosen["speedup"] == pytest.approx(report["one_rank_ms"] / chosen["ms"], abs=1e-3)
    assert chosen["efficiency"] == pytest.approx(chosen["speedup"] / 8, abs=1e-3)
    assert report["constants"]["source"] in told
    assert "engine fast" in told
    assert len(report["ranks"]) == 8
    assert sum(row["px_height"] * row["px_width"] for row in report["ranks"]) == 1328**2
    assert all(1 / 8 < row["work"] < 1 for row in report["ranks"])
    assert all(str(rank) in told.split("to scale:")[1] for rank in range(8))


def test_ranks_left_over_and_batches_dealt(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--size", "1024x768", "--ranks", "5", "--batch", "2", "--gpu", "NVIDIA H200")
    assert main(["plan", *flags]) == 0
    told = capsys.readouterr().out
    assert "images dealt to 2 groups" in told
    assert " 0 2 " in told.split("to scale:")[1]
    assert "none" in told


def test_tiles_and_memory(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--size", "2048x2048", "--ranks", "2", "--gpu", "NVIDIA H200", "--memory-gib", "1")
    assert main(["plan", *flags]) == 0
    told = capsys.readouterr().out
    assert "an exact decode needs" in told
    assert "does not fit" in told
    assert "1 GiB, by --memory-gib" in told
    assert "┼" in told.split("to scale:")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_assumed_gpu_and_an_unknown_one_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "64x64", "--ranks", "1"]) == 0
    told = capsys.readouterr().out
    assert "NVIDIA H200 (no GPU is found here: assumed, --gpu names another)" in told
    assert "there is one rank" in told
    assert main(["plan", "--size", "64x64", "--ranks", "1", "--gpu", "Some GPU"]) == 0
    assert "default, engine fast: unmeasured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "33x24"], "--size 33x24: the width is 33 pixels, needs a positive multiple of 8, such as 32 or 40"),
        (["--size", "0x8"], "--size 0x8: the width is 0 pixels"),
        (["--size", "32"], "--size: got '32', needs WIDTHxHEIGHT in pixels"),
        (["--ranks", "0"], "--ranks is 0, needs at least 1"),
        (["--ranks", "two"], "--ranks: got 'two', needs a whole number"),
        (["--batch", "-1"], "--batch is -1, needs at least 1"),
        (["--frames", "2"], "--frames 2: needs 1 + a multiple of 4, such as 1 or 5"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--gpu", " "], "--gpu is empty"),
        (["--memory-gib", "0"], "--memory-gib is 0, needs a positive number"),
        (["--memory-gib", "nan"], "--memory-gib is nan, needs a positive number"),
        (["--memory-gib", "inf"], "--memory-gib is inf, needs a positive number"),
        (["--memory-gib", "1e-9"], "needs about"),
        (["--memory-gib", "1", "--vae-config.memory-limit-gib", "1"], "are both given"),
        (["--json", "p.txt"], "give a name that ends in .json"),
        (["--json", "nodir/p.json"], "there is no folder"),
        (["--model", "nowhere"], "config.json does not exist"),
        (["--vae-config.cost-table", "model/config.json"], "cost_table (--vae-config.cost-table) model/config.json"),
        (["--vae-config.load-decoder", "false"], "--vae-config.load-decoder is false"),
    ],
)
def test_bad_input(refused: Refused, flags: list[str], words: str) -> None:
    assert refused(lambda: main(["plan", "--size", "64x64", "--ranks", "2", *flags]), words) == ""


# --------------------------------------------------------------------------------------------------- drawing


def box(rows: tuple[int, int], cols: tuple[int, int], label: str) -> Box:
    return Box(Window(Span(*rows), Span(*cols)), label)


def test_windows_are_drawn_to_scale() -> None:
    boxes = [box((0, 1), (0, 3), "0"), box((0, 1), (3, 4), "1"), box((1, 2), (0, 3), "2"), box((1, 2), (3, 4), "3")]
    lines = draw(boxes, 2, 4).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) == 79
    assert len(lines) == 21  # half as many: characters are twice as high as wide
    inner = lines[0].index("┬")
    assert inner == pytest.approx(3 / 4 * (len(lines[0]) - 1), abs=1)
    assert lines[0][0] + lines[0][-1] + lines[-1][0] + lines[-1][-1] == "┌┐└┘"
    middle = next(line for line in lines if "├" in line)
    assert middle[inner] == "┼"
    assert lines.index(middle) == pytest.approx((len(lines) - 1) / 2, abs=1)
    above = next(line for line in lines if "0" in line)
    assert above.index("0") == pytest.approx(inner / 2, abs=1)
    assert inner < above.index("1") < len(above) - 1


def test_overlapping_tiles_and_labels_without_room() -> None:
    tiles = [box((0, 8), (start, start + 8), str(start)) for start in range(0, 121)]
    text = draw(tiles, 8, 128)
    assert set(text) <= set(" ─│┌┐└┘┬┴┼├┤\n0123456789")
    assert draw([box((0, 1), (0, 10_000), "0")], 1, 10_000).count("\n") == 2
    assert len(draw([box((0, 10_000), (0, 1), "0")], 10_000, 1).splitlines()) == 33
