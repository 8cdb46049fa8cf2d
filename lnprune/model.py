"""Whole models in one call: local_structured, global_structured, remove_all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock
from torch.nn.utils.prune import LnStructured

from lnprune import ops, reference
from lnprune.batch import Transaction, bake, finish_all, fuse, is_writable, takes_zeros, zero
from lnprune.parameters import Parameters, Patterns, Weight, collect, per_weight
from lnprune.plan import Plan
from lnprune.prune import Amount, Order, channel_mask, contiguous_mask, ln_mask, native_order, pruned_count
from lnprune.ranking import rank, scores_of
from lnprune.registration import Pruning

__all__ = ["global_structured", "local_structured", "remove_all"]


def local_structured(
    parameters: Parameters,
    amount: Amount | Mapping[str, Amount],
    n: Order,
    dim: Any,
    importance_scores: Mapping[Any, Tensor] | None = None,
    *,
    permanent: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> None:
    """Prunes many parameters, each as :func:`ln_structured` does, in one native call for each device.

    What a loop of :func:`ln_structured` leaves, bit for bit, repeated pruning included, but that modules
    which share a weight also share its mask. All parameters or, where one raises, none. On a GPU nothing
    is waited for, but to compare an int amount with the channels that earlier pruning left.

    Args:
        parameters: pairs ``(module, name)``, or a module; as for :func:`rank`.
        amount: as for :func:`ln_structured`; one for all parameters, or one for each, by name.
        n: the order of the norm, as for :func:`ln_structured`.
        dim: the dim of the channels; as for :func:`rank`.
        importance_scores: tensors to rank in place of some of the weights; as for :func:`rank`.
        permanent: write zeros into the weights in place and leave no mask and no hook: the values that a
            loop of :func:`ln_structured` and ``remove`` leaves, but that zeros are +0.0 whatever was there.
            Parameters that have a mask, or that cannot be written in place, get torch's values.
        include: as for :func:`rank`.
        exclude: as for :func:`rank`.

    Raises:
        As :func:`ln_structured` and :func:`rank`, with the name of the parameter.

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> lnprune.local_structured(model, amount=0.5, n=2, dim="out")
        >>> [int(mask.sum()) for mask in model.buffers()]
        [16, 4]
    """
    weights, tensors = collect(parameters, dim, include, exclude)
    scores = scores_of(weights, tensors, importance_scores)
    amounts = per_weight(amount, [weight.name for weight in weights], "amount")
    masked = list(range(len(weights)))
    in_place: list[int] = []
    if permanent:
        p = None if reference.ranks_like_torch() else native_order(n)
        in_place = [i for i in masked if p is not None and _fits(weights[i], tensors[i], scores[i])]
        chosen = set(in_place)
        masked = [i for i in masked if i not in chosen]
    counts = [_named(weights[i].name, _count, scores[i], amounts[i], weights[i].dim) for i in in_place]
    with Transaction() as transaction:
        if permanent:
            singly = [i for i in masked if _is_bare(weights[i]) and is_writable(tensors[i])]
            flags = [
                _named(weights[i].name, channel_mask, scores[i], amounts[i], n, weights[i].dim)
                for i in singly
            ]
            taken = set(singly)
            masked = [i for i in masked if i not in taken]
        prunings = _install(transaction, masked, weights, tensors, scores, amounts, n)
        if not permanent:
            return
        multiply = bake(transaction, [(pruning.module, pruning.name) for pruning in prunings])
        by_device: dict[torch.device, list[int]] = {}
        for j, i in enumerate(in_place):
            by_device.setdefault(tensors[i].device, []).append(j)
        zero(transaction, [tensors[i] for i in singly], flags, [weights[i].dim for i in singly])
        for members in by_device.values():
            indices = [in_place[j] for j in members]
            ops.prune_channels_(
                [scores[i] for i in indices],
                [tensors[i] for i in indices],
                [weights[i].dim for i in indices],
                p,  # type: ignore[arg-type]
                [counts[j] for j in members],
                [0.0] * len(indices),
            )
        multiply()


def _count(scores: Tensor, amount: Any, dim: int) -> int:
    """How many channels to prune, after the checks of the method and of its mask."""
    stock._validate_pruning_amount_init(amount)
    return pruned_count(scores, amount, dim)


def _is_bare(weight: Weight) -> bool:
    """Whether the parameter has no mask yet."""
    module, attribute = weight.places[0]
    return attribute in module._parameters


def _fits(weight: Weight, tensor: Tensor, score: Tensor) -> bool:
    """Whether zeros can be written by the native code that ranks."""
    return _is_bare(weight) and ops.are_native(score, tensor) and takes_zeros(tensor)


def _named(name: str, function: Any, *arguments: Any) -> Any:
    """The call, with the parameter's name in the message of what it raises."""
    try:
        return function(*arguments)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise type(error)(f"{name}: {error}") from error


def _install(
    transaction: Transaction,
    indices: list[int],
    weights: list[Weight],
    tensors: list[Tensor],
    scores: list[Tensor],
    amounts: list[Any],
    n: Any,
) -> list[Pruning]:
    """Masks and hooks, for every place of each weight."""
    prunings: list[Pruning] = []
    firsts: list[int] = []  # the first place of each weight, whose mask the others take
    owners: list[int] = []
    for i in indices:
        weight = weights[i]
        firsts.append(len(prunings))
        for name, (module, attribute) in zip(weight.names, weight.places, strict=True):
            transaction.touch(module)
            owners.append(firsts[-1])
            given = None if scores[i] is tensors[i] else scores[i]
            prunings.append(
                _named(
                    name,
                    Pruning,
                    module,
                    attribute,
                    lambda i=i: LnStructured(amounts[i], n, weights[i].given_dim),
                    given,
                )
            )
    names = [weights[i].name for i in indices]
    found = dict(zip(firsts, _ln_masks([prunings[j] for j in firsts], names, n), strict=True))
    finish_all(
        prunings,
        [found[owner] if owner == j else (found[owner][0], []) for j, owner in enumerate(owners)],
    )
    return prunings


def _ln_masks(prunings: list[Pruning], names: list[str], n: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """The masks by Ln norms, fused where the native code takes a parameter as one of a list."""
    p = None if reference.ranks_like_torch() else native_order(n)
    results: list[Any] = [None] * len(prunings)
    groups: dict[tuple[torch.device, bool], list[tuple[int, Tensor, int, float]]] = {}
    for i, pruning in enumerate(prunings):
        new, scores, old_mask = pruning.new, pruning.scores, pruning.old_mask
        if p is None or not ops.are_native(scores, pruning.original):
            fused = False
        elif old_mask is None:
            count = _named(names[i], pruned_count, scores, new.amount, new.dim)
            fused = count > 0
            layout, count, fraction = scores, count, 0.0
        else:
            # An int has to be compared with the channels left: by the path of a single parameter.
            fused = (
                type(new.amount) is float
                and new.amount == new.amount
                and pruning.combines_as_torch()
                and ops.are_native(scores, old_mask)
                and old_mask.shape == scores.shape
            )
            if fused:
                layout, count, fraction = contiguous_mask(old_mask, scores.dtype), -1, new.amount
        if fused:
            key = scores.device, old_mask is not None
            groups.setdefault(key, []).append((i, layout, count, fraction))
        else:
            results[i] = _named(names[i], ln_mask, pruning)
    for (_, repeated), members in groups.items():
        parts = fuse([prunings[i] for i, _, _, _ in members], [layout for _, layout, _, _ in members])
        for with_weights, part in zip((True, False), parts, strict=True):
            rows = [members[j] for j in part]
            here = [prunings[i] for i, _, _, _ in rows]
            masks, products = ops.prune_channels(
                [pruning.scores for pruning in here],
                [layout for _, layout, _, _ in rows] if repeated else [],
                [pruning.original for pruning in here] if with_weights else [],
                [pruning.new.dim for pruning in here],
                p,  # type: ignore[arg-type]
                [count for _, _, count, _ in rows],
                [fraction for _, _, _, fraction in rows],
            )
            for j, (i, _, _, _) in enumerate(rows):
                results[i] = masks[j], products[j : j + 1]
    return results


def global_structured(
    parameters: Parameters,
    amount: Amount,
    n: Order,
    dim: Any,
    importance_scores: Mapping[Any, Tensor] | None = None,
    *,
    of: str = "channels",
    normalize: str = "size",
    min_channels: int = 1,
    multiple_of: int = 1,
    group_size: int = 1,
    permanent: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Plan:
    """Prunes the channels that rank last among those of all parameters.

    Short for :func:`rank`, :meth:`Ranking.select` with ``scope="global"``, and :meth:`Plan.apply`; the
    arguments are theirs.

    Returns:
        the applied :class:`Plan`: what was pruned where, and the way back.

    Raises:
        As :func:`rank`, :meth:`Ranking.select` and :meth:`Plan.apply`.

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 32))
        >>> lnprune.global_structured(model, amount=0.25, n=2, dim="out", min_channels=8)
        Plan(2 parameters, 72 of 96 channels kept)
    """
    ranking = rank(parameters, n, dim, importance_scores, include=include, exclude=exclude)
    plan = ranking.select(
        amount,
        scope="global",
        of=of,
        normalize=normalize,
        min_channels=min_channels,
        multiple_of=multiple_of,
        group_size=group_size,
    )
    return plan.apply(permanent=permanent)


def remove_all(model: nn.Module) -> nn.Module:
    """Makes the pruning of every parameter in a model permanent: ``torch.nn.utils.prune.remove`` for all.

    Masks of any method of ``torch.nn.utils.prune`` are multiplied into their parameters, in place, in one
    pass, and masks and hooks go. All or, where one raises, none.

    Args:
        model: a module, which may hold no masks at all.

    Returns:
        ``model``, changed in place.

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> lnprune.local_structured(model, amount=0.5, n=2, dim="out")
        >>> list(lnprune.remove_all(model).buffers())
        []
    """
    places = [
        (module, hook._tensor_name)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, stock.BasePruningMethod)
    ]
    with Transaction() as transaction:
        bake(transaction, places)()
    return model
