"""What goes of layers of experts: intermediate channels of each expert, and whole experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lnprune.measuring import rank
from lnprune.modules.expert_layers import intermediate
from lnprune.modules.parameters import Weight
from lnprune.modules.scores import scores_of
from lnprune.modules.values import current_values, weights_by_name
from lnprune.plans.ranking import Ranking, measure
from lnprune.plans.rows import Member, Row
from lnprune.plans.scales import scales_of
from lnprune.pretrained.choosing import Measures, kept_of_each, selected
from lnprune.pretrained.model_types import Experts
from lnprune.pretrained.slices import ExpertCut, Going, Router
from lnprune.removal.cutting import Cut
from lnprune.steps.flags import Amount


def choose_experts(
    model: Any,
    known: Experts,
    amount: Amount,
    experts: Amount | None,
    multiple_of: int,
    measures: Measures,
) -> list[Going]:
    """What goes of the experts of a model.

    Args:
        model: a model of transformers.
        known: what is known of its experts.
        amount: how many intermediate channels of each expert.
        experts: how many experts of each layer; None: none.
        multiple_of: what the channels that stay of each are a multiple of.
        measures: what channels and experts are measured by.

    Raises:
        ValueError: the numbers do not fit; the model has no such experts.
    """
    layers = {path: module for path, module in model.named_modules() if fnmatchcase(path, known.modules)}
    if not layers:
        if experts is not None:
            raise ValueError(f"experts: {type(model).__name__} has no layers of experts")
        return []
    found = []
    if amount:
        found.append(_width(model, known, layers, amount, multiple_of, measures))
    if experts is not None:
        found.append(_whole(model, known, layers, experts, measures))
    return found


def _width(
    model: Any,
    known: Experts,
    layers: Mapping[str, nn.Module],
    amount: Amount,
    multiple_of: int,
    measures: Measures,
) -> Going:
    """Of each expert its own channels, equally many of all."""
    parameters = [
        f"{path}.{name}" for path, module in layers.items() for name, _ in module.named_parameters()
    ]
    options = measures.of(list(layers), parameters)
    ranking = rank(model, measures.n, "out", experts="intermediate", include=list(layers), **options)
    keep = selected(ranking, amount, multiple_of)
    cuts = []
    for path, module in layers.items():
        found = intermediate(module)
        if found is None or isinstance(found, str):
            raise ValueError(f"{path}: {found or 'expected weights of all experts in one parameter'}")
        count = found.members[0].batch.size
        gone = ~torch.stack([keep[f"{path}[{expert}]"] for expert in range(count)])
        for each in found.members:
            mine = gone if each.channel_of is None else gone[:, each.channel_of]
            cuts.append(ExpertCut(f"{path}.{each.attribute}", each.dim, mine))
    return Going("intermediate channels of experts", [], cuts, [], {known.width: kept_of_each(keep)})


def _whole(
    model: Any, known: Experts, layers: Mapping[str, nn.Module], experts: Amount, measures: Measures
) -> Going:
    """Whole experts, with what their router has for them; equally many of each of its groups."""
    config = model.config
    count = getattr(config, known.number)
    groups = getattr(config, "n_group", None) or 1
    if type(experts) is int:
        if experts % groups:
            raise ValueError(
                f"experts: expected a multiple of {groups}, the groups of the router, got {experts}"
            )
        experts //= groups
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    slices: dict[str, list[str]] = {}  # of each layer, the names of what has a slice for each expert
    routers: dict[str, str] = {}
    for path, module in layers.items():
        routers[path] = f"{path.rpartition('.')[0]}.{known.router}"
        inside = [f"{path}.{name}" for name, _ in module.named_parameters()]
        beside = [name for name in tensors if name.rpartition(".")[0] == routers[path]]
        slices[path] = inside + beside
        for name in slices[path]:
            if tensors[name].shape[:1] != (count,):
                raise ValueError(
                    f"{name}: expected {known.number}={count} slices, got shape "
                    f"{tuple(tensors[name].shape)}"
                )
    by_router = {routers[path]: names for path, names in slices.items()}
    ranking = _ranking(model, by_router, count, groups, measures)
    keep = selected(ranking, experts)
    kept = kept_of_each(keep) * groups
    least = getattr(config, "num_experts_per_tok", 1)
    if kept < least:
        raise ValueError(f"experts: each token takes {least}: expected so many that stay, got {kept}")
    cuts, found = [], []
    for path, names in slices.items():
        flags = torch.cat([keep[name] for name in _rows_of(routers[path], groups)])
        gone = (~flags).nonzero().flatten()
        cuts += [Cut(name, 0, gone) for name in names]
        beside = [name for name in names if name.rpartition(".")[0] == routers[path]]
        found.append(Router(routers[path], beside, gone))
    return Going("experts", cuts, [], found, {known.number: kept})


def _rows_of(path: str, groups: int) -> list[str]:
    """The names of what is ranked of a layer: of its router, or of the groups that it chooses by."""
    return [path] if groups == 1 else [f"{path} group {group}" for group in range(groups)]


def _ranking(
    model: nn.Module, slices: Mapping[str, Sequence[str]], count: int, groups: int, measures: Measures
) -> Ranking:
    """Measures experts: the norm of all their weights and of their router's together."""
    names = [name for each in slices.values() for name in each]
    by_name = {
        name: weight for name, weight in weights_by_name(model, names).items() if len(weight.shape) > 1
    }
    rows: list[Row] = []
    size = count // groups
    for path, mine in slices.items():
        for group, name in enumerate(_rows_of(path, groups)):
            of_group = torch.arange(group * size, (group + 1) * size) if groups > 1 else None
            channels = None if of_group is None else of_group - group * size
            members = [
                Member(by_name[each], 0, channels, None, of_group) for each in mine if each in by_name
            ]
            rows.append(Row(name, size, members))
    weights: list[Weight] = list(by_name.values())
    values, masks = current_values(weights)
    options = measures.of([row.name for row in rows], list(by_name))
    scores = scores_of(weights, list(values.values()), options.get("importance_scores"))
    tensors: list[Tensor] = [values[row.members[0].weight] for row in rows]
    return measure(
        rows,
        measures.n,
        values,
        dict(zip(weights, scores, strict=True)),
        masks,
        scales=scales_of(rows, tensors, options.get("scale")),
    )
