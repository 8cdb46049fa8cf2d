"""Copies of a model: without some slices of its tensors, or with zeros in their place; and it in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

from lnprune.modules.masked import is_masked
from lnprune.modules.registration import unregister
from lnprune.modules.transaction import Transaction
from lnprune.plans.saved_groups import Attribute
from lnprune.removal.groups import Group
from lnprune.removal.sizes import set_sizes, shapes_of
from lnprune.torch_internals import own_buffers, own_parameters, own_pre_hooks, tree_leaves

Values = Callable[[str, Tensor], Tensor]


class HasAttributes(Protocol):
    """A group, or what goes of one: some attributes of modules hold its size."""

    @property
    def attributes(self) -> list[Attribute]:
        """These."""


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
    """A copy of a model without slices of its tensors; of these, what is left is all that is copied.

    What is left has the memory format of the whole.
    """
    flags: dict[str, dict[int, Tensor]] = {}
    for name, dim, slices in cuts:
        keep = flags.setdefault(name, {}).setdefault(
            dim, torch.ones(tensors[name].shape[dim], dtype=torch.bool)
        )
        keep[slices] = False

    def small(name: str, tensor: Tensor) -> Tensor:
        taken = tensor.detach()
        if name not in flags:
            return taken
        strides = taken.stride()
        order = sorted(range(taken.dim()), key=lambda dim: -strides[dim])
        taken = taken.permute(order)
        for dim, keep in flags[name].items():
            kept = keep.nonzero().flatten().to(taken.device)
            taken = taken.index_select(order.index(dim), kept)
        return taken.permute([order.index(dim) for dim in range(taken.dim())])

    before = _Sizes(model, settings)
    made = copied(model, tensors, small)
    before.change(made)
    return made


def adopt(model: nn.Module, small: nn.Module, settings: Sequence[Setting]) -> None:
    """Gives a model the tensors and sizes of its copy without slices, and takes masks that the copy lost.

    All or, where it raises, nothing. What has its shape still stays the object that it is.
    """
    before = _Sizes(model, settings)
    with Transaction() as transaction, torch.no_grad():
        for module, other in zip(model.modules(), small.modules(), strict=True):
            transaction.touch(module)
            new = _held(other)
            changed = []
            for key in list(own_parameters(module)):
                stem = key.removesuffix("_orig")
                if stem != key and is_masked(module, stem) and not is_masked(other, stem):
                    unregister(module, stem)
                    changed.append(stem)
            changed += [key for key, held in _held(module).items() if held.shape != new[key].shape]
            for key in changed:
                setattr(module, key, new[key])
            _renew(module)
        before.change(model)


def _held(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module has itself."""
    owned = {**own_parameters(module), **own_buffers(module)}
    return {key: tensor for key, tensor in owned.items() if tensor is not None}


class _Sizes:
    """What the attributes of modules are before slices go, and how they change."""

    def __init__(self, model: nn.Module, settings: Sequence[Setting]):
        self._settings = settings
        self._shapes = {
            path: shapes_of(module) for path, module in model.named_modules(remove_duplicate=False)
        }
        self._values = [getattr(model.get_submodule(path), attribute) for path, attribute, _ in settings]

    def change(self, small: nn.Module) -> None:
        """Sets the sizes of a model that lost its slices."""
        for path, module in small.named_modules(remove_duplicate=False):
            if shapes_of(module) != self._shapes[path]:
                set_sizes(module, self._shapes[path])
        for (path, attribute, value), old in zip(self._settings, self._values, strict=True):
            module = small.get_submodule(path)
            if getattr(module, attribute) == old:  # else it is set: the type of the module tells
                setattr(module, attribute, value)


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


def settings_for(model: nn.Module, groups: Sequence[HasAttributes], gone: Sequence[int]) -> list[Setting]:
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
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and is_masked(module, key):  # computed anew, below
                    memo[id(value)] = value.detach().new_empty(0)
                    continue
                for leaf in tree_leaves(value):
                    # What a hook computed, or a forward and cached, which torch refuses to copy.
                    if isinstance(leaf, Tensor) and not leaf.is_leaf:
                        memo[id(leaf)] = leaf.detach().clone()
        for name, tensor in tensors.items():
            made = make(name, tensor)
            if made.data_ptr() == tensor.data_ptr():
                made = made.clone()
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, tensor.requires_grad)
                vars(made).update(vars(tensor))
            memo[id(tensor)] = made
        new = copy.deepcopy(model, memo)
        for module in new.modules():
            _renew(module)
    return new


def _renew(module: nn.Module) -> None:
    """Computes masked weights anew."""
    for hook in list(own_pre_hooks(module).values()):
        if isinstance(hook, stock.BasePruningMethod):
            hook(module, None)
