"""Reading a picture, a folder of frames or a video for the encoder: uint8 levels [1, 3, F, H, W]."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from paravae.launch import video
from paravae.launch.picture_output import IMAGE_SUFFIXES


def read_picture(path: Path, frames: int | None = None) -> Tensor:
    """The levels in ``path``: an image, a folder of images in the order of their names, or a video.

    ``frames``: take only so many of the first.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it cannot be read, or holds too few frames.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"--frames is {frames}, needs at least 1")
    if path.is_dir():
        levels = _read_folder(path, frames)
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; need a picture, a folder of frames or an {video.SUFFIX} file")
    elif path.suffix.lower() == video.SUFFIX:
        levels = video.read(path, frames)
    else:
        levels = _read_image(path)[None]
    if frames is not None and len(levels) < frames:
        raise ValueError(f"{path} has {len(levels)} frames, --frames asks for {frames}")
    return torch.from_numpy(levels).permute(3, 0, 1, 2)[None]


def fit_to_model(levels: Tensor, ratio: int, temporal_ratio: int, crop: bool, name: str) -> Tensor:
    """``levels`` as the encoder takes them: sides that are multiples of ``ratio``, 1 + k * temporal_ratio frames.

    Raises:
        ValueError: they are not so, and ``crop`` is off (which cuts the sides, centrally, but no frames).
    """
    frames, height, width = levels.shape[2:]
    if (frames - 1) % temporal_ratio:
        raise ValueError(
            f"{name} has {frames} frames, needs 1 + a multiple of {temporal_ratio}; "
            f"--frames {frames - (frames - 1) % temporal_ratio} takes as many of the first as fit"
        )
    if height < ratio or width < ratio:
        raise ValueError(f"{name} is {width} x {height} pixels (width x height), needs at least {ratio} x {ratio}")
    rest_height, rest_width = height % ratio, width % ratio
    if not (rest_height or rest_width):
        return levels
    new_height, new_width = height - rest_height, width - rest_width
    if not crop:
        raise ValueError(
            f"{name} is {width} x {height} pixels (width x height), needs multiples of {ratio}; "
            f"--crop cuts it, centrally, to {new_width} x {new_height}"
        )
    top, left = rest_height // 2, rest_width // 2
    return levels[..., top : top + new_height, left : left + new_width]


def _read_folder(path: Path, most: int | None) -> np.ndarray:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no frames: no file ends in {', '.join(IMAGE_SUFFIXES)}")
    frames = [_read_image(file) for file in files[:most]]
    for file, frame in zip(files, frames, strict=False):
        if frame.shape != frames[0].shape:
            raise ValueError(
                f"{file} is {frame.shape[1]} x {frame.shape[0]} pixels, but {files[0].name} is "
                f"{frames[0].shape[1]} x {frames[0].shape[0]}; frames need one size"
            )
    return np.stack(frames)


def _read_image(path: Path) -> np.ndarray:
    """[H, W, 3], turned as its EXIF data say; transparency is dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is too large a picture: {error}") from error
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError is what Pillow raises for a broken PNG
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
