"""What a result was measured on and with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import paravae


def describe(ranks: int) -> dict[str, object]:
    """Machine, versions, commit and date, for the head of a result file."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "ranks": ranks,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": version_of("triton"),
        "diffusers": version_of("diffusers"),
        "paravae": paravae.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def version_of(package: str) -> str | None:
    """The installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this code; None where it was installed, though perhaps into a folder of someone's repository."""
    if stated := os.environ.get("PARAVAE_COMMIT"):  # where the code was copied without its history
        return stated
    own = Path(paravae.__file__)
    try:
        _git(own.parent, "ls-files", "--error-unmatch", own.name)
        return _git(own.parent, "rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
