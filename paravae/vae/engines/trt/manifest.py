"""What an engine is: a JSON file beside it, by which it is found, checked and matched to the weights.

``vae_decoder.trt`` has ``vae_decoder.trt.json``. A manifest is written after its engine, both whole or not at all; it
is read strictly, since an engine that is not what it is taken for gives wrong pixels without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paravae.vae.engines.base import Half
from paravae.vae.engines.trt.parts import DTYPES, OUTPUTS, PARTS, Part
from paravae.vae.engines.trt.shapes import Profile, Size

VERSION = 1
SUFFIX = ".trt"
_HALF_KEYS: dict[Half, tuple[str, str]] = {
    "decoder": ("post_quant_conv.", "decoder."),
    "encoder": ("encoder.", "quant_conv."),
}


class ManifestError(ValueError):
    """An engine's file or manifest is missing, broken, or does not belong to the other."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """See the head of this file. Hashes are SHA-256 in hexadecimal.

    ``profiles``: in units of the part's input; one that is static: the engine takes that size only.
    ``dtype``, ``denormalize``, ``output``: ``parts.ExportOptions``. ``weights_sha256``: of that half of the VAE by the
    dtype it is loaded in (``weights_sha256`` below). ``compute_capabilities``: such as 8.9. ``created``: UTC, ISO 8601.
    """

    part: Part
    profiles: tuple[Profile, ...]
    batch: int
    dtype: str
    denormalize: bool
    output: str
    engine_sha256: str
    engine_bytes: int
    onnx_sha256: str
    weights_sha256: dict[str, str]
    flavour: str
    flavour_version: str
    compute_capabilities: tuple[str, ...]
    paravae: str
    created: str
    version: int = VERSION

    @property
    def half(self) -> Half:
        return half_of(self.part)

    @property
    def is_static(self) -> bool:
        return all(profile.is_static for profile in self.profiles)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """What ``to_json`` wrote.

        Raises:
            ManifestError: it is of another version, or a field is missing, unknown or no such value.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ManifestError(f"it is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ManifestError(f"it holds a {type(values).__name__}, needs an object")
        if values.get("version") != VERSION:
            raise ManifestError(
                f"it is of version {values.get('version')!r}, this paravae reads version {VERSION}: "
                "build the engine anew"
            )
        names = {field.name for field in fields(Manifest)}
        missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
        if missing or unknown:
            raise ManifestError(f"it lacks {', '.join(missing) or 'nothing'} and has unknown {unknown}")
        return Manifest(**{name: _checked(name, value) for name, value in values.items()})


def manifest_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def half_of(part: Part) -> Half:
    return "decoder" if part.startswith("decoder") else "encoder"


def read_manifest(engine: Path) -> Manifest:
    """The manifest of the engine file ``engine``, whose bytes are not looked at.

    Raises:
        ManifestError: there is none, or none that can be read.
    """
    path = manifest_path(engine)
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ManifestError(f"{engine} has no manifest {path.name} beside it") from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # ours, or of a file that is not UTF-8
        raise ManifestError(f"{path}: {error}") from error


def read_engine(engine: Path, *, check_hash: bool = True) -> tuple[Manifest, bytes]:
    """The manifest and the bytes of an engine file, which are those that the manifest is of.

    Raises:
        ManifestError: they are not, or either is missing or cannot be read.
    """
    manifest = read_manifest(engine)
    try:
        found = engine.stat().st_size
        if found != manifest.engine_bytes:
            raise ManifestError(
                f"{engine} has {found} bytes, its manifest says {manifest.engine_bytes}: it is truncated or another's; "
                "build it anew"
            )
        blob = engine.read_bytes()
    except OSError as error:
        raise ManifestError(f"{engine} cannot be read: {error.strerror or error}") from error
    if check_hash and sha256(blob) != manifest.engine_sha256:
        raise ManifestError(f"{engine} is not the file that its manifest was written for: build it anew")
    return manifest, blob


def verify_manifest(engine: Path) -> Manifest:
    """The manifest of the engine file ``engine``, whose size and hash are what it says.

    Raises:
        ManifestError: as ``read_engine`` does.
    """
    return read_engine(engine)[0]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def weights_sha256(tensors: Mapping[str, Tensor], half: Half, dtype: torch.dtype | None = None) -> str:
    """A name for the weights of one half of a VAE's state dict, cast to ``dtype`` (None: as they are).

    Rounding loses what was before it, so an engine's manifest has one for each dtype that the VAE may be loaded in.
    """
    hasher = hashlib.sha256()
    for name in sorted(name for name in tensors if name.startswith(_HALF_KEYS[half])):
        tensor = tensors[name].detach().to("cpu", dtype or tensors[name].dtype)
        hasher.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def all_weights_sha256(tensors: Mapping[str, Tensor], half: Half) -> dict[str, str]:
    """``weights_sha256`` by dtype. ``tensors``: as the checkpoint has them, or in float32."""
    return {name: weights_sha256(tensors, half, dtype) for name, dtype in DTYPES.items()}


_TEXTS = ("flavour", "flavour_version", "paravae", "created")
_CHOICES: dict[str, tuple[str, ...]] = {"part": PARTS, "dtype": tuple(DTYPES), "output": OUTPUTS}


def _checked(name: str, value: Any) -> Any:
    """``value``, as the field has it."""
    if name in _CHOICES:
        good = value in _CHOICES[name]
    elif name in ("version", "batch", "engine_bytes"):
        good = type(value) is int and value > 0
    elif name == "denormalize":
        good = type(value) is bool
    elif name in ("engine_sha256", "onnx_sha256"):
        good = _is_hash(value)
    elif name == "weights_sha256":
        good = isinstance(value, dict) and value.keys() == DTYPES.keys() and all(map(_is_hash, value.values()))
    elif name == "profiles":
        return _profiles(value)
    elif name == "compute_capabilities":
        good = isinstance(value, list) and value != [] and all(isinstance(entry, str) for entry in value)
        value = tuple(value) if good else value
    else:
        assert name in _TEXTS
        good = isinstance(value, str)
    if not good:
        raise ManifestError(f"its {name} is {value!r}")
    return value


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _profiles(value: Any) -> tuple[Profile, ...]:
    try:
        found = tuple(Profile(**{end: _size(size) for end, size in entry.items()}) for entry in value)
    except (AttributeError, TypeError, ValueError) as error:
        raise ManifestError(f"its profiles are {value!r}: {error}") from error
    if not found:
        raise ManifestError("its profiles are empty")
    return found


def _size(value: Any) -> Size:
    height, width = value
    if type(height) is not int or type(width) is not int:
        raise TypeError("a size is two whole numbers")
    return height, width
