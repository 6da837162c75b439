"""Latents in safetensors files: spatial or packed as Qwen-Image's pipeline packs them, normalised or not.

The header says all that can be refused; data is read only from a file whose header is in order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paravae import AutoencoderKLQwenImage, VAEArchConfig
from paravae.files import whole_file
from paravae.vae.memory import GIB

logger = logging.getLogger("paravae")

SUFFIX = ".safetensors"
NAME = "latents"
_DTYPES = ("F64", "F32", "F16", "BF16")
_PACKED_SIDE = 2  # Qwen-Image packs 2 x 2 latents into one token


@dataclass(frozen=True)
class LatentsFile:
    """A latents file whose header has been read, and its flags settled; ``shape`` is as stored."""

    path: Path
    name: str
    shape: tuple[int, ...]
    normalized: bool
    picture_px: tuple[int, int] | None
    """Height and width in pixels, where stated: packed latents need it."""

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def lat_frames(self) -> int:
        return self.shape[2] if len(self.shape) == 5 else 1


def open_latents(
    path: Path, *, normalized: bool | None, height: int | None, width: int | None, max_gib: float
) -> LatentsFile:
    """Read the header of ``path``. ``normalized``, ``height``, ``width`` (pixels) are the flags, None if not given.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file to read.
        ValueError: it is not a latents file, is too large, or does not say what must be known.
    """
    _check_file(path, max_gib)
    try:
        with safe_open(path, framework="pt") as file:
            name = _only_name(path, list(file.keys()))
            stored = file.get_slice(name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(_why_not_safetensors(path, error)) from error
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} is of dtype {dtype}, needs one of {', '.join(_DTYPES)}")
    if len(shape) not in (3, 4, 5) or 0 in shape:
        raise ValueError(f"{path}: {name} has shape {list(shape)}, needs {_shapes_allowed(16, 64)}")
    return LatentsFile(
        path,
        name,
        shape,
        _is_normalized(path, metadata, normalized),
        _picture_size(path, metadata, height, width, needed=len(shape) == 3),
    )


def spatial_size(file: LatentsFile, arch: VAEArchConfig) -> tuple[int, int]:
    """Height and width of the latents (in latents), once it is checked that they fit the model.

    Raises:
        ValueError: they do not, or the size stated is not theirs.
    """
    tokens = arch.z_dim * _PACKED_SIDE**2
    packed = len(file.shape) == 3
    if (packed and file.shape[-1] != tokens) or (not packed and file.shape[1] != arch.z_dim):
        raise ValueError(
            f"{file.path}: {file.name} has shape {list(file.shape)}, needs {_shapes_allowed(arch.z_dim, tokens)}"
        )
    if packed:
        return _unpacked_size(file, arch.spatial_ratio)
    lat_size = (file.shape[-2], file.shape[-1])
    own_px = (lat_size[0] * arch.spatial_ratio, lat_size[1] * arch.spatial_ratio)
    if file.picture_px not in (None, own_px):
        raise ValueError(
            f"{file.path}: {file.name} of shape {list(file.shape)} are a picture of {_size_text(*own_px)}, "
            f"but --height and --width or the metadata say {_size_text(*file.picture_px or (0, 0))}"
        )
    return lat_size


def read_latents(file: LatentsFile, vae: AutoencoderKLQwenImage) -> Tensor:
    """The latents as ``vae.decode`` takes them: [B, z, T, h, w], denormalised, on its device and in its dtype."""
    lat_height, lat_width = spatial_size(file, vae.config.arch_config)
    with safe_open(file.path, framework="pt") as opened:
        latents = opened.get_tensor(file.name).to(vae.device)
    if len(file.shape) == 3:
        latents = unpack(latents, lat_height, lat_width)
    elif len(file.shape) == 4:
        latents = latents.unsqueeze(2)
    if file.normalized:
        latents = vae.denormalize(latents.to(torch.promote_types(latents.dtype, torch.float32)))
    return latents.to(vae.dtype)


def write_latents(path: Path, latents: Tensor, *, normalized: bool, frames: int, height: int, width: int) -> None:
    """Write [B, z, T, h, w] with what a reader must know; ``frames``, ``height``, ``width`` in pixels."""
    metadata = {
        "format": "pt",
        "normalized": str(normalized).lower(),
        "frames": str(frames),
        "height": str(height),
        "width": str(width),
    }
    with whole_file(path) as part:
        save_file({NAME: latents.detach().cpu().contiguous()}, part, metadata=metadata)


def unpack(tokens: Tensor, lat_height: int, lat_width: int) -> Tensor:
    """[B, h/2 * w/2, z * 2 * 2] -> [B, z, 1, h, w]. A token holds, for each channel, 2 x 2 latents row by row."""
    side = _PACKED_SIDE
    grid = tokens.unflatten(1, (lat_height // side, lat_width // side)).unflatten(3, (-1, side, side))
    batch, channels = grid.shape[0], grid.shape[3]
    # axes: batch, block row, block column, channel, row in block, column in block
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, 1, lat_height, lat_width)


def _check_file(path: Path, max_gib: float) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, need a {SUFFIX} file of latents")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; need a {SUFFIX} file of latents")
    if not max_gib > 0:
        raise ValueError(f"--max-latents-gib is {max_gib}, needs a positive number of GiB")
    gib = path.stat().st_size / GIB
    if gib > max_gib:
        raise ValueError(f"{path} holds {gib:.3g} GiB, more than the {max_gib:g} GiB that --max-latents-gib allows")
    with path.open("rb"):
        pass  # a file that may not be read says so in plain words here


def _only_name(path: Path, names: list[str]) -> str:
    if NAME in names:
        return NAME
    if len(names) == 1:
        return names[0]
    raise ValueError(
        f"{path} holds {len(names)} tensors ({', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}), "
        f"needs one, or one named {NAME!r}"
    )


def _why_not_safetensors(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # torch.save's zip, or a bare pickle
        return (
            f"{path} is a pickle or a zip of them: pickles can execute code and are not read; "
            "save the latents with safetensors.torch.save_file"
        )
    return f"{path} is not a whole safetensors file ({error})"


def _is_normalized(path: Path, metadata: Mapping[str, str], flag: bool | None) -> bool:
    stated: bool | None = None
    for key in ("normalized", "normalised"):
        if key in metadata:
            text = metadata[key]
            if text.lower() not in ("true", "false"):
                raise ValueError(f"{path}: its metadata has {key} = {text!r}, needs true or false")
            stated = text.lower() == "true"
    if flag is not None:
        if stated is not None and stated != flag:
            logger.warning("%s says normalized = %s; --normalized %s overrules it", path, stated, flag)
        return flag
    if stated is None:
        raise ValueError(
            f"{path} does not say whether its latents are normalised, as a diffusion model's are, or as the encoder "
            "gives them: say --normalized true or --normalized false (or put normalized into its metadata)"
        )
    return stated


def _picture_size(
    path: Path, metadata: Mapping[str, str], height: int | None, width: int | None, needed: bool
) -> tuple[int, int] | None:
    """Height and width in pixels from the flags, else from the metadata."""
    stated: list[int] = []
    for side, flag in (("height", height), ("width", width)):
        value: Any = metadata.get(side) if flag is None else flag
        if value is None:
            if needed:
                raise ValueError(
                    f"{path} holds packed latents [B, L, 64], from which the picture's size cannot be told: "
                    f"give --height and --width in pixels (--{side} is missing, and is not in the metadata)"
                )
            if flag is None and (height or width) is not None:
                raise ValueError(f"give --height and --width both; --{side} is missing")
            return None
        if not str(value).isdecimal() or int(value) < 1:
            source = f"{path}: its metadata's {side}" if flag is None else f"--{side}"
            raise ValueError(f"{source} is {value!r}, needs a positive number of pixels")
        stated.append(int(value))
    return stated[0], stated[1]


def _unpacked_size(file: LatentsFile, ratio: int) -> tuple[int, int]:
    assert file.picture_px is not None  # open_latents saw to it
    unit = ratio * _PACKED_SIDE
    for side, px in zip(("height", "width"), file.picture_px, strict=True):
        if px % unit:
            raise ValueError(
                f"{file.path}: the {side} of {px} pixels cannot be that of packed latents, needs a multiple of {unit}; "
                f"diffusers rounds down, to --{side} {px - px % unit}"
            )
    lat_height, lat_width = (px // ratio for px in file.picture_px)
    length = (lat_height // _PACKED_SIDE) * (lat_width // _PACKED_SIDE)
    if length != file.shape[1]:
        raise ValueError(
            f"{file.path}: packed latents of shape {list(file.shape)} hold {file.shape[1]} tokens, but a picture of "
            f"{_size_text(*file.picture_px)} has {length}; give its own --height and --width"
        )
    return lat_height, lat_width


def _shapes_allowed(z_dim: int, tokens: int) -> str:
    return f"[B, {z_dim}, T, h, w], [B, {z_dim}, h, w] or packed [B, L, {tokens}], none of them 0"


def _size_text(height: int, width: int) -> str:
    return f"{width} x {height} pixels (width x height)"
