"""From classes of labels to groups of channels, with an index for every slice, and to what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lnprune.plans.saved_groups import Attribute
from lnprune.removal.labels import NOT_CHANNELS, Classes, Labels, Slot

_ALONE = "has channels of which nothing was found that makes or reads them"


class GroupMember(NamedTuple):
    """Slices of a parameter or buffer, and the channels of the group that they belong to.

    Attributes:
        name: of the parameter or buffer.
        shape: of it.
        dim: of the slices.
        slices: which slices, int64, shape ``(slices,)``.
        channels: the channel of each, int64, shape ``(slices,)``.
        is_input: whether these slices read the channels: the inputs of a layer.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    slices: Tensor
    channels: Tensor
    is_input: bool


@dataclass(eq=False)
class Group:
    """Channels that are made of slices of the same parameters and buffers.

    Attributes:
        name: that of the first parameter that makes them.
        channels: how many they are.
        members: all slices of a channel go together, or none.
        attributes: the attributes of modules that hold a size of the group and change with it.
        moved_by: what in the code moves the channels by numbers, as a view with sizes; empty: nothing.
    """

    name: str
    channels: int
    members: list[GroupMember]
    attributes: list[Attribute] = field(default_factory=list)
    moved_by: str = ""

    @property
    def makers(self) -> list[str]:
        """The names of the weights that make the channels; of other parameters where there is no weight."""
        outputs = [member for member in self.members if not member.is_input] or self.members
        weights = [member for member in outputs if len(member.shape) > 1] or outputs
        return [member.name for member in weights]

    def __repr__(self) -> str:
        return f"Group({self.name!r}, {self.channels} channels, {len(self.members)} members)"


class Refused(NamedTuple):
    """Slices of a parameter or buffer that cannot go.

    Attributes:
        module: the path of the module that has it.
        parameter: its name in the model.
        dim: of the slices.
        slices: how many.
        reason: why not.
    """

    module: str
    parameter: str
    dim: int
    slices: int
    reason: str


def found_groups(labels: Labels, tensors: Mapping[str, Tensor]) -> tuple[list[Group], list[Refused]]:
    """The groups of channels that nothing pins, in the order of the model, and the rest by its reasons."""
    classes, slots = labels.classes(), labels.slots
    slot_of = torch.zeros(len(classes.of), dtype=torch.int64)
    for i, slot in enumerate(slots):
        slot_of[slot.first : slot.first + slot.size] = i
    refused = _refused(slots, classes, labels.reasons)
    free = (classes.reason < 0).nonzero().flatten()[1:]  # label 0 is none
    inputs = labels.inputs()
    groups = []
    for part in _of_same_slots(classes.of, slot_of, free, len(slots)):
        numbers = slot_of[part].unique().tolist()
        known = [slots[i] for i in numbers]
        if len(known) == 1 or all((slot.name, slot.dim) not in inputs for slot in known):
            for i, slot in zip(numbers, known, strict=True):
                refused.append(_refusal(slot, int((slot_of[part] == i).sum()), _ALONE))
            continue
        channels, channel = classes.of[part].unique(return_inverse=True)
        members = []
        for i, slot in zip(numbers, known, strict=True):
            mine = slot_of[part] == i
            shape = tuple(tensors[slot.name].shape)
            is_input = (slot.name, slot.dim) in inputs
            members.append(
                GroupMember(slot.name, shape, slot.dim, part[mine] - slot.first, channel[mine], is_input)
            )
        group = Group("", len(channels), members)
        notes = [note for note in classes.note[part].unique().tolist() if note >= 0]
        group.moved_by = labels.notes[notes[0]] if notes else ""
        groups.append(group)
    return in_order(groups, tensors), refused


def _of_same_slots(of: Tensor, slot_of: Tensor, free: Tensor, slots: int) -> list[Tensor]:
    """The labels of channels that consist of slices of the same slots as often, together."""
    if not len(free):
        return []
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(1 << 40, (slots,), generator=generator)
    pairs, counts = (of[free] * slots + slot_of[free]).unique(return_counts=True)
    signature = torch.zeros(len(of), dtype=torch.int64)
    signature.index_add_(0, pairs // slots, code[pairs % slots] * counts)
    order = free[signature[of[free]].argsort(stable=True)]
    _, lengths = signature[of[order]].unique_consecutive(return_counts=True)
    return [part.sort().values for part in order.split(lengths.tolist())]


def in_order(groups: Sequence[Group], names: Iterable[str]) -> list[Group]:
    """Groups in the order of a model's names, and with names of their own.

    A group has the name of the first weight that makes it; of several, as the parts of a fused projection,
    each has a number too.
    """
    order = {name: i for i, name in enumerate(names)}
    found = sorted(groups, key=lambda group: order[group.makers[0]])
    counts = Counter(group.makers[0] for group in found)
    numbers: Counter[str] = Counter()
    for group in found:
        name = group.makers[0]
        group.name = f"{name} [{numbers[name]}]" if counts[name] > 1 else name
        numbers[name] += 1
    return found


def refusals(group: Group, reason: str) -> list[Refused]:
    """The slices of a group that cannot go after all."""
    found = []
    for member in group.members:
        path = member.name.rpartition(".")[0]
        found.append(Refused(path, member.name, member.dim, len(member.slices), reason))
    return found


def _refusal(slot: Slot, slices: int, reason: str) -> Refused:
    return Refused(slot.name.rpartition(".")[0], slot.name, slot.dim, slices, reason)


def _refused(slots: Sequence[Slot], classes: Classes, reasons: Sequence[str]) -> list[Refused]:
    found = []
    for slot in slots:
        mine = classes.reason[slot.first : slot.first + slot.size]
        if int(mine.max()) < 0:
            continue
        values, counts = mine.unique(return_counts=True)
        for reason, count in zip(values.tolist(), counts.tolist(), strict=True):
            if reason >= 0 and reasons[reason] != NOT_CHANNELS:
                found.append(_refusal(slot, count, reasons[reason]))
    return found
