"""Rankings of matrices as plans keep them: which matrix of which parameter an entry is about."""

from __future__ import annotations

from typing import Any, NamedTuple

from lnprune.plans import fields
from lnprune.steps.batches import Batch, channels_of, dim_in_matrix, shape_of_matrix


class SavedBatch(NamedTuple):
    """One matrix of a parameter.

    Attributes:
        shape: of the whole parameter.
        dim: of the channels in it.
        batch_dim: along which the matrices lie.
        batch_size: how many they are.
        number: which of them it is, from 0 on.
    """

    shape: tuple[int, ...]
    dim: int
    batch_dim: int
    batch_size: int
    number: int

    @property
    def batch(self) -> Batch:
        return Batch(self.batch_dim, self.batch_size)

    @property
    def suffix(self) -> str:
        """What the name of a ranking has behind that of its parameter."""
        return f"[{self.number}]"


def document_of(batch: SavedBatch) -> dict[str, Any]:
    """As numbers and lists."""
    shape, dim, batch_dim, batch_size, number = batch
    return {
        "shape": list(shape),
        "dim": dim,
        "batch_dim": batch_dim,
        "batch_size": batch_size,
        "number": number,
    }


def saved_batch(values: dict[str, Any]) -> SavedBatch:
    """The fields of :func:`document_of`, checked."""
    shape = tuple(fields.list_of(values, "shape", int))
    numbers = {key: fields.count(values, key) for key in ("dim", "batch_dim", "batch_size", "number")}
    found = SavedBatch(shape, **numbers)
    size = found.batch_size
    if max(found.dim, found.batch_dim) >= len(shape) or any(each < 0 for each in shape):
        raise ValueError(
            f"dim, batch_dim: expected dims of shape {shape}, got {found.dim}, {found.batch_dim}"
        )
    if size < 1 or shape[found.batch_dim] % size or found.number >= size:
        raise ValueError(
            f"batch_size: expected one that divides dim {found.batch_dim} of shape {shape}, and a number "
            f"below it, got {size} and {found.number}"
        )
    if channels_of(shape, found.dim, found.batch) == 1 and found.dim == found.batch_dim:
        raise ValueError(f"batch_size: expected one that leaves channels along dim {found.dim}, got {size}")
    return found


def matrix_of(batch: SavedBatch) -> tuple[tuple[int, ...], int]:
    """The shape of the matrix, and the dim of its channels."""
    return shape_of_matrix(batch.shape, batch.batch), dim_in_matrix(batch.shape, batch.dim, batch.batch)
