"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; when the body is done it becomes ``path``, if it failed it goes.

    The name keeps ``path``'s suffix, from which writers tell the format.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        part.chmod(0o666 & ~_umask())  # safetensors would keep its files from all but their owner
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside ``path`` to fill; when the body is done it becomes ``path``, if it failed it goes.

    ``path`` must not exist or be an empty folder.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        yield part
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raise an OSError that says why, unless a file ``path`` can be made or replaced."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, need the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # asks the file system itself, and leaves no trace
    except OSError as error:
        raise PermissionError(f"cannot write {path}: {error.strerror or error}") from error
