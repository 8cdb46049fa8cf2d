"""Attributes of modules that may hold a size of a group, as a number of heads: what the trial changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lnprune.plans.saved_groups import Attribute
from lnprune.removal.groups import Group
from lnprune.removal.sizes import setter_of


def candidates(model: nn.Module, tensors: Mapping[str, Tensor], group: Group) -> list[Attribute]:
    """Integers in attributes that are an old size of the group.

    They are looked for in the modules that own its members and in those above, up to the one that all have
    in common, or to its parent where that owns members itself.
    """
    sizes = _sizes(tensors, group)
    found = []
    for path in _paths({member.name.rpartition(".")[0] for member in group.members}):
        module = model.get_submodule(path)
        if setter_of(module) is not None:  # its attributes are known
            continue
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if type(value) is int and value in sizes:
                found.append(Attribute(path, name, None, sizes[value]))
            elif type(value) in (tuple, list) and value and all(type(each) is int for each in value):
                for i, each in enumerate(value):
                    if each in sizes:
                        found.append(Attribute(path, name, i, sizes[each]))
    return found


def tries(found: Sequence[Attribute]) -> list[tuple[str, ...]]:
    """The names of attributes to try together: all, each, and all but one."""
    names = sorted({attribute.name for attribute in found})
    if not names:
        return []
    sets = [tuple(names), *((name,) for name in names)]
    sets += [tuple(each for each in names if each != name) for name in names if len(names) > 2]
    return list(dict.fromkeys(sets))


def _sizes(tensors: Mapping[str, Tensor], group: Group) -> dict[int, int]:
    """Sizes that follow the group, and how many of each a channel is."""
    sizes: dict[int, int] = {}
    for member in group.members:
        per_channel, rest = divmod(len(member.slices), group.channels)
        if rest:
            continue
        # Heads: of their width, and of what divides it, as queries of one key.
        for part in range(1, per_channel + 1):
            if per_channel % part == 0:
                sizes.setdefault(group.channels * part, part)
    for member in group.members:
        per_channel, rest = divmod(len(member.slices), group.channels)
        if not rest:
            sizes.setdefault(tensors[member.name].shape[member.dim], per_channel)
    sizes[group.channels] = 1
    return sizes


def _paths(owners: set[str]) -> list[str]:
    """The modules that own members, and those above them up to the common one."""
    parts = [owner.split(".") if owner else [] for owner in sorted(owners)]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    top = len(common)
    if ".".join(common) in owners and top:
        top -= 1
    paths = {".".join(each[:length]) for each in parts for length in range(top, len(each) + 1)}
    return sorted(paths)
