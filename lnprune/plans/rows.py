"""What one row of a selection is made of; rows to norms, and flags of rows to flags of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnprune.modules.application import Batch, Part, Slices, Weight
from lnprune.plans.layers import Parameters
from lnprune.steps.batches import channels_of, dim_in_matrix, rankings_of, shape_of_matrix
from lnprune.steps.factors import Factors
from lnprune.steps.local import on_cpu
from lnprune.steps.norms import Asked, channel_sums, countable, native_order, norms_of_each, norms_of_sums


@dataclass(eq=False, slots=True)
class Member:
    """Slices of a weight along a dim, or of a part of it, and the channels that they belong to.

    Of a batch, slices and channels are those of each matrix.

    Attributes:
        weight: the weight, wherever it lives.
        dim: the dim of the slices, counted from the first.
        index: the channel of each slice, int64 of shape ``(slices,)``; None: that of its number.
        part: the part of the weight that counts, as one expert of many; None: all of it.
        slices: the slices that count, int64 of shape ``(slices,)``, as those of one of the layers whose
            outputs are put side by side; None: all of them.
        batch: of matrices, one for each ranking of the row; None: there is one ranking.
    """

    weight: Weight
    dim: int
    index: Tensor | None = None
    part: Part | None = None
    slices: Tensor | None = None
    batch: Batch | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The member's part of a tensor of the weight's shape; a view."""
        return tensor if self.part is None else tensor.narrow(*self.part)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the member's part of the weight."""
        shape = list(self.weight.shape)
        if self.part is not None:
            shape[self.part.dim] = self.part.length
        return tuple(shape)

    @property
    def along(self) -> int:
        """How many slices lie along the dim, of each matrix where there is a batch."""
        return channels_of(self.shape, self.dim, self.batch)

    @property
    def elements(self) -> int:
        """How many elements of the weight its slices have, in all matrices."""
        whole = math.prod(self.shape)
        if self.slices is None or not whole:
            return whole
        return whole // self.along * self.slices.numel()


@dataclass(eq=False, slots=True)
class Row:
    """Channels that are ranked together: those of a weight, of a part of one, or of several weights.

    A channel of a row with several members is all the slices that belong to it: they have one norm, and
    are kept or pruned together. Where its members have batches, a row is as many rankings, each by itself,
    as a batch has matrices; norms and flags are those of all, one after another.

    Attributes:
        name: what messages, tables and files call it.
        channels: how many each ranking has.
        members: what a channel is measured by; at least one.
        followers: what else goes with a channel, as the biases.
    """

    name: str
    channels: int
    members: Sequence[Member]
    followers: Sequence[Member] = ()

    @property
    def is_single(self) -> bool:
        """Whether a channel is one slice of one member."""
        return len(self.members) == 1 and not self.followers and self.members[0].index is None

    @property
    def rankings(self) -> int:
        """How many it has."""
        return rankings_of(self.members[0].batch)

    @property
    def known_as(self) -> list[str]:
        """Its name, and, where it is one whole weight, the other names of that."""
        whole = self.is_single and self.members[0].part is None
        return [self.name, *(self.members[0].weight.names[1:] if whole else ())]

    @property
    def names(self) -> list[list[str]]:
        """The names of each ranking."""
        if self.members[0].batch is None:
            return [self.known_as]
        known = self.known_as
        return [[f"{name}[{i}]" for name in known] for i in range(self.rankings)]

    @property
    def size(self) -> int:
        """The elements that a channel is measured by."""
        return sum(member.elements for member in self.members) // max(1, self.rankings * self.channels)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of a ranking's one member; several members are a matrix of one row for each channel."""
        if not self.is_single:
            return self.channels, self.size
        member = self.members[0]
        return member.shape if member.batch is None else shape_of_matrix(member.shape, member.batch)

    @property
    def dim(self) -> int:
        """Where the channels are in :attr:`shape`."""
        if not self.is_single:
            return 0
        member = self.members[0]
        return member.dim if member.batch is None else dim_in_matrix(member.shape, member.dim, member.batch)


class Measured(NamedTuple):
    """Rows whose channels are measured in tensors of the shapes of their weights, by norms of one order."""

    rows: Sequence[Row]
    tensors: Mapping[Weight, Tensor]
    n: Any
    factors: Mapping[Weight, Factors] = {}  # what elements are multiplied by; nobody changes it


def row_norms(*asked: Measured) -> list[list[Tensor]]:
    """The norms of the channels of rows, float64.

    A channel of several slices has the norm of all their elements together. For that the slices' sums
    before the root are added on the CPU, in the order of the members, so that equal channels tie.
    """
    lists = []
    for rows, tensors, n, factors in asked:
        single = [row for row in rows if row.is_single]
        members = [row.members[0] for row in single]
        views = [member.of(tensors[member.weight]) for member in members]
        batches = [member.batch for member in members]
        dims, names = [member.dim for member in members], [row.name for row in single]
        scaled = [factors.get(member.weight) for member in members] if factors else ()
        lists.append(Asked(views, n, dims, names, batches if any(batches) else (), scaled))
    found = norms_of_each(lists)
    for i, (rows, tensors, n, factors) in enumerate(asked):
        if len(found[i]) < len(rows):
            together = iter(_joint_norms([row for row in rows if not row.is_single], tensors, n, factors))
            alone = iter(found[i])
            found[i] = [next(alone if row.is_single else together) for row in rows]
    return found


def _joint_norms(
    rows: Sequence[Row], tensors: Mapping[Weight, Tensor], n: Any, factors: Mapping[Weight, Factors]
) -> list[Tensor]:
    # What several rows have slices of is summed once.
    asked: dict[tuple[Weight, int, Part | None, Batch | None], tuple[str, Tensor]] = {}
    for row in rows:
        for member in row.members:
            key = member.weight, member.dim, member.part, member.batch
            if key not in asked:
                asked[key] = row.name, member.of(tensors[member.weight])
    names, views = [name for name, _ in asked.values()], [view for _, view in asked.values()]
    scaled = [factors.get(key[0]) for key in asked] if factors else ()
    sums = channel_sums(views, n, [key[1] for key in asked], names, [key[3] for key in asked], scaled)
    parts = dict(
        zip(asked, on_cpu(sums, torch.float64).split([each.numel() for each in sums]), strict=True)
    )
    p = native_order(n)
    joined = []
    for row in rows:
        shape = row.rankings, row.channels
        whole = torch.full(shape, math.inf if p == -math.inf else 0.0, dtype=torch.float64, device="cpu")
        for member in row.members:
            part = parts[member.weight, member.dim, member.part, member.batch].view(row.rankings, -1)
            if member.slices is not None:
                part = part[:, member.slices.cpu()]
            index = torch.arange(row.channels, device="cpu") if member.index is None else member.index.cpu()
            if p is not None and math.isinf(p):
                whole.scatter_reduce_(1, index.expand_as(part), part, "amax" if p > 0 else "amin")
            else:
                whole.index_add_(1, index, part)
        joined.append(whole.flatten())
    return norms_of_sums(joined, n)


def counted(rows: Sequence[Row], tensors: Mapping[Weight, Tensor]) -> Measured:
    """How many elements of each channel are not zero, of tensors of any dtype and any number of dims."""
    weights = {member.weight for row in rows for member in row.members}
    return Measured(rows, {weight: countable(tensors[weight]) for weight in weights}, 0)


def flags_of_weights(rows: Sequence[Row], flags: Sequence[Tensor]) -> list[Slices]:
    """What keep flags of rows mean for their weights; slices that several rows prune are there once."""
    found = []
    for row, keep in zip(rows, flags, strict=True):
        rankings = keep.view(row.rankings, -1)
        for member in (*row.members, *row.followers):
            mine = rankings if member.index is None else rankings[:, member.index.cpu()]
            if member.slices is not None:
                whole = torch.ones(row.rankings, member.along, dtype=torch.bool, device="cpu")
                whole[:, member.slices.cpu()] = mine
                mine = whole
            mine = keep if mine is rankings else mine.flatten()
            found.append(Slices(member.weight, member.dim, mine, member.part, member.batch))
    return merged(found)


def merged(slices: Iterable[Slices]) -> list[Slices]:
    """The same with those of one weight and dim together: a slice stays where all say so."""
    found: dict[Any, Slices] = {}
    for each in slices:
        key = each.weight, each.dim, each.part, each.batch
        keep = each.keep & found[key].keep if key in found else each.keep
        found[key] = each._replace(keep=keep)
    return list(found.values())


def joint_sizes(rows: Sequence[Row]) -> list[Parameters] | None:
    """The parameters that rows have slices of, for exact counts; None where each row is one weight."""
    if all(row.is_single for row in rows):
        return None
    found: dict[tuple[Weight, Batch | None, int], dict[int, list[tuple[int, int]]]] = {}
    first = 0  # of the row's rankings
    for row in rows:
        for member in (*row.members, *row.followers):
            each = len(member.slices) if member.slices is not None else member.along
            dim = member.dim
            if member.batch is not None:
                dim = dim_in_matrix(member.weight.shape, dim, member.batch)
            for i in range(row.rankings):
                dims = found.setdefault((member.weight, member.batch, i), {})
                dims.setdefault(dim, []).append((first + i, each // max(1, row.channels)))
        first += row.rankings
    return [
        Parameters(weight.shape if batch is None else shape_of_matrix(weight.shape, batch), dims)
        for (weight, batch, _), dims in found.items()
    ]
