"""Names of experts in files and in models: each expert by itself, or all of a layer in one parameter.

Files mostly hold ``mlp.experts.7.gate_proj.weight`` for each expert. The library transformers puts all of a
layer into ``mlp.experts.gate_up_proj`` when it loads them, gate above up, and takes them apart on saving.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from lnprune.modules.application import Slices
from lnprune.plans.plan_file import PlanEntry, SavedPlan
from lnprune.plans.saved_batches import SavedBatch
from lnprune.steps.batches import Batch

# What files call the projections of an expert: the parts of `gate_up_proj`, and `down_proj`.
LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2"))
# What files call modules that hold experts, and what models call them.
RENAMED = ((".block_sparse_moe.", ".mlp."),)
FUSED = "gate_up_proj", "down_proj"


class ExpertSlices(NamedTuple):
    """What is zeroed of a tensor that holds one projection of one expert."""

    name: str
    shape: tuple[int, ...]
    dim: int
    keep: Tensor


def experts_of(slices: Slices, known: Collection[str]) -> list[ExpertSlices]:
    """What slices of a weight that holds all experts are in a file that holds each by itself; else nothing.

    Raises:
        ValueError: they are such that no slices of the experts are the same.
    """
    weight = slices.weight
    prefix, dot, last = weight.name.rpartition(".experts.")
    if not dot or last not in FUSED or len(weight.shape) != 3:
        return []
    names = _names(f"{prefix}{dot}", last, known)
    if not names:
        return []
    experts = weight.shape[0]
    if slices.part is not None or slices.dim == 0 or slices.batch not in (None, Batch(0, experts)):
        raise ValueError(
            f"{weight.name}: the file holds each expert by itself, so expected matrices along dim 0, got "
            f"slices along dim {slices.dim} with batch {slices.batch}"
        )
    keep = slices.keep.view(1 if slices.batch is None else experts, -1).expand(experts, -1)
    rows, columns = weight.shape[1:]
    parts = len(names)
    found = []
    for i in range(experts):
        # A projection has its rows of the matrix, and all of the columns.
        pieces = keep[i].chunk(parts) if slices.dim == 1 else (keep[i],) * parts
        for name, piece in zip(names, pieces, strict=True):
            found.append(ExpertSlices(name.format(i), (rows // parts, columns), slices.dim - 1, piece))
    missing = next((each.name for each in found if each.name not in known), None)
    if missing is not None:
        raise ValueError(f"{weight.name}: the file has no {missing}, one of {experts} experts")
    return found


def _names(prefix: str, fused: str, known: Collection[str]) -> list[str]:
    """What a file calls the parts of a fused weight, with a place for the expert's number."""
    prefixes = [prefix, *(prefix.replace(model, file) for file, model in RENAMED if model in prefix)]
    for each in prefixes:
        for gate, up, down in LAYOUTS:
            projections = [gate, up] if fused == FUSED[0] else [down]
            names = [f"{each}{{}}.{projection}.weight" for projection in projections]
            if names[0].format(0) in known:
                return names
    return []


def fused_experts(saved: SavedPlan) -> SavedPlan:
    """The same plan with the names that models of transformers have for experts.

    Raises:
        ValueError: it prunes inputs of a gate that it does not prune of the up projection beside it.
    """
    places = {name: place for name in (entry.name for entry in saved.entries) if (place := _place(name))}
    sizes: dict[str, int] = {}
    for prefix, number, _ in places.values():
        sizes[prefix] = max(sizes.get(prefix, 0), number + 1)
    by_place = {places[entry.name]: i for i, entry in enumerate(saved.entries) if entry.name in places}
    entries: list[PlanEntry] = []
    names: list[list[str]] = []
    pruned: list[list[int]] = []
    batches: list[SavedBatch | None] = []
    done: set[tuple[str, int, str]] = set()
    for i, entry in enumerate(saved.entries):
        place = places.get(entry.name)
        if place is None:
            merged = entry, saved.names[i], saved.pruned[i], saved.batches[i] if saved.batches else None
        else:
            prefix, number, part = place
            fused = FUSED[1] if part == "down" else FUSED[0]
            if (prefix, number, fused) in done:
                continue
            done.add((prefix, number, fused))
            parts = ["down"] if part == "down" else ["gate", "up"]
            found = [by_place.get((prefix, number, each)) for each in parts]
            merged = _merged(saved, found, entry, f"{prefix}{fused}", number, sizes[prefix])
        for each, value in zip((entries, names, pruned, batches), merged, strict=True):
            each.append(value)  # type: ignore[attr-defined]
    return saved._replace(entries=entries, names=names, pruned=pruned, batches=batches)


def _place(name: str) -> tuple[str, int, str] | None:
    """The module of experts, as models call it, the number and the projection that a name is about."""
    match = re.fullmatch(r"(.+\.experts\.)(\d+)\.(\w+)\.weight", name)
    if match is None:
        return None
    prefix, number, projection = match.groups()
    for file, model in RENAMED:
        prefix = prefix.replace(file, model)
    for layout in LAYOUTS:
        if projection in layout:
            return prefix, int(number), ("gate", "up", "down")[layout.index(projection)]
    return None


def _merged(
    saved: SavedPlan, found: list[int | None], entry: PlanEntry, name: str, number: int, experts: int
) -> tuple[PlanEntry, list[str], list[int], SavedBatch]:
    """One entry for the projections of an expert that a model holds together."""
    parts = len(found)
    length, dim = entry.shape[0], entry.dim
    shape = (parts * length, entry.shape[1])
    lists = [[] if i is None else saved.pruned[i] for i in found]
    several = [saved.entries[i] for i in found if i is not None]
    if any((each.shape, each.dim) != (entry.shape, dim) for each in several):
        raise ValueError(f"{entry.name}: expected shape and dim of the projection beside it")
    if dim == 0:
        gone = [first * length + i for first, indices in enumerate(lists) for i in indices]
    else:
        if any(sorted(each) != sorted(lists[0]) for each in lists):
            raise ValueError(f"{entry.name}: expected the same inputs pruned of gate and up projection")
        gone = list(lists[0])
    is_alone = len(several) == 1
    merged = PlanEntry(
        f"{name}[{number}]",
        shape,
        dim,
        shape[dim],
        shape[dim] - len(gone),
        entry.norm_at_cut if is_alone else None,
        entry.margin if is_alone else None,
        sum(each.parameters_removed for each in several),
    )
    return merged, [merged.name], gone, SavedBatch((experts, *shape), dim + 1, 0, experts, number)
