"""Checkpoints: diffusers reads ours, we read diffusers', and what is not one is refused in clear words."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paravae import AutoencoderKLQwenImage, AutoencoderKLWan, QwenImageVAEConfig, WanVAEConfig
from paravae.configs import WanVAEArchConfig
from paravae.vae.models import checkpoint
from tests.builders import max_error, noise, pictures, small_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLQwenImage:
    return small_vae()


@pytest.fixture
def folder(vae: AutoencoderKLQwenImage, tmp_path: Path) -> Path:
    """A sound checkpoint, to be spoilt."""
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_error(folder: Path | str, kind: type[Exception], *fragments: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        AutoencoderKLQwenImage.from_pretrained(folder, **options)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


# ------------------------------------------------------------------------------------------------ sound ones


def test_round_trip(vae: AutoencoderKLQwenImage, folder: Path) -> None:
    again = AutoencoderKLQwenImage.from_pretrained(folder)
    assert same(again.state_dict(), vae.state_dict())
    assert again.config.arch_config == vae.config.arch_config
    assert (again.dtype, again.device.type, again.training) == (torch.float32, "cpu", False)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    latents = noise(1, 16, 2, 3, 4)
    assert torch.equal(again.decode(latents), vae.decode(latents))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]


def test_diffusers_reads_ours(vae: AutoencoderKLQwenImage, folder: Path) -> None:
    from diffusers import AutoencoderKLQwenImage as Qwen

    theirs = Qwen.from_pretrained(folder)
    assert same(theirs.state_dict(), vae.state_dict())
    assert (theirs.config.base_dim, list(theirs.config.dim_mult)) == (8, [1, 2, 4, 4])
    latents = noise(1, 16, 2, 3, 4)
    with torch.no_grad():
        assert max_error(theirs.decode(latents).sample, vae.decode(latents)) <= 2e-5


@pytest.mark.parametrize("name", ["AutoencoderKLQwenImage", "AutoencoderKLWan"])
def test_we_read_diffusers(name: str, tmp_path: Path) -> None:
    """Under either of our classes, since the networks are one."""
    import diffusers

    torch.manual_seed(0)
    theirs = getattr(diffusers, name)(base_dim=8)
    theirs.save_pretrained(tmp_path / "vae")
    for ours in (AutoencoderKLQwenImage, AutoencoderKLWan):
        vae = ours.from_pretrained(tmp_path, subfolder="vae")
        assert same(vae.state_dict(), theirs.state_dict())
        assert vae.config.arch_config.base_dim == 8
        assert len(vae.config.arch_config.latents_mean) == 16


def test_wan_is_saved_as_wan(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan as Wan

    wan = AutoencoderKLWan(WanVAEConfig(arch_config=WanVAEArchConfig(base_dim=8)))
    wan.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKLWan"
    assert same(Wan.from_pretrained(tmp_path).state_dict(), wan.state_dict())


def test_run_options_come_from_the_caller_and_architecture_from_the_file(folder: Path) -> None:
    """The default config says base_dim 96, the file 8."""
    config = QwenImageVAEConfig(use_parallel_decode=True, tile_sample_min_height=320)
    vae = AutoencoderKLQwenImage.from_pretrained(folder, vae_config=config)
    assert (vae.config.use_parallel_decode, vae.config.tile_sample_min_height) == (True, 320)
    assert vae.config.arch_config.base_dim == 8


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_vae(half: str, vae: AutoencoderKLQwenImage, folder: Path) -> None:
    config = QwenImageVAEConfig(load_encoder=half == "encoder", load_decoder=half == "decoder")
    loaded = AutoencoderKLQwenImage.from_pretrained(folder, vae_config=config)
    kept = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}[half]
    assert same(loaded.state_dict(), {key: t for key, t in vae.state_dict().items() if key.startswith(kept)})
    latents, pixels = noise(1, 16, 1, 2, 2), pictures(1, 3, 1, 16, 16)
    if half == "decoder":
        assert torch.equal(loaded.decode(latents), vae.decode(latents))
        with pytest.raises(ValueError, match=r"load_encoder=False.*cannot encode"):
            loaded.encode(pixels)
    else:
        assert torch.equal(loaded.encode(pixels).mean, vae.encode(pixels).mean)
        for decode in (loaded.decode, loaded.tiled_decode):
            with pytest.raises(ValueError, match=r"load_decoder=False.*cannot decode"):
                decode(latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(dtype: torch.dtype, vae: AutoencoderKLQwenImage, folder: Path) -> None:
    loaded = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=dtype)
    assert same(loaded.state_dict(), {key: tensor.to(dtype) for key, tensor in vae.state_dict().items()})
    assert loaded.decode(noise(1, 16, 1, 2, 2, dtype=dtype)).dtype == dtype


def test_saving_over_another(vae: AutoencoderKLQwenImage, folder: Path) -> None:
    changed = small_vae()
    changed.load_state_dict({key: tensor + 1 for key, tensor in vae.state_dict().items()})
    changed.save_pretrained(str(folder))
    assert same(AutoencoderKLQwenImage.from_pretrained(str(folder)).state_dict(), changed.state_dict())


@pytest.mark.parametrize("before", [False, True], ids=["into nothing", "over another"])
def test_a_save_that_fails_leaves_nothing_half_written(
    before: bool, vae: AutoencoderKLQwenImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before:
        vae.save_pretrained(tmp_path)
        edit_config(tmp_path, note="the old one")
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"the beginning of a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        vae.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


# ----------------------------------------------------------------------------------------------- unsound ones


def test_missing_directory(tmp_path: Path) -> None:
    load_error(tmp_path / "nowhere", FileNotFoundError, "nowhere", "not a directory", "config.json", WEIGHTS)


def test_a_file_is_no_checkpoint_directory(folder: Path) -> None:
    load_error(folder / WEIGHTS, FileNotFoundError, WEIGHTS, "not a directory")


@pytest.mark.parametrize("name", ["model.safetensors", "./vae", "vae.bin"])
def test_names_that_look_like_files_never_reach_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    load_error(name, FileNotFoundError, "not a directory")


def test_missing_subfolder(tmp_path: Path, folder: Path) -> None:
    load_error(tmp_path, FileNotFoundError, "no folder 'vea'", subfolder="vea")
    load_error(tmp_path, FileNotFoundError, "config.json", "does not exist")


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    load_error(folder, FileNotFoundError, WEIGHTS, "does not exist")


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    load_error(folder, FileNotFoundError, "config.json", "does not exist", WEIGHTS)


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_weights(kept: int, folder: Path) -> None:
    contents = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(contents[:kept])
    load_error(folder, ValueError, WEIGHTS, "not a whole safetensors file", "fetch it again")


def test_absurd_header(folder: Path) -> None:
    """A header that claims to be larger than any file is refused, not allocated."""
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    load_error(folder, ValueError, "not a whole safetensors file")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "vae.pth", "w.pkl"])
def test_pickles_are_not_opened(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / WEIGHTS).rename(folder / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("pickle.load was called"))
    monkeypatch.setattr("pickle.loads", lambda *_, **__: pytest.fail("pickle.loads was called"))
    monkeypatch.setattr(checkpoint, "load_file", lambda *_, **__: pytest.fail("the file was opened"))
    load_error(folder, ValueError, name, "pickles can execute code", WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"_class_name": "AutoencoderKL"}, ("'AutoencoderKL'", "AutoencoderKLQwenImage, AutoencoderKLWan")),
        ({"_class_name": None}, ("None", "AutoencoderKLQwenImage")),
        ({"is_residual": True}, ("is_residual = True", "another network")),
        ({"patch_size": 2}, ("patch_size = 2", "another network")),
        ({"decoder_base_dim": 256}, ("decoder_base_dim = 256", "another network")),
        ({"out_channels": 12}, ("out_channels = 12", "another network")),
        ({"attn_scales": [0.5]}, ("attn_scales = [0.5]", "another network")),
        ({"dim_mult": [1, 2]}, ("temperal_downsample has 3 entries",)),
        ({"z_dim": 48}, ("latents_mean has 16 entries", "z_dim is 48")),
        ({"base_dim": "wide"}, ("config.json",)),
    ],
)
def test_foreign_config(changes: dict[str, Any], fragments: tuple[str, ...], folder: Path) -> None:
    edit_config(folder, **changes)
    load_error(folder, ValueError, "config.json", *fragments)


@pytest.mark.parametrize("text", ["", "{", '{"_class_name": ', "[1, 2]", '"AutoencoderKLWan"', "\x00\x01"])
def test_broken_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    load_error(folder, ValueError, "config.json")


def test_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x80{}")
    load_error(folder, ValueError, "config.json", "not JSON")


def test_wrong_shapes(folder: Path) -> None:
    edit_config(folder, base_dim=16)
    load_error(folder, ValueError, WEIGHTS, "has shape", "config.json needs")


def test_other_keys(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["decoder.mid_block.extra"] = tensors.pop("decoder.conv_in.weight")
    save_file(tensors, folder / WEIGHTS)
    load_error(folder, ValueError, "another model", "1 tensors are missing", "decoder.conv_in.weight", "1 are unknown")
    surplus = {**load_file(folder / WEIGHTS), "decoder.conv_in.weight": torch.zeros(2)}
    save_file(surplus, folder / WEIGHTS)
    load_error(folder, ValueError, "another model", "0 tensors are missing", "1 are unknown", "decoder.mid_block.extra")
    save_file({"model.layers.0.weight": torch.zeros(2)}, folder / WEIGHTS)
    load_error(folder, ValueError, "another model", "194 tensors are missing", "model.layers.0.weight")


# ------------------------------------------------------------------------------------------------------ hub


@pytest.mark.parametrize("repository", ["Qwen/Qwen-Image", "Wan-AI/Wan2.1-T2V-14B-Diffusers"])
def test_from_the_hub(
    repository: str, vae: AutoencoderKLQwenImage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the two files are asked for. A dot in the repository's name does not make it a file."""
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder.parent)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    loaded = AutoencoderKLQwenImage.from_pretrained(repository, subfolder="vae")
    assert asked == [(repository, ["vae/config.json", f"vae/{WEIGHTS}"])]
    assert same(loaded.state_dict(), vae.state_dict())


@pytest.mark.parametrize("name", ["nobody/nothing-of-that-name", "nothing-of-that-name", "a/b/c/d", "bad name!"])
def test_a_name_that_is_neither(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    load_error(name, FileNotFoundError, name, "neither a local directory nor a hub repository")
