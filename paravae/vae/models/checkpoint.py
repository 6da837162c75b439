"""Checkpoints in diffusers' layout: config.json and one safetensors file. Nothing that can execute code is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paravae.configs import VAEArchConfig
from paravae.files import whole_file

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_CLASS_NAMES = ("AutoencoderKLQwenImage", "AutoencoderKLWan")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FILES = (".safetensors", ".json", *_PICKLES)  # a hub repository may have a dot in its name: Wan2.1
# What a config.json of these classes may hold beside our own fields, and the values that mean "plain Wan 2.1".
_PLAIN_VALUES: dict[str, tuple[object, ...]] = {
    "attn_scales": ([],),
    "decoder_base_dim": (None,),
    "is_residual": (False,),
    "patch_size": (None,),
    "in_channels": (3,),
    "out_channels": (3,),
    "clip_output": (True,),
}
ArchConfig = TypeVar("ArchConfig", bound=VAEArchConfig)


def locate(directory_or_repo: str | Path, subfolder: str | None) -> Path:
    """The local folder of a checkpoint, fetched from the hub if ``directory_or_repo`` is no directory."""
    root = Path(directory_or_repo)
    if not root.is_dir():
        if root.exists() or root.is_absolute() or str(directory_or_repo).startswith(".") or root.suffix in _FILES:
            raise FileNotFoundError(
                f"{root} is not a directory; need a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a hub repository"
            )
        prefix = f"{subfolder}/" if subfolder else ""
        try:
            root = Path(
                snapshot_download(str(directory_or_repo), allow_patterns=[prefix + CONFIG_NAME, prefix + WEIGHTS_NAME])
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{directory_or_repo} is neither a local directory nor a hub repository that can be reached: {error}"
            ) from error
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise FileNotFoundError(f"{root} has no folder {subfolder!r}")
    return folder


def read_arch(folder: Path, arch_class: type[ArchConfig]) -> ArchConfig:
    """The architecture that ``folder``'s config.json states."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint has {CONFIG_NAME} beside {WEIGHTS_NAME}")
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(stated, dict):
        stated = {"_class_name": type(stated).__name__}
    return arch_of(stated, str(path), arch_class)


def arch_of(stated: Mapping[str, Any], source: str, arch_class: type[ArchConfig]) -> ArchConfig:
    """The architecture that diffusers' fields for such a VAE state; ``source``: where they stand, for errors.

    Raises:
        ValueError: they are another model's.
    """
    if stated.get("_class_name") not in _CLASS_NAMES:
        came = stated.get("_class_name")
        raise ValueError(f"{source} is of {came!r}, need one of {', '.join(_CLASS_NAMES)} (Qwen-Image or Wan 2.1)")
    if (variant := variant_of(stated)) is not None:
        name, value = variant
        raise ValueError(
            f"{source} has {name} = {value!r}: another network than Qwen-Image's and Wan 2.1's "
            f"({_PLAIN_VALUES[name][0]!r})"
        )
    names = {field.name for field in fields(arch_class)}
    try:
        return arch_class(**{name: value for name, value in stated.items() if name in names})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def variant_of(stated: Mapping[str, Any]) -> tuple[str, object] | None:
    """The first of diffusers' fields, and its value, by which a VAE is another network than Qwen-Image's and Wan 2.1's:
    several go by the same class names. None if it is none other."""
    for name, plain in _PLAIN_VALUES.items():
        value = stated.get(name, plain[0])
        value = list(value) if isinstance(value, tuple) else value
        same_as_base = name == "decoder_base_dim" and value == stated.get("base_dim")
        if value not in plain and not same_as_base:
            return name, value
    return None


class Mismatch(NamedTuple):
    """Names of tensors, sorted: what a network lacks, what it does not know, what has another shape than its own."""

    missing: list[str]
    foreign: list[str]
    misshapen: list[str]


def mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Mismatch:
    """Of ``found`` to a network of the tensors ``expected``; a half of the VAE that it does not have may be there."""
    halves = {key.split(".")[0] for key in expected}
    foreign = (key for key in found.keys() - expected.keys() if key.split(".")[0] in halves or not _is_half(key))
    misshapen = (key for key in expected.keys() & found.keys() if found[key].shape != expected[key].shape)
    return Mismatch(sorted(expected.keys() - found.keys()), sorted(foreign), sorted(misshapen))


def read_tensors(
    folder: Path, expected: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of ``folder``'s weights named as in ``expected`` and shaped so; surplus halves are left out."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = [file.name for file in folder.iterdir() if file.suffix in _PICKLES]
        if pickles:
            raise ValueError(
                f"{folder} has only {', '.join(pickles)}: pickles can execute code and are not read; "
                f"need {WEIGHTS_NAME}"
            )
        raise FileNotFoundError(f"{path} does not exist")
    try:
        found = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    missing, foreign, misshapen = mismatch(expected, found)
    if missing or foreign:
        raise ValueError(
            f"{path} is of another model: {len(missing)} tensors are missing (such as {missing[:2]}), "
            f"{len(foreign)} are unknown (such as {foreign[:2]})"
        )
    if misshapen:
        key = misshapen[0]
        raise ValueError(
            f"{path}: {key} has shape {list(found[key].shape)}, {CONFIG_NAME} needs {list(expected[key].shape)}"
        )
    return {key: found[key].to(dtype) for key in expected}


def _is_half(key: str) -> bool:
    return key.split(".")[0] in ("encoder", "quant_conv", "post_quant_conv", "decoder")


def save(folder: Path, class_name: str, arch: VAEArchConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and the weights, each whole; a write that fails leaves neither behind."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = {"_class_name": class_name, "attn_scales": [], "dropout": 0.0, **asdict(arch)}
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with whole_file(folder / CONFIG_NAME) as config, whole_file(folder / WEIGHTS_NAME) as weights:
        config.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        save_file(contiguous, weights, metadata={"format": "pt"})
