"""The flags: one for each field, SGLang's forms, and what a wrong one is told."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

import pytest

from paravae import QwenImageVAEConfig, VAEConfig
from paravae.configs.cli import add_vae_flags, flag_fields, flag_name, vae_config_from
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
    own = [field.name for field in fields(QwenImageVAEConfig) if field.name != "arch_config"]
    assert flags == [f"--vae-config.{name.replace('_', '-')}" for name in own]
    assert parsed() == QwenImageVAEConfig()


def test_each_flag_sets_its_field_and_no_other() -> None:
    values = {"tile_sample_stride_height": "64", "tile_sample_stride_width": "64", "memory_limit_gib": "1.5"}
    for field in flag_fields(QwenImageVAEConfig):
        if field.name in ("parallel_decode_mode", "engine", "cost_table"):
            text = value = {"parallel_decode_mode": "patch", "engine": "torch", "cost_table": "gpu.json"}[field.name]
        elif isinstance(field.default, bool):
            text, value = str(not field.default).lower(), not field.default
        else:
            text = values.get(field.name, "320")
            value = float(text) if "." in text else int(text)
        expected = replace(QwenImageVAEConfig(), **{field.name: value})
        assert parsed(flag_name(field.name), text) == expected
        assert parsed(f"{flag_name(field.name)}={text}") == expected


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["decode", "--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in flag_fields(QwenImageVAEConfig):
        assert flag_name(field.name) in text
        assert " ".join(field.metadata["help"].split()) in text
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
