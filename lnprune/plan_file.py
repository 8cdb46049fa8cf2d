"""The file of a plan: one entry per parameter, as JSON with a version."""

from __future__ import annotations

import json
import math
import numbers
import os
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any, NamedTuple

from lnprune.atomic_file import replacing

__all__ = ["PlanEntry", "SavedPlan", "document", "read", "write"]

_FORMAT = "lnprune plan"
_VERSION = 1


@dataclass(frozen=True)
class PlanEntry:
    """What a plan does to one parameter.

    ``kept`` and ``channels`` are channels; channels pruned before the plan are not among the kept ones.
    ``norm_at_cut`` is the norm of the last channel (or group) that is kept, None if none is;
    ``margin`` is how much it is larger than that of the first one that is pruned, None if none is.
    ``parameters_removed`` are elements of the weight that the plan prunes, of those left so far.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    channels: int
    kept: int
    norm_at_cut: float | None
    margin: float | None
    parameters_removed: int


class SavedPlan(NamedTuple):
    """What a file says."""

    n: Any
    selection: dict[str, Any]
    entries: list[PlanEntry]
    names: list[list[str]]  # of each parameter, the first of them its entry's
    pruned: list[list[int]]


def document(
    n: Any,
    selection: Mapping[str, Any],
    entries: list[PlanEntry],
    names: list[list[str]],
    pruned: list[list[int]],
) -> dict[str, Any]:
    """A plan as numbers, strings, lists and dicts."""
    parameters = []
    for entry, known, indices in zip(entries, names, pruned, strict=True):
        values = asdict(entry)
        values["shared_with"] = known[1:]
        values["shape"] = list(entry.shape)
        for key in ("norm_at_cut", "margin"):
            values[key] = _plain(values[key])
        values["pruned"] = indices
        parameters.append(values)
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "n": _plain(n),
        "selection": _plain(selection),
        "parameters": parameters,
    }


def write(path: str | os.PathLike[str], head: dict[str, Any]) -> None:
    """Writes a document as JSON, whole or not at all; a line for each parameter, as channels are many."""
    head = dict(head)
    lines = ",\n  ".join(json.dumps(values, allow_nan=False) for values in head.pop("parameters"))
    start = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    text = f'{start},\n "parameters": [\n  {lines}\n ]\n}}\n'
    with replacing(path) as file:
        file.write(text.encode())


def read(path: str | os.PathLike[str]) -> SavedPlan:
    """Reads a file and checks every field of it; raises ValueError with the path."""
    try:
        saved = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a plan as JSON: {error}") from None
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected JSON of the format {_FORMAT!r}")
    if saved.get("version") != _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION} of a plan, got {saved.get('version')!r}")
    try:
        entries, names = _entries_of(saved)
        n, selection = _typed(saved, "n", str, int, float, bool, NoneType), _typed(saved, "selection", dict)
        for key in ("amount", "group_size"):
            selection[key]
    except (KeyError, TypeError, ValueError) as error:
        trouble = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: the plan is damaged: {trouble}") from error
    if n in ("inf", "-inf"):
        n = float(n)
    return SavedPlan(n, selection, entries, names, [values["pruned"] for values in saved["parameters"]])


def _plain(value: Any) -> Any:
    """What JSON has words for: a number that is not finite as a string, other objects as their number."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else str(float(value))


def _typed(values: Any, key: str, *kinds: type) -> Any:
    """The value of a key, which is of one of these types."""
    value = values[key]
    if type(value) not in kinds:
        raise TypeError(f"{key}: expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
    return value


def _list_of(values: Any, key: str, kind: type) -> list[Any]:
    found: list[Any] = _typed(values, key, list)
    for value in found:
        if type(value) is not kind:
            raise TypeError(f"{key}: expected a list of {kind.__name__}, got {value!r} in it")
    return found


def _number(values: Any, key: str) -> float | None:
    value = _typed(values, key, float, int, str, NoneType)
    return None if value is None else float(value)


def _entries_of(saved: dict[str, Any]) -> tuple[list[PlanEntry], list[list[str]]]:
    """The entries of a plan that was read, and the names of each parameter."""
    entries, names = [], []
    for values in _typed(saved, "parameters", list):
        entry = PlanEntry(
            _typed(values, "name", str),
            tuple(_list_of(values, "shape", int)),
            _typed(values, "dim", int),
            _typed(values, "channels", int),
            _typed(values, "kept", int),
            _number(values, "norm_at_cut"),
            _number(values, "margin"),
            _typed(values, "parameters_removed", int),
        )
        entries.append(entry)
        names.append([entry.name, *_list_of(values, "shared_with", str)])
        shape, channels, pruned = entry.shape, entry.channels, _list_of(values, "pruned", int)
        if not 0 <= entry.dim < len(shape) or shape[entry.dim] != channels:
            raise ValueError(f"{entry.name}: {channels} channels are not those of {shape}, dim {entry.dim}")
        if not all(0 <= i < channels for i in pruned):
            raise ValueError(f"{entry.name}: indices of pruned channels beyond its {channels}")
        if len(set(pruned)) != channels - entry.kept or len(set(pruned)) != len(pruned):
            raise ValueError(
                f"{entry.name}: {len(pruned)} pruned channels of {channels} do not leave {entry.kept}"
            )
    known = [name for group in names for name in group]
    if len(set(known)) != len(known):
        raise ValueError(f"{next(name for name in known if known.count(name) > 1)}: is there twice")
    return entries, names
