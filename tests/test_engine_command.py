"""``paravae engine build`` and ``paravae engine list``, as a user types them."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paravae import AutoencoderKLQwenImage, QwenImageVAEArchConfig, QwenImageVAEConfig
from paravae.launch import engine_build, engine_list
from paravae.launch.cli import main
from paravae.launch.engine_targets import Sharing, parallel_targets
from paravae.launch.planned import planner_of
from paravae.vae.cost import machine_of
from paravae.vae.engines.trt.flavour import NoTensorRTError
from paravae.vae.engines.trt.manifest import read_engine, verify_manifest, weights_sha256
from paravae.vae.engines.trt.shapes import RATIOS, Profile
from paravae.vae.plan import PatchPlan
from tests.command_bench import Bench, Refused, expect_one_line

H200 = machine_of(None, "NVIDIA H200")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(scope="module")
def builder() -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript, of paravae[tensorrt]")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, of paravae[tensorrt]")
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX's wheels: Linux on x86-64 only")


def build(bench: Bench, *flags: str) -> int:
    return main(["engine", "build", "--output", bench.path("out/engines"), "--model", bench.path("model"), *flags])


def built(bench: Bench) -> dict[str, Any]:
    """Every engine below the output, by its path, with its manifest, checked."""
    root = bench.folder / "out/engines"
    return {str(path.relative_to(root)): verify_manifest(path) for path in sorted(root.rglob("*.trt"))}


# ------------------------------------------------------------------------------------------------------- build


@without_gpu
@pytest.mark.usefixtures("builder")
def test_static_engines_and_their_list(
    bench: Bench, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Every part is exported once, whatever the number of sizes; a broken engine is told from a whole one."""
    flags = ("--sizes", "1664x928,64x96,64x96", "--parts", "decoder", "--optimization-level", "0")
    with caplog.at_level(logging.INFO):
        assert build(bench, *flags, "--workspace-gib", "8", "--timing-cache", bench.path("out/tc")) == 0
    found = built(bench)
    assert list(found) == ["16_9/vae_decoder.trt", "64x96/vae_decoder.trt"]
    assert caplog.text.count("exporting decoder in float16") == 1
    assert "--timing-cache is passed over: tensorrt_rtx" in caplog.text
    for manifest, size in zip(found.values(), ((116, 208), (12, 8)), strict=True):
        assert manifest.profiles == (Profile.static(size),)
        assert (manifest.dtype, manifest.output, manifest.denormalize) == ("float16", "float", False)
        assert manifest.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
        for dtype, name in manifest.weights_sha256.items():
            vae = bench.vae.state_dict()
            assert weights_sha256(vae, "decoder", getattr(torch, dtype)) == name
    assert "2 engines" in capsys.readouterr().out

    root = bench.folder / "out/engines"
    (root / "64x96/vae_decoder.trt").write_bytes(b"cut")
    (root / "1_1").mkdir()
    (root / "1_1/vae_encoder.trt").write_bytes((root / "16_9/vae_decoder.trt").read_bytes())
    assert main(["engine", "list", str(root)]) == 0
    told = capsys.readouterr()
    rows = {line.split("│")[1].strip(): line for line in told.out.splitlines() if line.startswith("│")}
    assert [word in rows["16_9/vae_decoder.trt"] for word in ("208x116", "float16", "12.0", "broken")] == [
        True, True, True, False,
    ]  # fmt: skip
    assert "broken" in rows["64x96/vae_decoder.trt"]
    assert "no manifest" in rows["1_1/vae_encoder.trt"]
    assert "engines: 3, broken: 1" in told.out
    assert "64x96/vae_decoder.trt has 3 bytes" in told.err
    assert "1_1/vae_encoder.trt has no manifest, as LightX2V builds them" in told.err
    assert "what it takes cannot be read here: TensorRT could not" in told.err  # its runtime needs a GPU


@without_gpu
@pytest.mark.usefixtures("builder")
def test_a_multi_profile_engine(bench: Bench) -> None:
    flags = ("--kind", "multi-profile", "--parts", "encoder", "--dtype", "bfloat16")
    assert build(bench, *flags, "--compute-capabilities", "8.9") == 0
    ((file, manifest),) = built(bench).items()
    assert file == "vae_encoder_multi_profile.trt"
    assert len(manifest.profiles) == 9
    assert manifest.profiles[4] == Profile((64, 64), (1088, 1920), (1360, 1920))
    assert (manifest.dtype, manifest.compute_capabilities) == ("bfloat16", ("8.9",))


@without_gpu
@pytest.mark.usefixtures("builder")
def test_engines_for_two_ranks(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--for-parallel", "2", "--sizes", "1024x1024", "--parts", "decoder", "--gpu", "NVIDIA H200")
    with caplog.at_level(logging.INFO):
        assert build(bench, *flags, "--pixels", "uint8", "--parallel-decode-mode", "patch") == 0
    found = built(bench)
    assert list(found) == ["parallel/decoder_head_128x128.trt", "parallel/decoder_tail_128x79.trt"]
    assert [manifest.output for manifest in found.values()] == ["float", "uint8"]
    assert [manifest.part for manifest in found.values()] == ["decoder_head", "decoder_tail"]
    assert "windows are planned for 2 x NVIDIA H200" in caplog.text
    assert "are for other programs" in caplog.text


def test_a_dry_run_needs_no_tensorrt(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*names: str) -> Any:
        raise NoTensorRTError("there is none")

    monkeypatch.setattr(engine_build, "find_flavour", missing)
    assert build(bench, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "14 engines, about" in told
    assert all(f"{name}/vae_{half}.trt" in told for name in RATIOS for half in ("decoder", "encoder"))
    assert build(bench, "--dry-run", "--kind", "multi-profile", "--parts", "decoder") == 0
    told = capsys.readouterr().out
    assert told.count("8x8") == 9
    assert "203x136" in told
    assert "1 engine, about 2" in told
    assert build(bench, "--dry-run", "--for-parallel", "3", "--sizes", "512x512") == 0
    assert "parallel/encoder_body_" in capsys.readouterr().out
    assert bench.written() == []
    assert build(bench) == 2
    expect_one_line(capsys.readouterr().err, "there is none")


# ---------------------------------------------------------------------------------------------- for many ranks


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLQwenImage:
    with torch.device("meta"):
        return AutoencoderKLQwenImage(QwenImageVAEConfig(arch_config=QwenImageVAEArchConfig()))


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("size", [(928, 1664), (1328, 1328)])
def test_windows_are_those_of_the_plan(vae: AutoencoderKLQwenImage, size: tuple[int, int], ranks: int) -> None:
    """Of the fastest grid with a head for each rank itself, which TensorRT cannot share: what each rank is fed."""
    targets = parallel_targets(vae, ["decoder"], [size], "float16", Sharing(ranks, "patch", H200, uint8=False))
    lat_size = (size[0] // 8, size[1] // 8)
    planner = planner_of(vae, H200, (1, 16, 1, *lat_size), torch.float16, torch.device("cuda"), ranks)
    own = [planned for planned in planner.patches() if planned.choice.head == "own"]
    best = min(own, key=lambda planned: planned.choice.ms).layout
    assert isinstance(best, PatchPlan)
    fed = {("decoder_tail", (trace[0].rows.size, trace[0].cols.size)) for trace in best.traces if trace[-1].area}
    assert all(target.profiles[0].is_static for target in targets)
    assert {(target.part, target.profiles[0].opt) for target in targets} == {("decoder_head", lat_size), *fed}


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_encoder_is_fed_whole_latents(vae: AutoencoderKLQwenImage, ranks: int) -> None:
    targets = parallel_targets(vae, ["encoder"], [(928, 1664)], "float16", Sharing(ranks, "auto", H200, uint8=False))
    bodies = [target.profiles[0].opt for target in targets if target.part == "encoder_body"]
    heads = [target.profiles[0].opt for target in targets if target.part == "encoder_head"]
    assert heads == [(116, 208)]
    assert all(side % 8 == 0 for size in bodies for side in size)
    area = 928 * 1664 / ranks
    assert all(area < math.prod(size) < 2 * area for size in bodies)


def test_auto_leaves_a_small_picture_to_one_rank(vae: AutoencoderKLQwenImage) -> None:
    auto, patch = (
        parallel_targets(vae, ["decoder"], [(64, 64), (1328, 1328)], "float16", Sharing(2, mode, H200, uint8=False))
        for mode in ("auto", "patch")
    )
    assert "64x64/vae_decoder.trt" in {target.file for target in auto}
    assert {target.part for target in patch} == {"decoder_head", "decoder_tail"}
    assert {target.part for target in auto} == {"decoder", "decoder_head", "decoder_tail"}
    assert vae.engine.shares_head  # planning for TensorRT leaves the VAE's own engine alone


# ------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sizes", "33x24"], "--sizes 33x24: the width is 33 pixels, needs a positive multiple of 8"),
        (["--sizes", "32"], "--sizes: got '32', needs WIDTHxHEIGHT"),
        (["--kind", "dynamic"], "--kind: invalid choice: 'dynamic'"),
        (["--kind", "multi-profile", "--sizes", "64x64"], "--sizes means nothing to --kind multi-profile"),
        (["--kind", "static", "--for-parallel", "2"], "--for-parallel: not allowed with argument --kind"),
        (["--for-parallel", "1"], "--for-parallel is 1, needs at least 2 ranks"),
        (["--gpu", "NVIDIA H200"], "--gpu means nothing without --for-parallel"),
        (["--parts", "decoder,head"], "--parts: got 'decoder,head', needs one or both of"),
        (["--dtype", "float64"], "--dtype: invalid choice: 'float64'"),
        (["--pixels", "int8"], "--pixels: invalid choice"),
        (["--workspace-gib", "0"], "--workspace-gib is 0, needs a positive number"),
        (["--optimization-level", "6"], "--optimization-level is 6, needs 0 to 5"),
        (["--timing-cache", "nodir/t"], "there is no folder nodir"),
        (["--model", "./nowhere"], "is not a directory"),
        (["--model", "model-foreign"], "is of 'UNet', need one of"),
        (["--output", "p.png/engines"], "p.png is a file, needs to be a folder"),
        (["--output", "/proc/engines"], "cannot write /proc/engines"),
        (["--for-parallel", "2", "--cost-table", "none.json"], "none.json"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_to_build(bench: Bench, refused: Refused, flags: list[str], words: str) -> None:
    refused(lambda: build(bench, *flags), words)


@without_gpu
@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--compute-capabilities", "9.0"], "builds for 7.5, 8.0"),
        (["--compute-capabilities", "7.5", "--dtype", "bfloat16"], "7.5 has no bfloat16; --dtype float16 does"),
        (["--flavour", "tensorrt"], "tensorrt cannot be imported"),
        (["--model", "model-cut"], "is not a whole safetensors file"),
        (
            ["--denormalize", "--sizes", "64x64", "--parts", "decoder", "--model", "bare"],
            "needs latents_mean and latents_std",
        ),
    ],
)
def test_bad_input_that_tensorrt_tells(bench: Bench, refused: Refused, flags: list[str], words: str) -> None:
    if "bare" in flags:
        arch = replace(bench.vae.config.arch_config, latents_mean=(), latents_std=())
        AutoencoderKLQwenImage(replace(bench.vae.config, arch_config=arch)).save_pretrained(bench.folder / "bare")
    refused(lambda: build(bench, *flags), words)


@without_gpu
@pytest.mark.usefixtures("builder")
def test_a_build_that_fails_leaves_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the user's input: exit status 1, in TensorRT's own words."""
    assert build(bench, "--sizes", "64x64", "--parts", "decoder", "--workspace-gib", "1e-9") == 1
    expect_one_line(capsys.readouterr().err, "TensorRT cannot build the engine", "workspace limit")
    assert bench.written() == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["engine"], "say build, list"),
        (["engine", "list"], "the following arguments are required: DIR"),
        (["engine", "list", "nowhere"], "nowhere is no folder of engines"),
        (["engine", "list", "p.png"], "p.png is no folder of engines"),
        (["engine", "bake"], "invalid choice: 'bake'"),
    ],
)
def test_bad_commands(refused: Refused, words: list[str], told: str) -> None:
    refused(lambda: main(words), told)


def test_a_list_without_tensorrt(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*names: str) -> Any:
        raise NoTensorRTError("there is none")

    monkeypatch.setattr(engine_list, "find_flavour", missing)
    assert main(["engine", "list", bench.path("out")]) == 0
    assert "engines: 0, broken: 0" in capsys.readouterr().out
    (bench.folder / "out/vae_decoder_multi_profile.trt").write_bytes(b"LightX2V's")
    assert main(["engine", "list", bench.path("out")]) == 0
    told = capsys.readouterr()
    assert "engines: 1, broken: 0" in told.out
    assert "what it takes cannot be read here: there is none" in told.err


def test_an_engine_read_back_is_what_was_built(tmp_path: Path) -> None:
    """``read_engine`` reads nothing but what has a manifest: an engine file of anyone's is never loaded unasked."""
    (tmp_path / "vae_decoder.trt").write_bytes(b"anything")
    with pytest.raises(ValueError, match="has no manifest"):
        read_engine(tmp_path / "vae_decoder.trt")
