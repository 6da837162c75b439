"""What config fields may hold: for each type of field the rule in words, and a check that tidies a value up."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], Any]
"""(a value from anywhere) -> what the field holds; raises ValueError if that value is none for it."""


def width_and_height(text: str) -> tuple[int, int]:
    """ "1664x928" -> (1664, 928), in pixels.

    Raises:
        ValueError: this is no size.
    """
    if not re.fullmatch(r"[0-9]+x[0-9]+", text):
        raise ValueError(f"got {text!r}, needs WIDTHxHEIGHT in pixels, such as 1664x928")
    width, height = text.split("x")
    return int(width), int(height)


def one_of(choices: tuple[str, ...]) -> tuple[str, Check]:
    """The rule and the check of a field that has but a few values."""

    def check(value: Any) -> Any:
        if value not in choices:
            raise ValueError
        return value

    return f"one of {', '.join(choices)}", check


def _exactly(kind: type) -> Check:
    """Of values of ``kind`` itself: true is no number here, and 1 no switch."""

    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError
        return value

    return check


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return float(value)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError
    return tuple(map(_exactly(str), values))


def _or_none(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


RULES: dict[Any, tuple[str, Check]] = {
    bool: ("true or false", _exactly(bool)),
    int: ("a whole number", _exactly(int)),
    str: ("text", _exactly(str)),
    int | None: ("a whole number", _or_none(_exactly(int))),
    float | None: ("a number", _or_none(_number)),
    str | None: ("text", _or_none(_exactly(str))),
    tuple[str, ...]: ("a list of texts", _texts),
}
