"""The fields of a JSON document, checked: errors say which field, what was wanted and what is there."""

from __future__ import annotations

import math
import numbers
import reprlib
import sys
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

# Numbers that JSON has no word for, as files spell them.
NOT_FINITE = ("inf", "-inf", "nan")
_LARGEST = sys.float_info.max


def plain(value: Any) -> Any:
    """What JSON has words for: a number that is not finite as a string, other objects as their number."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else str(float(value))


def typed(values: dict[str, Any], key: str, *kinds: type) -> Any:
    """The value of a key, which is of one of these types."""
    if key not in values:
        raise ValueError(f"{key}: it is missing")
    value = values[key]
    if type(value) not in kinds:
        raise ValueError(
            f"{key}: expected {' or '.join(kind.__name__ for kind in kinds)}, got {reprlib.repr(value)}"
        )
    if (type(value) is float and not math.isfinite(value)) or (
        type(value) is int and abs(value) > _LARGEST
    ):
        raise ValueError(f"{key}: expected a finite number, got {reprlib.repr(value)}")
    return value


def count(values: dict[str, Any], key: str, least: int = 0) -> int:
    count: int = typed(values, key, int)
    if count < least:
        raise ValueError(f"{key}: expected {least} or more, got {reprlib.repr(count)}")
    return count


def word(values: dict[str, Any], key: str, known: Iterable[str]) -> str:
    word: str = typed(values, key, str)
    if word not in known:
        raise ValueError(f"{key}: expected {' or '.join(map(repr, known))}, got {reprlib.repr(word)}")
    return word


def list_of(values: dict[str, Any], key: str, kind: type) -> list[Any]:
    found: list[Any] = typed(values, key, list)
    for value in found:
        if type(value) is not kind:
            raise ValueError(f"{key}: expected a list of {kind.__name__}, got {reprlib.repr(value)} in it")
    return found


def number(values: dict[str, Any], key: str) -> float | None:
    value = typed(values, key, float, int, str, NoneType)
    if isinstance(value, str):
        word(values, key, NOT_FINITE)
    return None if value is None else float(value)
