"""Calls as type checkers see them: mypy reports a comment below that silences nothing, too."""

import torch
from torch import nn

import lnprune
from lnprune.integrations.transformers import prune_pretrained

Pairs = list[tuple[nn.Module, str]]


def one_parameter(layer: nn.Linear) -> None:
    lnprune.ln_structured(layer, "weight", 0.5, 2, 0)
    lnprune.ln_structured(layer, "weight", 1, "fro", 0)
    lnprune.ln_structured(layer, "weight", 1, float("inf"), dim=1)
    lnprune.ln_structured(layer, "weight", 1, "l2", 0)  # type: ignore[arg-type]
    lnprune.ln_structured(layer, "weight", 1, 2, "out")  # type: ignore[arg-type]
    lnprune.ln_structured(layer, "weight", "1", 2, 0)  # type: ignore[arg-type]
    lnprune.channel_norms(torch.ones(2, 2), "two", 0)  # type: ignore[arg-type]


def rankings(model: nn.Sequential, pairs: Pairs) -> None:
    lnprune.rank(model, 2, "out").select(0.5, scope="global", of="parameters", normalize="layer")
    lnprune.rank(pairs, None, [0])
    lnprune.rank(model, 2, {"0.weight": "in"}, include={nn.Linear: {"out": 0, "in": 1}}, exclude=["1.*"])
    lnprune.rank(model, 2, "rows")  # type: ignore[arg-type]
    lnprune.rank(model, 2, ["rows"])  # type: ignore[list-item]
    lnprune.rank(model, "l2", 0)  # type: ignore[arg-type]
    lnprune.rank(model, 2, 0).select(0.5, scope="layer")  # type: ignore[arg-type]


def plans(plan: lnprune.Plan, model: nn.Module) -> None:
    plan.apply(permanent=True, bias=True, keep_backup=True).undo()
    plan.apply(model)  # type: ignore[arg-type]
    plan.apply(True)  # type: ignore[arg-type]
    plan.apply(permanent="no")  # type: ignore[arg-type]
    lnprune.patch(permanently=1)  # type: ignore[arg-type]


def whole_models(model: nn.Sequential, pairs: Pairs) -> tuple[nn.Sequential, Pairs]:
    lnprune.local_structured(model, 0.5, 2, "output")  # type: ignore[arg-type]
    lnprune.local_structured(model, 0.5, 2, 0, permanent="yes")  # type: ignore[arg-type]
    lnprune.global_structured(model, 0.5, "L2", 0)  # type: ignore[arg-type]
    lnprune.load_masked(lnprune.renew_masked(lnprune.remove_all(model)), model.state_dict(), strict=False)
    return (
        lnprune.global_structured(model, 0.5, 2, "out", permanent=True),
        lnprune.local_structured(pairs, 1, 2, 0),
    )


def folders() -> tuple[int, int]:
    pruned = prune_pretrained("large", "small", 0.25, heads=2, scale={"a": torch.ones(3)})
    prune_pretrained("large", "small", "half")  # type: ignore[arg-type]
    return pruned.parameters
