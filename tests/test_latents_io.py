"""Latents files: every layout comes out as the model takes it, and what is not in order is refused by its header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from paravae import AutoencoderKLQwenImage
from paravae.launch.latents import LatentsFile, open_latents, read_latents, spatial_size, unpack, write_latents
from tests.builders import noise, small_vae

PLAIN = {"normalized": "false"}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLQwenImage:
    return small_vae()


def stored(folder: Path, latents: Tensor, metadata: Mapping[str, str] | None = PLAIN, name: str = "latents") -> Path:
    path = folder / "z.safetensors"
    save_file({name: latents.contiguous()}, path, metadata=dict(metadata or {}))
    return path


def opened(
    path: Path,
    normalized: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    max_gib: float = 4,
) -> LatentsFile:
    return open_latents(path, normalized=normalized, height=height, width=width, max_gib=max_gib)


def packed(latents: Tensor) -> Tensor:
    """As Qwen-Image's pipeline packs [B, z, h, w]: a token for 2 x 2 latents; in it channel, row, column."""
    batch, channels, height, width = latents.shape
    tokens = torch.empty(batch, height // 2 * width // 2, 4 * channels, dtype=latents.dtype)
    for row in range(height):
        for col in range(width):
            token, place = (row // 2) * (width // 2) + col // 2, (row % 2) * 2 + col % 2
            tokens[:, token, place::4] = latents[:, :, row, col]
    return tokens


def test_spatial_latents_come_as_stored(tmp_path: Path, vae: AutoencoderKLQwenImage) -> None:
    video = noise(2, 16, 3, 4, 5)
    assert torch.equal(read_latents(opened(stored(tmp_path, video)), vae), video)
    image = noise(2, 16, 4, 5)
    assert torch.equal(read_latents(opened(stored(tmp_path, image)), vae), image[:, :, None])


def test_packed_latents_are_unpacked(tmp_path: Path, vae: AutoencoderKLQwenImage) -> None:
    latents = noise(2, 16, 4, 6)
    assert torch.equal(unpack(packed(latents), 4, 6), latents[:, :, None])
    path = stored(tmp_path, packed(latents), {**PLAIN, "height": "32", "width": "48"})
    assert torch.equal(read_latents(opened(path), vae), latents[:, :, None])
    by_flag = opened(stored(tmp_path, packed(latents)), height=32, width=48)
    assert torch.equal(read_latents(by_flag, vae), latents[:, :, None])


@pytest.mark.parametrize("key", ["normalized", "normalised"])
def test_normalised_latents_are_denormalised(tmp_path: Path, vae: AutoencoderKLQwenImage, key: str) -> None:
    latents = noise(1, 16, 1, 4, 5)
    got = read_latents(opened(stored(tmp_path, latents, {key: "True"})), vae)
    assert torch.equal(got, vae.denormalize(latents))


def test_the_flag_overrules_the_file_and_says_so(
    tmp_path: Path, vae: AutoencoderKLQwenImage, caplog: pytest.LogCaptureFixture
) -> None:
    latents = noise(1, 16, 1, 4, 5)
    file = opened(stored(tmp_path, latents), normalized=True)
    assert torch.equal(read_latents(file, vae), vae.denormalize(latents))
    assert "overrules" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_dtypes_become_that_of_the_weights(
    tmp_path: Path, vae: AutoencoderKLQwenImage, dtype: torch.dtype
) -> None:
    latents = noise(1, 16, 1, 2, 2).to(dtype)
    assert torch.equal(read_latents(opened(stored(tmp_path, latents)), vae), latents.float())


def test_the_only_tensor_may_have_any_name(tmp_path: Path) -> None:
    assert opened(stored(tmp_path, noise(1, 16, 2, 2), name="sample")).name == "sample"
    path = tmp_path / "two.safetensors"
    save_file({"a": noise(1, 16, 2, 2), "b": noise(1, 16, 2, 2)}, path, metadata=PLAIN)
    with pytest.raises(ValueError, match=r"holds 2 tensors \(a, b\), needs one, or one named 'latents'"):
        opened(path)


def test_what_is_written_says_what_it_is(tmp_path: Path, vae: AutoencoderKLQwenImage) -> None:
    path, latents = tmp_path / "w.safetensors", noise(1, 16, 2, 4, 5)
    write_latents(path, latents, normalized=True, frames=5, height=32, width=40)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "normalized": "true",
            "frames": "5",
            "height": "32",
            "width": "40",
        }
    assert torch.equal(read_latents(opened(path), vae), vae.denormalize(latents))
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("shape", "metadata", "flags", "words"),
    [
        ((1, 16, 4, 4), {}, {}, "say --normalized true or --normalized false"),
        ((1, 16, 4, 4), {"normalized": "maybe"}, {}, "normalized = 'maybe', needs true or false"),
        ((16, 4), PLAIN, {}, r"has shape \[16, 4\], needs \[B, 16, T, h, w\]"),
        ((1, 16, 0, 4), PLAIN, {}, r"has shape \[1, 16, 0, 4\]"),
        ((1, 8, 4, 4), PLAIN, {}, r"has shape \[1, 8, 4, 4\], needs \[B, 16, T, h, w\]"),
        ((1, 4, 60), PLAIN, {"height": 32, "width": 32}, r"has shape \[1, 4, 60\].*packed \[B, L, 64\]"),
        ((1, 4, 64), PLAIN, {}, "give --height and --width in pixels"),
        ((1, 4, 64), PLAIN, {"height": 32}, "--width is missing"),
        ((1, 16, 4, 4), PLAIN, {"height": 32}, "--width is missing"),
        ((1, 4, 64), PLAIN, {"height": 40, "width": 32}, "height of 40 pixels .* needs a multiple of 16.*--height 32"),
        ((1, 4, 64), PLAIN, {"height": 32, "width": 64}, "hold 4 tokens, but a picture of 64 x 32 pixels .* has 8"),
        ((1, 4, 64), PLAIN, {"height": -32, "width": 32}, "--height is -32, needs a positive number of pixels"),
        ((1, 4, 64), {**PLAIN, "height": "tall", "width": "32"}, {}, "metadata's height is 'tall'"),
        ((1, 16, 4, 4), PLAIN, {"height": 16, "width": 32}, "a picture of 32 x 32 pixels"),
        ((1, 16, 4, 4), PLAIN, {"max_gib": 1e-7}, "more than the 1e-07 GiB that --max-latents-gib allows"),
        ((1, 16, 4, 4), PLAIN, {"max_gib": 0}, "--max-latents-gib is 0, needs a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path,
    vae: AutoencoderKLQwenImage,
    shape: tuple[int, ...],
    metadata: dict[str, str],
    flags: dict[str, int],
    words: str,
) -> None:
    path = stored(tmp_path, torch.zeros(shape), metadata)
    with pytest.raises(ValueError, match=words):
        spatial_size(opened(path, **flags), vae.config.arch_config)


def test_integers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype I64, needs one of F64, F32, F16, BF16"):
        opened(stored(tmp_path, torch.zeros(1, 16, 4, 4, dtype=torch.int64)))


def test_files_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    good = stored(tmp_path, noise(1, 16, 4, 4)).read_bytes()
    truncated, foreign, pickled, old = (tmp_path / name for name in ("t", "f", "p", "o"))
    truncated.write_bytes(good[:-9])
    foreign.write_bytes(b"GIF89a and so on, for more than eight bytes")
    torch.save({"latents": noise(1, 16, 4, 4)}, pickled)
    torch.save({"latents": noise(1, 16, 4, 4)}, old, _use_new_zipfile_serialization=False)
    for path in (truncated, foreign):
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            opened(path)
    for path in (pickled, old):
        with pytest.raises(ValueError, match="pickles can execute code and are not read"):
            opened(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        opened(tmp_path)
