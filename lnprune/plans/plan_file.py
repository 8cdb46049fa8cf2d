"""The file of a plan: one entry per parameter, as JSON with a version."""

from __future__ import annotations

import json
import os
import pathlib
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lnprune.atomic_file import replacing
from lnprune.errors import named
from lnprune.plans import fields, saved_batches
from lnprune.plans.saved_batches import SavedBatch, matrix_of
from lnprune.plans.saved_groups import SavedGroup, document_of, saved_groups
from lnprune.plans.selection import LEAST, WORDS

_FORMAT = "lnprune plan"
_VERSION = 1
_MATRIX_NORMS = ("fro", "nuc")


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


class SavedPlan(NamedTuple):
    """What a file says."""

    n: Any
    selection: dict[str, Any]
    entries: list[PlanEntry]
    names: list[list[str]]  # of each parameter, the first of them its entry's
    pruned: list[list[int]]
    cut: float | None = None  # where a global plan cuts the norms of all parameters
    groups: list[SavedGroup] | None = None  # of coupled channels, one for each entry
    elements: int | None = None  # of all their parameters
    batches: Sequence[SavedBatch | None] = ()  # of each entry, the matrix that it is about


def document(
    n: Any,
    selection: Mapping[str, Any],
    entries: list[PlanEntry],
    names: list[list[str]],
    pruned: list[list[int]],
    cut: float | None = None,
    groups: Sequence[SavedGroup] | None = None,
    elements: int | None = None,
    batches: Sequence[SavedBatch | None] = (),
) -> dict[str, Any]:
    """A plan as numbers, strings, lists and dicts."""
    parameters = []
    for i, (entry, known, indices) in enumerate(zip(entries, names, pruned, strict=True)):
        values = asdict(entry)
        values["shared_with"] = known[1:]
        values["shape"] = list(entry.shape)
        for key in ("norm_at_cut", "margin"):
            values[key] = fields.plain(values[key])
        values["pruned"] = indices
        if batches and batches[i] is not None:
            values["batch"] = saved_batches.document_of(batches[i])  # type: ignore[arg-type]
        if groups is not None:
            values.update(document_of(groups[i]))
        parameters.append(values)
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "n": fields.plain(n),
        "selection": fields.plain(selection),
        **({} if cut is None else {"cut": fields.plain(cut)}),
        **({} if elements is None else {"elements": elements}),
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
    """Reads a file and checks every field of it; raises ValueError with the path and the field."""
    try:
        saved = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a plan as JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected a plan as JSON: it is nested too deeply") from None
    return parsed(saved, path)


def parsed(saved: Any, path: str | os.PathLike[str]) -> SavedPlan:
    """The same of a document as :func:`document` makes it; ``path`` is what errors say of it."""
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected JSON of the format {_FORMAT!r}")
    version = saved.get("version")
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION} of a plan, got {reprlib.repr(version)}")
    with named(f"{path}: the plan is damaged"):
        n, selection = order_of(saved), fields.typed(saved, "selection", dict)
        with named("selection", "."):
            selection = _selection_of(selection)
        cut = fields.number(saved, "cut") if "cut" in saved else None
        elements = fields.count(saved, "elements") if "elements" in saved else None
        entries, names, pruned, batches = _parameters_of(saved)
        groups = saved_groups(saved)
        return SavedPlan(n, selection, entries, names, pruned, cut, groups, elements, batches)


def order_of(values: dict[str, Any]) -> Any:
    """The order n of a plan's norms."""
    n = fields.typed(values, "n", str, int, float, bool, type(None))
    if isinstance(n, str):
        fields.word(values, "n", (*_MATRIX_NORMS, *fields.NOT_FINITE))
    return float(n) if n in fields.NOT_FINITE else n


def _selection_of(values: dict[str, Any]) -> dict[str, Any]:
    """What was selected, without what later versions say of it."""
    amount = fields.typed(values, "amount", int, float, bool, dict)
    with named("amount" if isinstance(amount, dict) else "", "."):
        amounts = amount if isinstance(amount, dict) else values
        for key in amount if isinstance(amount, dict) else ("amount",):
            share = fields.typed(amounts, key, int, float, bool)
            if share < 0 or (type(share) is float and share > 1):
                raise ValueError(f"{key}: expected a count, or a share from 0 to 1, got {share}")
    selection = {"amount": amount}
    for key, known in WORDS.items():
        if key in values:
            selection[key] = fields.word(values, key, known)
    for key, least in LEAST.items():
        if key in values or key == "group_size":
            selection[key] = fields.count(values, key, least)
    if "uniform" in values:
        with named("uniform", "."):
            if isinstance(values["uniform"], dict):
                selection["uniform"] = {
                    pattern: fields.typed(values["uniform"], pattern, str) for pattern in values["uniform"]
                }
            else:
                selection["uniform"] = fields.word(values, "uniform", ["kind"])
    return selection


def _entry_of(values: dict[str, Any]) -> tuple[PlanEntry, list[str], list[int]]:
    """One parameter's entry, all of its names, and its pruned channels."""
    entry = PlanEntry(
        fields.typed(values, "name", str),
        tuple(fields.list_of(values, "shape", int)),
        fields.count(values, "dim"),
        fields.count(values, "channels"),
        fields.count(values, "kept"),
        fields.number(values, "norm_at_cut"),
        fields.number(values, "margin"),
        fields.count(values, "parameters_removed"),
    )
    names = [entry.name, *fields.list_of(values, "shared_with", str)]
    shape, channels, pruned = entry.shape, entry.channels, fields.list_of(values, "pruned", int)
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


def _batch_of(values: dict[str, Any], entry: PlanEntry, names: Sequence[str]) -> SavedBatch | None:
    """The matrix that an entry is about, if it is about one."""
    if "batch" not in values:
        return None
    with named("batch", "."):
        found = saved_batches.saved_batch(fields.typed(values, "batch", dict))
    if matrix_of(found) != (entry.shape, entry.dim):
        raise ValueError(f"shape: expected {matrix_of(found)[0]}, that of a matrix, got {entry.shape}")
    if not all(name.endswith(found.suffix) for name in names):
        raise ValueError(f"name: expected one that ends in {found.suffix!r}, got {names}")
    return found


def _parameters_of(
    saved: dict[str, Any],
) -> tuple[list[PlanEntry], list[list[str]], list[list[int]], list[SavedBatch | None]]:
    """The entries of a plan, their names, their pruned channels, and the matrices that they are about."""
    entries, names, pruned, batches = [], [], [], []
    for i, values in enumerate(fields.list_of(saved, "parameters", dict)):
        with named(f"parameters[{i}]", "."):
            entry, known, indices = _entry_of(values)
            batch = _batch_of(values, entry, known)
        batches.append(batch)
        entries.append(entry)
        names.append(known)
        pruned.append(indices)
    for name, count in Counter(name for known in names for name in known).items():
        if count > 1:
            raise ValueError(f"parameters: {name!r} is there {count} times")
    return entries, names, pruned, batches
