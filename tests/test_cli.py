"""The commands, as a user types them: flags, results, errors, alone and under torchrun."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig, RankError, VAEConfig
from paravae.configs.cli import add_vae_flags, flag_fields, flag_name, vae_config_from
from paravae.launch import decode as decode_command
from paravae.launch.cli import main
from paravae.launch.errors import status_of
from paravae.vae.pixels import from_uint8
from tests.builders import noise, small_vae

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Bench:
    """A folder to work in, with a model, latents and pictures, good and bad."""

    folder: Path
    vae: AutoencoderKLQwenImage
    latents: Tensor

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def decode(self, *flags: str, latents: str = "z.safetensors", output: str = "out/x.png") -> int:
        files = ["--latents", self.path(latents), "--output", self.path(output)]
        return main(["decode", *files, "--model", self.path("model"), "--device", "cpu", *flags])

    def encode(self, *flags: str, picture: str = "p.png", output: str = "out/e.safetensors") -> int:
        files = ["--input", self.path(picture), "--output", self.path(output)]
        return main(["encode", *files, "--model", self.path("model"), "--device", "cpu", *flags])

    def written(self) -> list[str]:
        return sorted(entry.name for entry in (self.folder / "out").iterdir())

    def picture(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(self.folder / "out" / name))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("cli")
    vae, latents = small_vae(), noise(1, 16, 1, 12, 9)
    vae.save_pretrained(folder / "model")
    plain = {"normalized": "false"}
    save_file({"latents": latents}, folder / "z.safetensors", metadata=plain)
    save_file({"latents": noise(1, 16, 2, 4, 6)}, folder / "video.safetensors", metadata=plain)
    save_file({"latents": noise(1, 16, 1, 4, 4)}, folder / "unsaid.safetensors")
    save_file({"latents": noise(1, 4, 1, 4, 4)}, folder / "thin.safetensors", metadata=plain)
    save_file({"latents": latents * torch.nan}, folder / "nan.safetensors", metadata=plain)
    save_file({"latents": latents / 0}, folder / "inf.safetensors", metadata=plain)
    torch.save({"latents": latents}, folder / "pickle.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "z.safetensors").read_bytes()[:-9])
    levels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(levels).save(folder / "p.png")
    Image.fromarray(levels[:45, :37]).save(folder / "odd.png")
    (folder / "text.png").write_text("no picture")
    _broken_models(folder)
    return Bench(folder, vae, latents)


def _broken_models(folder: Path) -> None:
    config = (folder / "model" / "config.json").read_text()
    weights = (folder / "model" / "diffusion_pytorch_model.safetensors").read_bytes()
    for name, stated in (
        ("cut", config),
        ("foreign", config.replace("AutoencoderKLQwenImage", "UNet")),
        ("pickled", config),
    ):
        (folder / f"model-{name}").mkdir()
        (folder / f"model-{name}" / "config.json").write_text(stated)
    (folder / "model-cut" / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "model-pickled" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")


@pytest.fixture
def bench(stock: Bench, tmp_path: Path) -> Bench:
    """The stock, seen from a folder with an empty ``out``."""
    for entry in stock.folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "out").mkdir()
    return replace(stock, folder=tmp_path)


# ------------------------------------------------------------------------------------------------------- flags


def parsed(*flags: str) -> VAEConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_vae_flags(parser, QwenImageVAEConfig)
    return vae_config_from(parser.parse_args(flags), QwenImageVAEConfig)


def test_flags_and_fields_are_one_to_one() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_vae_flags(parser, QwenImageVAEConfig)
    flags = [option for action in parser._actions for option in action.option_strings]
    own = [field.name for field in fields(QwenImageVAEConfig) if field.name != "arch_config"]
    assert flags == [f"--vae-config.{name.replace('_', '-')}" for name in own]
    assert parsed() == QwenImageVAEConfig()


def test_each_flag_sets_its_field_and_no_other() -> None:
    values = {"tile_sample_stride_height": "64", "tile_sample_stride_width": "64", "memory_limit_gib": "1.5"}
    for field in flag_fields(QwenImageVAEConfig):
        if field.name == "parallel_decode_mode":
            text, value = "patch", "patch"
        elif isinstance(field.default, bool):
            text, value = str(not field.default).lower(), not field.default
        else:
            text = values.get(field.name, "320")
            value = float(text) if "." in text else int(text)
        expected = replace(QwenImageVAEConfig(), **{field.name: value})
        assert parsed(flag_name(field.name), text) == expected
        assert parsed(f"{flag_name(field.name)}={text}") == expected


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["decode", "--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in flag_fields(QwenImageVAEConfig):
        assert flag_name(field.name) in text
        assert " ".join(field.metadata["help"].split()) in text
    assert "largest step between tiles, in pixels down (default: 192)" in text
    assert "share each decode among the ranks of the parallel group (default: false)" in text
    assert "build and load the encoder (default: false)" in text  # a decode needs none


@pytest.mark.parametrize(
    ("value", "expected"), [((), True), (("true",), True), (("True",), True), (("false",), False), (("FALSE",), False)]
)
def test_a_switch_stands_bare_or_has_a_value(value: tuple[str, ...], expected: bool) -> None:
    assert parsed("--vae-config.use-parallel-decode", *value).use_parallel_decode is expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vae-config.nosuch"], "unrecognized arguments: --vae-config.nosuch"),
        (["--vae-config.use-parallel"], "unrecognized arguments: --vae-config.use-parallel"),  # no abbreviations
        (["--vae-config.parallel-decode-mode", "fast"], "--vae-config.parallel-decode-mode: invalid choice: 'fast'"),
        (["--vae-config.use-parallel-decode", "yes"], "--vae-config.use-parallel-decode: got 'yes', needs true or"),
        (["--vae-config.tile-sample-min-width", "1.5"], "--vae-config.tile-sample-min-width: got '1.5', needs a whole"),
        (["--vae-config.tile-sample-min-width", "100"], "(--vae-config.tile-sample-min-width) is 100 pixels, needs a"),
        (["--vae-config.tile-sample-stride-height", "264"], "lower --vae-config.tile-sample-stride-height"),
        (["--vae-config.memory-limit-gib", "lots"], "--vae-config.memory-limit-gib: got 'lots', needs a number"),
        (["--vae-config.memory-limit-gib", "0"], "memory_limit_gib is 0.0, needs a positive number"),
        (["--vae-config.load-encoder", "--vae-config.load-decoder", "false"], "needs the decoder"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--height"], "--height: expected one argument"),
    ],
)
def test_a_wrong_flag_is_named(bench: Bench, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert bench.decode(*flags) == 2
    expect_one_line(capsys.readouterr().err, words)
    assert bench.written() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "COMMAND"), (["fly"], "'fly'"), (["decode"], "--latents, --output"), (["encode"], "--input, --output")],
)
def test_a_wrong_command_says_what_is_needed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == 2
    expect_one_line(capsys.readouterr().err, words)


# --------------------------------------------------------------------------------------------- decode and encode


def test_a_decode_writes_what_the_model_gives(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.decode() == 0
    levels = bench.vae.decode(bench.latents, output_type="uint8")
    assert np.array_equal(bench.picture("x.png"), levels[0, :, 0].permute(1, 2, 0).numpy())
    assert bench.written() == ["x.png"]
    told = capsys.readouterr()
    assert told.out.startswith(f"{bench.path('out/x.png')}: 72 x 96; single on 1 rank; decoded in ")
    assert told.out.count("\n") == 1


def test_the_flags_reach_the_model(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = {f"tile_sample_{what}_{side}": 32 for what in ("min", "stride") for side in ("height", "width")}
    tiles["tile_sample_stride_width"] = 24
    flags = [text for name, px in tiles.items() for text in (flag_name(name), str(px))]
    assert bench.decode("--vae-config.use-tiling", *flags, "--dtype", "float64") == 0
    vae = small_vae(torch.float64, use_tiling=True, **tiles)
    levels = vae.decode(bench.latents.double(), output_type="uint8")
    assert np.array_equal(bench.picture("x.png"), levels[0, :, 0].permute(1, 2, 0).numpy())
    assert "tiled, 3 x 2 windows on 1 rank" in capsys.readouterr().out


def test_a_video_becomes_frames_or_a_film(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.decode(latents="video.safetensors", output="out/frames") == 0
    assert len(list((bench.folder / "out" / "frames").iterdir())) == 5
    assert bench.decode("--fps", "24", latents="video.safetensors", output="out/v.mp4") == 0
    assert bench.written() == ["frames", "v.mp4"]
    assert "48 x 32, 5 frames" in capsys.readouterr().out
    assert bench.encode("--vae-config.load-encoder", picture="out/frames") == 0
    assert load_file(bench.path("out/e.safetensors"))["latents"].shape == (1, 16, 2, 4, 6)


def test_an_encode_writes_the_mean(bench: Bench) -> None:
    assert bench.encode() == 0
    levels = torch.from_numpy(np.array(Image.open(bench.path("p.png")))).permute(2, 0, 1)[None, :, None]
    posterior = bench.vae.encode(from_uint8(levels))
    latents = load_file(bench.path("out/e.safetensors"))["latents"]
    assert torch.equal(latents, posterior.mode())
    assert bench.encode("--sample", "--seed", "3", output="out/s.safetensors") == 0
    drawn = posterior.sample(torch.Generator().manual_seed(3))
    assert torch.equal(load_file(bench.path("out/s.safetensors"))["latents"], drawn)


def test_what_is_encoded_can_be_decoded_normalised_or_not(bench: Bench) -> None:
    assert bench.encode() == 0
    assert bench.encode("--normalized", output="out/n.safetensors") == 0
    plain, normalised = (load_file(bench.path(f"out/{name}.safetensors"))["latents"] for name in "en")
    torch.testing.assert_close(normalised, bench.vae.normalize(plain))
    assert bench.decode(latents="out/e.safetensors", output="out/e.png") == 0
    assert bench.decode(latents="out/n.safetensors", output="out/n.png") == 0
    one, other = bench.picture("e.png").astype(int), bench.picture("n.png").astype(int)
    assert one.shape == (48, 40, 3)
    assert abs(one - other).max() <= 1


def test_cropping_is_asked_for(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.encode(picture="odd.png") == 2
    expect_one_line(capsys.readouterr().err, "odd.png is 37 x 45", "multiples of 8", "--crop", "to 32 x 40")
    assert bench.encode("--crop", picture="odd.png") == 0
    assert load_file(bench.path("out/e.safetensors"))["latents"].shape == (1, 16, 1, 5, 4)


# --------------------------------------------------------------------------------------------------------- faults


def expect_one_line(stderr: str, *words: str) -> None:
    """One line of error, and nothing like a traceback."""
    errors = [line for line in stderr.splitlines() if line.startswith("paravae: error: ")]
    assert len(errors) == 1, stderr
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latents": "nowhere.safetensors"}, "does not exist"),
        ({"latents": "out"}, "is a directory"),
        ({"latents": "cut.safetensors"}, "is not a whole safetensors file"),
        ({"latents": "pickle.safetensors"}, "pickles can execute code"),
        ({"latents": "unsaid.safetensors"}, "--normalized true or --normalized false"),
        ({"latents": "thin.safetensors"}, "has shape [1, 4, 1, 4, 4], needs [B, 16, T, h, w]"),
        ({"latents": "nan.safetensors"}, "latents hold 1728 NaN and 0 Inf"),
        ({"latents": "inf.safetensors"}, "latents hold 0 NaN and 1728 Inf"),
        ({"latents": "video.safetensors"}, "holds one frame, the video has 5"),
        ({"output": "nodir/x.png"}, "there is no folder"),
        ({"output": "out"}, "the folder is not empty"),
        ({"output": "out/.."}, "names no file or new folder"),
        ({"output": "out/x.tiff"}, "unknown format .tiff"),
    ],
)
def test_bad_input_to_decode(
    bench: Bench, capsys: pytest.CaptureFixture[str], options: dict[str, str], words: str
) -> None:
    (bench.folder / "out" / "kept").touch()
    assert bench.decode(**options) == 2
    expect_one_line(capsys.readouterr().err, words)
    assert bench.written() == ["kept"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "model-cut"], "is not a whole safetensors file"),
        (["--model", "model-foreign"], "is of 'UNet', need one of"),
        (["--model", "model-pickled"], "pickles can execute code and are not read"),
        (["--model", "./model-nowhere"], "is not a directory"),
        (["--model", "model", "--subfolder", "vae"], "has no folder 'vae'"),
        (["--max-latents-gib", "1e-7"], "more than the 1e-07 GiB that --max-latents-gib allows"),
        (["--vae-config.memory-limit-gib", "1e-4"], "memory_limit_gib"),
    ],
)
def test_bad_models_and_limits(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(bench.folder)
    assert bench.decode(*flags) == 2
    expect_one_line(capsys.readouterr().err, words)
    assert bench.written() == []


@pytest.mark.parametrize(
    ("options", "flags", "words"),
    [
        ({"picture": "nowhere.png"}, [], "does not exist"),
        ({"picture": "text.png"}, [], "cannot be read as a picture"),
        ({"output": "out/e.pt"}, [], "latents are written as .safetensors"),
        ({"output": "nodir/e.safetensors"}, [], "there is no folder"),
        ({}, ["--seed", "1"], "--seed means nothing without --sample"),
        ({}, ["--vae-config.load-decoder", "--vae-config.load-encoder=false"], "needs the encoder"),
    ],
)
def test_bad_input_to_encode(
    bench: Bench, capsys: pytest.CaptureFixture[str], options: dict[str, str], flags: list[str], words: str
) -> None:
    assert bench.encode(*flags, **options) == 2
    expect_one_line(capsys.readouterr().err, words)
    assert bench.written() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.decode("--device", "cuda") == 2
    expect_one_line(capsys.readouterr().err, "--device cuda", "--device cpu")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("No space left on device"), "No space left on device"),
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory. Tried to allocate"),
        (KeyError("x"), "a fault of paravae; --debug shows where"),
    ],
)
def test_a_failure_is_not_the_users_fault(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    words: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(decode_command, "write_pictures", fail)
    assert bench.decode() == 1
    expect_one_line(capsys.readouterr().err, words)
    assert bench.written() == []
    assert bench.decode("--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_another_rank_has_its_status() -> None:
    assert status_of(RankError("rank 1 failed", rank=1, input_error=True)) == 2
    assert status_of(RankError("rank 1 failed", rank=1, input_error=False)) == 1


# ------------------------------------------------------------------------------------------------------- torchrun


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


# ----------------------------------------------------------------------------------------------------------- demo


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
