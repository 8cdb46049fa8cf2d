"""Norms of stored tensors: pieces of one tensor at a time are read into memory that is used again.

The file is read, not mapped: one that shrinks meanwhile gives an error, and no signal.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnprune.checkpoints.choice import Chosen
from lnprune.checkpoints.memory import PIECE, Memory, Progress
from lnprune.checkpoints.stored import DTYPES, Reader, StoredTensor, in_file_order, reading, row_blocks
from lnprune.steps.batches import Batch
from lnprune.steps.factors import Factors
from lnprune.steps.norms import Asked, countable, norms_of_each, zero_norms_are_zeros


class Measured(NamedTuple):
    """The float64 norms of channels and, where these do not say what is zero, their nonzero elements."""

    norms: Tensor
    counts: Tensor | None


def measure_stored(
    chosen: Sequence[Chosen],
    n: Any,
    factors: Mapping[int, Factors] | None = None,
    progress: Progress = lambda _: None,
    counted: Collection[int] = (),
) -> list[Measured]:
    """The norms of the channels of each tensor, read in the order of the files.

    Args:
        chosen: the tensors.
        n: the order of the norms.
        factors: of some, by their number, what elements are multiplied by.
        progress: told of every piece.
        counted: the numbers of tensors whose nonzero elements are counted, whatever their norms say.

    Raises:
        UnusableCheckpoint: a file changed meanwhile, or cannot be read.
    """
    memory = Memory()
    found: dict[int, Measured] = {}
    order = in_file_order([each.tensor for each in chosen])
    for path in dict.fromkeys(chosen[i].tensor.file for i in order):
        with reading(path) as file:
            for i in order:
                if chosen[i].tensor.file == path:
                    factor = None if factors is None else factors.get(i)
                    found[i] = _measured(file, chosen[i], n, factor, i in counted, memory, progress)
    return [found[i] for i in range(len(chosen))]


class _Piece(NamedTuple):
    """Some of the first indices of a tensor."""

    offset: int
    length: int
    shape: tuple[int, ...]
    batch: Batch | None
    factors: Factors | None


def _pieces(each: Chosen, factors: Factors | None) -> Iterator[_Piece]:
    """Pieces of channels, or of matrices, whose norms side by side are those of the tensor."""
    tensor, batch = each.tensor, each.batch
    first = each.dim == 0 if batch is None else batch.dim == 0
    has_own = (
        factors is not None and batch is not None and factors.values.numel() > tensor.shape[factors.dim]
    )
    if not first or not tensor.is_contiguous or has_own or tensor.length <= PIECE:
        yield _Piece(tensor.offset, tensor.length, tensor.shape, batch, factors)
        return
    for row, count in row_blocks(tensor, PIECE):
        place = tensor.offset + row * tensor.row_length, count * tensor.row_length
        some = None if batch is None else Batch(0, count)
        yield _Piece(*place, (count, *tensor.shape[1:]), some, factors)


def _measured(
    file: Reader,
    each: Chosen,
    n: Any,
    factors: Factors | None,
    is_counted: bool,
    memory: Memory,
    progress: Progress,
) -> Measured:
    tensor = each.tensor
    dtype = DTYPES[tensor.dtype]
    says_zeros = zero_norms_are_zeros(dtype, n) and factors is None and not is_counted
    norms, counts = [], []
    for piece in _pieces(each, factors):
        data = memory.read(file, piece.offset, piece.length)
        is_whole = piece.length == tensor.length
        values = tensor.of(data) if is_whole else tensor.rows_of(data, piece.shape[0])
        asked = [Asked([values], n, [each.dim], [tensor.name], [piece.batch], [piece.factors])]
        if not says_zeros:
            asked.append(Asked([countable(values)], 0, [each.dim], [tensor.name], [piece.batch]))
        results = norms_of_each(asked)
        norms.append(results[0][0])
        counts += [] if says_zeros else results[1]
        progress(piece.length)
    return Measured(_joined(norms), None if says_zeros else _joined(counts))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def bytes_of(tensors: Sequence[StoredTensor]) -> int:
    """How many bytes are read for tensors."""
    return sum(math.prod(each.shape) * DTYPES[each.dtype].itemsize for each in tensors)
