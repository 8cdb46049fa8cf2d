"""What channels of different layers are compared by: norms, divided by what makes layers comparable."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from lnprune.plans.layers import Layers


def _size_factor(elements: int, p: float) -> float:
    """What the norm of so many ones is; finite and not 0, so that quotients keep the order of norms."""
    if elements == 0:
        return 1.0
    try:
        factor = float(elements) ** (1.0 if p == 0 else 1 / p)
    except OverflowError:
        return sys.float_info.max
    return max(factor, sys.float_info.min)


def compared(
    layers: Layers,
    norms: Tensor,
    normalize: str,
    group_size: int,
    layer_of_group: Tensor,
    alive: Tensor | None,
) -> Tensor:
    """The scores of groups of ``group_size`` channels: their norms, divided for each layer.

    Args:
        layers: all of them.
        norms: of the groups, float64.
        normalize: what by: ``"size"``, ``"layer"`` or ``"none"``.
        group_size: channels of a group.
        layer_of_group: the layer of each group.
        alive: which groups are not gone; None: all.
    """
    if normalize == "none":
        return norms
    if normalize == "size":
        if layers.p is None:
            raise ValueError(
                "normalize='size' needs a norm whose order is a number: take 'layer' or 'none'"
            )
        factors = [_size_factor(size * group_size, layers.p) for size in layers.sizes]
        return norms / torch.tensor(factors, dtype=torch.float64, device="cpu")[layer_of_group]
    counted = norms.isfinite()
    if alive is not None:
        counted &= alive
    indices = counted.nonzero().flatten()
    owners = layer_of_group[indices]
    sums = torch.zeros(len(layers.names), dtype=torch.float64, device="cpu").index_add_(
        0, owners, norms[indices]
    )
    means = sums / torch.bincount(owners, minlength=len(layers.names))
    # Layers of zeros stay at zero.
    return norms / torch.where(means > 0, means, 1.0)[layer_of_group]
