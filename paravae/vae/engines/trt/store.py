"""The engines of a folder, found by what is needed and loaded when it is: see ``trt_engine.EngineStore``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from paravae.configs.trt import TrtVAEConfig
from paravae.vae.engines.trt.directory import Entry, find_engine, read_directory
from paravae.vae.engines.trt.flavour import FLAVOURS, NoTensorRTError, find_flavour
from paravae.vae.engines.trt.manifest import Manifest, ManifestError, half_of, read_engine
from paravae.vae.engines.trt.needs import Need
from paravae.vae.engines.trt.parts import Part
from paravae.vae.engines.trt.resident import Residents
from paravae.vae.engines.trt.runner import EngineError, Library, Runner
from paravae.vae.engines.trt.shapes import RATIOS, Size, size_text
from paravae.vae.engines.trt.weights import Weights

logger = logging.getLogger("paravae")


class EngineFolder:
    """Implements ``trt_engine.EngineStore``.

    Args:
        config: where the engines are and how they are to be run.
        weights: what the engines have to be made of.
        graphs: CUDA graphs that each engine keeps.
        library: finds TensorRT by its flavour's name.
        runs_on: kinds of device that it runs on.
    """

    def __init__(
        self,
        config: TrtVAEConfig,
        weights: Weights,
        graphs: int = 0,
        library: Callable[..., Library] = find_flavour,
        runs_on: tuple[str, ...] = ("cuda",),
    ) -> None:
        assert config.trt_engine_path is not None
        self._root, self._config, self._weights = Path(config.trt_engine_path), config, weights
        self._graphs, self._library, self._runs_on = graphs, library, runs_on
        self._made_for: tuple[torch.device, list[tuple[int, int]]] | None = None
        self._device = torch.device("cpu")
        self.residents: Residents[Runner] = Residents(self._load, config.max_resident_bytes)
        self._broken: dict[Hashable, str] = {}

    def runs(self, needs: Sequence[Need], device: torch.device) -> list[Runner]:
        if device.type not in self._runs_on:
            raise EngineError(f"TensorRT runs on {' and '.join(self._runs_on)}, and the latents are on {device}")
        made_for = (device, self._weights.state.now())
        if self._made_for != made_for:
            self.residents.clear()
            self._broken.clear()
            self._device, self._made_for = device, made_for
        paths = [self._path_for(part, size) for part, size in needs]
        return self.residents.get(half_of(needs[0][0]), paths) if needs else []

    def summary(self) -> dict[str, Any]:
        loads = {
            str(key): {"times": count.times, "seconds": round(count.seconds, 3), "last_s": round(count.last_s, 3)}
            for key, count in self.residents.loads.items()
        }
        kept = [str(key) for key in self.residents.keys]
        return {"resident": kept, "resident_bytes": self.residents.bytes, "loads": loads}

    def _path_for(self, part: Part, size: Size) -> Path:
        """The engine for a need."""
        whole = part in ("decoder", "encoder")
        entries = [entry for entry in self._entries if not whole or self._is_of_kind(entry)]
        found = find_engine(entries, part, size)
        if found is not None:
            return found[0].path
        for entry in sorted(entries, key=lambda entry: entry.path.parent.name != _ratio_of(part, size)):
            if entry.is_foreign and entry.part == part and self._foreign_takes(entry.path, part, size):
                return entry.path
        troubles = [entry.trouble for entry in self._entries if entry.trouble and entry.part in (part, None)]
        of_kind = "multi-profile " if self._config.multi_profile and whole else ""
        raise EngineError(
            f"no {of_kind}engine in {self._root} takes the {part}'s input of {size_text(size)}"
            + (f" ({'; '.join(troubles)})" if troubles else "")
        )

    def _is_of_kind(self, entry: Entry) -> bool:
        """Whether the config wants an engine for whole pictures of one size, or of many."""
        multi = "multi_profile" in entry.path.name if entry.manifest is None else not entry.manifest.is_static
        return multi == self._config.multi_profile

    @cached_property
    def _entries(self) -> tuple[Entry, ...]:
        try:
            return read_directory(self._root)
        except OSError as error:
            raise EngineError(str(error)) from error

    def _foreign_takes(self, path: Path, part: Part, size: Size) -> bool:
        """Whether an engine without a manifest says itself that it takes that size: to be asked it must be loaded."""
        try:
            (runner,) = self.residents.get(half_of(part), [path])
        except EngineError as error:
            logger.warning("%s, which has no manifest, cannot be loaded: %s", path, error)
            return False
        return any(profile.contains(size) for profile in runner.profiles)

    def _load(self, key: Hashable) -> Runner:
        """An engine's file, once it has been checked; what cannot be loaded is not tried again."""
        assert isinstance(key, Path)
        if key in self._broken:
            raise EngineError(self._broken[key])
        try:
            return self._loaded(key)
        except (EngineError, ManifestError, NoTensorRTError, OSError) as error:
            self._broken[key] = f"{key}: {error}" if str(key) not in str(error) else str(error)
            raise EngineError(self._broken[key]) from error

    def _loaded(self, path: Path) -> Runner:
        entry = next(entry for entry in self._entries if entry.path == path)
        if entry.is_foreign:
            logger.warning("%s has no manifest: that it is of these weights is taken on trust", path)
            flavour, blob = self._config.flavour, path.read_bytes()
        else:
            manifest, blob = read_engine(path, check_hash=self._config.verify_hashes)
            self._check(manifest)
            flavour = manifest.flavour if self._config.flavour == "auto" else self._config.flavour
        library = self._library(*(FLAVOURS if flavour == "auto" else (flavour,)))
        return Runner(library, blob, self._device, self._graphs)

    def _check(self, manifest: Manifest) -> None:
        """That the engine computes what this VAE does."""
        if (manifest.batch, manifest.denormalize, manifest.output) != (1, False, "float"):
            raise EngineError(
                f"it takes {manifest.batch} images, denormalises: {manifest.denormalize}, gives {manifest.output}; "
                "paravae runs engines of one image that do neither before nor after what the network does"
            )
        if self._config.verify_hashes:
            known = manifest.weights_sha256.get(self._weights.dtype)
            if known != self._weights.sha256(manifest.half):
                raise EngineError(f"it was built from other weights than the {manifest.half}'s")


def _ratio_of(part: Part, size: Size) -> str:
    """LightX2V's folder for a size, or nothing."""
    unit = 8 if part == "decoder" else 1
    pixels = (unit * size[0], unit * size[1])
    return next((name for name, ratio in RATIOS.items() if ratio == pixels), "")
