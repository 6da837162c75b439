"""The fields of configs, as flags and files know them.

A *setting* is a field that users set by flag or file. Those of a nested config are named with a dot,
``trt_vae_config.strict``; what the model is (``arch_config``) comes from its checkpoint and is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any, TypeVar, get_type_hints

from paravae.configs.values import RULES, one_of

Made = TypeVar("Made")

FLAG_PREFIX = "vae-config"
NO_SETTING = "arch_config"


def option(default: Any, help: str, choices: tuple[str, ...] = (), stands_for: str | None = None) -> Any:
    """A dataclass field with the line of help that its flag shows, its choices if it has but a few, and what help
    calls its value (argparse's metavar) if not by its type."""
    return field(default=default, metadata={"help": help, "choices": choices, "stands_for": stands_for})


@dataclass(frozen=True)
class Setting:
    """``name``: dotted, as in ``trt_vae_config.strict``. ``kind``: the type of the field."""

    name: str
    kind: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    stands_for: str | None


def settings(config_class: type[Any], within: str = "") -> Mapping[str, Setting]:
    """All settings of a config class by name, those of nested configs where these stand."""
    found: dict[str, Setting] = {}
    kinds, nested = get_type_hints(config_class), _nested(config_class)
    for each in fields(config_class):
        name = within + each.name
        if each.name in nested:
            found |= settings(nested[each.name], f"{name}.")
        elif each.name != NO_SETTING:
            found[name] = Setting(name, kinds[each.name], each.default, **each.metadata)
    return found


def values_of(config: Any) -> dict[str, Any]:
    """The values of all settings of ``config`` by name."""
    return {name: attrgetter(name)(config) for name in settings(type(config))}


def make(config_class: type[Made], values: Mapping[str, Any]) -> Made:
    """The config whose settings have these ``values``, by name, and their defaults else.

    Raises:
        ValueError: a value is wrong, or they do not go together.
    """
    own = {name: value for name, value in values.items() if "." not in name}
    for name, nested in _nested(config_class).items():
        inside = {key.removeprefix(f"{name}."): values[key] for key in values if key.startswith(f"{name}.")}
        if inside:
            own[name] = make(nested, inside)
    return config_class(**own)


def flag_name(name: str, prefix: str = FLAG_PREFIX) -> str:
    """``trt_vae_config.strict`` -> ``--vae-config.trt-vae-config.strict``."""
    return f"--{prefix}.{name.replace('_', '-')}"


def check_fields(config: Any, within: str = "") -> None:
    """Raise ValueError for a value that is not of its field's type, or none of its choices.

    A list becomes the tuple, and a whole number the float, that the field holds. ``within``: the name, dot included,
    under which ``config`` stands in another.
    """
    for name, setting in settings(type(config)).items():
        if "." in name:
            continue
        value = getattr(config, name)
        rule, check = one_of(setting.choices) if setting.choices else RULES[setting.kind]
        try:
            object.__setattr__(config, name, check(value))
        except ValueError:
            raise ValueError(f"{name} ({flag_name(within + name)}) is {value!r}, needs {rule}") from None
    for name, nested in _nested(type(config)).items():
        if not isinstance(getattr(config, name), nested):
            raise ValueError(f"{name} is {getattr(config, name)!r}, needs a {nested.__name__}")


def _nested(config_class: type[Any]) -> Mapping[str, type[Any]]:
    """The configs that stand in fields of a config class, by the fields' names."""
    kinds = {name: kind for name, kind in get_type_hints(config_class).items() if name != NO_SETTING}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and is_dataclass(kind)}
