"""couple(): which channels of a model go together, and which cannot go and why."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lnprune.errors import shown
from lnprune.modules.finding import Patterns
from lnprune.modules.parameters import Weight
from lnprune.modules.scores import factors_along, scores_of
from lnprune.modules.values import current_values, weights_by_name
from lnprune.plans.ranking import Ranking, measure
from lnprune.plans.rows import Member, Row
from lnprune.plans.saved_groups import Attribute, SavedGroup, SavedMember
from lnprune.plans.scales import scales_of
from lnprune.removal import checks
from lnprune.removal.choosing import chosen
from lnprune.removal.comparison import Inputs
from lnprune.removal.groups import Group, GroupMember, Refused, found_groups, in_order, refusals
from lnprune.removal.removed import Removed
from lnprune.removal.run import followed
from lnprune.removal.trial import Trial
from lnprune.steps import reference
from lnprune.steps.norms import Order
from lnprune.torch_internals import own_parameters

_SECONDS = 30.0
_LISTED = 4  # so many names are printed of a list


class Coupling:
    """Which channels of a model go together, from :func:`couple`. ``print(coupling)`` lists it.

    Attributes:
        groups: the groups of channels that can go, in the order of the model.
        refused: the slices that cannot, and why.
    """

    def __init__(
        self, model: nn.Module, groups: list[Group], refused: list[Refused], inputs: Inputs | None = None
    ):
        self.groups = groups
        self.refused = refused
        self._model = model
        self._inputs = inputs  # what verifies a model without channels

    def rank(
        self,
        n: Order,
        members: Literal["all", "producers"] = "all",
        importance_scores: Mapping[Any, Tensor] | None = None,
        *,
        scale: Mapping[str, Tensor] | None = None,
        element_scale: Mapping[Any, Tensor] | None = None,
    ) -> Ranking:
        """Measures the channels of each group: the L\\ ``n`` norm of all their slices together.

        What :func:`rank` is for single weights. ``select`` takes the same arguments; a global one with
        ``normalize="size"`` divides the norms of a group by what ones in all of its slices would have. With
        ``of="parameters"`` and ``scope="global"`` an amount counts all elements of the parameters that the
        groups have slices of, biases and norms among them, and elements that two choices share, as where a
        layer loses inputs and outputs, once.

        Args:
            n: the order of the norm, as for :func:`ln_structured`.
            members: the weights that are measured: ``"all"``, those that make the channels and those that
                read them; or ``"producers"``, those that make them. Biases and what norms multiply and add
                are not measured: they go with the channels.
            importance_scores: tensors to measure in place of some of the weights, each of its weight's
                shape, by ``(module, name)`` or name. Those of weights that are not measured are not used.
            scale: by the name of a group, what the norms of its channels are multiplied by: float vectors
                of shape ``(channels,)``. Their absolute values count.
            element_scale: by ``(module, name)`` or name of a weight that is measured, what its elements are
                multiplied by: a factor for each index of the *other* dim, as for :func:`rank`.

        Returns:
            a :class:`Ranking`, one row for each group, by the name of the group.

        Raises:
            ValueError: ``members`` is another word; there are no groups; scores or vectors are for nothing
                that is there, or of another shape.
            RuntimeError: a parameter has another shape by now; ``n`` is no order of a norm.

        Example:
            >>> import lnprune
            >>> import torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            >>> plan = lnprune.couple(model, torch.randn(2, 8)).rank(n=2).select(0.5)
            >>> plan.apply(permanent=True)
            Plan(1 parameters, 8 of 16 channels kept)
            >>> pruned = ~plan.keep["0.weight"]
            >>> bool((model[0].bias[pruned] == 0).all()), bool((model[2].weight[:, pruned] == 0).all())
            (True, True)
        """
        if reference.ranks_like_torch():
            raise RuntimeError(
                "torch has no ranking of coupled channels: rank outside of reference_ranking()"
            )
        if members not in ("all", "producers"):
            raise ValueError(f"members: expected 'all' or 'producers', got {shown(members)}")
        if not self.groups:
            raise ValueError("there are no groups of channels to rank: print(coupling) says why")
        rows = self._rows[members]
        tensors, masks = current_values(self._weights.values())
        dims: dict[Weight, set[int]] = {}
        for row in rows:
            for member in row.members:
                dims.setdefault(member.weight, set()).add(member.dim)
        values = {weight: tensor for weight, tensor in tensors.items() if weight in dims}
        weights, measured = list(values), list(values.values())
        scores = scores_of(weights, measured, self._of_measured(importance_scores, weights))
        return measure(
            rows,
            n,
            values,
            dict(zip(weights, scores, strict=True)),
            masks,
            self._removed,
            scales=scales_of(rows, [values[row.members[0].weight] for row in rows], scale),
            factors=factors_along(weights, values, dims, element_scale),
        )

    def _of_measured(self, scores: Any, weights: Sequence[Weight]) -> Any:
        """Scores without those of the model's other parameters."""
        if not isinstance(scores, Mapping):
            return scores
        taken = {key for weight in weights for key in (*weight.names, *weight.places)}
        others = {
            key
            for path, module in self._model.named_modules(remove_duplicate=False)
            for name in own_parameters(module)
            for key in (f"{path}.{name}" if path else name, (module, name))
        }
        return {key: score for key, score in scores.items() if key in taken or key not in others}

    def _removed(self, keep: Sequence[Tensor]) -> Removed:
        """What goes with the channels that are not kept."""
        groups = []
        for group, flags in zip(self.groups, keep, strict=True):
            members = []
            for member in group.members:
                weight = self._weights.get(member.name)
                names = [member.name] if weight is None else weight.names
                pruned = member.slices[~flags[member.channels]].sort().values.tolist()
                members.append(
                    SavedMember(
                        names, member.shape, member.dim, pruned, None, member.is_input, weight is None
                    )
                )
            groups.append(SavedGroup(members, group.attributes))
        return Removed(
            self._model,
            [group.name for group in self.groups],
            [group.channels for group in self.groups],
            [int((~flags).sum()) for flags in keep],
            groups,
            self._inputs,
        )

    @functools.cached_property
    def _weights(self) -> dict[str, Weight]:
        """The parameters that groups have slices of, by name, with all places that share them."""
        wanted = dict.fromkeys(member.name for group in self.groups for member in group.members)
        return weights_by_name(self._model, wanted)

    @functools.cached_property
    def _rows(self) -> dict[str, list[Row]]:
        """A row for each group, by the word for the members that are measured."""
        return {
            word: [_row(group, self._weights, word == "all") for group in self.groups]
            for word in ("all", "producers")
        }

    def __repr__(self) -> str:
        channels = sum(group.channels for group in self.groups)
        return f"Coupling({type(self._model).__name__}, {len(self.groups)} groups, {channels} channels)"

    def __str__(self) -> str:
        lines = [repr(self), "", "channels that go together:"]
        for group in self.groups:
            lines.append(f"  {group.name}: {group.channels} channels")
            lines.append("    made by  " + _list([_place(m) for m in group.members if not m.is_input]))
            lines.append("    read by  " + _list([_place(m) for m in group.members if m.is_input]))
            if group.attributes:
                lines.append("    sizes in " + _list([_attribute(each) for each in group.attributes]))
        by_reason: dict[str, list[str]] = {}
        for each in self.refused:
            by_reason.setdefault(each.reason, []).append(f"{each.parameter}[{each.dim}]")
        lines += ["", "refused:"]
        lines += [f"  {_list(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def _row(group: Group, weights: Mapping[str, Weight], with_inputs: bool) -> Row:
    """A group as what a selection ranks; its slices of buffers take no part."""
    measured: list[Member] = []
    others: list[Member] = []
    for member in group.members:
        weight = weights.get(member.name)
        if weight is None:
            continue
        size = weight.shape[member.dim]
        is_whole = len(member.slices) == size and bool((member.slices[1:] > member.slices[:-1]).all())
        in_order = is_whole and group.channels == size and bool((member.channels == member.slices).all())
        mine = Member(
            weight,
            member.dim,
            None if in_order else member.channels,
            None,
            None if is_whole else member.slices,
        )
        is_measured = len(weight.shape) > 1 and (with_inputs or member.name in group.makers)
        is_measured = is_measured and (with_inputs or not member.is_input)
        (measured if is_measured else others).append(mine)
    return Row(group.name, group.channels, measured, others)


def _place(member: GroupMember) -> str:
    return f"{member.name}[{member.dim}]"


def _attribute(attribute: Attribute) -> str:
    place = f"{attribute.path}.{attribute.name}" if attribute.path else attribute.name
    return place if attribute.position is None else f"{place}[{attribute.position}]"


def _list(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def couple(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    check: bool | float = True,
) -> Coupling:
    """Finds which channels of a model go together, by following them through one run of it.

    Every index of every dim of every parameter gets a label. The model runs once, in eval mode and without
    gradients, and each ATen operation says what it does to the labels: a view moves them, a sum of two
    tensors unites them, a product unites what it sums over. What crosses the statistics of a layer norm,
    reaches the output, or goes through an operation that is not known, is refused.

    Labels cannot see sizes that are written in the code. So removal is tried: half of every group, drawn at
    random, is taken out of a copy with random parameters, in float64, and its outputs are compared with
    those of a copy with zeros in place of the channels. Groups that fail are found by halves. For each of
    them, attributes that hold its size, as a number of heads, are changed with it; if nothing helps, it is
    refused.

    Args:
        model: an eager model. It is not changed: modes, buffers, hooks and random numbers are as before.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keywords. They are not changed.
        include: only groups whose channels these make: names or patterns of modules or parameters, or
            types of modules, as in :func:`rank`.
        exclude: no groups whose channels these make.
        check: how many seconds the trial may take: True: 30. What is not known then is refused. False: no
            trial, which is for models whose code has no sizes in it. The trial needs the memory of two
            copies of the model in float64.

    Returns:
        a :class:`Coupling`.

    Raises:
        TypeError: the model is no module, or compiled, scripted or wrapped; it returns no tensor; example
            inputs are none.
        ValueError: the model raises on the example inputs; parameters are on the device meta or not
            initialised; a pattern matches nothing, or ``include`` names what is refused.

    Example:
        >>> import lnprune
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> coupling = lnprune.couple(model, torch.randn(1, 3, 16, 16))
        >>> print(coupling)
        Coupling(Sequential, 1 groups, 8 channels)
        <BLANKLINE>
        channels that go together:
          0.weight: 8 channels
            made by  0.weight[0], 0.bias[0], 1.weight[0], 1.bias[0] and 2 more
            read by  3.weight[1]
        <BLANKLINE>
        refused:
          0.weight[1]: meets data without channels (inputs, constants, positions) in the Conv2d `0`
          3.weight[0], 3.bias[0]: is part of the model's output
    """
    tensors = checks.checked_tensors(model)
    args, kwargs = checks.prepared_inputs(example_inputs)
    pinned = {**checks.unprunable(model), **checks.shared_memory(tensors)}
    seconds = _seconds(check)
    run = followed(model, tensors, args, kwargs, pinned)
    groups, refused = found_groups(run.labels, tensors)
    if seconds is not None and groups:
        trial = Trial(model, tensors, args, kwargs, seconds)
        trial.add(groups)
        if trial.has_failed:
            tied = followed(model, tensors, args, kwargs, pinned, ties_views=True)
            trial.replace(found_groups(tied.labels, tensors)[0])
        trial.finish()
        groups = in_order(trial.good, tensors)
        refused += [each for group, reason in trial.bad for each in refusals(group, reason)]
    groups, left_out = chosen(model, groups, refused, include, exclude)
    return Coupling(model, groups, refused + left_out, (args, kwargs))


def _seconds(check: Any) -> float | None:
    """How long the trial may take; None: there is none."""
    if check is True:
        return _SECONDS
    if check is False:
        return None
    if not isinstance(check, (int, float)) or not check > 0:
        raise ValueError(f"check: expected True, False or seconds, more than 0, got {shown(check)}")
    return float(check)
