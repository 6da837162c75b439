"""Gather natural photographs that ordinary installable packages ship, for training and for measuring.

The pictures come from Python packages that are already installed and from Debian packages that are
fetched with `apt-get download` and unpacked with `dpkg -x`, without installing them. Each picture is
turned into RGB, reduced if it is large, and written as JPEG to OUT/train or OUT/heldout;
OUT/sources.json says where each one came from and under which licence.

    python -m training.pictures --output DIR [--cache DIR]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from training.sources import SOURCES

MAX_SIDE_PX = 1280  # longest side of a prepared picture, in pixels
JPEG_QUALITY = 92  # Pillow's scale, 1 to 95; the set takes about 38 MB at 92 and 49 MB at 95


def python_package_folder(module: str) -> Path:
    """The folder of an installed Python package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the Python package {module!r} is not installed")
    return Path(spec.origin).parent


def fetch_debian_package(package: str, cache: Path) -> tuple[Path, str]:
    """Download and unpack a Debian package into `cache`, once; its unpacked root and its version."""
    for tool in ("apt-get", "dpkg", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} was not found: the wallpapers can be fetched on Debian or Ubuntu only")
    if not list(cache.glob(f"{package}_*.deb")):
        result = subprocess.run(
            ["apt-get", "download", package], cwd=cache, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise SystemExit(
                f"apt-get could not download {package} (was 'apt-get update' run?):\n{result.stderr.strip()}"
            )
    archive = max(cache.glob(f"{package}_*.deb"))
    root = cache / "unpacked" / archive.stem
    if not root.is_dir():
        partial = root.with_name(root.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
        for resources in partial.rglob("*.rcc"):
            unpack_qt_resources(resources, resources.with_suffix(""))
        partial.rename(root)
    version = subprocess.check_output(["dpkg-deb", "-f", str(archive), "Version"], text=True).strip()
    return root, version


def unpack_qt_resources(archive: Path, folder: Path) -> None:
    """Write the files of a binary Qt resource file (.rcc) below `folder`, except zstd-compressed ones."""
    data = archive.read_bytes()
    magic, version, tree, contents, names = struct.unpack_from(">4s4I", data)
    if magic != b"qres":
        raise ValueError(f"{archive.name} is not a Qt resource file")
    node_bytes = 14 if version < 2 else 22

    def walk(index: int, parent: Path) -> Iterator[tuple[Path, bytes]]:
        node = tree + index * node_bytes
        name_offset, flags = struct.unpack_from(">IH", data, node)
        name_start = names + name_offset
        (name_units,) = struct.unpack_from(">H", data, name_start)  # UTF-16 code units
        name = data[name_start + 6 : name_start + 6 + 2 * name_units].decode("utf-16-be")
        path = parent / Path(name).name if index else parent  # the root node has no name
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">II", data, node + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        else:
            start = contents + struct.unpack_from(">I", data, node + 10)[0]
            (size,) = struct.unpack_from(">I", data, start)  # bytes
            body = data[start + 4 : start + 4 + size]
            if flags & 1:  # zlib, after four bytes that tell the unpacked size
                yield path, zlib.decompress(body[4:])
            elif not flags & 4:
                yield path, body

    for path, body in walk(0, folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


def find_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The regular files below `folder` that match, sorted; a pattern that matches none is reported."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = [path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()]
        if not matches:
            print(f"warning: no file matches {pattern} in {folder}", file=sys.stderr)
        found.update(matches)
    return sorted(found)


def prepare_picture(source: Path, target: Path) -> tuple[int, int]:
    """Write `source` as an RGB JPEG, reduced to MAX_SIDE_PX if larger; its (width, height) in pixels."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    scale = MAX_SIDE_PX / max(picture.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture.save(target, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return picture.width, picture.height


def gather(output: Path, cache: Path) -> list[dict[str, object]]:
    """Prepare the pictures of all sources below `output`; the records written to sources.json."""
    records: list[dict[str, object]] = []
    for split in ("train", "heldout"):
        shutil.rmtree(output / split, ignore_errors=True)
        (output / split).mkdir(parents=True)
    for source in SOURCES:
        if source.kind == "pypi":
            root, version = python_package_folder(source.module), importlib.metadata.version(source.package)
        else:
            root, version = fetch_debian_package(source.package, cache)
        folder = root / source.folder
        heldout = find_files(folder, source.heldout)
        if len(heldout) != len(source.heldout):
            raise SystemExit(
                f"{source.package} {version} lacks a held-out picture; the table was written for {source.version}"
            )
        excluded = {*heldout, *(folder / name for name in source.skip)}
        train = [path for path in find_files(folder, source.train) if path not in excluded]
        for split, paths in (("train", train), ("heldout", heldout)):
            for path in paths:
                relative = path.relative_to(folder)
                name = "-".join((source.package, *relative.with_suffix("").parts)) + ".jpg"
                size = prepare_picture(path, output / split / name)
                records.append(
                    {
                        "file": f"{split}/{name}",
                        "package": source.package,
                        "version": version,
                        "licence": source.licence,
                        "size": list(size),
                        "original": f"{source.folder}/{relative.as_posix()}",
                    }
                )
    (output / "sources.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return records


def main(arguments: list[str] | None = None) -> None:
    """Command line: python -m training.pictures --output DIR [--cache DIR]."""
    parser = argparse.ArgumentParser(description="Gather photographs shipped by installable packages.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write train/ and heldout/ into")
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder that keeps the Debian packages (about 340 MB "
        "downloaded); without it they go to a temporary folder and are deleted",
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        cache: Path = options.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        records = gather(options.output, cache)
    bytes_total = sum((options.output / str(record["file"])).stat().st_size for record in records)
    heldout = sum(str(record["file"]).startswith("heldout/") for record in records)
    print(f"{len(records) - heldout} training and {heldout} held-out pictures, {bytes_total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
