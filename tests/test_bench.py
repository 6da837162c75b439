"""paravae bench and the single-GPU benchmark: what they write, what they refuse, and that a wrong result is noticed."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import render, sglang_peer, single_gpu
from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.launch import bench_cost, bench_errors, bench_model, bench_timing
from paravae.launch.bench import check_flags
from paravae.launch.bench_cases import Case
from paravae.launch.bench_peers import check_peers
from paravae.launch.cli import build_parser, main
from paravae.launch.world import World
from paravae.vae import plan
from paravae.vae.comm import RankGroup
from tests.builders import SMALL, noise, small_vae
from tests.command_bench import Bench, Refused, expect_one_line
from tests.test_launch import torchrun

QUICK = ("--device", "cpu", "--repeats", "2", "--warmup", "1")
SMALL_CONFIG = QwenImageVAEConfig(arch_config=SMALL)


def run(bench: Bench, *flags: str, output: str = "out/b.json") -> int:
    return main(["bench", "--model", bench.path("model"), "--output", bench.path(output), *QUICK, *flags])


def report_of(bench: Bench) -> dict[str, Any]:
    return json.loads((bench.folder / "out/b.json").read_text(encoding="utf-8"))


def test_every_case_has_a_row(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bench, "--sizes", "24x16", "24x16", "--frames", "1", "5") == 0
    report = report_of(bench)
    cases = [(row["what"], row["size"], row["frames"]) for row in report["rows"]]
    assert cases == [(what, "24x16", frames) for frames in (1, 5) for what in ("decode", "encode")]
    for row in report["rows"]:
        assert row["who"] == "paravae"
        assert row["correct"] is True
        assert 0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert 0 < row["rms_error"] < row["max_error"]  # bfloat16 against fp32: something, but little
        assert row["flops"] > row["block_bytes"] > 0
        assert 0 < row["matmul_share"] < 1
        assert row["peak_gib"] is None  # no GPU
    assert report["rows"][0]["ran"] == "single on 1 rank"
    assert report["args"]["sizes"] == ["24x16", "24x16"]
    assert report["machine"]["ranks"] == 1
    assert {"torch", "triton", "diffusers", "commit", "date"} <= report["machine"].keys()
    assert report["rates"]["bf16_matmul_tflops"] > 0
    assert "paravae" in report["contestants"]
    told = capsys.readouterr()
    assert "decode 24x16, 5 frames: paravae" in told.err
    assert "24x16" in told.out
    assert "RMS error" in told.out


def test_a_peer_is_timed_and_sets_the_bar(bench: Bench) -> None:
    assert run(bench, "--sizes", "16x24", "--peers", "diffusers") == 0
    report = report_of(bench)
    assert [(row["what"], row["who"]) for row in report["rows"]] == [
        (what, who) for what in ("decode", "encode") for who in ("paravae", "diffusers")
    ]
    assert "AutoencoderKLQwenImage, eager" in report["contestants"]["diffusers"]
    for own, peer in zip(report["rows"][::2], report["rows"][1::2], strict=True):
        assert own["rms_error"] <= 1.05 * peer["rms_error"]
        assert peer["correct"] is True
        assert own["flops"] == peer["flops"]


def test_a_tiled_decode_is_held_against_tiles(bench: Bench) -> None:
    tiles = [f"--vae-config.tile-sample-{what}-{side}=32" for what in ("min", "stride") for side in ("height", "width")]
    flags = ("--sizes", "96x64", "--what", "decode", "--dtype", "float32", "--vae-config.use-tiling", *tiles)
    assert run(bench, *flags) == 0
    (row,) = report_of(bench)["rows"]
    assert row["ran"].startswith("tiled, 2 x 3 tiles")
    assert row["max_error"] < 1e-4


def test_ranks_share_and_one_writes(bench: Bench) -> None:
    flags = ("--sizes", "64x32", "--what", "decode", "--vae-config.use-parallel-decode")
    ended = torchrun(2, "bench", "--model", bench.path("model"), "--output", bench.path("out/b.json"), *QUICK, *flags)
    assert ended.returncode == 0, ended.stderr
    (row,) = report_of(bench)["rows"]
    assert row["ran"].endswith("of 2 ranks"), "of so small a picture each rank does all"
    assert row["correct"] is True
    assert report_of(bench)["machine"]["ranks"] == 2
    assert ended.stdout.count("RMS error") == 1


def spoil_narrow(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Let every decode that is not in fp32, as the truth is, be off by ``error``."""
    decode = AutoencoderKLQwenImage.decode

    def spoilt(vae: AutoencoderKLQwenImage, latents: Tensor, **options: Any) -> Tensor:
        return decode(vae, latents, **options) + (error if vae.dtype != torch.float32 else 0)

    monkeypatch.setattr(AutoencoderKLQwenImage, "decode", spoilt)


@pytest.mark.parametrize(
    ("flags", "error"), [((), 0.5), (("--peers", "diffusers"), 0.02)], ids=["alone", "beside diffusers"]
)
def test_an_incorrect_result_is_written_and_fails(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    error: float,
) -> None:
    spoil_narrow(monkeypatch, error)
    assert run(bench, "--sizes", "32x24", *flags) == 1
    told = capsys.readouterr()
    expect_one_line(told.err, "1 result of paravae not correct", "decode 32x24, frames 1: RMS error")
    assert "NO" in told.out
    marks = {(row["who"], row["what"]): row["correct"] for row in report_of(bench)["rows"]}
    assert marks.pop(("paravae", "decode")) is False
    assert all(marks.values())
    assert all("ms" in row for row in report_of(bench)["rows"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sizes", "33x24"], "--sizes 33x24: the width is 33 pixels, needs a positive multiple of 8, such as 32 or"),
        (["--sizes", "32x20"], "the height is 20 pixels"),
        (["--sizes", "0x8"], "the width is 0 pixels"),
        (["--sizes", "32"], "--sizes: got '32', needs WIDTHxHEIGHT in pixels"),
        (["--frames", "2"], "--frames 2: needs 1 + a multiple of 4, such as 1 or 5"),
        (["--frames", "-3"], "--frames -3: needs 1 + a multiple of 4"),
        (["--peers", "sglang"], "--peers: invalid choice: 'sglang'"),
        (["--what", "train"], "--what: invalid choice: 'train'"),
        (["--dtype", "float64"], "--dtype: invalid choice: 'float64'"),
        (["--repeats", "0"], "--repeats is 0, needs at least 1"),
        (["--warmup", "0"], "--warmup is 0, needs at least 1"),
        (["--output", "b.txt"], "give a name that ends in .json"),
        (["--output", "nodir/b.json"], "there is no folder"),
        (["--model", "./model-nowhere"], "is not a directory"),
        (["--vae-config.load-encoder", "false"], "--what encode needs the encoder"),
        (["--vae-config.load-encoder=false", "--what", "decode", "--peers", "diffusers"], "--peers need both halves"),
    ],
)
def test_wrong_flags(bench: Bench, refused: Refused, flags: list[str], words: str) -> None:
    refused(lambda: run(bench, *flags), words)


def test_peers_are_for_one_rank() -> None:
    args = build_parser().parse_args(["bench", "--peers", "diffusers"])
    here = World(0, 2, torch.device("cpu"), RankGroup(0, 2))
    with pytest.raises(ValueError, match=r"--peers diffusers with 2 ranks: .* time them without torchrun"):
        check_flags(args, QwenImageVAEConfig(), here)


def test_a_gpu_needs_three_calls_to_warm_up() -> None:
    args = build_parser().parse_args(["bench", "--warmup", "2"])
    here = World(0, 1, torch.device("cuda", 0), RankGroup.alone())
    with pytest.raises(ValueError, match="--warmup is 2, needs at least 3: the second call of a shape"):
        check_flags(args, QwenImageVAEConfig(), here)


def test_a_missing_peer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_peers(["diffusers"], torch.device("cpu"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="needs a C compiler"):
        check_peers(["compile"], torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'diffusers"):
        check_peers(["diffusers"], torch.device("cpu"))


@pytest.mark.parametrize("lat_size", [(4, 6), (7, 3)])
def test_flops_are_those_of_the_planner(lat_size: tuple[int, int]) -> None:
    vae = small_vae()
    height, width = lat_size
    shapes = ((1, 16, 1, height, width), (1, 3, 1, 8 * height, 8 * width))
    stages = vae.engine.decoder_stages
    work = plan.local_work(stages, plan.whole(stages, *lat_size))
    work += plan.local_work(vae.engine.decoder_front, plan.whole(vae.engine.decoder_front, *lat_size))
    channels, tokens = vae.engine.attention_channels, height * width
    work += plan.attention_work(channels, tokens, tokens) + plan.projections_work(channels, tokens)
    work += 16 * 16 * height * width  # post_quant_conv, which the planner leaves out
    assert bench_cost.count(vae.config, "decode", *shapes).flops == 2 * work
    stages = vae.engine.encoder_stages
    local = plan.local_work(stages, plan.whole(stages, 8 * height, 8 * width))
    assert bench_cost.count(vae.config, "encode", *shapes).flops > 2 * local


def test_a_video_costs_more_than_its_frames() -> None:
    """Each frame after the first meets three taps in time."""
    image, video = (
        bench_cost.count(SMALL_CONFIG, "decode", (1, 16, frames, 4, 4), (1, 3, 4 * frames - 3, 32, 32))
        for frames in (1, 3)
    )
    assert 9 * image.flops < video.flops < 3 * 9 * image.flops
    assert video.values < 9 * image.values + 10**6


def test_errors() -> None:
    truth = noise(1, 3, 2, 4, 4)
    spoilt = truth.clone()
    spoilt[0, 0, 1, 0, 0] += 1
    found = bench_errors.errors(spoilt, truth)
    assert found["max_error"] == pytest.approx(1)
    assert found["rms_error"] == pytest.approx((1 / truth.numel()) ** 0.5, rel=1e-5)
    assert bench_errors.errors(truth * torch.nan, truth)["rms_error"] == 1e6  # JSON has no NaN
    with pytest.raises(ValueError, match=r"has shape \[1, 3, 1, 4, 4\], needs \[1, 3, 2, 4, 4\]"):
        bench_errors.errors(truth[:, :, :1], truth)


def test_clocks() -> None:
    device = torch.device("cpu")
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench_timing.interleaved_ms(calls, {"a": 3, "b": 2}, device, RankGroup.alone())
    assert order == list("ababa")
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 2}
    assert bench_timing.spread([5, 1, 2, 4, 3]) == {"ms": 3, "p20_ms": 2, "p80_ms": 4}
    assert bench_timing.largest("x", 1.25, RankGroup.alone()) == 1.25


@pytest.mark.parametrize(("together", "order"), [(True, "ab" + "ab" * 5 + "aa"), (False, "a" * 8 + "b" * 6)])
def test_slow_calls_are_timed_less_often(together: bool, order: str) -> None:
    done: list[str] = []

    def slow() -> None:
        done.append("b")
        time.sleep(0.03)

    calls = {"a": lambda: done.append("a"), "b": slow}
    device, group = torch.device("cpu"), RankGroup.alone()
    times = bench_timing.turns_ms(calls, 7, device, group, seconds=0.05, together=together)
    assert "".join(done) == order  # a call each that does not count, then seven and, of the slow one, five
    assert {name: len(each) for name, each in times.items()} == {"a": 7, "b": 5}


def test_random_weights_are_seeded_and_leave_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, other = (bench_model.random_model(SMALL_CONFIG) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(tensor, other.state[key]) for key, tensor in one.state.items())
    built = one.build(one.config, torch.float32, torch.device("cpu"))
    assert 0.1 < float(built.decode(Case("decode", 64, 64, 1).draw_input(SMALL)).std()) < 1


@pytest.fixture
def small_single_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """benchmarks.single_gpu with a small model, writing to the folder given."""
    monkeypatch.setattr(single_gpu, "load", lambda *_: bench_model.random_model(SMALL_CONFIG))

    def build(state: dict[str, Tensor], dtype: torch.dtype, device: torch.device, **options: Any) -> SimpleNamespace:
        assert options == {"folder": tmp_path, "base_dim": SMALL.base_dim}
        vae = bench_model.Model("", SMALL_CONFIG, state).build(SMALL_CONFIG, dtype, device)

        def encode(pixels: Tensor) -> Tensor:
            raise RuntimeError("out of\nsomething")

        return SimpleNamespace(decode=vae.decode, encode=encode, what_ran="SGLang, or so")

    monkeypatch.setattr(sglang_peer, "build", build)
    return tmp_path


def test_the_single_gpu_benchmark_goes_on_where_it_stopped(
    small_single_gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = small_single_gpu, small_single_gpu / "single_gpu.json"
    monkeypatch.setattr(single_gpu, "VIDEO", (16, 16))
    flags = [*QUICK, "--peers", "diffusers", "--sglang", str(folder), "--sizes", "16x8", "--output", str(output)]
    flags += ["--video-frames", "5"]
    assert single_gpu.main([*flags, "--minutes", "0"]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["rows"] == []
    cases = ["decode 16x8, 1 frame", "decode 16x16, 5 frames", "encode 16x8, 1 frame", "encode 16x16, 5 frames"]
    assert report["skipped"] == cases
    assert "skipped, no time left: decode 16x8" in capsys.readouterr().err

    assert single_gpu.main([*flags, "--what", "decode"]) == 0
    decodes = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [row["who"] for row in decodes] == ["paravae", "diffusers", "sglang"] * 2
    assert single_gpu.main([*flags, "--resume"]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["rows"][: len(decodes)] == decodes
    assert len(report["rows"]) == 12
    assert report["rows"][-1]["failed"] == "RuntimeError: out of something"
    assert report["contestants"]["sglang"] == "SGLang, or so"
    with pytest.raises(SystemExit):
        single_gpu.main([*flags, "--resume", "--dtype", "float32"])
    assert "is of another --dtype" in capsys.readouterr().err

    monkeypatch.setattr(render, "RESULTS", folder)
    monkeypatch.setattr(render, "PLOT", folder / "plot.png")
    text = render.render("".join(f"<!-- results: single_gpu{name} -->\n<!-- end -->\n" for name in ("", "-all")))
    assert "| 16x16, 5 frames |" in text
    assert "| encode 16x8 | SGLang | failed |" in text
    render.plot()
    assert (folder / "plot.png").stat().st_size > 10_000


def test_sglang_that_cannot_run_says_why(small_single_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(*_: object, **__: object) -> None:
        raise sglang_peer.PeerUnavailable("no sglang/ in it")

    sglang_peer.build = build  # type: ignore[assignment]  # put back by the fixture
    with pytest.raises(SystemExit):
        single_gpu.main([*QUICK, "--sglang", "nowhere", "--output", str(small_single_gpu / "x.json")])
    assert "--sglang nowhere: no sglang/ in it" in capsys.readouterr().err


def test_a_block_without_results_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    text = "<!-- results: single_gpu -->\nas it was\n<!-- end -->\n"
    assert render.render(text) == text
