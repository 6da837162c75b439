"""MP4 files, through ffmpeg (the extra ``video``). Frames are uint8 [F, H, W, 3]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

SUFFIX = ".mp4"
_QUALITY = 8  # imageio-ffmpeg's scale to 10


def check_installed() -> ModuleType:
    """imageio_ffmpeg, with the ffmpeg that it brings.

    Raises:
        ValueError: either is missing.
    """
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"{SUFFIX} files need the extra 'video': pip install paravae[video] ({error}); or use a folder of frames"
        ) from error
    return imageio_ffmpeg


def write(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write H.264, with chroma halved as players expect; the sizes must be even."""
    height, width = frames.shape[1:3]
    writer = check_installed().write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        quality=_QUALITY,
        macro_block_size=1,  # else it would scale the picture to multiples of 16
        ffmpeg_log_level="error",
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()
    if not path.is_file() or not path.stat().st_size:
        raise OSError(f"ffmpeg wrote no video to {path}")


def read(path: Path, most: int | None) -> np.ndarray:
    """The frames of ``path``, the first ``most`` of them if that is given.

    Raises:
        ValueError: ffmpeg cannot read it.
    """
    reader: Iterator = check_installed().read_frames(str(path))
    frames: list[np.ndarray] = []
    try:
        width, height = next(reader)["size"]
        for data in reader:
            frames.append(np.frombuffer(data, np.uint8).reshape(height, width, 3))
            if len(frames) == most:
                break
    except (OSError, RuntimeError, StopIteration) as error:
        raise ValueError(f"{path} cannot be read as a video: {' '.join(str(error).split())[-200:]}") from error
    finally:
        reader.close()  # type: ignore[attr-defined]
    if not frames:
        raise ValueError(f"{path} holds no frames")
    return np.stack(frames)
