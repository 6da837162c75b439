"""Which tests run here: those marked ``cuda`` and ``nccl`` need GPUs and say so when there are too few."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels then run on CPU tensors

from tests.command_bench import bench, refused, stock  # noqa: F401 (fixtures)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for mark, needed in (("cuda", 1), ("nccl", 2)):
            if item.get_closest_marker(mark) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} or more CUDA GPUs, this machine has {gpus}"))


@pytest.fixture(scope="session")
def onnx_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small VAE's parts as ONNX files: made once, exporting takes seconds."""
    pytest.importorskip("onnxscript", reason="needs paravae[tensorrt]")
    pytest.importorskip("onnxruntime", reason="needs paravae[tensorrt]")
    from tests.trt_engines import export_parts

    folder = tmp_path_factory.mktemp("onnx")
    export_parts(folder)
    return folder
