"""``paravae engine verify``: what it finds of engines, which a stand-in for TensorRT's runtime runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paravae.launch import cli
from paravae.launch.engine_verify import Verified, verify_all
from paravae.vae.engines.trt.directory import read_directory
from paravae.vae.engines.trt.parts import PARTS
from paravae.vae.engines.trt.shapes import Profile, Target
from tests.builders import perturb, small_vae
from tests.trt_engines import write_engine
from tests.trt_fake import FakeTensorRT


def write(onnx_parts: Path, root: Path) -> None:
    for part in PARTS:
        unit = 8 if part in ("encoder", "encoder_body") else 1
        profiles = tuple(Profile((unit, unit), (unit * side, unit * side), (999, 999)) for side in (4, 6))
        write_engine(onnx_parts, root, Target(part, profiles, f"parallel/{part}.trt"))


def found(root: Path, library: FakeTensorRT) -> list[Verified]:
    vae = small_vae()
    return list(verify_all(root, read_directory(root), vae, lambda manifest: library, torch.device("cpu")))


def test_each_engine_at_each_of_its_best_sizes(onnx_parts: Path, tmp_path: Path) -> None:
    write(onnx_parts, tmp_path)
    rows = found(tmp_path, FakeTensorRT())
    assert len(rows) == 2 * len(PARTS)
    assert {row.part for row in rows} == set(PARTS)
    for row in rows:
        assert row.trouble is None
        assert row.max_error is not None
        assert row.allowed is not None
        assert 0 < row.max_error <= min(row.allowed, 1e-5)
        assert row.psnr_db is not None
        assert row.psnr_db > 80
        assert row.ms is not None
        assert row.torch_ms is not None
        assert min(row.ms, row.torch_ms) > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("deserialize_cuda_engine", "could not deserialize"),
        ("execute_async_v3", "could not run"),
        ("nan", "its error is inf"),
    ],
)
def test_what_is_wrong_is_said(call: str, words: str, onnx_parts: Path, tmp_path: Path) -> None:
    write_engine(onnx_parts, tmp_path, Target("decoder", (Profile.static((4, 4)),), "4x4/vae_decoder.trt"))
    (row,) = found(tmp_path, FakeTensorRT(fails={call}))
    assert words in (row.trouble or "")


def test_another_network_is_not_within_the_bound(onnx_parts: Path, tmp_path: Path) -> None:
    path = write_engine(onnx_parts, tmp_path, Target("decoder", (Profile.static((4, 4)),), "4x4/vae_decoder.trt"))
    vae = small_vae()
    perturb(vae)
    entries = read_directory(tmp_path)
    (row,) = verify_all(tmp_path, entries, vae, lambda manifest: FakeTensorRT(), torch.device("cpu"))
    assert "other weights" in (row.trouble or "")
    from paravae.vae.engines.trt.manifest import all_weights_sha256, manifest_path

    lies = all_weights_sha256(vae.state_dict(), "decoder")
    manifest = entries[0].manifest
    assert manifest is not None
    manifest_path(path).write_text(replace(manifest, weights_sha256=lies).to_json())
    (row,) = verify_all(tmp_path, read_directory(tmp_path), vae, lambda manifest: FakeTensorRT(), torch.device("cpu"))
    assert "its error is" in (row.trouble or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engine", "verify", str(tmp_path)]) == 2
    assert "takes a CUDA GPU; there is none here" in capsys.readouterr().err
