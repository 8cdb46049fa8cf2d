"""What goes of a model's tensors: taken out of copies of them, or zeros in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnprune.removal.cutting import Cut


class ExpertCut(NamedTuple):
    """Slices of the weights of a layer's experts, dim 0, that go: of each expert its own, equally many."""

    name: str
    dim: int
    gone: Tensor  # bool, (experts, slices)


class Router(NamedTuple):
    """Experts that a router no longer chooses.

    Attributes:
        path: the router.
        names: its parameters and buffers, one slice along dim 0 for each expert.
        gone: the numbers of the experts, int64.
    """

    path: str
    names: list[str]
    gone: Tensor


class Going(NamedTuple):
    """What goes of one part of a model, and what changes with it.

    Attributes:
        what: the part, in words.
        cuts: slices of whole tensors.
        expert_cuts: slices of single experts.
        routers: those that lose experts.
        numbers: those that change, by what the config calls them.
        sizes: what changes that no config can say, as :mod:`lnprune.pretrained.custom_code` finds it; None:
            nothing.
    """

    what: str
    cuts: list[Cut]
    expert_cuts: list[ExpertCut]
    routers: list[Router]
    numbers: dict[str, int]
    sizes: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, int]:
        """The numbers that the config says: none of what it cannot say."""
        return self.numbers if self.sizes is None else {}


def without_slices(tensors: Mapping[str, Tensor], parts: Sequence[Going]) -> dict[str, Tensor]:
    """The tensors without what goes of them. What loses nothing is not copied."""
    made = dict(tensors)
    for part in parts:
        for name, dim, gone in part.expert_cuts:
            if name in made:
                made[name] = _without_each(made[name], dim, gone)
    # All slices of a tensor along a dim at once: the numbers of slices are those before any went.
    flags: dict[tuple[str, int], Tensor] = {}
    for part in parts:
        for name, dim, slices in part.cuts:
            if name not in tensors:
                continue
            keep = flags.setdefault((name, dim), torch.ones(tensors[name].shape[dim], dtype=torch.bool))
            keep[slices] = False
    for (name, dim), keep in flags.items():
        made[name] = made[name].index_select(dim, keep.nonzero().flatten())
    return made


def _without_each(tensor: Tensor, dim: int, gone: Tensor) -> Tensor:
    """A tensor without slices along a dim, others for each of its matrices."""
    experts = len(gone)
    kept = (~gone).nonzero()[:, 1].view(experts, -1)
    shape = [experts, *(1 for _ in tensor.shape[1:])]
    shape[dim] = kept.shape[1]
    size = list(tensor.shape)
    size[dim] = kept.shape[1]
    return tensor.gather(dim, kept.view(shape).expand(size))


@torch.no_grad()
def zero_(tensors: Mapping[str, Tensor], parts: Sequence[Going]) -> None:
    """Writes zeros into what goes, as :func:`lnprune.removal.cutting.zeroed` does into a copy.

    Of experts that a router no longer chooses, nothing is read: their slices stay as they are.
    """
    for part in parts:
        routed = {name for router in part.routers for name in router.names}
        for name, dim, slices in part.cuts:
            if name not in routed and tensors[name].is_floating_point():
                tensors[name].index_fill_(dim, slices, 0)
        for name, dim, gone in part.expert_cuts:
            shape = [len(gone), *(1 for _ in tensors[name].shape[1:])]
            shape[dim] = gone.shape[1]
            tensors[name].masked_fill_(gone.view(shape), 0)
