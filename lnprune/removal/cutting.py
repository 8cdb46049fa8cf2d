"""Copies of a model: without some slices of its tensors, or with zeros in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lnprune.removal.groups import Group
from lnprune.removal.sizes import set_sizes, shapes_of

Values = Callable[[str, Tensor], Tensor]


class Cut(NamedTuple):
    """Slices of a parameter or buffer, by its name, that go."""

    name: str
    dim: int
    slices: Tensor  # int64


class Setting(NamedTuple):
    """A value for an attribute of the module at a path."""

    path: str
    attribute: str
    value: Any


def cuts_of(group: Group, channels: Tensor) -> list[Cut]:
    """The slices that go with channels of a group, given as flags."""
    return [Cut(m.name, m.dim, m.slices[channels[m.channels]]) for m in group.members]


def without(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    cuts: Sequence[Cut],
    settings: Sequence[Setting] = (),
) -> nn.Module:
    """A copy of a model without slices of its tensors; of these, what is left is all that is copied."""
    flags: dict[str, dict[int, Tensor]] = {}
    for name, dim, slices in cuts:
        keep = flags.setdefault(name, {}).setdefault(
            dim, torch.ones(tensors[name].shape[dim], dtype=torch.bool)
        )
        keep[slices] = False

    def small(name: str, tensor: Tensor) -> Tensor:
        taken = tensor.detach()
        for dim, keep in flags.get(name, {}).items():
            taken = taken.index_select(dim, keep.nonzero().flatten().to(taken.device))
        return taken

    shapes = {path: shapes_of(module) for path, module in model.named_modules(remove_duplicate=False)}
    made = copied(model, tensors, small)
    for path, module in made.named_modules(remove_duplicate=False):
        if shapes_of(module) != shapes[path]:
            set_sizes(module, shapes[path])
    for path, attribute, value in settings:
        module = made.get_submodule(path)
        # What the type of the module tells is set already.
        if getattr(module, attribute) == getattr(model.get_submodule(path), attribute):
            setattr(module, attribute, value)
    return made


def zeroed(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    cuts: Sequence[Cut],
) -> nn.Module:
    """A copy of a model with zeros in place of slices: what the model without them is compared with.

    Zeros are in what makes channels, in biases, in what norms multiply and add, and in what reads channels.
    Running variances stay as they are, as something divides by them.
    """
    of_name: dict[str, list[Cut]] = {}
    for cut in cuts:
        of_name.setdefault(cut.name, []).append(cut)

    def full(name: str, tensor: Tensor) -> Tensor:
        taken = tensor.detach()
        if not taken.is_floating_point() or name.endswith("running_var"):
            return taken
        for _, dim, slices in of_name.get(name, ()):
            taken = taken.index_fill(dim, slices.to(taken.device), 0)
        return taken

    return copied(model, tensors, full)


def settings_for(model: nn.Module, groups: Sequence[Group], gone: Sequence[int]) -> list[Setting]:
    """The values of all attributes that hold sizes of groups, when so many channels of each are gone."""
    values: dict[tuple[str, str], Any] = {}
    for group, count in zip(groups, gone, strict=True):
        for path, name, position, per_channel in group.attributes:
            value = values.get((path, name), getattr(model.get_submodule(path), name))
            if position is None:
                value -= count * per_channel
            else:
                items = list(value)
                items[position] -= count * per_channel
                value = type(value)(items)
            values[path, name] = value
    return [Setting(path, name, value) for (path, name), value in values.items()]


def copied(model: nn.Module, tensors: Mapping[str, Tensor], make: Values) -> nn.Module:
    """A deep copy with other tensors in place of the model's, wherever it has them."""
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for module in model.modules():
            for value in vars(module).values():  # what a hook computed, which torch refuses to copy
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
        for name, tensor in tensors.items():
            made = make(name, tensor)
            if made.data_ptr() == tensor.data_ptr():
                made = made.clone()
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, tensor.requires_grad)
            memo[id(tensor)] = made
    return copy.deepcopy(model, memo)
