"""``paravae bench calibrate``: constants are found again from the times that they give, and the file is one to use."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from paravae import AutoencoderKLQwenImage
from paravae.launch import calibrate_fit
from paravae.launch.calibrate_fit import DecodeSample, GatherSample, SharedSample
from paravae.launch.cli import main
from paravae.launch.planned import lone_window, planner_of
from paravae.vae.cost import Link, Rates, machines, read_machine
from tests.builders import noise, small_vae
from tests.command_bench import Bench, Refused
from tests.test_launch import torchrun

TRUTH = Rates(
    fixed_ms=0.9,
    conv_ms=(0.004, 0.0031, 0.0026, 0.005),
    attention_ms=0.002,
    frame_ms=2.0,
    stream=1.7,
    blend_ms=0.05,
)
TRUE_LINK = Link(latency_ms=0.04, gb_per_s=120, step_ms=0.4)
KNOWN = machines()["NVIDIA H200"]
SIZES = ((256, 256), (512, 512), (1024, 1024), (1328, 1328), (2048, 2048))


@pytest.fixture(scope="module")
def full() -> AutoencoderKLQwenImage:
    """The full-size model, without its memory."""
    with torch.device("meta"):
        return AutoencoderKLQwenImage()


def planner(vae: AutoencoderKLQwenImage, size: tuple[int, int], frames: int = 1, ranks: int = 1):
    shape = (1, 16, frames, size[0] // 8, size[1] // 8)
    return planner_of(vae, KNOWN, shape, torch.bfloat16, torch.device("cuda"), ranks)


def timed(planner, planned, ranks: int = 1, scale: float = 1.0) -> DecodeSample:
    """What a machine of the true constants would have measured."""
    sample = DecodeSample(planner.cost, planned.layout, ranks, 1.0)
    return replace(sample, ms=scale * sample.predict(TRUTH, TRUE_LINK))


def samples(vae: AutoencoderKLQwenImage) -> tuple[list[DecodeSample], ...]:
    images = [timed(one, one.single()) for one in (planner(vae, size) for size in SIZES)]
    for size in SIZES[2:]:
        for ranks in (2, 4, 8):
            many = planner(vae, size, ranks=ranks)
            images += [timed(many, lone_window(one, 0)) for one in many.patches() if one.choice.head == "own"]
    films = [planner(vae, size, frames) for size, frames in (((256, 256), 6), ((480, 832), 3), ((512, 512), 2))]
    videos = [timed(one, one.single()) for one in films]
    tiled = [timed(one, one.tiled(2**60)) for one in (planner(vae, size) for size in SIZES[1:3])]
    return images, videos, tiled


def test_constants_are_found_again(full: AutoencoderKLQwenImage) -> None:
    found = calibrate_fit.fit_rates(KNOWN.engines["fast"], *samples(full))
    for name in ("fixed_ms", "attention_ms", "frame_ms", "stream", "blend_ms"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3), name
    assert found.conv_ms == pytest.approx(TRUTH.conv_ms, rel=1e-3)


def test_noise_moves_predictions_little(full: AutoencoderKLQwenImage) -> None:
    """Times that are off by 3 %: predictions of what was not measured are right by 5 %, whatever the constants."""
    draw = np.random.default_rng(0)
    parts = [[replace(one, ms=one.ms * (1 + 0.03 * draw.standard_normal())) for one in part] for part in samples(full)]
    found = calibrate_fit.fit_rates(KNOWN.engines["fast"], *parts)
    for size, ranks in (((832, 832), 1), ((1664, 928), 4), ((2048, 2048), 16), ((3072, 3072), 2)):
        many = planner(full, size, ranks=ranks)
        for planned in (many.single(), *many.patches()):
            sample = timed(many, planned, ranks)
            assert sample.predict(found, TRUE_LINK) == pytest.approx(sample.ms, rel=0.05), planned.choice.how


def test_the_links_constants_are_found_again(full: AutoencoderKLQwenImage) -> None:
    gathers = [GatherSample(4**power, 4, TRUE_LINK.gather_ms(4**power, 4)) for power in range(7, 14)]
    shared = []
    for size in SIZES[1:3]:
        many = planner(full, size, ranks=4)
        for planned in many.patches():
            sample = timed(many, planned, 4)
            shared.append(SharedSample(sample, sample.predict(TRUTH, calibrate_fit.NO_LINK)))
    found = calibrate_fit.fit_link(replace(KNOWN.link, latency_ms=0.01, gb_per_s=400.0, step_ms=0.0), gathers, shared)
    for name in ("latency_ms", "gb_per_s", "step_ms"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE_LINK, name), rel=0.02), name


def test_few_times_do_not_bend_what_is_known(full: AutoencoderKLQwenImage) -> None:
    """Three pictures of a machine twice as slow, off by some per cent: constants stay near twice the known ones."""
    known = KNOWN.engines["fast"]
    images = []
    for size, error in zip(SIZES[1:4], (1.04, 0.97, 1.02), strict=True):
        one = planner(full, size)
        sample = DecodeSample(one.cost, one.single().layout, 1, 1.0)
        images.append(replace(sample, ms=2 * error * sample.predict(known, TRUE_LINK)))
    found = calibrate_fit.fit_rates(known, images)
    assert found.conv_ms == pytest.approx([2 * one for one in known.conv_ms], rel=0.3)
    assert found.attention_ms == pytest.approx(2 * known.attention_ms, rel=0.3)
    assert found.blend_ms == pytest.approx(2 * known.blend_ms, rel=0.1), "not measured: the machine's speed holds"


def test_nothing_measured_changes_nothing() -> None:
    assert calibrate_fit.fit_rates(KNOWN.engines["fast"], []) == KNOWN.engines["fast"]
    assert calibrate_fit.fit_link(KNOWN.link, [], []) == KNOWN.link


def test_least_squares_without_negatives() -> None:
    """Against what defines it: no gain left where x is zero, none at all where it is free."""
    draw = np.random.default_rng(1)
    for rows, columns in ((8, 3), (20, 7), (5, 5), (3, 6)):
        a, b = draw.standard_normal((rows, columns)), draw.standard_normal(rows)
        x = calibrate_fit.nnls(a, b)
        gain = a.T @ (b - a @ x)
        assert (x >= 0).all()
        assert (gain < 1e-9).all()
        assert abs(gain[x > 0]).max(initial=0) < 1e-9
    assert calibrate_fit.nnls(np.array([[0.0, 1.0]]), np.array([2.0])) == pytest.approx([0.0, 2.0])


# --------------------------------------------------------------------------------------------------- command


FLAGS = ("--device", "cpu", "--sizes", "16x16", "32x16", "48x32")


def test_the_command_writes_what_the_flag_takes(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    output = bench.path("out/c.json")
    assert main(["bench", "calibrate", "--model", bench.path("model"), "--output", output, *FLAGS]) == 0
    told = capsys.readouterr().out
    assert "link not measured on one rank" in " ".join(told.split())
    report = json.loads((bench.folder / "out/c.json").read_text(encoding="utf-8"))
    assert {row["engine"] for row in report["rows"]} == {"torch32", "torch16"}
    assert {row["what"] for row in report["rows"]} == {"image", "window", "video", "tiles"}
    for row in report["rows"]:
        assert row["ms"] > 0
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["ms"] - 1, abs=0.01)
    machine, known = read_machine(bench.folder / "out/c.json"), machines()["cpu"]
    assert machine.name == "cpu"
    assert machine.link == known.link
    assert machine.engines["fast"] == known.engines["fast"]
    assert machine.engines["torch32"] != known.engines["torch32"]
    vae = small_vae(cost_table=output)
    vae.decode(noise(1, 16, 1, 4, 4))
    assert vae.last_choice is not None
    assert vae.last_choice.ms > 0


def test_two_ranks_measure_their_link(bench: Bench) -> None:
    ended = torchrun(
        2, "bench", "calibrate", "--model", bench.path("model"), "--output", bench.path("out/c.json"), *FLAGS
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads((bench.folder / "out/c.json").read_text(encoding="utf-8"))
    assert {row["what"] for row in report["rows"]} == {"image", "window", "video", "tiles", "gather", "shared"}
    assert "link of 2 ranks" in report["source"]
    assert report["link"] != machines()["cpu"].link
    assert ended.stdout.count("for --vae-config.cost-table") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "c.txt"], "give a name that ends in .json"),
        (["--output", "nodir/c.json"], "there is no folder"),
        (["--output", "c.json", "--sizes", "17x16"], "--sizes 17x16: the width is 17 pixels"),
        (["--output", "c.json", "--model", "./model-nowhere"], "is not a directory"),
        ([], "the following arguments are required: --output"),
    ],
)
def test_wrong_flags(refused: Refused, flags: list[str], words: str) -> None:
    refused(lambda: main(["bench", "calibrate", "--device", "cpu", *flags]), words)
