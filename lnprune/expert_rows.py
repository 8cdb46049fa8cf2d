"""Rows for the intermediate channels of experts: what of which parameters makes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lnprune.errors import shown
from lnprune.modules.expert_layers import ExpertSlices, intermediate
from lnprune.modules.finding import named_modules
from lnprune.modules.masked import parameter_of
from lnprune.modules.parameters import Weight
from lnprune.plans.rows import Member, Row


def expert_rows(model: Any, word: Any, weights: Sequence[Weight]) -> tuple[list[Row], list[str]]:
    """A row for each layer of experts, as many rankings as it has experts; and which layers are not known.

    Args:
        model: the model.
        word: what is ranked of experts.
        weights: the weights that a call is about; layers of which none is among them are left alone.
    """
    if word != "intermediate":
        raise ValueError(f"experts: expected 'intermediate' or None, got {shown(word)}")
    if not isinstance(model, nn.Module):
        raise TypeError("experts='intermediate' looks for layers of experts in a model, got a list")
    places: dict[tuple[int, str], Weight] = {}
    for weight in weights:
        places.update(((id(module), attribute), weight) for module, attribute in weight.places)
    biases: dict[int, Weight] = {}  # by the identity of the parameter
    rows: dict[tuple[Weight, ...], Row] = {}
    unknown = []
    paths = {id(module): path for path, module in named_modules(model)}
    for path, module in named_modules(model):
        found = intermediate(module)
        if isinstance(found, str):
            unknown.append(f"{path or type(module).__name__}: {found}")
        if found is None or isinstance(found, str):
            continue
        mine = [places.get((id(each.module), each.attribute)) for each in found.members]
        if not any(mine):
            continue
        members = [
            Member(
                _bias(each, paths[id(each.module)], biases) if weight is None else weight,
                each.dim,
                each.channel_of,
                batch=each.batch,
            )
            for weight, each in zip(mine, found.members, strict=True)
        ]
        key = tuple(member.weight for member in members)
        if key not in rows:
            others = {weight for known in rows for weight in known}
            if others & set(key):
                raise ValueError(
                    f"{path}: shares some of its weights with other experts, and not all: expected experts "
                    "that share all of them, or none: exclude them"
                )
            rows[key] = Row(path or "experts", found.channels, members)
    if not rows and not unknown:
        raise ValueError(f"experts='intermediate': {type(model).__name__} has no known layers of experts")
    return list(rows.values()), unknown


def _bias(each: ExpertSlices, path: str, known: dict[int, Weight]) -> Weight:
    """The biases of experts, which no call names; a weight that is missing was excluded."""
    name = f"{path}.{each.attribute}" if path else each.attribute
    if not each.attribute.endswith("_bias"):
        raise ValueError(f"{name}: expected all weights of experts or none, for experts='intermediate'")
    parameter = parameter_of(each.module, each.attribute)
    assert parameter is not None
    weight = known.setdefault(id(parameter), Weight([name], parameter.shape))
    if name not in weight.names:
        weight.names.append(name)
    weight.places.append((each.module, each.attribute))
    return weight
