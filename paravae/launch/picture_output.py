"""Pictures and videos in files: what may be written where, and the writing. Levels are uint8, [B, 3, F, H, W]."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from paravae.files import check_writable, whole_file, whole_folder
from paravae.launch import video

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = f"{', '.join(IMAGE_SUFFIXES)} for one frame, {video.SUFFIX} or a folder (no suffix) for a video"
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"compress_level": 4},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"quality": 95},
}


@dataclass(frozen=True)
class PictureOutput:
    """Where pictures go: ``kind`` is image, frames or video; a path for each of the batch."""

    kind: str
    paths: tuple[Path, ...]
    fps: float

    def __str__(self) -> str:
        first, last = self.paths[0], self.paths[-1]
        return str(first) if len(self.paths) == 1 else f"{first} to {last.name}"


def plan_output(text: str, batch: int, frames: int, fps: float) -> PictureOutput:
    """Where ``batch`` pictures of ``frames`` frames go if the user says ``text``; nothing is written yet.

    Raises:
        OSError: nothing can be written there.
        ValueError: the format is unknown, or does not suit the number of frames.
    """
    path = Path(text)
    suffix = path.suffix.lower()
    if path.name in ("", ".."):
        raise ValueError(f"--output {text!r} names no file or new folder; need {FORMATS}")
    if text.endswith("/") or not suffix:
        kind = "frames"
    elif suffix == video.SUFFIX:
        kind = "video"
        video.check_installed()
    elif suffix in IMAGE_SUFFIXES:
        kind = "image"
    else:
        raise ValueError(f"--output {text}: unknown format {suffix}; need {FORMATS}")
    if kind == "image" and frames > 1:
        raise ValueError(
            f"--output {text}: a {suffix} file holds one frame, the video has {frames}; need {video.SUFFIX} or a folder"
        )
    if not 0 < fps < float("inf"):
        raise ValueError(f"--fps is {fps}, needs a positive number of frames a second")
    paths = (path,) if batch == 1 else tuple(path.with_name(f"{path.stem}_{i}{path.suffix}") for i in range(batch))
    for each in paths:
        _check_free_folder(each) if kind == "frames" else check_writable(each)
    return PictureOutput(kind, paths, fps)


def write_pictures(output: PictureOutput, levels: Tensor) -> None:
    """Write each picture of ``levels``; all of them appear, or none."""
    with ExitStack() as all_or_none:
        for path, picture in zip(output.paths, levels.cpu(), strict=True):
            frames = picture.permute(1, 2, 3, 0).contiguous().numpy()  # [F, H, W, 3]
            if output.kind == "frames":
                part = all_or_none.enter_context(whole_folder(path))
                for index, frame in enumerate(frames):
                    _save_image(frame, part / f"frame_{index:05d}.png")
                continue
            part = all_or_none.enter_context(whole_file(path))
            if output.kind == "video":
                video.write(part, frames, output.fps)
            else:
                _save_image(frames[0], part)


def _save_image(frame: np.ndarray, path: Path) -> None:
    Image.fromarray(frame).save(path, **_SAVE_OPTIONS[path.suffix.lower()])


def _check_free_folder(path: Path) -> None:
    if path.is_dir():
        if any(path.iterdir()):
            raise FileExistsError(f"--output {path}: the folder is not empty; give a new one, frames do not mix")
    elif path.exists():
        raise FileExistsError(f"--output {path} is a file without a suffix; need {FORMATS}")
    check_writable(path.with_name(f".{path.name}.part"))
