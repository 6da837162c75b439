"""The commands decode and encode, as a user types them: results and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from paravae import RankError
from paravae.configs.cli import flag_name
from paravae.launch import decode as decode_command
from paravae.launch.errors import status_of
from paravae.vae.pixels import from_uint8
from tests.builders import small_vae
from tests.command_bench import Bench, Refused, expect_one_line


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
    assert "tiled, 3 x 2 tiles on 1 rank" in capsys.readouterr().out


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
def test_bad_models_and_limits(bench: Bench, refused: Refused, flags: list[str], words: str) -> None:
    refused(lambda: bench.decode(*flags), words)


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
