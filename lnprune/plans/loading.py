"""From what the file of a plan says to a plan for a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnprune.modules.application import Part, Slices, Weight
from lnprune.plans.plan import Details, Plan
from lnprune.plans.plan_file import SavedPlan
from lnprune.plans.saved_batches import SavedBatch
from lnprune.plans.saved_groups import Coupled, SavedGroup
from lnprune.steps.batches import channels_of, rankings_of


class _Pruned(NamedTuple):
    """The slices of a weight, or of one matrix of it, that go.

    Attributes:
        weight: the weight.
        dim: of the slices in it.
        pruned: the indices of the slices that go, in the part or the matrix.
        part: the part of the weight that counts; None: all of it.
        batch: the matrix; None: all of the weight.
    """

    weight: Weight
    dim: int
    pruned: Sequence[int]
    part: Part | None = None
    batch: SavedBatch | None = None


def loaded(
    saved: SavedPlan, weights: Sequence[Weight], coupled: Callable[[], Coupled] | None = None
) -> Plan:
    """The plan of a file, for weights of its names; ``coupled`` is for one of coupled channels."""
    flags = [
        _flags(entry.channels, pruned) for entry, pruned in zip(saved.entries, saved.pruned, strict=True)
    ]
    details = Details(saved.entries, saved.names, saved.cut, None, saved.elements, saved.batches)
    names = [entry.name for entry in saved.entries]
    slices = slices_of(saved, weights)
    return Plan(saved.n, saved.selection, names, flags, lambda: details, lambda: slices, coupled)


def slices_of(saved: SavedPlan, weights: Sequence[Weight]) -> list[Slices]:
    """What the plan of a file prunes of weights of its names."""
    by_name = {weight.name: weight for weight in weights}
    return _slices(_pruned(saved, by_name) if saved.groups is None else _members(saved.groups, by_name))


def weights_of(saved: SavedPlan) -> list[Weight]:
    """The weights that the plan of a file is about, which live nowhere yet."""
    found: dict[str, Weight] = {}
    if saved.groups is not None:
        members = [member for group in saved.groups for member in group.members if not member.is_buffer]
        # Of a parameter and a buffer of one name, which no model has, the last.
        found = {member.names[0]: Weight(member.names, member.shape) for member in members}
        return list(found.values())
    for entry, names, batch in zip(saved.entries, saved.names, saved.batches, strict=True):
        if batch is not None:
            names = [name.removesuffix(batch.suffix) for name in names]
        found.setdefault(names[0], Weight(names, entry.shape if batch is None else batch.shape))
    return list(found.values())


def _pruned(saved: SavedPlan, weights: Mapping[str, Weight]) -> Iterator[_Pruned]:
    """What the entries of a plan prune of weights, by their names."""
    for entry, indices, batch in zip(saved.entries, saved.pruned, saved.batches, strict=True):
        if batch is None:
            yield _Pruned(weights[entry.name], entry.dim, indices)
        else:
            yield _Pruned(weights[entry.name.removesuffix(batch.suffix)], batch.dim, indices, None, batch)


def _members(groups: Sequence[SavedGroup], weights: Mapping[str, Weight]) -> Iterator[_Pruned]:
    """What groups prune of weights, by their names; buffers stay as they are."""
    for group in groups:
        for member in group.members:
            if not member.is_buffer:
                part = None if member.part is None else Part(*member.part)
                yield _Pruned(weights[member.names[0]], member.dim, member.pruned, part, member.batch)


def _flags(channels: int, pruned: Sequence[int]) -> Tensor:
    keep = torch.ones(channels, dtype=torch.bool, device="cpu")
    keep[torch.tensor(pruned, dtype=torch.int64, device="cpu")] = False
    return keep


def _slices(pruned: Iterable[_Pruned]) -> list[Slices]:
    """What goes, by weight, dim and part: of the matrices of a weight the flags of all."""
    found: dict[Any, Tensor] = {}
    for weight, dim, indices, part, saved in pruned:
        batch = None if saved is None else saved.batch
        shape = list(weight.shape)
        if part is not None:
            shape[part.dim] = part.length
        along = channels_of(shape, dim, batch)
        key = weight, dim, part, batch
        if key not in found:
            found[key] = torch.ones(rankings_of(batch) * along, dtype=torch.bool, device="cpu")
        first = 0 if saved is None else saved.number * along
        found[key][torch.tensor(indices, dtype=torch.int64, device="cpu") + first] = False
    return [Slices(weight, dim, keep, part, batch) for (weight, dim, part, batch), keep in found.items()]
