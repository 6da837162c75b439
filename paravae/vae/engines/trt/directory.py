"""Which engines a folder holds: those with manifests, and those that LightX2V built, which have none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from paravae.vae.engines.trt.manifest import SUFFIX, Manifest, ManifestError, manifest_path, read_manifest
from paravae.vae.engines.trt.manifest import verify_manifest as verify
from paravae.vae.engines.trt.parts import Part
from paravae.vae.engines.trt.shapes import Size, choose_profile

_LIGHTX2V: dict[str, Part] = {
    f"vae_{part}{kind}{SUFFIX}": part for part in ("decoder", "encoder") for kind in ("", "_multi_profile")
}


@dataclass(frozen=True)
class Entry:
    """An engine's file. ``part``: None where nothing says so. ``manifest``: None for LightX2V's, and where there is
    ``trouble``: why the engine cannot be used."""

    path: Path
    part: Part | None
    manifest: Manifest | None
    trouble: str | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether it must be asked itself what it takes: it is as LightX2V names it, and has no manifest."""
        return self.manifest is None and self.trouble is None


def read_directory(root: Path, *, check_hashes: bool = False) -> tuple[Entry, ...]:
    """Every engine below ``root``, in the order of their paths.

    ``check_hashes``: read the engines' files whole, too.

    Raises:
        FileNotFoundError, NotADirectoryError: ``root`` is no folder.
    """
    if not root.is_dir():
        kind = NotADirectoryError if root.exists() else FileNotFoundError
        raise kind(f"{root} is no folder of engines; paravae engine build --output {root} makes one")
    engines = set(root.rglob(f"*{SUFFIX}"))
    engines |= {path.with_name(path.name.removesuffix(".json")) for path in root.rglob(f"*{SUFFIX}.json")}
    shown = [path for path in sorted(engines) if not path.name.startswith(".")]  # what a build is writing
    return tuple(_entry(root, path, check_hashes) for path in shown)


def find_engine(entries: Iterable[Entry], part: Part, size: Size) -> tuple[Entry, int] | None:
    """The engine for an input of ``size`` (height, width), and its profile: among all profiles of all engines of
    ``part`` as ``choose_profile`` has it, a static one before others; None if none takes it."""
    found = []
    for entry in entries:
        if entry.manifest is None or entry.part != part:
            continue
        index = choose_profile(entry.manifest.profiles, size)
        if index is not None:
            profile = entry.manifest.profiles[index]
            found.append(((profile.distance(size), not profile.is_static, str(entry.path)), entry, index))
    if not found:
        return None
    _, entry, index = min(found, key=lambda candidate: candidate[0])
    return entry, index


def _entry(root: Path, path: Path, check_hashes: bool) -> Entry:
    part = _LIGHTX2V.get(path.name)
    if not path.resolve().is_relative_to(root.resolve()):
        return Entry(path, part, None, f"{path} leads out of {root}: engines are taken from within it only")
    if not path.is_file():
        return Entry(path, part, None, f"{manifest_path(path)} is there, but its engine is not")
    if part is not None and not manifest_path(path).exists():
        return Entry(path, part, None)
    try:
        manifest = (verify if check_hashes else read_manifest)(path)
    except ManifestError as error:
        return Entry(path, part, None, str(error))
    return Entry(path, manifest.part, manifest)
