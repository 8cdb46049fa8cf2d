"""What errors say: the parameter's name, what arrived in short; and checks that several calls share."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class named:
    """Inside, an error about one of many things says its name first. The block may change the name.

    Example:
        >>> with named("weight") as about:
        ...     about.name = "bias"
        ...     raise ValueError("expected two dims")
        Traceback (most recent call last):
        ValueError: bias: expected two dims
    """

    __slots__ = ("name", "separator")

    def __init__(self, name: str = "", separator: str = ": "):
        self.name, self.separator = name, separator

    def __enter__(self) -> named:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        is_about_it = isinstance(error, (TypeError, ValueError, IndexError, RuntimeError)) and self.name
        if error is not None and is_about_it and error.args and isinstance(error.args[0], str):
            # In place, since not every type of exception can be made from a message alone.
            error.args = f"{self.name}{self.separator}{error.args[0]}", *error.args[1:]


def check_flags(**flags: Any) -> None:
    """Raises TypeError where a keyword's value is neither True nor False."""
    for name, value in flags.items():
        if type(value) is not bool:
            raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def shown(value: Any) -> str:
    """What a message says of a value: tensors by shape and modules by type, others in one short line."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a module of type {type(value).__name__}"
    if type(value) in (tuple, list):
        inside = ", ".join(shown(each) for each in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"({inside})" if type(value) is tuple else f"[{inside}]"
    return " ".join(reprlib.repr(value).split())


def per_name(given: Any, names: Sequence[str], what: str) -> list[Any]:
    """One value for each name: the same for all, or by name."""
    if not isinstance(given, Mapping):
        return [given] * len(names)
    unknown = [name for name in given if name not in set(names)]
    missing = [name for name in names if name not in given]
    if unknown or missing:
        trouble = f"got one for {unknown[0]!r}" if unknown else f"got none for {missing[0]!r}"
        raise ValueError(f"{what}: expected one for each of {len(names)} parameters, {trouble}")
    return [given[name] for name in names]
