"""Manifests of TensorRT engines: what is written is read, what is not whole is refused; and folders of engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paravae.vae.engines.trt import manifest as manifests
from paravae.vae.engines.trt.directory import find_engine, read_directory
from paravae.vae.engines.trt.manifest import Manifest, ManifestError, manifest_path, read_engine, verify_manifest
from paravae.vae.engines.trt.parts import DTYPES, Part
from paravae.vae.engines.trt.shapes import Profile, multi_profiles
from tests.builders import small_vae

BLOB = b"an engine" * 99
WHOLE = Manifest(
    part="decoder",
    profiles=multi_profiles(8),
    batch=1,
    dtype="float16",
    denormalize=True,
    output="uint8",
    engine_sha256=manifests.sha256(BLOB),
    engine_bytes=len(BLOB),
    onnx_sha256="0" * 64,
    weights_sha256={"float16": "1" * 64, "bfloat16": "2" * 64, "float32": "3" * 64},
    flavour="tensorrt_rtx",
    flavour_version="1.7.1.116",
    compute_capabilities=("8.6", "8.9"),
    paravae="0.1.0",
    created="2026-11-21T22:40:17+00:00",
)


def write(path: Path, found: Manifest = WHOLE, blob: bytes = BLOB) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blob)
    manifest_path(path).write_text(found.to_json(), encoding="utf-8")
    return path


def static(part: Part, *size: int) -> Manifest:
    return replace(WHOLE, part=part, profiles=(Profile.static((size[0], size[1])),))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert Manifest.from_json(WHOLE.to_json()) == WHOLE
    engine = write(tmp_path / "vae_decoder.trt")
    assert manifest_path(engine).name == "vae_decoder.trt.json"
    assert verify_manifest(engine) == WHOLE
    assert read_engine(engine) == (WHOLE, BLOB)
    assert WHOLE.half == "decoder"
    assert not WHOLE.is_static
    assert static("encoder_body", 8, 9).is_static
    assert static("encoder_body", 8, 9).half == "encoder"


@pytest.mark.parametrize("name", [field for field in json.loads(WHOLE.to_json()) if field != "version"])
def test_no_field_may_be_missing_or_of_another_kind(name: str) -> None:
    values = json.loads(WHOLE.to_json())
    for wrong in (None, 1.5, [], {"a": 1}, -1, [[1]]):
        with pytest.raises(ManifestError, match=name):
            Manifest.from_json(json.dumps({**values, name: wrong}))
    del values[name]
    with pytest.raises(ManifestError, match=f"lacks {name}"):
        Manifest.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2, this paravae reads version 1"),
        ({"version": None}, "version None"),
        ({"more": 1}, r"unknown \['more'\]"),
        ({"part": "tail"}, "part is 'tail'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"engine_bytes": True}, "engine_bytes is True"),
        ({"engine_sha256": "0" * 63}, "engine_sha256"),
        ({"weights_sha256": {"float16": "0" * 64}}, "weights_sha256"),
        ({"profiles": [{"min": [1, 1], "opt": [2, 2]}]}, "profiles"),
        ({"profiles": [{"min": [3, 1], "opt": [2, 2], "max": [4, 4]}]}, "min <= opt <= max"),
        ({"profiles": [{"min": [1, 1], "opt": [2, 2.0], "max": [4, 4]}]}, "whole numbers"),
        ({"compute_capabilities": [8.9]}, "compute_capabilities"),
    ],
)
def test_foreign_manifests_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        Manifest.from_json(json.dumps({**json.loads(WHOLE.to_json()), **changes}))


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', WHOLE.to_json()[:-20], "\x00"])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    engine = write(tmp_path / "e.trt")
    manifest_path(engine).write_text(text)
    with pytest.raises(ManifestError, match=r"e\.trt\.json"):
        verify_manifest(engine)


def test_an_engine_that_is_not_its_manifests_is_refused(tmp_path: Path) -> None:
    engine = write(tmp_path / "e.trt")
    engine.write_bytes(BLOB[:-1])
    with pytest.raises(ManifestError, match=f"has {len(BLOB) - 1} bytes, its manifest says {len(BLOB)}"):
        verify_manifest(engine)
    engine.write_bytes(b"x" + BLOB[1:])
    with pytest.raises(ManifestError, match="not the file that its manifest was written for"):
        verify_manifest(engine)
    assert read_engine(engine, check_hash=False)[1] == b"x" + BLOB[1:]
    engine.unlink()
    with pytest.raises(ManifestError, match="cannot be read: No such file"):
        verify_manifest(engine)
    manifest_path(engine).unlink()
    with pytest.raises(ManifestError, match="has no manifest"):
        verify_manifest(engine)
    (tmp_path / "bytes.trt.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="bytes"):
        verify_manifest(tmp_path / "bytes.trt")


# -------------------------------------------------------------------------------------------------- weights


def test_weights_have_one_name_in_each_dtype_and_half() -> None:
    """However the VAE is loaded, it finds the name of its own weights; another's differ."""
    names = {half: manifests.all_weights_sha256(small_vae().state_dict(), half) for half in ("decoder", "encoder")}
    for half in ("decoder", "encoder"):
        for dtype_name, dtype in DTYPES.items():
            tensors = small_vae(dtype).state_dict()
            strided = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in tensors.items()}
            assert not strided["decoder.conv_in.weight"].is_contiguous()
            assert manifests.weights_sha256(tensors, half) == names[half][dtype_name]
            assert manifests.weights_sha256(strided, half) == names[half][dtype_name]
    assert len({name for half in names.values() for name in half.values()}) == 6


def test_each_weight_of_the_half_counts_and_no_other() -> None:
    tensors = small_vae().state_dict()
    before = {half: manifests.weights_sha256(tensors, half) for half in ("decoder", "encoder")}
    for name in ("decoder.conv_out.bias", "post_quant_conv.weight", "encoder.norm_out.gamma", "quant_conv.bias"):
        changed = {**tensors, name: tensors[name] + 1e-3}
        after = {half: manifests.weights_sha256(changed, half) for half in ("decoder", "encoder")}
        differing = [half for half in after if after[half] != before[half]]
        assert differing == ["encoder" if name.startswith(("encoder", "quant")) else "decoder"]
    assert manifests.weights_sha256(dict(reversed(tensors.items())), "decoder") == before["decoder"]


# -------------------------------------------------------------------------------------------------- folders


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "16_9/vae_decoder.trt", static("decoder", 116, 208))
    write(tmp_path / "parallel/decoder_tail_8x8.trt", static("decoder_tail", 8, 8))
    (tmp_path / "1_1").mkdir()
    (tmp_path / "1_1/vae_encoder.trt").write_bytes(BLOB)
    (tmp_path / "vae_decoder_multi_profile.trt.json").write_text(WHOLE.to_json())
    write(tmp_path / "cut/vae_decoder.trt", blob=BLOB[1:])
    (tmp_path / "stranger.trt").write_bytes(BLOB)
    (tmp_path / ".vae_decoder.1.part.trt").write_bytes(BLOB)
    (tmp_path / "notes.txt").touch()
    entries = {str(entry.path.relative_to(tmp_path)): entry for entry in read_directory(tmp_path, check_hashes=True)}
    assert list(entries) == [
        "16_9/vae_decoder.trt",
        "1_1/vae_encoder.trt",
        "cut/vae_decoder.trt",
        "parallel/decoder_tail_8x8.trt",
        "stranger.trt",
        "vae_decoder_multi_profile.trt",
    ]
    assert entries["16_9/vae_decoder.trt"].manifest == static("decoder", 116, 208)
    assert entries["1_1/vae_encoder.trt"].is_foreign
    assert entries["1_1/vae_encoder.trt"].part == "encoder"
    troubles = {name: entry.trouble for name, entry in entries.items() if entry.trouble}
    assert list(troubles) == ["cut/vae_decoder.trt", "stranger.trt", "vae_decoder_multi_profile.trt"]
    assert "truncated" in str(troubles["cut/vae_decoder.trt"])
    assert "has no manifest" in str(troubles["stranger.trt"])
    assert "its engine is not" in str(troubles["vae_decoder_multi_profile.trt"])
    assert not any(entry.is_foreign for name, entry in entries.items() if name in troubles)


def test_engines_are_taken_from_within_the_folder_only(tmp_path: Path) -> None:
    outside = write(tmp_path / "elsewhere/vae_decoder.trt")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/vae_decoder.trt").symlink_to(outside)
    (tmp_path / "root/vae_decoder.trt.json").symlink_to(manifest_path(outside))
    (entry,) = read_directory(tmp_path / "root")
    assert "leads out of" in str(entry.trouble)
    assert find_engine([entry], "decoder", (64, 64)) is None
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert read_directory(tmp_path / "link")[0].trouble is None
    with pytest.raises(FileNotFoundError, match="is no folder of engines; paravae engine build"):
        read_directory(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError):
        read_directory(outside)


def test_the_nearest_profile_of_all_engines_of_the_part_is_found(tmp_path: Path) -> None:
    write(tmp_path / "vae_decoder_multi_profile.trt")
    write(tmp_path / "0/vae_decoder.trt", replace(WHOLE, profiles=(Profile((8, 8), (240, 240), (240, 240)),)))
    write(tmp_path / "64x64/vae_decoder.trt", static("decoder", 64, 64))
    write(tmp_path / "parallel/decoder_tail_64x64.trt", static("decoder_tail", 64, 64))
    entries = read_directory(tmp_path)

    def found(part: Part, *size: int) -> tuple[str, int] | None:
        engine = find_engine(entries, part, (size[0], size[1]))
        return None if engine is None else (str(engine[0].path.relative_to(tmp_path)), engine[1])

    assert found("decoder", 64, 64) == ("64x64/vae_decoder.trt", 0)
    assert found("decoder", 64, 65) == ("vae_decoder_multi_profile.trt", 0)
    assert found("decoder", 128, 128) == ("vae_decoder_multi_profile.trt", 1)
    assert found("decoder", 239, 239) == ("0/vae_decoder.trt", 0)
    assert found("decoder", 241, 64) is None
    assert found("decoder_tail", 64, 64) == ("parallel/decoder_tail_64x64.trt", 0)
    assert found("decoder_tail", 64, 65) is None
    assert found("encoder", 64, 64) is None
