"""Whole models in one call: rank, local_structured, global_structured, remove_all, load_plan."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import prune as stock

from lnprune.errors import check_flags, per_name
from lnprune.modules.application import install, prune_in_place, unmask
from lnprune.modules.finding import Patterns
from lnprune.modules.parameters import Dim, Parameters, Weight, collect, placed, repeatable, scores_of
from lnprune.modules.registration import Target
from lnprune.modules.sharded import parameters_of
from lnprune.modules.transaction import Transaction
from lnprune.modules.values import current_values
from lnprune.plans import plan_file
from lnprune.plans.plan import Plan, loaded
from lnprune.plans.plan_file import SavedPlan
from lnprune.plans.ranking import Ranking, measure
from lnprune.plans.rows import Member, Row
from lnprune.plans.selection import Normalize, Of
from lnprune.removal.removed import removed_of
from lnprune.steps import reference
from lnprune.steps.flags import Amount
from lnprune.steps.in_place import write_in_place
from lnprune.steps.norms import Order
from lnprune.steps.sharding import Agreement, Group
from lnprune.torch_internals import own_pre_hooks, pruned_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Given = TypeVar("Given", bound=Parameters)  # a model, or pairs of modules and names


def rank(
    parameters: Parameters,
    n: Order,
    dim: Dim,
    importance_scores: Mapping[Any, Tensor] | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    group: ProcessGroup | None = None,
) -> Ranking:
    """Measures the L\\ ``n`` norm of every channel of many parameters, in one native call per device.

    No weight is changed, and none is read again by the selections that follow. A weight that modules
    share is measured once. Of a pruned parameter the product of mask and original is measured, as they are
    now, whatever the last forward left in the attribute. Channels that are gone take no part in what is
    selected: those that a mask empties, and those whose elements are all zero, whoever zeroed them. Sharded
    parameters (DTensor) are measured where they lie, by one call on all ranks, and norms are of whole
    weights.

    Args:
        parameters: pairs ``(module, name)``, as in torch's ``global_unstructured``; they are called
            ``"0.weight"``, ``"1.weight"``, ... Or a module: then the weights of every Linear, convolution,
            transposed convolution, Embedding, MultiheadAttention and Conv1D of transformers in it. Their
            names are those of the bare model, without what wrappers (compiled, parallel, averaged) add.
        n: the order of the norm, as for :func:`ln_structured`.
        dim: the dim of the channels: one number; ``"out"`` or ``"in"``, which is the right one for each
            type of module; or one per parameter, as a sequence or as a mapping by name.
        importance_scores: tensors to rank in place of some of the weights, by ``(module, name)`` or by
            the parameter's name, each of its parameter's shape.
        include: of a module, the weights to take: patterns as in :mod:`fnmatch` for the name of the
            parameter or of its module, and types of modules. A pattern that matches none of the weights
            above is looked for among all parameters of two dims or more, and a type beyond the ones above
            stands for all of these in its modules. A mapping also teaches what ``dim="out"`` and ``"in"``
            mean, as in ``include={MyLinear: {"out": 0, "in": 1}, nn.Linear: None}``.
        exclude: patterns and types of weights not to take. A weight that modules share is taken under all
            of its names or, where one of them is excluded, under none.
        group: a process group whose ranks hold different layers, as the stages of a pipeline do: each ranks
            its own, and all get one ranking of the layers of all. Every rank of it makes the call. A plan
            from it prunes, on each rank, the layers that are there. A name that several ranks have gets the
            rank's number in the group: ``"experts.0.weight@1"``.

    Returns:
        a :class:`Ranking`. Its norms stay on the devices of the weights until the first selection.

    Raises:
        AttributeError: a module has no such parameter.
        ValueError: there is nothing to rank; a parameter is given twice, has fewer than two dims or no
            shape yet, shares its weight with one that has another ``dim``; a pattern matches nothing;
            scores have another shape.
        IndexError: ``dim`` is out of range.
        TypeError: ``parameters`` holds something else; a parameter is parametrized.
        RuntimeError: ``n`` is no order of a norm; or inside :func:`reference_ranking`, since a ranking
            across layers has no counterpart in torch; or another rank raises, or makes another call, where
            parameters are sharded or with ``group``.

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))
        >>> ranking = lnprune.rank(model, n=2, dim="out")
        >>> {name: tuple(norms.shape) for name, norms in ranking.norms.items()}
        {'0.weight': (8,), '1.weight': (4,)}
    """
    parameters = repeatable(parameters)
    with (
        contextlib.nullcontext() if group is None else Group(group) as others,
        Agreement(parameters_of(parameters)) as agreement,
    ):
        if reference.ranks_like_torch():
            raise RuntimeError(
                "rank orders channels by float64 norms, ties by index: inside reference_ranking() use "
                "ln_structured or local_structured, or rank outside of it"
            )
        weights, _, given = collect(parameters, dim, include, exclude)
        rows = []
        for weight, along in zip(weights, given, strict=True):
            along %= len(weight.shape)
            rows.append(Row(weight.name, weight.shape[along], [Member(weight, along)]))
        measured, masks = current_values(weights)
        scores = scores_of(weights, list(measured.values()), importance_scores)
        values = list(measured.values())
        agreement.confirm(
            "rank", n, [row.name for row in rows], given, values, scores, _given(scores, values)
        )
        by_weight = dict(zip(weights, scores, strict=True))
        return measure(rows, n, measured, by_weight, masks, group=others)


def _given(scores: Sequence[Tensor], values: Sequence[Tensor]) -> list[bool]:
    """For which weights scores were given."""
    return [score is not value for score, value in zip(scores, values, strict=True)]


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
        weights, tensors, dims = collect(parameters, dim, include, exclude)
        scores = scores_of(weights, tensors, importance_scores)
        if not permanent:
            for weight in weights:
                weight.check_holds_mask()
        names = [weight.name for weight in weights]
        amounts = per_name(amount, names, "amount")
        # One at a time: thousands of them at once would keep the garbage collector busy.
        targets = (
            Target(name, module, attribute, along, share, None, None if score is tensor else score)
            for weight, along, tensor, score, share in zip(
                weights, dims, tensors, scores, amounts, strict=True
            )
            for name, (module, attribute) in zip(weight.names, weight.places, strict=True)
        )
        asked = names, dims, amounts, tensors, scores, _given(scores, tensors)
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
    parameters = repeatable(parameters)
    with Agreement(parameters_of(parameters)) as agreement:
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
    if saved.groups is None:
        pairs = zip(saved.entries, saved.names, strict=True)
        weights = [Weight(names, entry.shape) for entry, names in pairs]
        return loaded(saved, placed(weights, parameters))
    held = {}
    for group in saved.groups:
        held.update({member.names[0]: member for member in group.members if not member.is_buffer})
    weights = placed([Weight(member.names, member.shape) for member in held.values()], parameters)
    model = parameters if isinstance(parameters, nn.Module) else None
    return loaded(saved, weights, functools.partial(removed_of, saved, model))
