"""Label planes: integer tensors that broadcast to a tensor and say to which channel each element belongs.

A plane has size 1 along each dim on which it does not depend. Labels from 1 on are those of channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Planes = list[Tensor]

NONE = 0  # what belongs to no channel
ANY = -1  # what is repeated as often as there are channels in what it meets


def varying(plane: Tensor) -> list[int]:
    """The dims on which a plane depends."""
    return [dim for dim, size in enumerate(plane.shape) if size > 1]


def has_channels(planes: Iterable[Tensor], dim: int) -> list[Tensor]:
    """Those of the planes that depend on a dim."""
    return [plane for plane in planes if plane.shape[dim] > 1]


def outermost(plane: Tensor) -> int:
    """The dim of a plane along which labels are furthest apart: heads, not what is inside of one."""

    def distance(dim: int) -> float:
        return float((plane.narrow(dim, 1, 1) - plane.narrow(dim, 0, 1)).abs().double().mean())

    return max(varying(plane), key=distance)


def squashed(plane: Tensor, dims: Iterable[int] | None = None) -> Tensor:
    """The plane with size 1 along those of the dims on which its labels do not depend."""
    if plane.numel() and int(plane.max()) == ANY:
        return plane
    for dim in range(plane.dim()) if dims is None else dims:
        if plane.shape[dim] > 1:
            first = plane.narrow(dim, 0, 1)
            if bool((plane == first).all()):
                plane = first
    return plane


def along(plane: Tensor, dim: int, dims: int) -> Tensor:
    """A plane of one dim as the plane of a tensor with that many dims."""
    return plane.reshape([-1 if each == dim else 1 for each in range(dims)])


def aligned(plane: Tensor, dims: int) -> Tensor:
    """A plane with dims of size 1 in front, as broadcasting adds them."""
    return plane.reshape((1,) * (dims - plane.dim()) + tuple(plane.shape))


def anything(shape: Sequence[int], dim: int) -> Tensor:
    """The plane of what is repeated along a dim of a tensor of this shape."""
    return torch.full([size if each == dim else 1 for each, size in enumerate(shape)], ANY)


def matching_dims(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """The neighbouring dims of one shape that a view turns into neighbouring dims of another.

    Example:
        >>> matching_dims([2, 12, 5], [2, 3, 4, 5])
        [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3)), (range(2, 3), range(3, 4))]
    """
    i = j = 0
    found = []
    while i < len(old) or j < len(new):
        first_old, first_new, left, right = i, j, 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        found.append((range(first_old, i), range(first_new, j)))
    return found
