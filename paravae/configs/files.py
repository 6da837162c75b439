"""Configs from JSON and YAML files, and the presets that ship with paravae.

A file has the fields' names, nested as the configs are; what it leaves out keeps its default:

    {"vae_type": "tensorrt", "trt_vae_config": {"trt_engine_path": "engines", "multi_profile": true}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import yaml

from paravae.configs.fields import NO_SETTING, Made, Setting, make, settings

_PRESETS = Path(__file__).parent / "presets"
_SUFFIXES = (".json", ".yaml", ".yml")


def load_vae_config(source: str | Path, config_class: type[Made]) -> Made:
    """The config that ``source`` states: a JSON or YAML file, or the name of a preset.

    Raises:
        ValueError: there is no such file or preset, or it holds no such config.
    """
    try:
        return make(config_class, read_settings(source, config_class))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_settings(source: str | Path, config_class: type[Any]) -> dict[str, Any]:
    """The settings that ``source`` states, by their dotted names; their values are checked when a config is made.

    Raises:
        ValueError: there is no such file or preset, it is not JSON or YAML, or has keys that are none of the config's.
            The caller says which ``source``.
    """
    return _once(_flat(_read(_locate(source)), settings(config_class)))


def presets() -> tuple[str, ...]:
    """The names of the presets."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix in _SUFFIXES:
        return path
    if str(source) in presets():
        return _PRESETS / f"{source}.json"
    raise ValueError(
        f"is neither a config file, whose name would end in {', '.join(_SUFFIXES)}, "
        f"nor a preset: {', '.join(presets())}"
    )


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8: {error}") from error
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, _Loader)
    except (json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses keys that stand twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            _once((key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))
        return super().construct_mapping(node, deep)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A table of ``pairs``, none of which may have the key of another."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{key!r} is given twice")
        table[key] = value
    return table


def _flat(table: Any, known: Mapping[str, Setting], within: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting in a table and in the tables within, with its dotted name."""
    if not isinstance(table, dict):
        what = f"{within.removesuffix('.')} is" if within else "holds"
        raise ValueError(f"{what} {shortened(table)}, needs names of settings with their values")
    for key, value in table.items():
        name = f"{within}{key}"
        if name in known:
            yield name, value
        elif any(other.startswith(f"{name}.") for other in known):
            yield from _flat(value, known, f"{name}.")
        elif name == NO_SETTING:
            raise ValueError(f"{name} cannot be set: what the model is comes from its checkpoint's config.json")
        else:
            raise ValueError(f"unknown key {name!r}; the nearest known one is {_nearest(name, known)!r}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like ``name``, wherever it stands."""

    def likeness(other: str) -> float:
        return max(SequenceMatcher(None, name, words).ratio() for words in (other, other.rsplit(".", 1)[-1]))

    return max(known, key=likeness)
