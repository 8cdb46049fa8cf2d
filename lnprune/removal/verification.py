"""The check of a model without channels: it computes what the model with zeros in their place computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lnprune.plans.saved_groups import Attribute
from lnprune.removal.comparison import Inputs, Subject, fault_of
from lnprune.removal.cutting import Cut, Setting, settings_for
from lnprune.torch_internals import tree_leaves, tree_map

_LISTED = 4  # so many groups are named


class Choice(NamedTuple):
    """What goes of one group: so many channels, slices of tensors, and sizes in attributes.

    ``reads`` are the names and dims of the slices that read channels.
    """

    name: str
    gone: int
    cuts: list[Cut]
    reads: set[tuple[str, int]]
    attributes: list[Attribute]


def settings_of(model: nn.Module, choices: Sequence[Choice]) -> list[Setting]:
    """The attributes of a model that change with choices, and their new values."""
    return settings_for(model, choices, [choice.gone for choice in choices])


def check_computes_the_same(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    small: nn.Module,
    choices: Sequence[Choice],
    inputs: Inputs,
) -> None:
    """Compares in float64, with the model's own parameters and with random ones.

    On the inputs, and on random ones of another batch size where the model with all channels takes such.

    Raises:
        RuntimeError: outputs differ. It says by how much, and from which groups. Or the model has none.
    """
    other = of_another_batch_size(inputs)
    for random in (False, True):
        subject = Subject(model, tensors, inputs, random)
        parameters = "random" if random else "its own"
        if subject.fault:
            raise RuntimeError(
                f"nothing to compare with: with {parameters} parameters the model {subject.fault} on the "
                "example inputs. The model is as it was. With verify=False channels go without a comparison"
            )
        mine = None
        if not random:
            own = dict([*small.named_parameters(), *small.named_buffers()])
            mine = subject.like(small, own)
        for which in (inputs, other):
            if which is other and not _takes(subject, other):
                continue
            trouble = _trouble(subject, choices, which, mine)
            if trouble is not None:
                groups = _culprits(subject, choices, which) or [choice.name for choice in choices]
                described = "example inputs" if which is inputs else "random ones of another batch size"
                raise RuntimeError(
                    f"the model without the channels is not that with zeros in their place: {trouble}, "
                    f"with {parameters} parameters, on {described}. "
                    f"It comes from the groups {_list(groups)}. The model is as it was. Exclude these "
                    "groups, or teach lnprune the sizes in their modules with size_setter()"
                )
        del subject, mine  # before the next are made


def _takes(subject: Subject, inputs: Inputs) -> bool:
    """Whether the model with all channels gives numbers on inputs."""
    return fault_of(subject.ran(subject.like(subject.model, subject.tensors), inputs)) is None


def _trouble(
    subject: Subject, choices: Sequence[Choice], inputs: Inputs, small: nn.Module | None = None
) -> str | None:
    cuts = [cut for choice in choices for cut in choice.cuts]
    reads = set().union(*(choice.reads for choice in choices))
    return subject.trouble(cuts, reads, settings_of(subject.model, choices), small, inputs)


def _culprits(subject: Subject, choices: Sequence[Choice], inputs: Inputs) -> list[str]:
    """The groups whose channels alone make outputs differ; none where only several together do."""
    found: list[str] = []
    left = [list(choices)]
    while left:
        part = left.pop()
        if _trouble(subject, part, inputs) is None:
            continue
        if len(part) == 1:
            found.append(part[0].name)
        else:
            half = len(part) // 2
            left += [part[half:], part[:half]]
    return found


def of_another_batch_size(inputs: Inputs) -> Inputs:
    """Random inputs like these, one more along the first dim.

    Real numbers are normal, of the same mean and deviation. Of integers and flags, whole examples are
    repeated; where there are more than two values, as token ids, they are drawn from these.
    """
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or not len(tensors[0]):
        return inputs
    size = len(tensors[0])
    generator = torch.Generator().manual_seed(0)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != size:
            return leaf
        rows = leaf.detach()[torch.arange(size + 1, device=leaf.device) % size]
        if leaf.is_floating_point():
            noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
            deviation = leaf.detach().double().std(correction=0).to(rows)
            return noise * deviation + leaf.detach().mean()
        if leaf.dtype != torch.bool and len(leaf.unique()) > 2:
            values = leaf.detach().flatten()
            drawn = torch.randint(len(values), (rows.numel(),), generator=generator)
            return values[drawn.to(values.device)].view_as(rows)
        return rows

    made: Inputs = tree_map(other, inputs)
    return made


def _list(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    listed = ", ".join(f"`{name}`" for name in names[:_LISTED])
    return listed + (f" and {rest} more" if rest > 0 else "")
