"""Engines as the real TensorRT-RTX builder makes them, which needs no GPU: files, manifests, progress and failures.

Whether an engine computes what its graph does, only a GPU can say (``paravae engine verify``); what is read back here
is what the builder was told: the network's input and output, and the profiles.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paravae.files import whole_file
from paravae.vae.engines.trt import build as build_module
from paravae.vae.engines.trt import flavour as flavour_module
from paravae.vae.engines.trt.build import BuildOptions, Built, Source, build_engine, estimated_bytes
from paravae.vae.engines.trt.flavour import BuildError, Flavour, NetworkBuild, NoTensorRTError, find_flavour
from paravae.vae.engines.trt.manifest import all_weights_sha256, manifest_path, read_engine, sha256
from paravae.vae.engines.trt.parts import ExportOptions
from paravae.vae.engines.trt.shapes import Profile, multi_profile_target, static_target, window_targets
from tests.builders import small_vae

pytest.importorskip("onnx", reason="needs onnx, of paravae[tensorrt]")
pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX's wheels, which are for Linux on x86-64 only")

RTX = BuildOptions(compute_capabilities=("8.6", "8.9", "12.0"))
OPTIONS = ExportOptions("float16", denormalize=False, output="uint8")
STATIC = static_target("decoder", (128, 192), 8)
TWO = (Profile((8, 8), (16, 16), (32, 32)), Profile((8, 8), (16, 32), (64, 64)))


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return find_flavour("tensorrt_rtx")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The small VAE's decoder, of any height and width."""
    from paravae.vae.engines.trt.export import export_onnx

    path, vae = tmp_path_factory.mktemp("onnx") / "decoder.onnx", small_vae()
    export_onnx(vae, "decoder", path, options=OPTIONS, size=(16, 24), dynamic=True)
    return Source(path, OPTIONS, all_weights_sha256(vae.state_dict(), "decoder"), "0.1.0")


@pytest.fixture(scope="module")
def static(flavour: Flavour, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_engine(flavour, source, STATIC, tmp_path_factory.mktemp("engines"), RTX)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------- what is made


def test_an_engine_and_its_manifest_are_what_was_asked_for(static: Built, source: Source, flavour: Flavour) -> None:
    manifest, blob = read_engine(static.path)
    assert manifest == static.manifest
    assert static.path.parts[-2:] == ("192x128", "vae_decoder.trt")
    assert files(static.path.parent) == ["vae_decoder.trt", "vae_decoder.trt.json"]
    assert b"vtrt" in blob[:64]
    assert manifest.engine_bytes == len(blob) > 100_000
    assert manifest.profiles == (Profile.static((16, 24)),)
    assert manifest.onnx_sha256 == sha256(source.onnx.read_bytes())
    assert manifest.weights_sha256 == all_weights_sha256(small_vae().state_dict(), "decoder")
    assert (manifest.part, manifest.dtype, manifest.output, manifest.denormalize) == (
        "decoder", "float16", "uint8", False,
    )  # fmt: skip
    assert (manifest.flavour, manifest.flavour_version) == ("tensorrt_rtx", flavour.module.__version__)
    assert manifest.compute_capabilities == ("8.6", "8.9", "12.0")
    assert static.seconds > 0


def test_a_static_engine_is_of_a_static_network(flavour: Flavour, source: Source) -> None:
    network = NetworkBuild(flavour, source.onnx)
    assert network.ports == (
        ("latents", (1, 16, -1, -1), "HALF"),
        ("pixels", (1, -1, -1, 3), "UINT8"),
    )
    network.take(STATIC.profiles)
    assert network.ports == (
        ("latents", (1, 16, 16, 24), "HALF"),
        ("pixels", (1, 128, 192, 3), "UINT8"),
    )


def test_profiles_reach_the_builder(flavour: Flavour, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from the very objects that the builder was given."""
    added: list[Any] = []
    network = NetworkBuild(flavour, source.onnx)
    config = network._config
    spy = SimpleNamespace(add_optimization_profile=lambda p: added.append(p) or config.add_optimization_profile(p))
    monkeypatch.setattr(network, "_config", spy)
    network.take(TWO)
    shapes = [[tuple(shape) for shape in profile.get_shape("latents")] for profile in added]
    assert shapes == [[(1, 16, *end) for end in (profile.min, profile.opt, profile.max)] for profile in TWO]
    assert config.num_optimization_profiles == 2


def test_engines_of_many_profiles_and_of_windows(flavour: Flavour, source: Source, tmp_path: Path) -> None:
    """More profiles make a larger file, over the one set of weights."""
    multi = dataclasses.replace(multi_profile_target("decoder", 8), profiles=TWO)
    (window,) = window_targets([("decoder", (9, 7))])
    built = [build_engine(flavour, source, target, tmp_path, RTX) for target in (multi, window)]
    assert files(tmp_path) == [
        "parallel/decoder_7x9.trt",
        "parallel/decoder_7x9.trt.json",
        "vae_decoder_multi_profile.trt",
        "vae_decoder_multi_profile.trt.json",
    ]
    assert [read_engine(engine.path)[0].profiles for engine in built] == [TWO, (Profile.static((9, 7)),)]
    assert built[0].manifest.engine_bytes > built[1].manifest.engine_bytes
    parameters = source.onnx.stat().st_size // 2
    for engine, target in zip(built, (multi, window), strict=True):
        assert 1 / 3 < estimated_bytes(parameters, "float16", target) / engine.manifest.engine_bytes < 3


def test_what_is_asked_of_the_builder_is_set(flavour: Flavour, source: Source) -> None:
    network, trt = NetworkBuild(flavour, source.onnx), flavour.module
    network.set_level(1)
    network.limit_workspace(3 << 20)
    network.set_targets(("7.5", "12.0"))
    config = network._config
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 3 << 20
    assert [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)] == [
        trt.ComputeCapability.SM75,
        trt.ComputeCapability.SM120,
    ]
    assert network._network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_a_build_takes_the_place_of_the_last_one(flavour: Flavour, source: Source, tmp_path: Path) -> None:
    first = build_engine(flavour, source, STATIC, tmp_path, RTX)
    other = dataclasses.replace(RTX, compute_capabilities=("8.9",))
    second = build_engine(flavour, source, STATIC, tmp_path, other)
    assert first.path == second.path
    assert read_engine(first.path)[0].compute_capabilities == ("8.9",)
    assert files(tmp_path) == ["192x128/vae_decoder.trt", "192x128/vae_decoder.trt.json"]


def test_progress_rises_to_the_end_and_can_be_stopped(flavour: Flavour, source: Source, tmp_path: Path) -> None:
    told: list[float] = []
    build_engine(flavour, source, STATIC, tmp_path, RTX, told.append)
    assert len(told) > 5
    assert told == sorted(told)
    assert 0 <= told[0] < 0.5
    assert told[-1] == 1

    def interrupt(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(flavour, source, STATIC, tmp_path / "stopped", RTX, interrupt)
    assert files(tmp_path / "stopped") == []


def test_the_timing_cache_of_a_flavour_that_keeps_one(
    flavour: Flavour, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT-RTX has the calls, though they have no effect on its engines: so the file is real, and what is in it."""
    cache = tmp_path / "timings.bin"
    options = dataclasses.replace(RTX, timing_cache=cache)
    build_engine(flavour, source, STATIC, tmp_path / "rtx", options)
    assert not cache.exists()

    monkeypatch.setattr(Flavour, "keeps_timing_cache", True)
    begun: list[bytes] = []
    use = NetworkBuild.use_timing_cache

    def use_own(self: NetworkBuild, blob: bytes) -> bool:
        begun.append(blob)
        return use(self, blob) and blob != b"of another GPU"  # TensorRT-RTX takes any, as empty

    monkeypatch.setattr(NetworkBuild, "use_timing_cache", use_own)
    build_engine(flavour, source, STATIC, tmp_path / "first", options)
    kept = cache.read_bytes()
    build_engine(flavour, source, STATIC, tmp_path / "second", options)
    assert begun == [b"", kept]
    assert len(kept) > 0
    cache.write_bytes(b"of another GPU")
    build_engine(flavour, source, STATIC, tmp_path / "third", options)
    assert begun[2:] == [b"of another GPU", b""]
    assert "begun anew" in caplog.text
    assert files(tmp_path)[-1] == "timings.bin"


@pytest.mark.slow
def test_the_full_size_decoder(flavour: Flavour, tmp_path: Path) -> None:
    """9 profiles of 50 MB of weights: they are in the file once."""
    from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
    from paravae.vae.engines.trt.export import export_onnx

    vae, path = AutoencoderKLQwenImage(QwenImageVAEConfig(load_encoder=False)), tmp_path / "decoder.onnx"
    export_onnx(vae, "decoder", path, options=ExportOptions(), size=(16, 24), dynamic=True)
    source = Source(path, ExportOptions(), all_weights_sha256(vae.state_dict(), "decoder"), "0.1.0")
    for target in (multi_profile_target("decoder", 8), static_target("decoder", (928, 1664), 8)):
        built = build_engine(flavour, source, target, tmp_path, RTX)
        assert path.stat().st_size < built.manifest.engine_bytes < 2 * path.stat().st_size
        estimate = estimated_bytes(path.stat().st_size // 2, "float16", target)
        assert 0.8 < estimate / built.manifest.engine_bytes < 1.25


# --------------------------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize("content", [b"", b"no graph", None])
def test_what_is_no_graph_is_refused(flavour: Flavour, tmp_path: Path, content: bytes | None, source: Source) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(source.onnx.read_bytes()[:-1000] if content is None else content)
    bad = dataclasses.replace(source, onnx=path)
    words = r"bad\.onnx has not one input" if content == b"" else r"TensorRT cannot read .*bad\.onnx: .*Failed to parse"
    with pytest.raises(BuildError, match=words):  # an empty file is a graph to TensorRT
        build_engine(flavour, bad, STATIC, tmp_path / "engines", RTX)
    assert not (tmp_path / "engines").exists()


def test_what_tensorrt_refuses_is_said_in_its_words(flavour: Flavour, source: Source, tmp_path: Path) -> None:
    """And the next build is not troubled by it."""
    for options, words in (
        (dataclasses.replace(RTX, workspace_bytes=1), "within workspace limit"),
        (dataclasses.replace(RTX, compute_capabilities=("7.5", "8.9")), None),
    ):
        if words is None:
            assert build_engine(flavour, source, STATIC, tmp_path, options).manifest.engine_bytes
            continue
        with pytest.raises(BuildError, match=words):
            build_engine(flavour, source, STATIC, tmp_path, options)
        assert files(tmp_path) == []
    assert flavour.complaints() == ""


def test_profiles_that_the_network_cannot_take(flavour: Flavour, source: Source, tmp_path: Path) -> None:
    network = NetworkBuild(flavour, source.onnx)
    network.take(STATIC.profiles)
    with pytest.raises(BuildError, match=r"the network takes \(16, 24\), not \(9, 7\)"):
        network.take([Profile.static((9, 7))])
    huge = Profile((8, 8), (2**31, 8), (2**31, 8))
    with pytest.raises(BuildError, match="TensorRT cannot take the profile"):
        NetworkBuild(flavour, source.onnx).take([huge])


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_what_was_there(
    flavour: Flavour, source: Source, static: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """``failing``: the write that finds no space, of the engine or of the manifest."""
    before = build_engine(flavour, source, STATIC, tmp_path, RTX)
    kept = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    name = ("write_bytes", "write_text")[failing - 1]

    def full(self: Path, *args: object, **options: object) -> int:
        with self.open("wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, name, full)
    for root in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            build_engine(flavour, source, STATIC, root, RTX)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == kept
    assert read_engine(before.path)[0] == before.manifest


def test_a_manifest_never_comes_before_its_engine(
    flavour: Flavour, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = build_module.whole_file.__globals__["os"].replace
    monkeypatch.setattr("paravae.files.os.replace", lambda a, b: order.append(Path(b).name) or replace(a, b))
    built = build_engine(flavour, source, STATIC, tmp_path, RTX)
    assert order == ["vae_decoder.trt", "vae_decoder.trt.json"]
    assert whole_file is build_module.whole_file
    assert manifest_path(built.path).is_file()


# ------------------------------------------------------------------------------------------------ the flavours


def test_flavours_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"lib{name}.so: cannot open") if "rtx" in name else ImportError(f"no {name}")

    monkeypatch.setattr(flavour_module, "import_module", missing)
    monkeypatch.setattr(flavour_module, "_imported", flavour_module._imported.__wrapped__)  # not what is kept
    with pytest.raises(NoTensorRTError, match=r"no tensorrt.*libtensorrt_rtx\.so.*pip install 'paravae\[tensorrt"):
        find_flavour()
    with pytest.raises(NoTensorRTError, match="there is no flavour 'onnx'"):
        find_flavour("onnx")


def test_the_wheels_own_module_does_for_a_missing_package(flavour: Flavour) -> None:
    assert flavour.module.__name__ in ("tensorrt_rtx", "tensorrt_rtx_bindings")
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(flavour.targets)
    assert not flavour.keeps_timing_cache
    assert dataclasses.replace(flavour, name="tensorrt").targets == ()


def test_messages_are_logged_and_errors_kept_once(flavour: Flavour, caplog: pytest.LogCaptureFixture) -> None:
    severity = flavour.module.ILogger.Severity
    flavour.complaints()
    with caplog.at_level(logging.DEBUG, "paravae.tensorrt"):
        for level, text in (
            (severity.ERROR, "bad"), (severity.ERROR, "bad"), (severity.INTERNAL_ERROR, "worse"),
            (severity.WARNING, "odd"), (severity.INFO, "fine"),
        ):  # fmt: skip
            flavour.logger.log(level, text)
    assert flavour.complaints() == "bad; worse"
    assert flavour.complaints() == ""
    levels = {record.getMessage(): record.levelno for record in caplog.records}
    assert levels["odd"] == logging.WARNING
    assert levels["fine"] == levels["bad"] == logging.DEBUG


def test_a_handler_that_fails_does_not_reach_tensorrt(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flavour_module.logger, "log", fail)
    flavour.logger.log(flavour.module.ILogger.Severity.WARNING, "odd")
    assert "could not be logged" in flavour.complaints()


def test_a_builder_that_cannot_be_made(flavour: Flavour, source: Source) -> None:
    """As the data-centre flavour's, where there is no GPU."""

    def refuse(logger: Any) -> Any:
        logger.log(flavour.module.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    without = SimpleNamespace(**{name: getattr(flavour.module, name) for name in dir(flavour.module)})
    without.Builder = refuse
    with pytest.raises(BuildError, match="cannot make a builder: CUDA initialization failure"):
        NetworkBuild(dataclasses.replace(flavour, module=without), source.onnx)
