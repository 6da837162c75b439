"""A folder in which to try the commands, with a model, latents and pictures, good and bad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from paravae import AutoencoderKLQwenImage
from paravae.launch.cli import main
from tests.builders import noise, small_vae


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


@pytest.fixture(scope="session")
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


Refused = Callable[..., str]
"""(a command to run, words of its error ...) -> what it printed on stdout."""


@pytest.fixture
def refused(bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Bad input to a command run in the bench's folder: exit status 2, one line that says so, nothing written."""

    def run(command: Callable[[], int], *words: str) -> str:
        monkeypatch.chdir(bench.folder)
        assert command() == 2
        told = capsys.readouterr()
        expect_one_line(told.err, *words)
        assert bench.written() == []
        return told.out

    return run


def expect_one_line(stderr: str, *words: str) -> None:
    """One line of error, and nothing like a traceback."""
    errors = [line for line in stderr.splitlines() if line.startswith("paravae: error: ")]
    assert len(errors) == 1, stderr
    for word in words:
        assert word in errors[0]
