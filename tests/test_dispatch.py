"""Kernel or reference: which runs, and that nothing about it is silent or hides a device's own error."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from paravae.layers import dispatch, references_only
from paravae.layers.dispatch import FusedOp, split_channels
from paravae.layers.norm_silu import norm_silu


class Pretended(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 0)  # type: ignore[assignment]


def op(error: Exception | None = None, unfit: str | None = None, calls: list[str] | None = None) -> FusedOp:
    calls = [] if calls is None else calls

    def reference(x: Tensor) -> str:
        calls.append("reference")
        return "reference"

    def kernel(x: Tensor) -> str:
        calls.append("kernel")
        if error is not None:
            raise error
        return "kernel"

    return FusedOp("an_op", reference, kernel, lambda x: unfit)  # type: ignore[arg-type, return-value]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    if dispatch.triton is None:
        monkeypatch.setattr(dispatch, "triton", object())


on_gpu = torch.ones(2).as_subclass(Pretended)


def test_the_kernel_runs_where_it_can() -> None:
    assert op()(on_gpu) == "kernel"
    assert not dispatch.fallbacks()


def test_a_cpu_takes_the_reference_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert op()(torch.ones(2)) == "reference"
    assert not caplog.records
    assert not dispatch.fallbacks()


@pytest.mark.parametrize(
    ("made", "x", "reason"),
    [
        (op(unfit="it has 5 channels"), on_gpu, "it has 5 channels"),
        (op(), torch.ones(2, dtype=torch.float64).as_subclass(Pretended), "does not take torch.float64"),
    ],
)
def test_a_fallback_on_a_gpu_is_said_once(
    made: FusedOp, x: Tensor, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "paravae"):
        assert [made(x), made(x)] == ["reference", "reference"]
    assert [record.getMessage() for record in caplog.records] == [
        f"an_op runs as plain PyTorch: {next(iter(dispatch.fallbacks()['an_op']))}"
    ]
    assert reason in caplog.text


def test_without_triton_the_reference_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "triton", None)
    assert op()(on_gpu) == "reference"
    assert "Triton is not installed" in caplog.text


def test_a_kernel_that_fails_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    broken = op(RuntimeError("PassManager::run failed\nand much more"), calls=calls)
    assert [broken(on_gpu), broken(on_gpu)] == ["reference", "reference"]
    assert calls == ["kernel", "reference", "reference"]
    assert "the kernel failed: RuntimeError: PassManager::run failed" in caplog.text
    assert "much more" not in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: illegal access")])
def test_errors_of_the_device_are_raised(error: Exception) -> None:
    calls: list[str] = []
    with pytest.raises(type(error)):
        op(error, calls=calls)(on_gpu)
    assert calls == ["kernel"]


def test_references_only() -> None:
    made = op()
    with references_only():
        assert made(on_gpu) == "reference"
    assert made(on_gpu) == "kernel"
    assert not dispatch.fallbacks()


def test_split_channels() -> None:
    assert [split_channels(n) for n in (96, 64, 384, 40, 100)] == [(64, 32), (64, 0), (256, 128), (32, 8), (64, 64)]


def test_unfit_arguments_are_named() -> None:
    x = torch.zeros(1, 1, 2, 3, 4)
    assert norm_silu._unfit(x, None) is None
    assert "channels last" in str(norm_silu._unfit(torch.zeros(1, 4, 1, 2, 3).movedim(1, -1), None))
    assert "channels" in str(norm_silu._unfit(torch.zeros(1, 1, 1, 1, 2000), None))


def test_layers_import_without_triton() -> None:
    """In a process where Triton cannot be imported, everything still works, by references."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from paravae.layers.norm_silu import norm_silu
from paravae.layers.attention import wide_attention
from paravae.layers.to_pixels import to_pixels
print(norm_silu(torch.ones(1, 1, 1, 1, 4), torch.ones(4), silu=False).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(4)
