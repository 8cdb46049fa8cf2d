"""Whole models in one call: local_structured, global_structured, remove_all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import prune as stock

from lnprune.application import Target, install, prune_in_place, unmask
from lnprune.errors import check_flags
from lnprune.flags import Amount
from lnprune.in_place import write_in_place
from lnprune.norms import Order
from lnprune.parameters import Dim, Parameters, Patterns, collect, per_weight, scores_of
from lnprune.ranking import rank
from lnprune.selection import Normalize, Of
from lnprune.torch_internals import (
    own_pre_hooks,
    pruned_name,
)
from lnprune.transaction import Transaction

__all__ = ["global_structured", "local_structured", "remove_all"]

Given = TypeVar("Given", bound=Parameters)  # a model, or pairs of modules and names


def local_structured(
    parameters: Given,
    amount: Amount | Mapping[str, Amount],
    n: Order,
    dim: Dim,
    importance_scores: Mapping[Any, Tensor] | None = None,
    *,
    permanent: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Given:
    """Prunes many parameters, each as :func:`ln_structured` does, in one native call for each device.

    The result is that of a loop of :func:`ln_structured`, bit for bit, but for one thing: modules that
    share a weight also share its mask. All parameters are pruned or, where one raises, none.

    A weight that has a mask is ranked by the values that the last forward gave it, as torch does
    (:func:`renew_masked` gives it those of now). On a GPU the call returns before the work is done. Only
    where ``amount`` is an int and a weight has a mask does it wait, to compare the int with the number of
    channels that are left.

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

    Returns:
        ``parameters``, whose modules are changed in place.

    Raises:
        As :func:`ln_structured` and :func:`rank`, with the name of the parameter. ValueError for a mask
        that no hook would renew, as :meth:`Plan.apply`. With ``permanent``, RuntimeError for values that
        lie in other tensors (DTensor) or in memory that cannot be written.

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> model = lnprune.local_structured(model, amount=0.5, n=2, dim="out")
        >>> [int(mask.sum()) for mask in model.buffers()]
        [16, 4]
    """
    check_flags(permanent=permanent)
    weights, tensors = collect(parameters, dim, include, exclude)
    scores = scores_of(weights, tensors, importance_scores)
    if not permanent:
        for weight in weights:
            weight.check_holds_mask()
    amounts = per_weight(amount, [weight.name for weight in weights], "amount")
    # One at a time: thousands of them at once would keep the garbage collector busy.
    targets = (
        Target(name, module, attribute, weight.given_dim, share, None, None if score is tensor else score)
        for weight, tensor, score, share in zip(weights, tensors, scores, amounts, strict=True)
        for name, (module, attribute) in zip(weight.names, weight.places, strict=True)
    )
    with Transaction() as transaction:
        (prune_in_place if permanent else install)(transaction, targets, n)
    return parameters


def global_structured(
    parameters: Given,
    amount: Amount,
    n: Order,
    dim: Dim,
    importance_scores: Mapping[Any, Tensor] | None = None,
    *,
    of: Of = "channels",
    normalize: Normalize = "size",
    min_channels: int = 1,
    multiple_of: int = 1,
    group_size: int = 1,
    permanent: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Given:
    """Prunes the channels that rank last among those of all parameters.

    Short for :func:`rank`, :meth:`Ranking.select` with ``scope="global"``, and :meth:`Plan.apply`; the
    arguments are theirs. For a plan to look at, to save or to undo, call these.

    Returns:
        ``parameters``, whose modules are changed in place.

    Raises:
        As :func:`rank`, :meth:`Ranking.select` and :meth:`Plan.apply`.

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 32))
        >>> model = lnprune.global_structured(model, amount=0.25, n=2, dim="out", min_channels=8)
        >>> sum(int(mask[:, 0].sum()) for mask in model.buffers())
        72
    """
    check_flags(permanent=permanent)
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
    plan.apply(permanent=permanent)
    return parameters


def remove_all(model: nn.Module) -> nn.Module:
    """Makes the pruning of every parameter in a model permanent: ``torch.nn.utils.prune.remove`` for all.

    Masks of any method of ``torch.nn.utils.prune`` are multiplied into their parameters, in place, in one
    pass, and masks and hooks go. All or, where one raises, none.

    Args:
        model: a module, which may hold no masks at all.

    Returns:
        ``model``, changed in place.

    Raises:
        RuntimeError: the values of a masked parameter lie in other tensors (DTensor).

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> model = lnprune.local_structured(model, amount=0.5, n=2, dim="out")
        >>> list(lnprune.remove_all(model).buffers())
        []
    """
    places = [
        (f"{path}.{pruned_name(hook)}" if path else pruned_name(hook), module, pruned_name(hook))
        for path, module in model.named_modules()
        for hook in own_pre_hooks(module).values()
        if isinstance(hook, stock.BasePruningMethod)
    ]
    with Transaction() as transaction:
        pairs = unmask(transaction, places)
        write_in_place([], pairs, None, transaction.note)
    return model
