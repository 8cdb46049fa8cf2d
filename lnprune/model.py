"""Whole models in one call: local_structured, global_structured, remove_all, load_plan."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.utils import prune as stock

from lnprune.errors import check_flags, per_name
from lnprune.measuring import rank
from lnprune.modules.application import install, prune_in_place, unmask
from lnprune.modules.batching import BatchDim, names_of
from lnprune.modules.finding import Patterns
from lnprune.modules.parameters import Dim, Parameters, collect, placed, repeatable
from lnprune.modules.registration import Target
from lnprune.modules.scores import is_given, scores_of
from lnprune.modules.sharded import parameters_of
from lnprune.modules.transaction import Transaction
from lnprune.plans import plan_file
from lnprune.plans.kinds import Uniform
from lnprune.plans.loading import loaded, weights_of
from lnprune.plans.outcome import NotCoupled
from lnprune.plans.plan import Plan
from lnprune.plans.plan_file import SavedPlan
from lnprune.plans.selection import Normalize, Of
from lnprune.removal.removed import removed_of
from lnprune.steps.batches import Batch
from lnprune.steps.flags import Amount
from lnprune.steps.in_place import write_in_place
from lnprune.steps.norms import Order
from lnprune.steps.sharding import Agreement
from lnprune.torch_internals import own_pre_hooks, pruned_name

Given = TypeVar("Given", bound=Parameters)  # a model, or pairs of modules and names


def _amounts(given: Any, names: Sequence[str], batches: Sequence[Batch | None]) -> list[Any]:
    """The amount of each parameter; a tuple where those of its rankings differ."""
    if not (any(batches) and isinstance(given, Mapping)):
        return per_name(given, names, "amount")
    known = [names_of(name, batch) for name, batch in zip(names, batches, strict=True)]
    each = iter(per_name(given, [name for rankings in known for name in rankings], "amount"))
    found = [tuple(next(each) for _ in rankings) for rankings in known]
    return [amounts if any(one is not amounts[0] for one in amounts) else amounts[0] for amounts in found]


def local_structured(
    parameters: Given,
    amount: Amount | Mapping[str, Amount],
    n: Order,
    dim: Dim,
    importance_scores: Mapping[Any, Tensor] | None = None,
    *,
    permanent: bool = False,
    batch_dim: BatchDim = None,
    batch_size: BatchDim = None,
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
        batch_dim: as for :func:`rank`. A mask is of the whole parameter; its hook is a ``CustomFromMask``.
        batch_size: as for :func:`rank`.
        permanent: write zeros into the weights in place and leave no mask and no hook: the values that a
            loop of :func:`ln_structured` and ``remove`` leaves, but that zeros are +0.0 whatever was there.
            Parameters that have a mask, or that cannot be written in place, get torch's values.
        include: as for :func:`rank`.
        exclude: as for :func:`rank`.

    Returns:
        ``parameters``, whose modules are changed in place.

    Raises:
        As :func:`ln_structured` and :func:`rank`, with the name of the parameter. ValueError for a mask
        that no hook would renew, as :meth:`Plan.apply`. RuntimeError for masks under ``fully_shard``; with
        ``permanent``, for values that lie in other tensors, but for a DTensor's, or in memory that cannot
        be written.

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> model = lnprune.local_structured(model, amount=0.5, n=2, dim="out")
        >>> [int(mask.sum()) for mask in model.buffers()]
        [16, 4]
    """
    parameters = repeatable(parameters)
    with Transaction() as transaction, Agreement(parameters_of(parameters)) as agreement:
        check_flags(permanent=permanent)
        weights, tensors, dims, batches = collect(parameters, dim, include, exclude, batch_dim, batch_size)
        scores = scores_of(weights, tensors, importance_scores)
        if not permanent:
            for weight in weights:
                weight.check_holds_mask()
        names = [weight.name for weight in weights]
        amounts = _amounts(amount, names, batches)
        # One at a time: thousands of them at once would keep the garbage collector busy.
        targets = (
            Target(
                *(name, module, attribute, along, share, None, None if score is tensor else score),
                *(None, batch),
            )
            for weight, along, batch, tensor, score, share in zip(
                weights, dims, batches, tensors, scores, amounts, strict=True
            )
            for name, (module, attribute) in zip(weight.names, weight.places, strict=True)
        )
        asked = names, dims, batches, amounts, tensors, scores, is_given(scores, tensors)
        agree = functools.partial(agreement.confirm, "local", permanent, n, *asked)
        if permanent:
            prune_in_place(transaction, targets, n, agree=agree)
        else:
            agree()
            install(transaction, targets, n)
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
    uniform: Uniform = None,
    permanent: bool = False,
    batch_dim: BatchDim = None,
    batch_size: BatchDim = None,
    experts: Literal["intermediate"] | None = None,
    scale: Mapping[str, Tensor] | None = None,
    element_scale: Mapping[Any, Tensor] | None = None,
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
    parameters = repeatable(parameters)
    with Agreement(parameters_of(parameters)) as agreement:
        check_flags(permanent=permanent)
        ranking = rank(
            parameters,
            n,
            dim,
            importance_scores,
            batch_dim=batch_dim,
            batch_size=batch_size,
            experts=experts,
            scale=scale,
            element_scale=element_scale,
            include=include,
            exclude=exclude,
        )
        plan = ranking.select(
            amount,
            scope="global",
            of=of,
            normalize=normalize,
            min_channels=min_channels,
            multiple_of=multiple_of,
            group_size=group_size,
            uniform=uniform,
        )
        agreement.confirm("global")
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
        RuntimeError: the values of a masked parameter lie in other tensors, but for a DTensor's, or
            ``fully_shard`` keeps it.

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
    with Transaction() as transaction, Agreement(parameters_of(model)) as agreement:
        pairs = unmask(transaction, places)
        agree = functools.partial(agreement.confirm, "remove_all", [name for name, _, _ in places])
        write_in_place([], pairs, None, transaction.note, agree=agree)
    return model


def load_plan(path: str | os.PathLike[str], parameters: Parameters) -> Plan:
    """Reads a plan that :meth:`Plan.save` wrote, for a model with the same parameters.

    Args:
        path: the file.
        parameters: the model, wrapped (compiled, parallel, averaged) or not, or pairs ``(module, name)`` in
            the order in which they were ranked.

    Returns:
        the :class:`Plan`, without norms.

    Raises:
        ValueError: the file holds no plan, or one of a newer version, or one for another model: a
            parameter is missing or has another shape.

    Example:
        >>> import lnprune, pathlib, tempfile
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "plan.json"
        >>> lnprune.rank(model, n=2, dim="out").select(0.5).save(path)
        >>> lnprune.load_plan(path, model).apply()
        Plan(1 parameters, 2 of 4 channels kept)
    """
    parameters = repeatable(parameters)
    with Agreement(parameters_of(parameters)) as agreement:
        saved = plan_file.read(path)
        plan = _loaded(saved, parameters)
        agreement.confirm("load", saved)
    return plan


def _loaded(saved: SavedPlan, parameters: Parameters) -> Plan:
    weights = placed(weights_of(saved), parameters)
    if saved.groups is None:
        return loaded(saved, weights)
    if any(member.batch is not None for group in saved.groups for member in group.members):
        return loaded(saved, weights, functools.partial(NotCoupled, saved.groups))
    model = parameters if isinstance(parameters, nn.Module) else None
    return loaded(saved, weights, functools.partial(removed_of, saved, model))
