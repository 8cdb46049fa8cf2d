"""Channels of a model that go: where they are in it, and the smaller model, verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

from lnprune.modules.masked import is_masked
from lnprune.plans.plan_file import SavedPlan
from lnprune.plans.saved_groups import SavedGroup, SavedMember
from lnprune.removal.checks import checked_tensors, prepared_inputs
from lnprune.removal.comparison import Inputs
from lnprune.removal.cutting import Cut, adopt, without
from lnprune.removal.verification import Choice, check_computes_the_same, settings_of
from lnprune.torch_internals import own_buffers


class Removed:
    """Channels of the groups of a model that go.

    Args:
        model: which has them; None: not known.
        names: of the groups.
        channels: how many each has.
        gone: how many of these go.
        groups: the slices, and the attributes that hold sizes.
        inputs: what the model is called with, to verify; None: not known.
    """

    def __init__(
        self,
        model: nn.Module | None,
        names: Sequence[str],
        channels: Sequence[int],
        gone: Sequence[int],
        groups: list[SavedGroup],
        inputs: Inputs | None = None,
    ):
        self.groups = groups
        self._model, self._inputs = model, inputs
        self._names, self._channels, self._gone = names, channels, gone

    def compact(self, verify: bool, inplace: bool, example_inputs: Any) -> nn.Module:
        """As :meth:`Plan.compact`."""
        model = self._model
        if model is None:
            raise RuntimeError(
                "compact needs a model: give load_plan one, in place of a list of parameters"
            )
        inputs = self._inputs if example_inputs is None else prepared_inputs(example_inputs)
        if verify and inputs is None:
            raise ValueError(
                "verify: a plan from a file has no example inputs: give example_inputs=, or verify=False"
            )
        tensors = checked_tensors(model)
        choices = self.choices(model, tensors)
        small = self.small(model, tensors, choices)
        if verify and inputs is not None:
            check_computes_the_same(model, tensors, small, choices, inputs)
        if not inplace:
            return small
        adopt(model, small, settings_of(model, choices))
        return model

    def small(
        self, model: nn.Module, tensors: Mapping[str, Tensor], choices: Sequence[Choice]
    ) -> nn.Module:
        """A copy of a model without the channels, and without masks of which only ones would be left."""
        cuts = [cut for choice in choices for cut in choice.cuts]
        small = without(model, tensors, cuts, settings_of(model, choices))
        self._drop_masks(small)
        return small

    def choices(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Choice]:
        """The slices of each group that go, by the names of a model's tensors.

        Raises:
            ValueError: a group keeps no channel; a tensor is missing or has another shape.
        """
        for name, channels, gone in zip(self._names, self._channels, self._gone, strict=True):
            if gone >= channels:
                raise ValueError(
                    f"{name}: expected a channel that stays, got none of {channels}: select with "
                    "min_channels=1 or more"
                )
        first = {id(tensor): name for name, tensor in tensors.items()}
        every = dict(
            [
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            ]
        )
        choices = []
        for name, group, gone in zip(self._names, self.groups, self._gone, strict=True):
            cuts: dict[tuple[str, int], Cut] = {}
            reads = set()
            for member in group.members:
                if member.part is not None:
                    raise ValueError(f"{name}: channels of a part of a weight cannot leave it")
                slices = torch.tensor(member.pruned, dtype=torch.int64, device="cpu")
                for tensor in _held(member, every, type(model).__name__):
                    key = first[id(tensor)], member.dim
                    cuts[key] = Cut(*key, slices)
                    if member.is_input:
                        reads.add(key)
            choices.append(Choice(name, gone, list(cuts.values()), reads, group.attributes))
        try:
            settings_of(model, choices)
        except (AttributeError, TypeError, IndexError) as error:
            raise ValueError(f"the plan is for another model: {error}") from None
        return choices

    def _drop_masks(self, small: nn.Module) -> None:
        """Removes masks from what lost slices, where all that they masked is gone."""
        names = {name for group in self.groups for member in group.members for name in member.names}
        for name in names:
            path, _, attribute = name.rpartition(".")
            module = small.get_submodule(path)
            if is_masked(module, attribute):
                mask = own_buffers(module)[attribute + "_mask"]
                assert mask is not None
                if not mask.is_meta and bool(mask.all()):
                    stock.remove(module, attribute)


def _held(member: SavedMember, every: Mapping[str, Tensor], owner: str) -> list[Tensor]:
    """The tensors of a member in a model: itself or, where it is masked, what it was and its mask."""
    found = []
    for name in member.names:
        held = [every.get(name)]
        if held == [None]:
            held = [every.get(name + "_orig"), every.get(name + "_mask")]
        for tensor in held:
            if tensor is None:
                raise ValueError(
                    f"{name}: {owner} has no such parameter or buffer: the plan is for another model"
                )
            if tuple(tensor.shape) != member.shape:
                raise ValueError(
                    f"{name}: expected shape {member.shape}, got {tuple(tensor.shape)}: the plan "
                    "is for another model, or for this one before channels left it"
                )
            found.append(tensor)
    return found


def removed_of(saved: SavedPlan, model: nn.Module | None) -> Removed:
    """What a file says that goes, of a model."""
    if saved.groups is None:
        raise ValueError("expected a plan of coupled channels, from couple(), got one of single weights")
    entries = saved.entries
    return Removed(
        model,
        [entry.name for entry in entries],
        [entry.channels for entry in entries],
        [entry.channels - entry.kept for entry in entries],
        saved.groups,
    )
