"""Whole models in one call: rank measures the norms of every channel, to select from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lnprune.expert_rows import expert_rows
from lnprune.modules.batching import BatchDim
from lnprune.modules.finding import Patterns, left_out
from lnprune.modules.parameters import Dim, Parameters, collect, repeatable
from lnprune.modules.scores import factors_of, is_given, scores_of
from lnprune.modules.sharded import parameters_of
from lnprune.modules.values import current_values
from lnprune.plans.ranking import Ranking, measure
from lnprune.plans.rows import Member, Row
from lnprune.plans.scales import scales_of
from lnprune.steps import reference
from lnprune.steps.norms import Order
from lnprune.steps.sharding import Agreement, Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rank(
    parameters: Parameters,
    n: Order,
    dim: Dim,
    importance_scores: Mapping[Any, Tensor] | None = None,
    *,
    batch_dim: BatchDim = None,
    batch_size: BatchDim = None,
    experts: Literal["intermediate"] | None = None,
    scale: Mapping[str, Tensor] | None = None,
    element_scale: Mapping[Any, Tensor] | None = None,
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
        batch_dim: the dim along which a parameter holds many matrices, as ``[experts, out, in]`` does. Each
            of them is ranked and pruned by itself, under a name of its own, as in ``"experts.weight[17]"``.
            One number for all; or one per parameter, or None, as a sequence or as a mapping by name or
            pattern, of those that have one.
        batch_size: of a ``batch_dim`` that holds the matrices one after another, how many they are, as
            heads in ``[heads * head_dim, in]``; given as ``batch_dim`` is, which may be the channels' dim.
        experts: ``"intermediate"``: rank the intermediate channels of the experts of known layers, each by
            the norm of all that belongs to it: its rows of gate and up projection, their biases, and its
            column of the down projection. A plan prunes all of these together: experts get narrower.
        scale: by name, what the norms of channels are multiplied by: float vectors of shape ``(channels,)``
            or ``(matrices, channels)``, on the weight's device. Their absolute values count.
        element_scale: by ``(module, name)`` or name, what elements are multiplied by before they are
            ranked: float vectors with a factor for each index of the *other* dim, that of the inputs where
            channels are outputs. The norm of a channel is then that of ``w[i, j] * v[j]``, in float64, and
            no product tensor is made. For matrices and convolutions; where there is a ``batch_dim``, one
            vector for all matrices, or a tensor of shape ``(matrices, length)``.
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
        weights, _, dims, batches = collect(parameters, dim, include, exclude, batch_dim, batch_size)
        of_experts, unknown = ([], []) if experts is None else expert_rows(parameters, experts, weights)
        owners = {member.weight: row for row in of_experts for member in row.members}
        found: dict[Row, None] = {}  # in order
        for weight, along, batch in zip(weights, dims, batches, strict=True):
            member = Member(weight, along % len(weight.shape), batch=batch)
            row = owners.get(weight)
            found[Row(weight.name, member.along, [member]) if row is None else row] = None
        rows = list(found)
        known = set(weights)
        weights += [weight for weight in owners if weight not in known]
        measured, masks = current_values(weights)
        scores = scores_of(weights, list(measured.values()), importance_scores)
        values = list(measured.values())
        by_weight = dict(zip(weights, scores, strict=True))
        members = {member.weight: member for row in rows for member in row.members}
        factors = factors_of(
            weights,
            measured,
            {weight: member.dim for weight, member in members.items()},
            {weight: member.batch for weight, member in members.items()},
            element_scale,
        )
        scales = scales_of(rows, [measured[row.members[0].weight] for row in rows], scale)
        agreement.confirm(
            *("rank", n, [row.name for row in rows], dims, batches, values, scores),
            *(is_given(scores, values), list(scales), [weight.name for weight in factors]),
        )
        said: Callable[[], list[str]] = list
        if isinstance(parameters, nn.Module) and include is None:
            names = frozenset(name for weight in weights for name in weight.names)
            said = functools.partial(_left_out, parameters, names, unknown)
        return measure(rows, n, measured, by_weight, masks, None, others, said, scales, factors)


def _left_out(model: nn.Module, names: Collection[str], unknown: list[str]) -> list[str]:
    return [*unknown, *left_out(model, names)]
