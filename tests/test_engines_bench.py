"""``benchmarks.engines`` where no engine runs: PyTorch stands in, and its picture has to be PyTorch's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.engines import main


@pytest.mark.parametrize("same", [True, False])
def test_pytorch_stands_in_on_a_cpu(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, flags = tmp_path / "engines.json", ["--sizes", "64x96", "--dtype", "float32", "--device", "cpu"]
    if not same:
        monkeypatch.setattr(torch, "equal", lambda *pictures: False)
    status = main(["--engines", str(tmp_path), *flags, "--repeats", "2", "--warmup", "1", "--output", str(output)])
    assert status == int(not same)
    assert same == ("is not that of PyTorch alone" not in capsys.readouterr().err)
    report = json.loads(output.read_text())
    plain, asked = report["rows"]
    reason = "TensorRT runs on cuda, and the latents are on cpu"
    assert asked["ran"] == {"tensorrt": 0, "pytorch": 1 + 1 + 2}
    assert asked["fallbacks"] == {reason: 4}
    assert report["logged"] == [f"PyTorch stands in for TensorRT: {reason}"]
    assert plain["same_bits"] == asked["same_bits"] == same
    assert plain["ms"] > 0
    assert asked["ms"] > 0
