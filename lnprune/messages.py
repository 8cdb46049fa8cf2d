"""What errors say: the parameter's name, what arrived in short; and checks that several calls share."""

from __future__ import annotations

import reprlib
from typing import Any

from torch import Tensor, nn

__all__ = ["NAMED_ERRORS", "add_name", "check_flags", "shown"]

# What a call on one of many parameters raises about it, as a rule.
NAMED_ERRORS = (TypeError, ValueError, IndexError, RuntimeError)


def add_name(error: Exception, name: str) -> None:
    """Puts the name, where there is one, before the error's message."""
    # In place, since not every type of exception can be made from a message alone.
    if name and error.args and isinstance(error.args[0], str):
        error.args = f"{name}: {error.args[0]}", *error.args[1:]


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
