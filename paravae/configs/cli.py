"""Flags generated from config fields, one for each, in SGLang's spelling: ``--vae-config.use-parallel-decode``.

argparse rather than tyro: SGLang's booleans take an optional value (``--flag``, ``--flag true``, ``--flag false``),
and its own parser is argparse, so the same two functions add these flags to it. ``--vae-config-file`` names a file
of the same settings; flags that are typed go before it, and it before defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from paravae.configs.base import VAEConfig
from paravae.configs.fields import FLAG_PREFIX, Setting, flag_name, make, settings, values_of
from paravae.configs.files import presets, read_settings

Config = TypeVar("Config", bound=VAEConfig)


@dataclass(frozen=True)
class _Default:
    """Stands for a flag that is not typed, so that a file may say otherwise. Reads as --help is to show it."""

    value: Any

    def __str__(self) -> str:
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)


def add_vae_flags(parser: argparse.ArgumentParser, config_class: type[VAEConfig], prefix: str = FLAG_PREFIX) -> None:
    """Add ``--PREFIX.field-name`` for each setting of ``config_class``, its default being the field's, and
    ``--PREFIX-file``."""
    group = parser.add_argument_group(f"how to run the VAE (--{prefix}.*)")
    group.add_argument(
        f"--{prefix}-file",
        metavar="FILE_OR_PRESET",
        help="JSON or YAML file of the settings below, or a preset "
        f"({', '.join(presets())}); flags that are given as well override it",
    )
    for setting in settings(config_class).values():
        shows_default = " (default: %(default)s)" if setting.default not in (None, ()) else ""
        group.add_argument(
            flag_name(setting.name, prefix),
            dest=_destination(setting.name, prefix),
            default=_Default(setting.default),
            help=setting.help.replace("%", "%%") + shows_default,
            **_reading(setting),
        )


def vae_config_from(args: argparse.Namespace, config_class: type[Config], prefix: str = FLAG_PREFIX) -> Config:
    """The config that the parsed flags, and the file that they name, state.

    Raises:
        ValueError: the file is missing or wrong, or the values do not go together.
    """
    flags = {name: getattr(args, _destination(name, prefix)) for name in settings(config_class)}
    values = {name: value.value for name, value in flags.items() if isinstance(value, _Default)}
    typed = {name: value for name, value in flags.items() if not isinstance(value, _Default)}
    file = getattr(args, f"{prefix}-file".replace("-", "_"))
    if file is None:
        return make(config_class, values | typed)
    try:
        values |= read_settings(file, config_class)
    except ValueError as error:
        raise ValueError(f"--{prefix}-file {file}: {error}") from error
    try:
        return make(config_class, values | typed)
    except ValueError as error:
        raise ValueError(f"{error} (some of this is said by --{prefix}-file {file})") from error


def flag_values(config: VAEConfig, prefix: str = FLAG_PREFIX) -> dict[str, Any]:
    """What every flag came to, the file's word included, by its place in the parsed arguments: for JSON records."""
    values = {_destination(name, prefix): value for name, value in values_of(config).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def set_flag_defaults(parser: argparse.ArgumentParser, prefix: str = FLAG_PREFIX, **defaults: Any) -> None:
    """Give settings, by name, other defaults for the command of ``parser``; its help shows them."""
    parser.set_defaults(**{_destination(name, prefix): _Default(value) for name, value in defaults.items()})


def boolean(text: str) -> bool:
    """argparse's type of a switch."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}, needs true or false (or nothing, which means true)")
    return text.lower() == "true"


def whole_number(text: str) -> int:
    """argparse's type of an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs a whole number") from None


def number(text: str) -> float:
    """argparse's type of a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs a number") from None


def texts(text: str) -> tuple[str, ...]:
    """argparse's type of a list, with commas between."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _destination(name: str, prefix: str) -> str:
    return f"{prefix.replace('-', '_')}.{name}"


def _reading(setting: Setting) -> dict[str, Any]:
    """How argparse is to read the value of a setting."""
    if setting.kind is bool:
        return {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    if setting.choices:
        return {"choices": setting.choices}
    readers: dict[Any, tuple[Callable[[str], Any], str]] = {
        str: (str, "TEXT"),
        int: (whole_number, "N"),
        int | None: (whole_number, "N"),
        float | None: (number, "X"),
        str | None: (str, "TEXT"),
        tuple[str, ...]: (texts, "TEXT,TEXT,..."),
    }
    if setting.kind not in readers:
        raise TypeError(f"{setting.name}: there is no flag for a field of type {setting.kind}")
    reader, metavar = readers[setting.kind]
    return {"type": reader, "metavar": setting.stands_for or metavar}
