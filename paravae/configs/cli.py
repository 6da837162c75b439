"""Flags generated from config fields, one for each, in SGLang's spelling: ``--vae-config.use-parallel-decode``.

argparse rather than tyro: SGLang's booleans take an optional value (``--flag``, ``--flag true``, ``--flag false``),
and its own parser is argparse, so the same two functions add these flags to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar, get_type_hints

from paravae.configs.base import VAEConfig

Config = TypeVar("Config", bound=VAEConfig)

_NESTED = ("arch_config",)  # what the model is comes from its checkpoint, never from flags


def add_vae_flags(parser: argparse.ArgumentParser, config_class: type[VAEConfig], prefix: str = "vae-config") -> None:
    """Add ``--PREFIX.field-name`` for each field of ``config_class``, its default being the field's."""
    types = get_type_hints(config_class)
    group = parser.add_argument_group(f"how to run the VAE (--{prefix}.*)")
    for field in flag_fields(config_class):
        shows_default = "" if field.default is None else " (default: %(default)s)"
        group.add_argument(
            flag_name(field.name, prefix),
            dest=_destination(field.name, prefix),
            default=_as_text(field.default),
            help=field.metadata["help"].replace("%", "%%") + shows_default,
            **_reading(types[field.name], field),
        )


def vae_config_from(args: argparse.Namespace, config_class: type[Config], prefix: str = "vae-config") -> Config:
    """The config that the parsed flags state.

    Raises:
        ValueError: the values do not go together.
    """
    return config_class(**{f.name: getattr(args, _destination(f.name, prefix)) for f in flag_fields(config_class)})


def flag_fields(config_class: type[VAEConfig]) -> list[Field[Any]]:
    """The fields that have a flag."""
    return [field for field in fields(config_class) if field.name not in _NESTED]


def flag_name(field_name: str, prefix: str = "vae-config") -> str:
    return f"--{prefix}.{field_name.replace('_', '-')}"


def set_flag_defaults(parser: argparse.ArgumentParser, prefix: str = "vae-config", **defaults: Any) -> None:
    """Give fields, by name, other defaults for the command of ``parser``; its help shows them."""
    parser.set_defaults(**{_destination(name, prefix): _as_text(value) for name, value in defaults.items()})


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


def _destination(field_name: str, prefix: str) -> str:
    return f"{prefix.replace('-', '_')}.{field_name}"


def _as_text(default: Any) -> Any:
    """Switches as they are typed, which argparse reads back: so that --help says true, not True."""
    return str(default).lower() if isinstance(default, bool) else default


def _reading(annotation: Any, field: Field[Any]) -> dict[str, Any]:
    """How argparse is to read the value of a field of this type."""
    if annotation is bool:
        return {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    if field.metadata.get("choices"):
        return {"choices": field.metadata["choices"]}
    readers: dict[Any, tuple[Callable[[str], Any], str]] = {
        str: (str, "TEXT"),
        int: (whole_number, "N"),
        float: (number, "X"),
        float | None: (number, "X"),
        str | None: (str, "TEXT"),
    }
    if annotation not in readers:
        raise TypeError(f"{field.name}: there is no flag for a field of type {annotation}")
    reader, metavar = readers[annotation]
    return {"type": reader, "metavar": metavar}
