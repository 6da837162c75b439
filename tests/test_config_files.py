"""Configs from JSON and YAML files and from presets, alone and under flags."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from paravae import QwenImageVAEConfig, VAEConfig, WanVAEConfig
from paravae.configs import TrtVAEConfig, load_vae_config
from paravae.configs.cli import add_vae_flags, flag_values, set_flag_defaults, vae_config_from
from paravae.configs.fields import make, settings, values_of
from paravae.configs.files import presets
from tests.config_cases import ROOT, SCRIPTS, STATED, written

AS_JSON = """{
  "use_parallel_decode": true, "memory_limit_gib": 2, "vae_type": "tensorrt",
  "trt_vae_config": {"trt_engine_path": "my engines", "multi_profile": true, "warm_up": ["64x32", "1664x928"]}
}"""
AS_YAML = """
use_parallel_decode: yes  # YAML 1.1: true
memory_limit_gib: 2
vae_type: tensorrt
trt_vae_config:
  trt_engine_path: my engines
  multi_profile: on
  warm_up: [64x32, 1664x928]
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [("vae.json", AS_JSON), ("vae.yaml", AS_YAML), ("vae.yml", AS_YAML), ("vae.json", "\ufeff" + AS_JSON)],
)
def test_a_file_is_read(tmp_path: Path, name: str, text: str) -> None:
    config = load_vae_config(written(tmp_path, text, name), QwenImageVAEConfig)
    assert config == STATED
    assert type(config) is QwenImageVAEConfig
    assert load_vae_config(tmp_path / name, WanVAEConfig).trt_vae_config == STATED.trt_vae_config
    assert isinstance(config.memory_limit_gib, float)
    hash(config)  # lists have become tuples


def test_a_relative_folder_is_the_working_directorys_not_the_files(tmp_path: Path) -> None:
    """As in a flag; a preset, which lies within the package, could not name the user's folder else."""
    (tmp_path / "configs").mkdir()
    text = '{"trt_vae_config": {"trt_engine_path": "engines"}, "cost_table": "gpu.json"}'
    config = load_vae_config(written(tmp_path / "configs", text), VAEConfig)
    assert (config.trt_vae_config.trt_engine_path, config.cost_table) == ("engines", "gpu.json")


def test_an_empty_table_is_the_default(tmp_path: Path) -> None:
    assert load_vae_config(written(tmp_path, "{}"), VAEConfig) == VAEConfig()


@pytest.mark.parametrize("name", ["vae.json", "vae.yaml"])
def test_every_setting_can_stand_in_a_file(tmp_path: Path, name: str) -> None:
    """What is written from a config gives that config."""
    nested: dict[str, object] = {}
    for key, value in values_of(STATED).items():
        head, _, inside = key.partition(".")
        stored = list(value) if isinstance(value, tuple) else value
        if inside:
            nested.setdefault(head, {})[inside] = stored  # type: ignore[index]
        else:
            nested[key] = stored
    text = json.dumps(nested) if name.endswith("json") else yaml.safe_dump(nested)
    assert load_vae_config(written(tmp_path, text, name), QwenImageVAEConfig) == STATED
    assert make(QwenImageVAEConfig, values_of(STATED)) == STATED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"vae_typ": "tensorrt"}', ("unknown key 'vae_typ'", "known one is 'vae_type'")),
        (
            '{"trt_vae_config": {"multi-profile": true}}',
            ("'trt_vae_config.multi-profile'", "'trt_vae_config.multi_prof"),
        ),
        ('{"trt_engine_path": "x"}', ("unknown key 'trt_engine_path'", "is 'trt_vae_config.trt_engine_path'")),
        ('{"strikt": true}', ("known one is 'trt_vae_config.strict'",)),
        ('{"arch_config": {"base_dim": 8}}', ("arch_config cannot be set", "checkpoint's config.json")),
        ('{"vae_type": "trt"}', ("vae_type (--vae-config.vae-type) is 'trt'", "one of pytorch, tensorrt")),
        ('{"vae_type": "tensorrt"}', ("--vae-config.trt-vae-config.trt-engine-path DIR",)),
        ('{"use_tiling": "no"}', ("use_tiling (--vae-config.use-tiling) is 'no'", "true or false")),
        ('{"use_tiling": 1}', ("is 1, needs true or false",)),
        ('{"use_tiling": null}', ("is None, needs true or false",)),
        ('{"cuda_graphs": true}', ("cuda_graphs", "is True, needs a whole number")),
        ('{"cuda_graphs": 2.0}', ("is 2.0, needs a whole number",)),
        ('{"cuda_graphs": -1}', ("is -1, needs 0 or more",)),
        ('{"memory_limit_gib": "2"}', ("memory_limit_gib", "is '2', needs a number")),
        ('{"memory_limit_gib": Infinity}', ("memory_limit_gib is inf",)),
        ('{"trt_vae_config": {"strict": "on"}}', ("(--vae-config.trt-vae-config.strict) is 'on', needs true or",)),
        ('{"trt_vae_config": {"trt_engine_path": 16}}', ("is 16, needs text",)),
        ('{"trt_vae_config": {"warm_up": "64x64"}}', ("warm_up", "is '64x64', needs a list of texts")),
        ('{"trt_vae_config": {"warm_up": [[64, 64]]}}', ("is [[64, 64]], needs a list of texts",)),
        ('{"trt_vae_config": {"warm_up": ["64"]}}', ("warm-up): got '64', needs WIDTHxHEIGHT",)),
        ('{"trt_vae_config": true}', ("trt_vae_config is True, needs names of settings",)),
        ('{"vae_type": "pytorch", "vae_type": "tensorrt"}', ("'vae_type' is given twice",)),
        ('{"trt_vae_config": {"strict": true}, "trt_vae_config.strict": false}', ("strict' is given twice",)),
        ("[]", ("holds [], needs names of settings",)),
        ("", ("is not JSON: Expecting value: line 1",)),
        ('{"vae_type": "pytorch"', ("is not JSON",)),
        (b'{"vae_type": "\xff"}', ("is not text in UTF-8",)),
        ("[" * 100_000, ("is not JSON", "recursion")),
    ],
    ids=lambda value: str(value)[:60] if not isinstance(value, tuple) else "",
)
def test_a_wrong_file_is_told_so(tmp_path: Path, text: str | bytes, words: tuple[str, ...]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is checked below
        load_vae_config(path, VAEConfig)
    assert str(caught.value).startswith(f"{path}: ")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vae_type: on", ("vae_type (--vae-config.vae-type) is True, needs one of pytorch, tensorrt",)),
        ("trt_vae_config: {trt_engine_path: no}", ("trt_engine_path", "is False, needs text")),
        ("trt_vae_config: {trt_engine_path: 2026-11-21}", ("datetime.date(2026, 11, 21), needs text",)),
        ("trt_vae_config: {max_resident_bytes: 2e9}", ("max_resident_bytes", "is '2e9', needs a whole number")),
        ("on: true", ("unknown key 'True'",)),
        ("use_tiling: true\nuse_tiling: false", ("'use_tiling' is given twice",)),
        ("", ("holds None, needs names of settings",)),
        ("vae_type: [", ("is not YAML",)),
        ("vae_type: pytorch\n---\nvae_type: tensorrt", ("is not YAML", "single document")),
        ("cost_table: !!python/object/apply:os.getcwd []", ("is not YAML", "could not determine a constructor")),
        ("&a {trt_vae_config: *a}", ("unknown key 'trt_vae_config.trt_vae_config'",)),
    ],
)
def test_what_yaml_makes_of_a_word_is_checked(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is checked below
        load_vae_config(written(tmp_path, text, "vae.yaml"), VAEConfig)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.json", "nowhere.json: cannot be read: No such file"),
        ("folder.json", "folder.json: cannot be read: Is a directory"),
        (
            "vae.toml",
            "vae.toml: is neither a config file, whose name would end in .json, .yaml, .yml, nor a preset: qwen",
        ),
        ("qwen_image", "nor a preset: qwen_image_i2i_multi_profile, qwen_image_t2i_static"),
        ("../presets/qwen_image_t2i_static", "is neither a config file"),
    ],
)
def test_a_source_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is checked below
        load_vae_config(source, VAEConfig)
    assert words in str(caught.value)


# ---------------------------------------------------------------------------------------------------- presets


def test_presets() -> None:
    """LightX2V's two: static engines for text to image, multi-profile ones for image to image."""
    assert presets() == ("qwen_image_i2i_multi_profile", "qwen_image_t2i_static")
    for name, multi in zip(presets(), (True, False), strict=True):
        config = load_vae_config(name, QwenImageVAEConfig)
        engines = TrtVAEConfig(trt_engine_path="engines", multi_profile=multi)
        assert config == QwenImageVAEConfig(vae_type="tensorrt", trt_vae_config=engines)


def test_presets_and_scripts_are_packaged(tmp_path: Path) -> None:
    """An installed paravae has them, too."""
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "build_py", "--build-lib", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    for path in (*(ROOT / "paravae/configs/presets").iterdir(), *SCRIPTS.iterdir()):
        assert (tmp_path / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


# ------------------------------------------------------------------------------------------------ under flags


def parsed(*flags: str, **command_defaults: object) -> QwenImageVAEConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_vae_flags(parser, QwenImageVAEConfig)
    set_flag_defaults(parser, **command_defaults)
    return vae_config_from(parser.parse_args(flags), QwenImageVAEConfig)


@pytest.mark.parametrize("file_first", [True, False])
def test_flags_that_are_typed_go_before_the_file(tmp_path: Path, file_first: bool) -> None:
    """Even where they say what is the default anyway, and wherever they stand."""
    file = ("--vae-config-file", written(tmp_path, AS_JSON))
    assert parsed(*file) == STATED

    def together(*flags: str) -> QwenImageVAEConfig:
        return parsed(*file, *flags) if file_first else parsed(*flags, *file)

    assert together("--vae-config.vae-type", "pytorch") == replace(STATED, vae_type="pytorch")
    assert together("--vae-config.use-parallel-decode=false") == replace(STATED, use_parallel_decode=False)
    engines = replace(STATED.trt_vae_config, multi_profile=False, strict=True, warm_up=())
    flags = ("multi-profile=false", "strict", "warm-up=")
    typed = together(*(f"--vae-config.trt-vae-config.{flag}" for flag in flags))
    assert typed == replace(STATED, trt_vae_config=engines)


def test_the_file_goes_before_the_commands_defaults(tmp_path: Path) -> None:
    file = ("--vae-config-file", written(tmp_path, '{"load_encoder": true}'))
    assert parsed(load_encoder=False).load_encoder is False
    assert parsed(*file, load_encoder=False, use_tiling=True) == QwenImageVAEConfig(use_tiling=True)
    assert parsed(*file, "--vae-config.load-encoder=false").load_encoder is False


def test_the_last_file_counts(tmp_path: Path) -> None:
    """So the scripts' preset gives way."""
    file = written(tmp_path, '{"use_tiling": true}')
    flags = ("--vae-config-file", "qwen_image_t2i_static", "--vae-config-file", file)
    assert parsed(*flags) == QwenImageVAEConfig(use_tiling=True)


def test_a_flag_may_complete_the_file(tmp_path: Path) -> None:
    file = ("--vae-config-file", written(tmp_path, '{"vae_type": "tensorrt"}'))
    with pytest.raises(ValueError, match=r"trt-engine-path DIR.* \(some of this is said by --vae-config-file .*json"):
        parsed(*file)
    assert parsed(*file, "--vae-config.trt-vae-config.trt-engine-path", "e").trt_vae_config.trt_engine_path == "e"


def test_records_have_what_the_flags_came_to(tmp_path: Path) -> None:
    config = parsed("--vae-config-file", written(tmp_path, AS_JSON), "--vae-config.cuda-graphs", "3")
    values = flag_values(config)
    assert len(values) == len(settings(QwenImageVAEConfig))
    assert values["vae_config.trt_vae_config.trt_engine_path"] == "my engines"
    assert (values["vae_config.cuda_graphs"], values["vae_config.use_tiling"]) == (3, False)
    json.dumps(values)
