"""Engines on several ranks: each its window by head and tail, and all PyTorch as soon as one rank cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from paravae import AutoencoderKLQwenImage
from paravae.vae.engines.trt.trt_engine import TensorRTEngine
from tests.builders import digest, max_error, noise, pictures, small_vae
from tests.ranks import Rank, check, run_ranks
from tests.trt_engines import with_engines, write_all
from tests.trt_fake import FakeTensorRT

SIZE = (40, 5)  # of the latents: windows of any rank are smaller than the whole


@dataclass(frozen=True)
class Cases:
    """What ranks do with the engines of ``root``; ``parts``: a folder without those for whole pictures."""

    root: Path

    def vae(self, library: FakeTensorRT, strict: bool = False) -> AutoencoderKLQwenImage:
        shared = small_vae(use_parallel_decode=True, parallel_decode_mode="patch")
        return with_engines(self.root, library, shared, strict=strict)

    def windows(self, here: Rank) -> str:
        """One GPU's pixels, though each rank ran an engine on a window of its own."""
        vae, alone = self.vae(FakeTensorRT()), small_vae()
        z, picture = noise(1, 16, 1, *SIZE), pictures(1, 3, 1, 8 * SIZE[0], 8 * SIZE[1])
        pixels, moments = vae.decode(z), vae.encode(picture).mean
        assert vae.last_choice is not None
        assert vae.last_choice.mode == "patch"
        assert vae.last_choice.head == "own"
        assert max_error(pixels, alone.decode(z)) <= 1e-5
        assert max_error(moments, alone.encode(picture).mean) <= 1e-5
        assert report(vae)["ran"] == {"tensorrt": 2, "pytorch": 0}
        return digest(pixels, moments)

    def one_cannot(self, here: Rank, call: str, before: bool) -> str:
        """The last rank's engine fails; ``before``: as it is loaded. It is all PyTorch's then, later all TensorRT's."""
        library, alone = FakeTensorRT(), small_vae(use_parallel_decode=True, parallel_decode_mode="patch")
        vae, z, is_last = self.vae(library), noise(1, 16, 1, *SIZE), here.rank == here.size - 1
        if not before:
            vae.decode(z)
        if is_last:
            library.fails.add(call)
        pixels = vae.decode(z)
        assert max_error(pixels, alone.decode(z)) == 0
        (reason,) = report(vae)["fallbacks"]
        assert (call in reason or "finite" in reason) if is_last else reason == "another rank cannot use its engine"
        library.fails.clear()
        if not before:
            vae.decode(z)
            assert report(vae)["ran"] == {"tensorrt": 2, "pytorch": 1}
        return digest(pixels)

    def strict(self, here: Rank) -> str:
        library = FakeTensorRT(fails={"execute_async_v3"} if here.rank == 0 else set())
        vae = self.vae(library, strict=True)
        with pytest.raises(RuntimeError, match="strictly, and cannot be had"):
            vae.decode(noise(1, 16, 1, *SIZE))
        library.fails.clear()
        vae.decode(noise(1, 16, 1, *SIZE))
        return "fine"

    def all(self) -> dict[str, Callable[[Rank], object]]:
        return {
            "windows": self.windows,
            "one cannot load": partial(self.one_cannot, call="deserialize_cuda_engine", before=True),
            "one cannot run": partial(self.one_cannot, call="execute_async_v3", before=False),
            "one is not finite": partial(self.one_cannot, call="nan", before=False),
            "strict": self.strict,
        }


def report(vae: AutoencoderKLQwenImage) -> dict[str, Any]:
    assert isinstance(vae.engine, TensorRTEngine)
    return vae.engine.summary()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks(size: int, onnx_parts: Path, tmp_path: Path) -> None:
    write_all(onnx_parts, tmp_path / "engines")
    cases = Cases(tmp_path / "engines").all()
    results = run_ranks(cases, size, tmp_path / "rendezvous")
    for name in cases:
        check(results, name)
