"""The flags: one for each field, SGLang's forms, and what a wrong one is told."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from typing import Any

import pytest

from paravae import QwenImageVAEConfig, VAEConfig
from paravae.configs import TrtVAEConfig
from paravae.configs.cli import add_vae_flags, flag_name, vae_config_from
from paravae.configs.fields import option, settings, values_of
from paravae.launch.cli import main
from tests.command_bench import Bench, expect_one_line


def parsed(*flags: str) -> VAEConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_vae_flags(parser, QwenImageVAEConfig)
    return vae_config_from(parser.parse_args(flags), QwenImageVAEConfig)


def test_flags_and_fields_are_one_to_one() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_vae_flags(parser, QwenImageVAEConfig)
    flags = [option for action in parser._actions for option in action.option_strings]
    own: list[str] = []
    for field in fields(QwenImageVAEConfig):
        if field.name == "trt_vae_config":
            own += [f"trt-vae-config.{inner.name}" for inner in fields(TrtVAEConfig)]
        elif field.name != "arch_config":
            own.append(field.name)
    assert flags == ["--vae-config-file", *(f"--vae-config.{name.replace('_', '-')}" for name in own)]
    assert parsed() == QwenImageVAEConfig()


@dataclass(frozen=True, kw_only=True)
class _Inner:
    size: int = option(3, "a number of things")


@dataclass(frozen=True, kw_only=True)
class _Middle:
    inner: _Inner = dataclass_field(default_factory=_Inner)
    on: bool = option(False, "whether it is")


@dataclass(frozen=True, kw_only=True)
class Deep(QwenImageVAEConfig):
    """A config with configs two deep."""

    mid_dle: _Middle = dataclass_field(default_factory=_Middle)


def test_any_nested_config_has_flags(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_vae_flags(parser, Deep)
    args = parser.parse_args(["--vae-config.mid-dle.inner.size=7", "--vae-config.mid-dle.on"])
    assert vae_config_from(args, Deep) == Deep(mid_dle=_Middle(inner=_Inner(size=7), on=True))
    assert "a number of things (default: 3)" in " ".join(parser.format_help().split())


def text_and_value(name: str, default: Any) -> tuple[str, Any]:
    """Something else than the default, as it is typed and as the config holds it."""
    words = {"parallel_decode_mode": "patch", "engine": "torch", "cost_table": "gpu.json", "vae_type": "tensorrt"}
    words |= {"trt_vae_config.trt_engine_path": "my engines", "trt_vae_config.flavour": "tensorrt_rtx"}
    strides = {"tile_sample_stride_height": 64, "tile_sample_stride_width": 64}
    if name in words:
        return words[name], words[name]
    if name == "memory_limit_gib":
        return "1.5", 1.5
    if name == "trt_vae_config.warm_up":
        return "64x32, 1664x928,64x32", ("64x32", "1664x928")
    if isinstance(default, bool):
        return str(not default).lower(), not default
    return str(strides.get(name, 320)), strides.get(name, 320)


def test_each_flag_sets_its_field_and_no_other() -> None:
    engines = "trt_vae_config.trt_engine_path"
    for name, setting in settings(QwenImageVAEConfig).items():
        text, value = text_and_value(name, setting.default)
        needed = {engines: "engines"} if name == "vae_type" else {}
        expected = {**values_of(QwenImageVAEConfig()), **needed, name: value}
        assert expected != values_of(QwenImageVAEConfig())
        also = [f"{flag_name(key)}={needed[key]}" for key in needed]
        assert values_of(parsed(*also, flag_name(name), text)) == expected
        assert values_of(parsed(*also, f"{flag_name(name)}={text}")) == expected


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["decode", "--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, setting in settings(QwenImageVAEConfig).items():
        assert flag_name(name) in text
        assert " ".join(setting.help.split()) in text.replace("data- centre", "data-centre")
    assert "--vae-config-file FILE_OR_PRESET" in text
    assert "--vae-config.trt-vae-config.trt-engine-path DIR" in text
    assert "--vae-config.trt-vae-config.warm-up WxH,WxH,..." in text
    assert "largest step between tiles, in pixels down (default: 192)" in text
    assert "share each decode among the ranks of the parallel group (default: false)" in text
    assert "build and load the encoder (default: false)" in text  # a decode needs none


@pytest.mark.parametrize(
    ("value", "expected"), [((), True), (("true",), True), (("True",), True), (("false",), False), (("FALSE",), False)]
)
def test_a_switch_stands_bare_or_has_a_value(value: tuple[str, ...], expected: bool) -> None:
    assert parsed("--vae-config.use-parallel-decode", *value).use_parallel_decode is expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vae-config.nosuch"], "unrecognized arguments: --vae-config.nosuch"),
        (["--vae-config.use-parallel"], "unrecognized arguments: --vae-config.use-parallel"),  # no abbreviations
        (["--vae-config.parallel-decode-mode", "fast"], "--vae-config.parallel-decode-mode: invalid choice: 'fast'"),
        (["--vae-config.use-parallel-decode", "yes"], "--vae-config.use-parallel-decode: got 'yes', needs true or"),
        (["--vae-config.tile-sample-min-width", "1.5"], "--vae-config.tile-sample-min-width: got '1.5', needs a whole"),
        (["--vae-config.tile-sample-min-width", "100"], "(--vae-config.tile-sample-min-width) is 100 pixels, needs a"),
        (["--vae-config.tile-sample-stride-height", "264"], "lower --vae-config.tile-sample-stride-height"),
        (["--vae-config.memory-limit-gib", "lots"], "--vae-config.memory-limit-gib: got 'lots', needs a number"),
        (["--vae-config.memory-limit-gib", "0"], "memory_limit_gib is 0.0, needs a positive number"),
        (["--vae-config.load-encoder", "--vae-config.load-decoder", "false"], "needs the decoder"),
        (["--vae-config.memory-limit-gib", "inf"], "memory_limit_gib is inf, needs a positive number"),
        (["--vae-config.vae-type", "trt"], "--vae-config.vae-type: invalid choice: 'trt'"),
        (
            ["--vae-config.vae-type", "tensorrt"],
            "needs the folder of its engines: --vae-config.trt-vae-config.trt-engin",
        ),
        (["--vae-config.trt-vae-config.strict", "on"], "--vae-config.trt-vae-config.strict: got 'on', needs true or"),
        (
            ["--vae-config.trt-vae-config.max-resident-bytes", "2G"],
            "max-resident-bytes: got '2G', needs a whole number",
        ),
        (["--vae-config.trt-vae-config.warm-up", "64x64,9"], "warm-up): got '9', needs WIDTHxHEIGHT in pixels"),
        (["--vae-config.trt-vae-config.warm-up", "1472x1140"], "has 1472x1140: width and height need to be positive m"),
        (["--vae-config.arch-config.base-dim", "8"], "unrecognized arguments: --vae-config.arch-config.base-dim"),
        (["--vae-config-file", "none.json"], "--vae-config-file none.json: cannot be read: No such file"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--height"], "--height: expected one argument"),
    ],
)
def test_a_wrong_flag_is_named(bench: Bench, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert bench.decode(*flags) == 2
    expect_one_line(capsys.readouterr().err, words)
    assert bench.written() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "COMMAND"), (["fly"], "'fly'"), (["decode"], "--latents, --output"), (["encode"], "--input, --output")],
)
def test_a_wrong_command_says_what_is_needed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == 2
    expect_one_line(capsys.readouterr().err, words)
