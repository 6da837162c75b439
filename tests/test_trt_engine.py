"""Images by engines, run by a stand-in for TensorRT's runtime; and all for which PyTorch has to stand in for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paravae.vae.engines.trt.flavour import NoTensorRTError
from paravae.vae.engines.trt.manifest import manifest_path
from paravae.vae.engines.trt.runner import EngineError
from paravae.vae.engines.trt.shapes import Profile, Target
from paravae.vae.engines.trt.trt_engine import TensorRTEngine
from tests.builders import max_error, noise, pictures, small_vae
from tests.trt_engines import ANY, with_engines, write_all, write_engine
from tests.trt_fake import FakeTensorRT

SIZE = (9, 12)  # of the latents
DECODER = "vae_decoder_multi_profile.trt"


@pytest.fixture
def root(onnx_parts: Path, tmp_path: Path) -> Path:
    write_all(onnx_parts, tmp_path / "engines")
    return tmp_path / "engines"


def latents(batch: int = 1, frames: int = 1) -> torch.Tensor:
    return noise(batch, 16, frames, *SIZE)


def report(vae: Any) -> dict[str, Any]:
    assert isinstance(vae.engine, TensorRTEngine)
    return vae.engine.summary()


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_and_encode_by_engines(batch: int, root: Path) -> None:
    library = FakeTensorRT()
    vae, torch_vae = with_engines(root, library), small_vae()
    assert max_error(vae.decode(latents(batch)), torch_vae.decode(latents(batch))) <= 1e-5
    levels = vae.decode(latents(batch), output_type="uint8")
    assert max_error(levels, torch_vae.decode(latents(batch), output_type="uint8")) <= 1
    picture = pictures(batch, 3, 1, 8 * SIZE[0], 8 * SIZE[1])
    assert max_error(vae.encode(picture).mean, torch_vae.encode(picture).mean) <= 1e-5
    assert report(vae)["ran"] == {"tensorrt": 3, "pytorch": 0}
    assert library.calls.count("execute_async_v3") == 3 * batch


def test_in_parts_where_there_is_no_engine_for_the_whole(onnx_parts: Path, tmp_path: Path) -> None:
    write_all(onnx_parts, tmp_path, ["decoder_head", "decoder_tail", "encoder_body", "encoder_head"])
    vae, torch_vae = with_engines(tmp_path, FakeTensorRT()), small_vae()
    assert max_error(vae.decode(latents()), torch_vae.decode(latents())) <= 1e-5
    picture = pictures(1, 3, 1, 8 * SIZE[0], 8 * SIZE[1])
    assert max_error(vae.encode(picture).mean, torch_vae.encode(picture).mean) <= 1e-5
    assert report(vae)["ran"] == {"tensorrt": 2, "pytorch": 0}


def test_tiles_are_pictures_of_their_own(root: Path) -> None:
    sizes = {
        f"tile_sample_{what}_{side}": px for side in ("height", "width") for what, px in (("min", 64), ("stride", 48))
    }
    vae, torch_vae = with_engines(root, FakeTensorRT(), small_vae(**sizes)), small_vae(**sizes)
    z = noise(1, 16, 1, 20, 20)
    assert max_error(vae.tiled_decode(z), torch_vae.tiled_decode(z)) <= 1e-5
    assert report(vae)["ran"] == {"tensorrt": 1, "pytorch": 0}


def test_warm_up_loads(root: Path) -> None:
    vae = with_engines(root, FakeTensorRT())
    vae.warm_up([(64, 72), (96, 72)])
    assert report(vae)["ran"] == {"tensorrt": 4, "pytorch": 0}
    assert len(report(vae)["resident"]) == 2


def truncate(root: Path, library: FakeTensorRT) -> None:
    (root / DECODER).write_bytes((root / DECODER).read_bytes()[:-1])


def change_a_byte(root: Path, library: FakeTensorRT) -> None:
    blob = bytearray((root / DECODER).read_bytes())
    blob[-1] ^= 1
    (root / DECODER).write_bytes(bytes(blob))


def change_manifest(root: Path, library: FakeTensorRT) -> None:
    manifest_path(root / DECODER).write_text("{}")


def remove(root: Path, library: FakeTensorRT) -> None:
    (root / DECODER).unlink()


def fail_at(*calls: str) -> Callable[[Path, FakeTensorRT], None]:
    return lambda root, library: library.fails.update(calls)


TROUBLES: dict[str, tuple[Callable[[Path, FakeTensorRT], None], str]] = {
    "missing": (remove, "its engine is not"),
    "truncated": (truncate, "it is truncated or another's"),
    "another file": (change_a_byte, "is not the file that its manifest was written for"),
    "broken manifest": (change_manifest, "version"),
    "refused by the runtime": (
        fail_at("deserialize_cuda_engine"),
        "could not deserialize the engine: deserial",
    ),
    "no context": (fail_at("create_execution_context"), "could not make a context"),
    "no profile": (fail_at("set_optimization_profile_async"), "could not take profile 0"),
    "no shape": (fail_at("set_input_shape"), "could not take an input"),
    "no address": (fail_at("set_tensor_address"), "could not bind latents"),
    "enqueue": (fail_at("execute_async_v3"), "could not run"),
    "out of memory": (fail_at("memory"), "out of memory"),
    "not finite": (fail_at("nan"), "not finite"),
}


def only_the_decoder(onnx_parts: Path, root: Path) -> None:
    write_engine(onnx_parts, root, Target("decoder", (ANY,), DECODER))


@pytest.mark.parametrize("name", list(TROUBLES))
def test_pytorch_stands_in(name: str, onnx_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same picture as ever, the reason said once, counted each time; an error where that was asked for."""
    only_the_decoder(onnx_parts, tmp_path)
    library = FakeTensorRT()
    trouble, words = TROUBLES[name]
    trouble(tmp_path, library)
    vae = with_engines(tmp_path, library)
    with caplog.at_level(logging.WARNING):
        pixels = [vae.decode(latents()) for _ in range(2)]
    assert all(torch.equal(some, small_vae().decode(latents())) for some in pixels)
    found = report(vae)
    assert found["ran"] == {"tensorrt": 0, "pytorch": 2}
    assert words in " ".join(found["fallbacks"])
    assert sum("stands in" in record.getMessage() and words in record.getMessage() for record in caplog.records) == 1
    strict = with_engines(tmp_path, library, strict=True)
    with pytest.raises(EngineError, match="strictly, and cannot be had"):
        strict.decode(latents())


def test_what_engines_do_not_take(onnx_parts: Path, tmp_path: Path) -> None:
    write_engine(onnx_parts, tmp_path, Target("decoder", (Profile((8, 8), (8, 8), (9, 11)),), DECODER))
    vae = with_engines(tmp_path, FakeTensorRT())
    vae.decode(latents())
    assert "takes the decoder's input of 12x9" in " ".join(report(vae)["fallbacks"])
    vae.decode(latents(frames=2))
    assert "a video: engines take single frames" in report(vae)["fallbacks"]


def test_engines_of_other_weights(root: Path) -> None:
    vae = with_engines(root, FakeTensorRT())
    vae.decode(latents())
    with torch.no_grad():
        vae.decoder.conv_in.bias.add_(0.5)
    assert max_error(vae.decode(latents()), small_vae().decode(latents())) > 1e-3
    assert report(vae)["ran"] == {"tensorrt": 1, "pytorch": 1}
    assert "other weights than the decoder's" in " ".join(report(vae)["fallbacks"])


@pytest.mark.parametrize("change", [{"denormalize": True}, {"output": "uint8"}, {"batch": 2}])
def test_engines_that_do_more_than_the_network(change: dict[str, Any], onnx_parts: Path, tmp_path: Path) -> None:
    write_engine(onnx_parts, tmp_path, Target("decoder", (ANY,), DECODER), **change)
    vae = with_engines(tmp_path, FakeTensorRT())
    assert torch.equal(vae.decode(latents()), small_vae().decode(latents()))
    assert "neither before nor after" in " ".join(report(vae)["fallbacks"])


def test_without_the_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*names: str) -> Any:
        raise NoTensorRTError(f"{names[0]} cannot be imported")

    vae = with_engines(root, FakeTensorRT())
    monkeypatch.setattr(vae.engine._store, "_library", missing)
    assert torch.equal(vae.decode(latents()), small_vae().decode(latents()))
    assert "cannot be imported" in " ".join(report(vae)["fallbacks"])


def test_a_folder_of_lightx2v(onnx_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Engines without manifests are asked themselves, with a warning."""
    for folder, size in (("16_9", (116, 208)), ("1_1", SIZE)):
        target = Target("decoder", (Profile.static(size),), f"{folder}/vae_decoder.trt")
        write_engine(onnx_parts, tmp_path, target, manifest=False)
    vae = with_engines(tmp_path, FakeTensorRT(), multi_profile=False)
    assert max_error(vae.decode(latents()), small_vae().decode(latents())) <= 1e-5
    assert report(vae)["ran"] == {"tensorrt": 1, "pytorch": 0}
    assert "has no manifest" in caplog.text


def test_static_engines_come_and_go(onnx_parts: Path, tmp_path: Path) -> None:
    """By default one pair is kept; with a budget as much as it holds."""
    sizes = [(8, 8), (8, 9), (9, 8)]
    for size in sizes:
        for part, unit in (("decoder", 1), ("encoder", 8)):
            profile = Profile.static((unit * size[0], unit * size[1]))
            file = f"{size[1]}x{size[0]}/vae_{part}.trt"
            write_engine(onnx_parts, tmp_path, Target(part, (profile,), file))  # type: ignore[arg-type]
    bytes_of_all = sum(path.stat().st_size for path in tmp_path.rglob("*.trt"))
    for most, kept in ((None, 2), (bytes_of_all, 6), (1, 1)):
        vae = with_engines(tmp_path, FakeTensorRT(), multi_profile=False, max_resident_bytes=most)
        for size in (*sizes, sizes[0]):
            vae.encode(pictures(1, 3, 1, 8 * size[0], 8 * size[1]))
            vae.decode(noise(1, 16, 1, *size))
        found = report(vae)
        assert found["ran"] == {"tensorrt": 8, "pytorch": 0}
        assert len(found["resident"]) == kept
        again = [path for path, load in found["loads"].items() if load["times"] == 2]
        assert len(again) == (0 if most == bytes_of_all else 2)
