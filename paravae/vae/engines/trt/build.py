"""ONNX file and profiles -> engine file and manifest, each whole or not at all, the manifest last."""

from __future__ import annotations

import datetime
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from paravae.files import whole_file
from paravae.vae.engines.trt.flavour import Flavour, NetworkBuild, Watch
from paravae.vae.engines.trt.manifest import Manifest, manifest_path, sha256
from paravae.vae.engines.trt.parts import DTYPES, ExportOptions
from paravae.vae.engines.trt.shapes import Target

logger = logging.getLogger("paravae")

LEVELS = range(6)
# What TensorRT-RTX adds to the weights, which all profiles of an engine share: measured with 1.7.1 on all parts of the
# full-size network in float16, 1.4 to 5.3 MB and 1.4 to 3.3 MB.
_STATIC_BYTES, _PROFILE_BYTES = 3_000_000, 2_500_000


@dataclass(frozen=True)
class BuildOptions:
    """How TensorRT is to build. None: as it does by itself.

    ``workspace_bytes``: most that an engine may need beside its inputs and outputs. ``level``: 0 (built fastest) to 5
    (runs fastest). ``timing_cache``: a file, made if it is missing, by which later builds are faster.
    ``compute_capabilities``: of the GPUs to build for, of ``Flavour.targets``; empty: of the GPU here.
    """

    workspace_bytes: int | None = None
    level: int | None = None
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What engines are built from: an ONNX file of a part, how it was exported, and the weights in it by name."""

    onnx: Path
    options: ExportOptions
    weights_sha256: dict[str, str]
    paravae: str
    batch: int = 1
    onnx_sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "onnx_sha256", sha256(self.onnx.read_bytes()))


@dataclass(frozen=True)
class Built:
    """An engine that is there. ``seconds``: that building it took."""

    path: Path
    manifest: Manifest
    seconds: float


def build_engine(
    flavour: Flavour, source: Source, target: Target, root: Path, options: BuildOptions, watch: Watch | None = None
) -> Built:
    """Build ``target`` into the folder ``root``, in the place of what was there.

    ``watch``: is told of progress, and may raise to end it.

    Raises:
        BuildError: TensorRT cannot; and why. No file is touched.
        OSError: it cannot be written.
    """
    started = time.perf_counter()
    blob = _built(flavour, source.onnx, target, options, watch)
    seconds = time.perf_counter() - started
    manifest = Manifest(
        part=target.part,
        profiles=target.profiles,
        batch=source.batch,
        dtype=source.options.dtype,
        denormalize=source.options.denormalize,
        output=source.options.output,
        engine_sha256=sha256(blob),
        engine_bytes=len(blob),
        onnx_sha256=source.onnx_sha256,
        weights_sha256=source.weights_sha256,
        flavour=flavour.name,
        flavour_version=flavour.version,
        compute_capabilities=options.compute_capabilities,
        paravae=source.paravae,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    path = root / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(manifest_path(path)) as beside, whole_file(path) as engine:  # the engine takes its place first
        engine.write_bytes(blob)
        beside.write_text(manifest.to_json(), encoding="utf-8")
    return Built(path, manifest, seconds)


def estimated_bytes(parameters: int, dtype: str, target: Target) -> int:
    """About what an engine's file takes. ``parameters``: numbers in the part's weights."""
    static = target.profiles[0].is_static
    added = _STATIC_BYTES if static else _PROFILE_BYTES * len(target.profiles)
    return parameters * DTYPES[dtype].itemsize + added


def _built(flavour: Flavour, onnx: Path, target: Target, options: BuildOptions, watch: Watch | None) -> bytes:
    build = NetworkBuild(flavour, onnx)
    build.take(target.profiles)
    if options.workspace_bytes is not None:
        build.limit_workspace(options.workspace_bytes)
    if options.level is not None:
        build.set_level(options.level)
    if flavour.targets:
        build.set_targets(options.compute_capabilities)
    cache = options.timing_cache if flavour.keeps_timing_cache else None
    if cache is not None:
        _begin_with(build, cache)
    blob = build.serialized(watch)
    if cache is not None:
        with whole_file(cache) as part:
            part.write_bytes(build.timing_cache())
    return blob


def _begin_with(build: NetworkBuild, cache: Path) -> None:
    content = cache.read_bytes() if cache.is_file() else b""
    if build.use_timing_cache(content):
        return
    logger.warning("timing cache %s is of another GPU, or version of TensorRT: it is begun anew", cache)
    build.use_timing_cache(b"")
