"""Batches: a dim of a tensor seen as so many matrices, each with channels and a ranking of its own.

The experts of a layer lie in one parameter, ``[experts, out, in]``, and so do the heads of an attention,
``[heads x head_dim, in]``. Norms, counts and flags of such a tensor are those of all its matrices, one
after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lnprune.steps.layouts import keeps_strides

_NONE: list[int] = []  # nobody changes it


class Batch(NamedTuple):
    """A dim that counts as two: so many matrices, and what is left of the dim within each of them."""

    dim: int
    size: int


def rankings_of(batch: Batch | None) -> int:
    """How many rankings a tensor has."""
    return 1 if batch is None else batch.size


def channels_of(shape: Sequence[int], dim: int, batch: Batch | None) -> int:
    """How many channels each of its rankings has."""
    if batch is None or batch.dim != dim % len(shape):
        return shape[dim]
    return shape[dim] // batch.size


def matrices(tensor: Tensor, batch: Batch) -> Tensor:
    """A view of shape ``(size, ...)`` whose parts are the matrices.

    A batch dim of which nothing is left within a matrix is none of its dims, if it has two others.
    """
    rest = tensor.shape[batch.dim] // max(1, batch.size)  # a shard may have no matrix
    parts = tensor.unflatten(batch.dim, (batch.size, max(1, rest))).movedim(batch.dim, 0)
    return parts.squeeze(batch.dim + 1) if _is_whole(tensor.shape, batch) else parts


def dim_in_matrix(shape: Sequence[int], dim: int, batch: Batch) -> int:
    """The dim of the channels in each of the :func:`matrices` of a tensor of this shape."""
    dim %= len(shape)
    return dim - 1 if dim > batch.dim and _is_whole(shape, batch) else dim


def shape_of_matrix(shape: Sequence[int], batch: Batch) -> tuple[int, ...]:
    """The shape of each of the :func:`matrices` of a tensor of this shape."""
    rest = () if _is_whole(shape, batch) else (shape[batch.dim] // batch.size,)
    return *shape[: batch.dim], *rest, *shape[batch.dim + 1 :]


def _is_whole(shape: Sequence[int], batch: Batch) -> bool:
    return shape[batch.dim] == batch.size and len(shape) > 2


def numbers(batches: Sequence[Batch | None]) -> list[int]:
    """What native ops take: a dim and a count for each tensor, or nothing where no tensor has a batch."""
    if not any(batches):
        return _NONE
    return [number for batch in batches for number in batch or (0, 1)]


def is_outside(tensor: Tensor, dim: int, batch: Batch | None) -> bool:
    """Whether native code takes the batch: outside of the other dims, or beside the channels."""
    if batch is None:
        return True
    if not keeps_strides(tensor):
        return False
    dim %= tensor.dim()
    strides = tensor.stride()
    rest = tensor.shape[batch.dim] // batch.size
    batch_stride = strides[batch.dim] * rest
    stride = strides[dim] if channels_of(tensor.shape, dim, batch) > 1 else batch_stride
    before = between = False
    for d, size in enumerate(tensor.shape):
        if (rest if d == batch.dim else size) > 1 and d != dim:
            before |= strides[d] > batch_stride
            between |= stride < strides[d] <= batch_stride
    return stride <= batch_stride and not (before and between)


def _places(
    tensor: Tensor, dim: int, batch: Batch, channels: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A view of shape ``(count, channels, ...)``, and where these channels are in it."""
    parts = matrices(tensor, batch).movedim(dim_in_matrix(tensor.shape, dim, batch) + 1, 1)
    channels = channels.to(tensor.device)
    return parts, (channels // parts.shape[1], channels % parts.shape[1])


def taken(tensor: Tensor, dim: int, batch: Batch | None, channels: Tensor) -> Tensor:
    """A copy of the slices of these channels."""
    if batch is None:
        return tensor.index_select(dim, channels.to(tensor.device))
    parts, places = _places(tensor, dim, batch, channels)
    return parts[places]


def put(tensor: Tensor, dim: int, batch: Batch | None, channels: Tensor, values: Tensor) -> None:
    """Overwrites the slices of these channels, with values as :func:`taken` gives them."""
    if batch is None:
        tensor.index_copy_(dim, channels.to(tensor.device), values)
        return
    parts, places = _places(tensor, dim, batch, channels)
    parts[places] = values


def filled(tensor: Tensor, dim: int, batch: Batch | None, channels: Tensor, value: int) -> None:
    """Overwrites the slices of these channels with one value."""
    if batch is None:
        tensor.index_fill_(dim, channels.to(tensor.device), value)
        return
    parts, places = _places(tensor, dim, batch, channels)
    parts[places] = value
