"""Who modulates in benchmarks/modulation.py: paravae, PyTorch as diffusers uses it, torch.compile of that, SGLang."""

from __future__ import annotations

import importlib
import importlib.metadata
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.modulation_cases import Gate, Inputs, Tables, Way, chosen
from benchmarks.sglang_import import PeerUnavailable, open_folder
from paravae.launch.bench_errors import OURS, REFERENCE
from paravae.layers import modulation as ops

COMPILED = "compile"
SGLANG = "sglang"
COMPILING = ("dynamic", "static", "none")


class Ours(Way):
    def __init__(self, lazy: bool = False) -> None:
        self.lazy = lazy
        self.name = f"{OURS}-lazy" if lazy else OURS
        self.words = "paravae.layers.modulation, " + ("lazy gates" if lazy else "gates written, as SGLang's ops do")
        self._norm = ops.FusedLayerNormScaleShift()
        self._select = ops.FusedLayerNormScaleShiftSelect01()
        self._gate_select = ops.FusedLayerNormScaleShiftGateSelect01()
        self._residual_norm = ops.FusedResidualLayerNormScaleShift()
        self._residual_select = ops.FusedResidualLayerNormScaleShiftSelect01()
        self._residual_gate_select = ops.FusedResidualLayerNormScaleShiftGateSelect01()
        self._closing, self._closing_select = ops.FusedResidual(), ops.FusedResidualSelect01()

    def norm(self, x: Tensor, tables: Tables, index: Tensor | None) -> tuple[Tensor, Gate]:
        (shift0, shift1), (scale0, scale1), (gate0, gate1) = tables
        if index is None:
            return self._norm(x, None, None, scale0, shift0), tables.gate
        if self.lazy:
            return self._select(x, None, None, scale0, shift0, scale1, shift1, index), tables.gate
        return self._gate_select(x, None, None, scale0, shift0, gate0, scale1, shift1, gate1, index)

    def residual_norm(
        self, x: Tensor, residual: Tensor, gate: Gate, tables: Tables, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Gate]:
        (shift0, shift1), (scale0, scale1), (gate0, gate1) = tables
        if index is None:
            return *self._residual_norm(x, residual, gate[0], None, None, scale0, shift0), tables.gate
        if self.lazy:
            both = (scale0, shift0, scale1, shift1)
            return *self._residual_select(x, residual, *gate, None, None, *both, index), tables.gate
        assert isinstance(gate, Tensor)
        return self._residual_gate_select(
            x, residual, gate, None, None, scale0, shift0, gate0, scale1, shift1, gate1, index
        )

    def closing(self, x: Tensor, residual: Tensor, gate: Gate, index: Tensor | None) -> Tensor:
        if isinstance(gate, Tensor):
            return self._closing(x, residual, gate)
        assert index is not None
        return self._closing_select(x, residual, *gate, index)


class Eager(Way):
    """Step by step, each rounded, as diffusers' QwenImageTransformerBlock; on doubles it is the truth."""

    name = REFERENCE
    words = "the PyTorch ops that diffusers' transformer block runs, eager"

    def __init__(self, lazy: bool = False) -> None:
        self.lazy = lazy

    def norm(self, x: Tensor, tables: Tables, index: Tensor | None) -> tuple[Tensor, Gate]:
        normed = F.layer_norm(x, x.shape[-1:], eps=ops.EPS)
        y = normed * (1 + chosen(tables.scale, index)) + chosen(tables.shift, index)
        return y, tables.gate if self.lazy else chosen(tables.gate, index)

    def residual_norm(
        self, x: Tensor, residual: Tensor, gate: Gate, tables: Tables, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Gate]:
        total = self.closing(x, residual, gate, index)
        y, next_gate = self.norm(total, tables, index)
        return y, total, next_gate

    def closing(self, x: Tensor, residual: Tensor, gate: Gate, index: Tensor | None) -> Tensor:
        return residual + chosen(gate, index) * x


class Compiled(Way):
    """torch.compile of ``Eager``, op by op: in a model attention and MLP are between them.

    ``dynamic``: one for all L, tuned on the first; else one for each.
    """

    def __init__(self, lazy: bool = False, *, dynamic: bool, backend: Any = "inductor") -> None:
        self.lazy, self._dynamic, eager = lazy, dynamic, Eager(lazy)
        self.name = f"{COMPILED}-lazy" if lazy else COMPILED
        self.words = f"torch.compile of diffusers' ops, {'any' if dynamic else 'each'} L, " + (
            "gates chosen where they are used" if lazy else "gates written"
        )
        torch._dynamo.config.recompile_limit = 1000  # by default it gives up compiling after 8 shapes
        self._norm, self._residual_norm, self._closing = (
            torch.compile(function, fullgraph=True, dynamic=False, backend=backend)  # but for what _marked says
            for function in (eager.norm, eager.residual_norm, eager.closing)
        )

    def norm(self, x: Tensor, tables: Tables, index: Tensor | None) -> tuple[Tensor, Gate]:
        self._mark(x, index)
        return self._norm(x, tables, index)

    def residual_norm(
        self, x: Tensor, residual: Tensor, gate: Gate, tables: Tables, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Gate]:
        self._mark(x, residual, gate, index)
        return self._residual_norm(x, residual, gate, tables, index)

    def closing(self, x: Tensor, residual: Tensor, gate: Gate, index: Tensor | None) -> Tensor:
        self._mark(x, residual, gate, index)
        return self._closing(x, residual, gate, index)

    def _mark(self, *tensors: Gate | None) -> None:
        for tensor in tensors:
            if self._dynamic and isinstance(tensor, Tensor):
                torch._dynamo.mark_dynamic(tensor, 1)


class SGLang(Way):
    """The ops of its Qwen-Image transformer with an index (qwen_image.py, fused_scale_shift_gate.py, elementwise.py).

    Its ops copy the tables at each call, since its kernels step through the copies by the strides of what they were
    given; here they are dense before, and only its kernels are timed. Without an index it runs kernels in NVIDIA's
    CuTe DSL, which are not here.
    """

    name, plain = SGLANG, False

    def __init__(self, kernels: types.ModuleType, version: str) -> None:
        self._kernels: Any = kernels
        self.words = f"SGLang {version}'s Triton kernels, its tables made dense before"

    def prepared(self, inputs: Inputs) -> Inputs:
        return inputs.with_tables(Tensor.contiguous)

    def norm(self, x: Tensor, tables: Tables, index: Tensor | None) -> tuple[Tensor, Gate]:
        sets = _by_set(tables)
        return self._kernels.fuse_layernorm_scale_shift_gate_select01_kernel(x, None, None, *sets, index, ops.EPS)

    def residual_norm(
        self, x: Tensor, residual: Tensor, gate: Gate, tables: Tables, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Gate]:
        kernel = self._kernels.fuse_residual_layernorm_scale_shift_gate_select01_kernel
        return kernel(x, residual, gate, None, None, *_by_set(tables), index, ops.EPS)

    def closing(self, x: Tensor, residual: Tensor, gate: Gate, index: Tensor | None) -> Tensor:
        return self._kernels.fuse_scale_shift_kernel(x, gate, residual, scale_constant=0)


def _by_set(tables: Tables) -> tuple[Tensor, ...]:
    """scale0, shift0, gate0, scale1, shift1, gate1."""
    return tuple(pair[number] for number in (0, 1) for pair in (tables.scale, tables.shift, tables.gate))


_PACKAGES = dict.fromkeys((
    "sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.diffusion",
    "sglang.kernels.ops.diffusion.common", "sglang.kernels.ops.diffusion.modulate",
    "sglang.srt", "sglang.multimodal_gen", "sglang.multimodal_gen.runtime",
))  # fmt: skip
"""Those on the kernels' way, none with its __init__."""
_PLATFORMS = ("cuda", "hip", "npu", "mps", "musa", "xpu")
_REPLACED: dict[str, dict[str, object]] = {
    "sglang.srt.utils": {"is_gfx1250_supported": lambda: False},
    "sglang.multimodal_gen.runtime.platforms": {
        "current_platform": types.SimpleNamespace(
            **{f"is_{name}": lambda name=name: name == "cuda" for name in _PLATFORMS}
        )
    },
}
"""What only asks which machine this is."""


def sglang_from(folder: Path) -> SGLang:
    """Its kernels, from what `benchmarks/fetch_sglang.sh` laid out in `folder`.

    Raises:
        PeerUnavailable: they cannot be imported, and why.
    """
    open_folder(folder, _PACKAGES, _REPLACED)
    try:
        kernels = importlib.import_module("sglang.kernels.ops.diffusion.modulate.scale_shift_triton")
        return SGLang(kernels, importlib.metadata.version("sglang"))
    except Exception as error:  # whatever its modules raise when imported: the benchmark goes on without the peer
        raise PeerUnavailable(f"SGLang's kernels could not be imported: {type(error).__name__}: {error}") from error


class Absent(Way):
    """A peer that could not be had: every op says why."""

    def __init__(self, name: str, plain: bool, reason: Exception) -> None:
        self.name, self.plain, self._reason = name, plain, reason
        self.words = f"not there: {reason}"

    def prepared(self, inputs: Inputs) -> Inputs:
        raise self._reason


def contestants(compiling: str, sglang: Path | None) -> list[Way]:
    """All of a run, the reference first. ``compiling``: one of ``COMPILING``; ``sglang``: a folder to take it from."""
    ways: list[Way] = [Eager(), Ours(), Ours(lazy=True)]
    if compiling != "none":
        ways += [Compiled(lazy, dynamic=compiling == "dynamic") for lazy in (False, True)]
    if sglang is not None:
        try:
            ways.append(sglang_from(sglang))
        except PeerUnavailable as reason:
            ways.append(Absent(SGLANG, SGLang.plain, reason))
    return ways
