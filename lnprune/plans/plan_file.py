"""The file of a plan: one entry per parameter, as JSON with a version."""

from __future__ import annotations

import json
import math
import numbers
import os
import pathlib
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any, NamedTuple

from lnprune.atomic_file import replacing
from lnprune.errors import named
from lnprune.plans.selection import LEAST, WORDS

_FORMAT = "lnprune plan"
_VERSION = 1
# Numbers that JSON has no word for, as the file spells them.
_NOT_FINITE = ("inf", "-inf", "nan")
_MATRIX_NORMS = ("fro", "nuc")
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class PlanEntry:
    """What a plan does to one parameter.

    Attributes:
        name: of the weight; the first, where it has several.
        shape: of the weight.
        dim: along which its channels lie.
        channels: how many it has.
        kept: how many stay. Channels that were gone before are not among them.
        norm_at_cut: the norm of the last channel (or group) that stays, as it was compared: for
            ``scope="global"`` divided as ``normalize`` says. None where none stays.
        margin: how much larger that is than the norm of the first channel (or group) that goes. None where
            none goes, or none stays.
        parameters_removed: elements of the weight that the plan sets to zero and that were not gone before.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    channels: int
    kept: int
    norm_at_cut: float | None
    margin: float | None
    parameters_removed: int


class SavedMember(NamedTuple):
    """A weight that coupled channels are slices of: its names, and the slices along a dim that go.

    ``part`` is the part of the weight that counts, by its dim, first index and length; None: all of it.
    """

    names: list[str]
    shape: tuple[int, ...]
    dim: int
    pruned: list[int]
    part: tuple[int, int, int] | None = None

    @property
    def slices(self) -> int:
        """How many slices there are along the dim."""
        is_along = self.part is not None and self.part[0] == self.dim
        return self.part[2] if is_along else self.shape[self.dim]  # type: ignore[index]


class SavedPlan(NamedTuple):
    """What a file says."""

    n: Any
    selection: dict[str, Any]
    entries: list[PlanEntry]
    names: list[list[str]]  # of each parameter, the first of them its entry's
    pruned: list[list[int]]
    cut: float | None = None  # where a global plan cuts the norms of all parameters
    members: list[list[SavedMember]] | None = None  # of coupled channels
    elements: int | None = None  # of all their parameters


def document(
    n: Any,
    selection: Mapping[str, Any],
    entries: list[PlanEntry],
    names: list[list[str]],
    pruned: list[list[int]],
    cut: float | None = None,
    members: Sequence[Sequence[SavedMember]] | None = None,
    elements: int | None = None,
) -> dict[str, Any]:
    """A plan as numbers, strings, lists and dicts."""
    parameters = []
    for i, (entry, known, indices) in enumerate(zip(entries, names, pruned, strict=True)):
        values = asdict(entry)
        values["shared_with"] = known[1:]
        values["shape"] = list(entry.shape)
        for key in ("norm_at_cut", "margin"):
            values[key] = _plain(values[key])
        values["pruned"] = indices
        if members is not None:
            values["members"] = [_member(member) for member in members[i]]
        parameters.append(values)
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "n": _plain(n),
        "selection": _plain(selection),
        **({} if cut is None else {"cut": _plain(cut)}),
        **({} if elements is None else {"elements": elements}),
        "parameters": parameters,
    }


def _member(member: SavedMember) -> dict[str, Any]:
    name, *others = member.names
    return {
        "name": name,
        "shared_with": others,
        "shape": list(member.shape),
        "dim": member.dim,
        "pruned": member.pruned,
        **({} if member.part is None else {"part": list(member.part)}),
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
    """Reads a file and checks every field of it; raises ValueError with the path and the field."""
    try:
        saved = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a plan as JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected a plan as JSON: it is nested too deeply") from None
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected JSON of the format {_FORMAT!r}")
    version = saved.get("version")
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION} of a plan, got {reprlib.repr(version)}")
    with named(f"{path}: the plan is damaged"):
        n, selection = _order(saved), _typed(saved, "selection", dict)
        with named("selection", "."):
            selection = _selection_of(selection)
        cut = _number(saved, "cut") if "cut" in saved else None
        elements = _count(saved, "elements") if "elements" in saved else None
        return SavedPlan(n, selection, *_parameters_of(saved), cut, _members_of(saved), elements)


def _plain(value: Any) -> Any:
    """What JSON has words for: a number that is not finite as a string, other objects as their number."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else str(float(value))


def _typed(values: dict[str, Any], key: str, *kinds: type) -> Any:
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


def _count(values: dict[str, Any], key: str, least: int = 0) -> int:
    count: int = _typed(values, key, int)
    if count < least:
        raise ValueError(f"{key}: expected {least} or more, got {reprlib.repr(count)}")
    return count


def _word(values: dict[str, Any], key: str, known: Iterable[str]) -> str:
    word: str = _typed(values, key, str)
    if word not in known:
        raise ValueError(f"{key}: expected {' or '.join(map(repr, known))}, got {reprlib.repr(word)}")
    return word


def _list_of(values: dict[str, Any], key: str, kind: type) -> list[Any]:
    found: list[Any] = _typed(values, key, list)
    for value in found:
        if type(value) is not kind:
            raise ValueError(f"{key}: expected a list of {kind.__name__}, got {reprlib.repr(value)} in it")
    return found


def _number(values: dict[str, Any], key: str) -> float | None:
    value = _typed(values, key, float, int, str, NoneType)
    if isinstance(value, str):
        _word(values, key, _NOT_FINITE)
    return None if value is None else float(value)


def _order(values: dict[str, Any]) -> Any:
    """The order n of a plan's norms."""
    n = _typed(values, "n", str, int, float, bool, NoneType)
    if isinstance(n, str):
        _word(values, "n", (*_MATRIX_NORMS, *_NOT_FINITE))
    return float(n) if n in _NOT_FINITE else n


def _selection_of(values: dict[str, Any]) -> dict[str, Any]:
    """What was selected, without what later versions say of it."""
    amount = _typed(values, "amount", int, float, bool, dict)
    with named("amount" if isinstance(amount, dict) else "", "."):
        amounts = amount if isinstance(amount, dict) else values
        for key in amount if isinstance(amount, dict) else ("amount",):
            share = _typed(amounts, key, int, float, bool)
            if share < 0 or (type(share) is float and share > 1):
                raise ValueError(f"{key}: expected a count, or a share from 0 to 1, got {share}")
    selection = {"amount": amount}
    for key, known in WORDS.items():
        if key in values:
            selection[key] = _word(values, key, known)
    for key, least in LEAST.items():
        if key in values or key == "group_size":
            selection[key] = _count(values, key, least)
    return selection


def _entry_of(values: dict[str, Any]) -> tuple[PlanEntry, list[str], list[int]]:
    """One parameter's entry, all of its names, and its pruned channels."""
    entry = PlanEntry(
        _typed(values, "name", str),
        tuple(_list_of(values, "shape", int)),
        _count(values, "dim"),
        _count(values, "channels"),
        _count(values, "kept"),
        _number(values, "norm_at_cut"),
        _number(values, "margin"),
        _count(values, "parameters_removed"),
    )
    names = [entry.name, *_list_of(values, "shared_with", str)]
    shape, channels, pruned = entry.shape, entry.channels, _list_of(values, "pruned", int)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: expected sizes of 0 or more, got {reprlib.repr(shape)}")
    if entry.dim >= len(shape) or shape[entry.dim] != channels:
        raise ValueError(
            f"channels: expected those of shape {reprlib.repr(shape)} along dim {reprlib.repr(entry.dim)}, "
            f"got {reprlib.repr(channels)}"
        )
    if not all(0 <= i < channels for i in pruned):
        raise ValueError(f"pruned: expected indices of the {channels} channels, got others")
    if len(set(pruned)) != channels - entry.kept or len(set(pruned)) != len(pruned):
        raise ValueError(f"pruned: {len(pruned)} of {channels} channels do not leave the {entry.kept} kept")
    return entry, names, pruned


def _members_of(saved: dict[str, Any]) -> list[list[SavedMember]] | None:
    """The members of each entry of a plan of coupled channels; None for other plans."""
    entries = _list_of(saved, "parameters", dict)
    if not any("members" in values for values in entries):
        return None
    found = []
    for i, values in enumerate(entries):
        with named(f"parameters[{i}].members", "."):
            members = []
            for each in _list_of(values, "members", dict):
                names = [_typed(each, "name", str), *_list_of(each, "shared_with", str)]
                shape, dim = tuple(_list_of(each, "shape", int)), _count(each, "dim")
                pruned = _list_of(each, "pruned", int)
                part = tuple(_list_of(each, "part", int)) if "part" in each else None
                if dim >= len(shape):
                    raise ValueError(f"dim: expected one of shape {reprlib.repr(shape)}, got {dim}")
                if part is not None and not _is_part(part, shape):
                    raise ValueError(f"part: expected one of shape {reprlib.repr(shape)}, got {part}")
                member = SavedMember(names, shape, dim, pruned, part)
                if not all(0 <= k < member.slices for k in pruned):
                    raise ValueError(f"pruned: expected indices of {member.slices} slices, got others")
                members.append(member)
            found.append(members)
    return found


def _is_part(part: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(part) != 3:
        return False
    dim, start, length = part
    return 0 <= dim < len(shape) and 0 <= start <= start + length <= shape[dim]


def _parameters_of(saved: dict[str, Any]) -> tuple[list[PlanEntry], list[list[str]], list[list[int]]]:
    """The entries of a plan, the names of each parameter, and the pruned channels of each."""
    entries, names, pruned = [], [], []
    for i, values in enumerate(_list_of(saved, "parameters", dict)):
        with named(f"parameters[{i}]", "."):
            entry, known, indices = _entry_of(values)
        entries.append(entry)
        names.append(known)
        pruned.append(indices)
    for name, count in Counter(name for known in names for name in known).items():
        if count > 1:
            raise ValueError(f"parameters: {name!r} is there {count} times")
    return entries, names, pruned
