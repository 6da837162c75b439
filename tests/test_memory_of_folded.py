"""How many tensors of the largest level a folded network holds at once, counted on tensors without memory.

The kernels are replaced by what they allocate, so the count is a GPU's, whatever runs this.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.vae import plan
from paravae.vae.models import flow as flow_module
from paravae.vae.models import folded


class Gauge(TorchDispatchMode):
    """Bytes of storage that tensors made in this context hold, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return out

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._holders:
            self._holders[key] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self._holders[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= size


@pytest.fixture
def kernels_that_only_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm_silu(x: Tensor, gamma: Any, bias: Any = None, residual: Any = None, *, silu: bool = True, out: Any = None):  # type: ignore[no-untyped-def]
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out

    def fused_conv(x: Tensor, weight: Any, packed: Any, bias: Any, gamma: Any = None, residual: Any = None) -> Tensor:
        return residual if gamma is None and residual is not None else torch.empty_like(x)

    def to_pixels(x: Tensor, *rest: Any, as_uint8: bool = False) -> Tensor:
        planes = torch.empty((27, *x.shape[1:4]), dtype=torch.float32, device=x.device)
        return planes[:3].new_empty((x.shape[0], 3, 1, *x.shape[2:4]), dtype=x.dtype)

    for module in (flow_module, folded):
        monkeypatch.setattr(module, "norm_silu", norm_silu)
    monkeypatch.setattr(flow_module, "fused_conv", fused_conv)
    monkeypatch.setattr(folded, "to_pixels", to_pixels)
    monkeypatch.setattr(folded, "wide_attention", lambda query, keys_values: query.new_empty(query.shape))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLQwenImage:
    with torch.device("meta"):
        return AutoencoderKLQwenImage(QwenImageVAEConfig(engine="fast")).bfloat16()


def largest(stages: plan.Stages, trace: tuple[plan.Window, ...]) -> int:
    return 2 * plan.peak_elements(stages, trace)


@pytest.mark.parametrize("size", [(128, 128), (116, 208)])
def test_decode(vae: AutoencoderKLQwenImage, size: tuple[int, int], kernels_that_only_allocate: None) -> None:
    """The stream, what a convolution reads and what it writes: three, and at 1024 x 1024 less than 0.62 GB."""
    stages = vae.engine.decoder_stages
    trace = plan.whole(stages, *size)
    latents = torch.empty((1, 16, 1, *size), dtype=torch.bfloat16, device="meta")
    next(iter(vae.engine.decode(latents, trace)))  # weights are folded
    with torch.no_grad(), Gauge() as gauge:
        (pixels,) = vae.engine.decode(latents, trace)
    assert pixels.shape == (1, 3, 1, 8 * size[0], 8 * size[1])
    assert 2.9 * largest(stages, trace) < gauge.most < 3.02 * largest(stages, trace)
    if size == (128, 128):
        assert gauge.most < 0.62e9


def test_encode(vae: AutoencoderKLQwenImage, kernels_that_only_allocate: None) -> None:
    stages = vae.engine.encoder_stages
    trace = plan.whole(stages, 1024, 1024)
    pixels = torch.empty((1, 3, 1, 1024, 1024), dtype=torch.bfloat16, device="meta")
    next(iter(vae.engine.encode_window(pixels, trace)))
    with torch.no_grad(), Gauge() as gauge:
        (features,) = vae.engine.encode_window(pixels, trace)
    assert features.shape == (1, 384, 1, 128, 128)
    assert 2.9 * largest(stages, trace) < gauge.most < 3.1 * largest(stages, trace)
