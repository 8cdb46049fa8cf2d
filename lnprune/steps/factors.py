"""Factors: what the elements of a tensor are multiplied by before they are ranked, by an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnprune.errors import shown
from lnprune.steps.batches import Batch, dim_in_matrix, matrices
from lnprune.steps.local import indices_here, is_distributed


class Factors(NamedTuple):
    """One for each index along a dim, or, of a batch, as many for each matrix, one matrix after another."""

    values: Tensor  # contiguous float64, on the device of the tensor
    dim: int


def product(tensor: Tensor, factors: Factors, batch: Batch | None) -> Tensor:
    """The tensor times its factors, in float64 or complex128: what native code does without making it."""
    values = factors.values
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    if batch is None:
        shape = [1] * wide.dim()
        shape[factors.dim] = -1
        return wide * values.view(shape)
    parts = matrices(wide, batch)
    shape = [1] * parts.dim()
    shape[dim_in_matrix(wide.shape, factors.dim, batch) + 1] = length = length_of(
        tensor, factors.dim, batch
    )
    shape[0] = values.numel() // length
    made = wide.clone()
    matrices(made, batch).copy_(parts * values.view(shape))
    return made


def length_of(tensor: Tensor, dim: int, batch: Batch | None) -> int:
    """How many factors a tensor, or one matrix of it, has along a dim."""
    is_split = batch is not None and batch.dim == dim
    return tensor.shape[dim] // (batch.size if is_split and batch is not None else 1)


def factors_here(tensor: Tensor, factors: Factors, batch: Batch | None) -> Factors:
    """Those of the part of a DTensor that is here."""
    if not is_distributed(tensor):
        return factors
    length = length_of(tensor, factors.dim, batch)
    here = indices_here(tensor, factors.dim)
    values = factors.values.view(-1, length)
    if batch is not None and batch.dim == factors.dim and here is not None:
        raise ValueError("expected factors along a dim of a sharded tensor that holds no batch")
    rows = None if batch is None or len(values) == 1 else indices_here(tensor, batch.dim)
    if rows is not None:
        values = values[rows.to(values.device)]
    if here is not None:
        values = values[:, here.to(values.device)]
    return Factors(values.flatten(), factors.dim)


def checked_vector(vector: Any, shapes: Sequence[tuple[int, ...]], tensor: Tensor, name: str) -> Tensor:
    """The vector in float64, where it has one of these shapes, and is where the tensor is."""
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        raise TypeError(f"{name}: expected a vector of floating-point numbers, got {shown(vector)}")
    if tuple(vector.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(
            f"{name}: expected a vector of shape {wanted} for shape {tuple(tensor.shape)}, got "
            f"{tuple(vector.shape)}"
        )
    if vector.device != tensor.device:
        raise ValueError(
            f"{name}: expected a vector on {tensor.device}, as the weight, got {vector.device}"
        )
    return vector.detach().to(torch.float64)
