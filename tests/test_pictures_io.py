"""Picture files: what is written can be read again, and what cannot be written is refused before any work."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from paravae.launch import picture_output
from paravae.launch.picture_input import fit_to_model, read_picture
from paravae.launch.picture_output import plan_output, write_pictures


def smooth_levels(batch: int = 1, frames: int = 1, height: int = 24, width: int = 32) -> Tensor:
    """Levels [B, 3, F, H, W] that codecs keep well, each picture and frame different."""
    down = torch.linspace(0, 120, height)[:, None]
    across = torch.linspace(0, 100, width)
    parts = [
        torch.stack([down + across, 200 - across + 0 * down, down + 0 * across]) + 5 * index
        for index in range(batch * frames)
    ]
    return torch.stack(parts).view(batch, frames, 3, height, width).transpose(1, 2).to(torch.uint8)


def write(folder: Path, name: str, levels: Tensor) -> None:
    write_pictures(plan_output(str(folder / name), levels.shape[0], levels.shape[2], 16.0), levels)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(("name", "most"), [("x.png", 0), ("x.PNG", 0), ("x.jpg", 8), ("x.jpeg", 8), ("x.webp", 8)])
def test_an_image_comes_back(tmp_path: Path, name: str, most: int) -> None:
    levels = smooth_levels()
    write(tmp_path, name, levels)
    assert names(tmp_path) == [name]
    assert (read_picture(tmp_path / name).int() - levels.int()).abs().max() <= most


def test_a_folder_of_frames_comes_back(tmp_path: Path) -> None:
    levels = smooth_levels(frames=5)
    write(tmp_path, "frames", levels)
    assert names(tmp_path) == ["frames"]
    assert names(tmp_path / "frames") == [f"frame_0000{index}.png" for index in range(5)]
    assert torch.equal(read_picture(tmp_path / "frames"), levels)
    assert torch.equal(read_picture(tmp_path / "frames", frames=1), levels[:, :, :1])
    (tmp_path / "empty").mkdir()
    write(tmp_path, "empty/", levels)
    assert len(names(tmp_path / "empty")) == 5


def test_a_video_comes_back_in_its_own_size(tmp_path: Path) -> None:
    levels = smooth_levels(frames=5, height=40, width=56)  # multiples of 8 and not of 16
    write(tmp_path, "v.mp4", levels)
    assert names(tmp_path) == ["v.mp4"]
    read = read_picture(tmp_path / "v.mp4")
    assert read.shape == levels.shape
    assert (read.float() - levels.float()).abs().mean() < 4
    assert read_picture(tmp_path / "v.mp4", frames=2).shape[2] == 2


def test_each_of_a_batch_has_its_number(tmp_path: Path) -> None:
    levels = smooth_levels(batch=2)
    write(tmp_path, "out.png", levels)
    assert names(tmp_path) == ["out_0.png", "out_1.png"]
    assert torch.equal(read_picture(tmp_path / "out_1.png"), levels[1:])
    write(tmp_path, "f", smooth_levels(batch=2, frames=2))
    assert names(tmp_path) == ["f_0", "f_1", "out_0.png", "out_1.png"]


def test_pictures_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write(tmp_path, "x.png", smooth_levels())
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["out.png", "frames"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full_disk(frame: np.ndarray, path: Path) -> None:
        path.write_bytes(b"half")
        if written:
            raise OSError("No space left on device")
        written.append(path)

    written: list[Path] = []
    monkeypatch.setattr(picture_output, "_save_image", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, name, smooth_levels(batch=2))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "frames", "error", "words"),
    [
        ("x.gif", 1, ValueError, "unknown format .gif; need .png"),
        ("x.png", 5, ValueError, "a .png file holds one frame, the video has 5; need .mp4 or a folder"),
        ("nodir/x.png", 1, FileNotFoundError, "there is no folder"),
        ("nodir/frames", 1, FileNotFoundError, "there is no folder"),
        ("folder.png", 1, IsADirectoryError, "is a directory"),
        ("full", 5, FileExistsError, "the folder is not empty"),
        ("..", 5, ValueError, "names no file or new folder"),
        ("full/file", 5, FileExistsError, "is a file without a suffix"),
    ],
)
def test_output_that_cannot_be_is_refused(
    tmp_path: Path, name: str, frames: int, error: type[Exception], words: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=words):
        plan_output(str(tmp_path / name), 1, frames, 16.0)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_frames_a_second_must_be_positive(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match=r"--fps is .*, needs a positive number"):
        plan_output(str(tmp_path / "v.mp4"), 1, 5, fps)


def test_without_its_extra_a_video_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"pip install paravae\[video\]"):
        plan_output(str(tmp_path / "v.mp4"), 1, 5, 16.0)


def test_pictures_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "good.png", smooth_levels())
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video")
    for name, words in (("cut.png", "as a picture"), ("text.png", "as a picture"), ("text.mp4", "as a video")):
        with pytest.raises(ValueError, match=f"cannot be read {words}"):
            read_picture(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_picture(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="has 1 frames, --frames asks for 5"):
        read_picture(tmp_path / "good.png", frames=5)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no frames"):
        read_picture(tmp_path / "none")
    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "a.png")
    Image.new("RGB", (16, 8)).save(tmp_path / "mixed" / "b.png")
    with pytest.raises(ValueError, match="frames need one size"):
        read_picture(tmp_path / "mixed")


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (16, 8)).save(tmp_path / "x.png")
        assert read_picture(tmp_path / "x.png").shape == (1, 3, 1, 8, 16)


def test_cropping_is_central_and_only_if_asked_for() -> None:
    levels = smooth_levels(height=29, width=34)
    with pytest.raises(
        ValueError, match=r"p is 34 x 29 pixels .* multiples of 8; --crop cuts it, centrally, to 32 x 24"
    ):
        fit_to_model(levels, 8, 4, crop=False, name="p")
    assert torch.equal(fit_to_model(levels, 8, 4, crop=True, name="p"), levels[..., 2:26, 1:33])
    exact = smooth_levels(height=24, width=32)
    assert fit_to_model(exact, 8, 4, crop=True, name="p") is exact
    with pytest.raises(ValueError, match="needs at least 8 x 8"):
        fit_to_model(smooth_levels(height=7), 8, 4, crop=True, name="p")
    with pytest.raises(ValueError, match=r"has 8 frames, needs 1 \+ a multiple of 4; --frames 5"):
        fit_to_model(smooth_levels(frames=8), 8, 4, crop=True, name="p")
