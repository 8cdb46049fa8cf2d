"""What a selection chooses among: the channels of all layers, and groups of adjacent ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnprune.steps import ops


class Parameters(NamedTuple):
    """A parameter that layers have slices of, along one dim or several.

    Attributes:
        shape: of the parameter.
        layers: by dim, the layers whose channels are slices along it, and how many slices a channel is.
    """

    shape: Sequence[int]
    layers: Mapping[int, Sequence[tuple[int, int]]]

    def left(self, gone: Callable[[int], Any]) -> Any:
        """How many elements are left when so many channels of each layer are gone; numbers or tensors."""
        left: Any = 1
        for dim, size in enumerate(self.shape):
            for layer, slices in self.layers.get(dim, ()):
                size = size - slices * gone(layer)
            left = left * size
        return left

    def costs(self) -> Iterator[tuple[int, int]]:
        """How many elements a channel of each layer has, where all slices lie along one dim."""
        for dim, layers in self.layers.items():
            others = math.prod(size for d, size in enumerate(self.shape) if d != dim)
            for layer, slices in layers:
                yield layer, slices * others


@dataclass(frozen=True)
class Layers:
    """The channels of all layers, one after another, on the CPU."""

    names: Sequence[str]
    channels: Sequence[int]
    sizes: Sequence[int]  # elements of a channel
    norms: Tensor  # float64
    unmasked: Tensor | None  # bool: not emptied by a mask; None: all
    nonzero: Tensor | None  # bool: not all of its elements are zero; None: all
    p: float | None  # the order of the norms; None where it is no real number
    parameters: Sequence[Parameters] | None = None  # coupled layers: what they are slices of


def group_norms(norms: Tensor, group_size: int, p: float | None) -> Tensor:
    """The norm of every group of adjacent channels: that of all their elements together."""
    if group_size == 1 or norms.numel() == 0:
        return norms
    if p is None:
        raise ValueError(f"group_size={group_size} needs a norm of vectors, whose order is a number")
    # A count of nonzero elements adds up. Every other norm is the norm of the norms.
    return ops.channel_norms([norms.view(-1, group_size)], [0], 1.0 if p == 0 else p)[0]


def integers(values: Sequence[int]) -> Tensor:
    # On the CPU whatever the default device is.
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def owners(counts: Tensor) -> Tensor:
    """0 as often as the first count says, then 1, ..."""
    return torch.arange(counts.numel(), device="cpu").repeat_interleave(counts)


def alive_groups(layers: Layers, group_size: int) -> Tensor | None:
    """Bool flags: which groups of adjacent channels are not gone; None: all.

    A group is gone where each of its channels is. A mask has to leave all or none of a group.
    """
    alive = None
    if layers.unmasked is not None:
        channels = layers.unmasked.view(-1, group_size)
        alive = channels.any(dim=1)
        for group in (alive != channels.all(dim=1)).nonzero().flatten().tolist()[:1]:
            of_groups = owners(integers(layers.channels) // group_size)
            raise ValueError(
                f"{layers.names[int(of_groups[group])]}: expected earlier pruning to leave all or none "
                f"of a group of {group_size} channels (group_size), it left {int(channels[group].sum())}"
            )
    if layers.nonzero is not None:
        nonzero = layers.nonzero.view(-1, group_size).any(dim=1)
        alive = nonzero if alive is None else alive & nonzero
    return alive
