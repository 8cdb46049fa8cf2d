"""Groups of coupled channels as plans keep them: the slices that go, and the sizes that change."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from types import NoneType
from typing import Any, NamedTuple, Protocol

from torch import nn

from lnprune.errors import named
from lnprune.plans import fields, saved_batches
from lnprune.plans.saved_batches import SavedBatch
from lnprune.steps.batches import channels_of


class SavedMember(NamedTuple):
    """A parameter or buffer that channels are slices of, and the slices along a dim that go.

    Attributes:
        names: all that it has.
        shape: of it.
        dim: of the slices.
        pruned: the indices of the slices that go.
        part: the part of the weight that counts, by its dim, first index and length; None: all of it.
        is_input: whether these slices read the channels.
        is_buffer: whether it is a buffer, which a plan only changes where channels leave the model.
        batch: the matrix of the weight that the slices are in; None: all of it.
    """

    names: list[str]
    shape: tuple[int, ...]
    dim: int
    pruned: list[int]
    part: tuple[int, int, int] | None = None
    is_input: bool = False
    is_buffer: bool = False
    batch: SavedBatch | None = None

    @property
    def slices(self) -> int:
        """How many slices there are along the dim."""
        if self.batch is not None:
            return channels_of(self.shape, self.dim, self.batch.batch)
        is_along = self.part is not None and self.part[0] == self.dim
        return self.part[2] if is_along else self.shape[self.dim]  # type: ignore[index]


class Attribute(NamedTuple):
    """An attribute of a module that holds a size: so many of it for each channel of a group.

    Attributes:
        path: of the module.
        name: of the attribute.
        position: where in the attribute, if that is a tuple or list; None: it is the number itself.
        per_channel: how much smaller it is for each channel that goes.
    """

    path: str
    name: str
    position: int | None
    per_channel: int


class SavedGroup(NamedTuple):
    """The channels of a group that go: slices of its members, and the attributes that hold its size."""

    members: list[SavedMember]
    attributes: list[Attribute]


class Coupled(Protocol):
    """Coupled channels of a model that go, as what finds them hands them to a plan."""

    @property
    def groups(self) -> list[SavedGroup]:
        """One for each entry of the plan."""

    def compact(self, verify: bool, inplace: bool, example_inputs: Any) -> nn.Module:
        """The model without the channels."""


def document_of(group: SavedGroup) -> dict[str, Any]:
    """A group as numbers, strings, lists and dicts."""
    return {
        "members": [_member(member) for member in group.members],
        "attributes": [
            {"path": path, "name": name, "position": position, "per_channel": per_channel}
            for path, name, position, per_channel in group.attributes
        ],
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
        **({"is_input": True} if member.is_input else {}),
        **({"is_buffer": True} if member.is_buffer else {}),
        **({} if member.batch is None else {"batch": saved_batches.document_of(member.batch)}),
    }


def saved_groups(saved: dict[str, Any]) -> list[SavedGroup] | None:
    """The groups of a plan of coupled channels, one for each entry; None for other plans."""
    entries: Sequence[dict[str, Any]] = fields.list_of(saved, "parameters", dict)
    if not any("members" in values for values in entries):
        return None
    found = []
    for i, values in enumerate(entries):
        with named(f"parameters[{i}]", "."):
            members, attributes = [], []
            with named("members", "."):
                for each in fields.list_of(values, "members", dict):
                    members.append(_member_of(each))
            with named("attributes", "."):
                for each in fields.list_of(values, "attributes", dict):
                    attributes.append(_attribute_of(each))
            found.append(SavedGroup(members, attributes))
    return found


def _member_of(values: dict[str, Any]) -> SavedMember:
    names = [fields.typed(values, "name", str), *fields.list_of(values, "shared_with", str)]
    shape, dim = tuple(fields.list_of(values, "shape", int)), fields.count(values, "dim")
    pruned = fields.list_of(values, "pruned", int)
    part = tuple(fields.list_of(values, "part", int)) if "part" in values else None
    if dim >= len(shape):
        raise ValueError(f"dim: expected one of shape {reprlib.repr(shape)}, got {dim}")
    if part is not None and not _is_part(part, shape):
        raise ValueError(f"part: expected one of shape {reprlib.repr(shape)}, got {part}")
    is_input, is_buffer = (
        fields.typed(values, key, bool) if key in values else False for key in ("is_input", "is_buffer")
    )
    batch = None
    if "batch" in values:
        with named("batch", "."):
            batch = saved_batches.saved_batch(fields.typed(values, "batch", dict))
            if (batch.shape, batch.dim) != (shape, dim):
                raise ValueError(
                    f"shape: expected {shape} with channels along {dim}, got {batch.shape}, {batch.dim}"
                )
    member = SavedMember(names, shape, dim, pruned, part, is_input, is_buffer, batch)
    if not all(0 <= k < member.slices for k in pruned):
        raise ValueError(f"pruned: expected indices of {member.slices} slices, got others")
    return member


def _attribute_of(values: dict[str, Any]) -> Attribute:
    position = fields.typed(values, "position", int, NoneType)
    if position is not None and position < 0:
        raise ValueError(f"position: expected 0 or more, got {position}")
    path, name = fields.typed(values, "path", str), fields.typed(values, "name", str)
    return Attribute(path, name, position, fields.count(values, "per_channel", least=1))


def _is_part(part: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(part) != 3:
        return False
    dim, start, length = part
    return 0 <= dim < len(shape) and 0 <= start <= start + length <= shape[dim]
