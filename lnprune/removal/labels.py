"""The labels of one run of a model: planes of tensors, which labels are one channel, which are pinned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lnprune.removal.planes import NONE, Planes, anything, has_channels, squashed
from lnprune.torch_internals import base_of

_MARKS = "lnprune_marks"
# The reason for what nobody takes for channels, as the positions of a kernel.
NOT_CHANNELS = ""
_NO_CHANNELS = "meets data without channels (inputs, constants, positions) in {}"


class Slot(NamedTuple):
    """A dim of a parameter or buffer; each index along it has a label of its own."""

    name: str
    dim: int
    first: int  # the label of index 0
    size: int

    def labels(self) -> Tensor:
        """One for each index."""
        return torch.arange(self.first, self.first + self.size)


class Marks:
    """What is known of a tensor in the run; it hangs on the tensor."""

    __slots__ = ("is_from_inputs", "is_uniform", "planes")

    def __init__(self, planes: Planes, is_uniform: bool = False, is_from_inputs: bool = False):
        self.planes = planes
        # Equal values that the code made: they have the size that the code gives them.
        self.is_uniform = is_uniform
        self.is_from_inputs = is_from_inputs


class Classes(NamedTuple):
    """What the labels of a run amount to.

    Attributes:
        of: the class of each label: the smallest label in it.
        reason: for each label the index of the reason that pins its class, or -1.
        note: for each label the index of what moved its class by numbers, or -1.
    """

    of: Tensor
    reason: Tensor
    note: Tensor


class Labels:
    """The labels of the parameters and buffers of a model, and what a run says of them.

    ``place`` says where in the model the run is. With ``ties_views``, what a view splits is united along
    all but the last of the new dims: then the code may say the number of parts, if not their size.
    """

    def __init__(self, tensors: Mapping[str, Tensor], place: Callable[[], str], ties_views: bool):
        self.slots: list[Slot] = []
        self.reasons: list[str] = []
        self.read: set[int] = set()  # tensors whose planes were asked for, by identity
        self.ties_views = ties_views
        self._place = place
        self._count = 1
        self._edges: list[Tensor] = []
        self._pinned: list[tuple[Tensor, int]] = []
        self.notes: list[str] = []
        self._noted: list[tuple[Tensor, int]] = []
        self._summed: list[Tensor] = []
        self._used: set[int] = set()
        self._owners: dict[int, list[Tensor]] = {}
        self._owned = dict(tensors)
        # Memory that was written to: a label for each of its elements, so that all views of it agree.
        self._written: dict[int, list[Tensor]] = {}
        self._alive: list[torch.UntypedStorage] = []
        for name, tensor in tensors.items():
            planes = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    slot = Slot(name, dim, self._count, size)
                    self.slots.append(slot)
                    self._count += size
                    planes.append(slot.labels().view([-1 if e == dim else 1 for e in range(tensor.dim())]))
            self.mark(tensor, Marks(planes))
            self._owners.setdefault(_memory(tensor), []).append(tensor)

    # What hangs on tensors.

    def mark(self, tensor: Tensor, marks: Marks) -> None:
        """Says what is known of a tensor."""
        setattr(tensor, _MARKS, marks)

    def marks(self, tensor: Tensor) -> Marks | None:
        """What is known of a tensor, if anything."""
        return getattr(tensor, _MARKS, None)

    def forget(self) -> None:
        """Leaves the parameters and buffers as they were."""
        for tensor in self._owned.values():
            if hasattr(tensor, _MARKS):
                delattr(tensor, _MARKS)

    def owns(self, tensor: Tensor) -> bool:
        """Whether its memory is that of a parameter or buffer."""
        return tensor.layout is torch.strided and _memory(tensor) in self._owners

    def is_uniform(self, tensor: Tensor) -> bool:
        """Whether it has equal values made by the code, whose size is the one that the code gives them."""
        marks = self.marks(tensor)
        return marks is not None and marks.is_uniform and _memory(tensor) not in self._written

    def is_from_inputs(self, tensor: Tensor) -> bool:
        """Whether its values depend on the inputs."""
        marks = self.marks(tensor)
        return marks is not None and marks.is_from_inputs

    def planes(self, tensor: Tensor) -> Planes:
        """The planes of a tensor."""
        self.read.add(id(tensor))
        if tensor.layout is not torch.strided:
            return []
        memory = _memory(tensor)
        if memory in self._written:
            views = [squashed(_view(flat, tensor)) for flat in self._written[memory]]
            return [plane for plane in views if plane.any()]
        owners = self._owners.get(memory, ())
        if any(owner is tensor for owner in owners):
            self._used.add(id(tensor))
        else:
            self._used.update(map(id, owners))
        marks = self.marks(tensor)
        if marks is not None:
            return marks.planes
        # A tensor that no operation made, as `.data`, in the memory of a parameter.
        views = [squashed(_view(flat, tensor)) for flat in self._flat(owners)] if owners else []
        return [plane for plane in views if plane.any()]

    def _flat(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The labels of each element of the memory that tensors have in common."""
        known = [self.marks(tensor) or Marks([]) for tensor in tensors]
        size = tensors[0].untyped_storage().nbytes() // tensors[0].element_size()
        most = max((len(each.planes) for each in known), default=0)
        flats = [torch.zeros(size, dtype=torch.int64) for _ in range(most)]
        for tensor, marks in zip(tensors, known, strict=True):
            for flat, plane in zip(flats, marks.planes, strict=False):
                _view(flat, tensor).copy_(plane.expand(tensor.shape))
        return flats

    def through_memory(self, tensor: Tensor, out: Tensor) -> Planes:
        """The planes of another look at the memory of a tensor."""
        self.planes(tensor)
        memory = _memory(tensor)
        flats = self._written.get(memory) or self._flat(self._owners.get(memory, [tensor]))
        return [squashed(_view(flat, out)) for flat in flats]

    def write(self, tensor: Tensor, planes: Planes) -> None:
        """Says what was written into a tensor, for all that look at the same memory."""
        memory = _memory(tensor)
        if memory not in self._written:
            base = base_of(tensor)
            self._written[memory] = self._flat(self._owners.get(memory, [tensor if base is None else base]))
            self._alive.append(tensor.untyped_storage())
        flats = self._written[memory]
        while len(flats) < len(planes):
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            flats.append(torch.zeros(size, dtype=torch.int64))
        for k, flat in enumerate(flats):
            labels = planes[k].expand(tensor.shape) if k < len(planes) else torch.tensor(NONE)
            _view(flat, tensor).copy_(labels)

    # What is said of labels.

    def pin(self, planes: Iterable[Tensor], reason: str) -> None:
        """Says that these channels cannot go. ``{}`` in the reason stands for the place in the model."""
        planes = list(planes)
        if not planes:
            return
        reason = reason.replace("{}", self._place())
        if not self.reasons or self.reasons[-1] != reason:
            self.reasons.append(reason)
        for plane in planes:
            flat = plane.reshape(-1)
            self._pinned.append((flat[flat > 0], len(self.reasons) - 1))

    def unite(self, a: Tensor, b: Tensor) -> Tensor:
        """Says that labels at the same places are of one channel. What has no label pins what has one."""
        if a is b or (a.shape == b.shape and torch.equal(a, b)):
            return a
        a, b = torch.broadcast_tensors(a, b)
        both = (a > 0) & (b > 0) & (a != b)
        if bool(both.any()):
            self._edges.append(torch.stack([a[both], b[both]]))
        alone = (a == NONE) & (b > 0) | (b == NONE) & (a > 0)
        if bool(alone.any()):
            self.pin([torch.maximum(a, b)[alone]], _NO_CHANNELS)
        return torch.where(a > 0, a, torch.where(b > 0, b, torch.maximum(a, b)))

    def unit(self, plane: Tensor, dims: Iterable[int]) -> Tensor:
        """Says that all along these dims is one channel; the plane of that has size 1 along them."""
        for dim in dims:
            if plane.shape[dim] > 1:
                whole = plane.amax(dim, keepdim=True)
                self.unite(plane, whole)
                plane = whole
        return plane

    def pin_without_channels(self, planes: Iterable[Tensor]) -> None:
        """Pins what meets data that has no channels."""
        self.pin(planes, _NO_CHANNELS)

    def note(self, planes: Iterable[Tensor], what: str) -> None:
        """Says what moves channels by numbers, which may be written in the code."""
        planes = list(planes)
        if planes:
            self.notes.append(f"{what} in {self._place()}")
            for plane in planes:
                flat = plane.reshape(-1)
                self._noted.append((flat[flat > 0], len(self.notes) - 1))

    def summed_over(self, tensor: Tensor, dim: int) -> Planes:
        """The planes of an operand of a product that is summed along ``dim``.

        Equal values made by the code have as many channels there as the other operand.
        """
        if self.is_uniform(tensor) and tensor.shape[dim] > 1:
            return [anything(tensor.shape, dim)]
        planes = self.planes(tensor)
        self.note_summed(tensor, has_channels(planes, dim))
        return planes

    def note_summed(self, tensor: Tensor, planes: Iterable[Tensor]) -> None:
        """Says that a product sums over these channels of a tensor: a parameter consumes them."""
        if self.owns(tensor):
            self._summed += [plane.reshape(-1) for plane in planes]

    # What it amounts to.

    def inputs(self) -> set[tuple[str, int]]:
        """The dims of parameters along which a product sums: what consumes channels."""
        if not self._summed:
            return set()
        slot_of = torch.zeros(self._count, dtype=torch.int64)
        for i, slot in enumerate(self.slots):
            slot_of[slot.first : slot.first + slot.size] = i
        summed = torch.cat(self._summed)
        return {self.slots[i][:2] for i in slot_of[summed[summed > 0]].unique().tolist()}

    def classes(self) -> Classes:
        """Which labels are one channel, and why channels are pinned. What the run never used is pinned."""
        for slot in self.slots:
            if id(self._owned[slot.name]) not in self._used:
                self.pin([slot.labels()], "is not used in this run")
        of = _components(self._count, self._edges)
        return Classes(of, _first(of, self._pinned), _first(of, self._noted))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _view(flat: Tensor, tensor: Tensor) -> Tensor:
    """That part of the labels of a memory that a tensor looks at."""
    return torch.as_strided(flat, tensor.shape, tensor.stride(), tensor.storage_offset())


def _first(of: Tensor, said: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The smallest number that is said of any label of a class, for each label; -1 where none is."""
    none = len(said)
    first = torch.full((len(of),), none)
    for labels, number in said:
        first.scatter_reduce_(0, of[labels], torch.full_like(labels, number), "amin")
    return torch.where(first == none, -1, first)[of]


def _components(count: int, edges: Sequence[Tensor]) -> Tensor:
    """The smallest label that each label is connected to."""
    root = torch.arange(count)
    if not edges:
        return root
    a, b = torch.cat(list(edges), 1)
    while True:
        root_a, root_b = root[a], root[b]
        apart = root_a != root_b
        if not bool(apart.any()):
            return root
        low, high = torch.minimum(root_a, root_b)[apart], torch.maximum(root_a, root_b)[apart]
        root.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
