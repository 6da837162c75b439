"""examples/sglang_decode.py, as its docstring says to start it: fresh processes, so the entry point does it all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")

from PIL import Image

ROOT = Path(__file__).parents[2]
FLAGS = ("--vae-precision", "fp32", "--vae-config.parallel-decode-mode", "patch")


def run(ranks: int, output: Path, **environment: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, "examples/sglang_decode.py", "--output", str(output), *FLAGS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_two_ranks_write_the_picture_that_sglang_writes_alone(tmp_path: Path) -> None:
    assert "ServedQwenImageVAE, patch" in run(2, tmp_path / "two.png")
    assert "AutoencoderKLQwenImage, SGLang's own" in run(1, tmp_path / "one.png", PARAVAE_SGLANG="0")
    two, one = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("two.png", "one.png"))
    assert two.shape == (192, 256, 3)
    assert np.abs(two - one).max() <= 1
    assert one.std() > 5
