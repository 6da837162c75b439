"""A folder of engines for a small VAE, for the stand-in of TensorRT to run, and a VAE that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.configs.trt import TrtVAEConfig
from paravae.vae.engines.trt.export import export_onnx
from paravae.vae.engines.trt.make import part_channels
from paravae.vae.engines.trt.manifest import Manifest, all_weights_sha256, half_of, manifest_path, sha256
from paravae.vae.engines.trt.parts import PARTS, ExportOptions, Part
from paravae.vae.engines.trt.shapes import Profile, Target
from paravae.vae.engines.trt.store import EngineFolder
from paravae.vae.engines.trt.trt_engine import TensorRTEngine
from paravae.vae.engines.trt.weights import Weights
from tests.builders import small_vae
from tests.trt_fake import FakeTensorRT, engine_bytes

ANY = Profile((1, 1), (8, 8), (512, 512))


def export_parts(folder: Path, parts: Sequence[Part] = PARTS) -> None:
    """The ONNX file of each part of the small VAE."""
    vae = small_vae()
    for part in parts:
        export_onnx(vae, part, folder / f"{part}.onnx", options=ExportOptions("float32"), size=(32, 32), dynamic=True)


def write_engine(onnx_folder: Path, root: Path, target: Target, **changes: Any) -> Path:
    """An engine's file and, but for ``manifest=False``, its manifest, with ``changes`` of its fields."""
    onnx, path = onnx_folder / f"{target.part}.onnx", root / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = engine_bytes(onnx, target.profiles)
    path.write_bytes(blob)
    if changes.pop("manifest", True):
        fields: dict[str, Any] = {
            "part": target.part,
            "profiles": target.profiles,
            "batch": 1,
            "dtype": "float32",
            "denormalize": False,
            "output": "float",
            "engine_sha256": sha256(blob),
            "engine_bytes": len(blob),
            "onnx_sha256": sha256(onnx.read_bytes()),
            "weights_sha256": _weights(half_of(target.part)),
            "flavour": "tensorrt_rtx",
            "flavour_version": "0",
            "compute_capabilities": ("8.9",),
            "paravae": "0",
            "created": "2026-11-21T00:00:00Z",
        }
        manifest_path(path).write_text(Manifest(**(fields | changes)).to_json(), encoding="utf-8")
    return path


@cache
def _weights(half: Any) -> dict[str, str]:
    return all_weights_sha256(small_vae().state_dict(), half)


def write_all(onnx_folder: Path, root: Path, parts: Sequence[Part] = PARTS) -> None:
    """One engine for each part, of any size."""
    for part in parts:
        whole = part in ("decoder", "encoder")
        file = f"vae_{part}_multi_profile.trt" if whole else f"parallel/{part}.trt"
        write_engine(onnx_folder, root, Target(part, (ANY,), file))


def with_engines(
    root: Path, library: FakeTensorRT, vae: AutoencoderKLQwenImage | None = None, **options: Any
) -> AutoencoderKLQwenImage:
    """The small VAE, decoding with the engines of ``root`` on the CPU; ``options`` of ``TrtVAEConfig``."""
    vae = vae or small_vae()
    config = TrtVAEConfig(trt_engine_path=str(root), **{"multi_profile": True, **options})
    store = EngineFolder(config, Weights(vae), library=lambda *names: library, runs_on=("cpu",))
    inner = vae.engine
    vae.use_engine(TensorRTEngine(inner, store, part_channels(vae.config.arch_config, inner), strict=config.strict))
    assert isinstance(vae.config, QwenImageVAEConfig)
    return vae
