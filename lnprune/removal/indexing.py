"""What indexing does to label planes: indices that are constants move them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lnprune.removal.labels import Labels
from lnprune.removal.planes import Planes, aligned, has_channels, squashed, varying
from lnprune.removal.pointwise import Operand, combined
from lnprune.removal.rules import rule

_NUMBERS = "its values are used as indices or by Python in {}"
_INDEXED = "indices that are constants move labels; indices computed from the inputs pin"


def _taken(labels: Labels, x: Tensor, indices: Sequence[Tensor | None]) -> Planes:
    """The planes of ``x[indices]``."""
    whole: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            planes = labels.planes(index)
            if index.dim() == 1:  # a mask over channels goes with them
                for plane in has_channels(labels.planes(x), len(whole)):
                    for mask in planes:
                        labels.unite(plane.reshape(-1), mask)
            else:
                labels.pin(planes, _NUMBERS)
            whole += list(index.nonzero(as_tuple=True))
        else:
            if index is not None:
                labels.pin(labels.planes(index), _NUMBERS)
            whole.append(index)
    from_inputs = any(index is not None and labels.is_from_inputs(index) for index in indices)
    whole += [None] * (x.dim() - len(whole))
    used = [dim for dim, index in enumerate(whole) if index is not None]
    longest = max((index.dim() for index in whole if index is not None), default=0)
    found = []
    for plane in labels.planes(x):
        inside = [dim for dim in used if plane.shape[dim] > 1]
        if inside and from_inputs:
            labels.pin([plane], "its channels are chosen by the values of the inputs in {}")
            if len(inside) == len(varying(plane)):
                continue
            plane = labels.unit(plane, inside)
            inside = []
        places: list[Any] = []
        for dim, index in enumerate(whole):
            if index is None:
                places.append(slice(None))
            elif not inside:
                places.append(torch.zeros((1,) * longest, dtype=torch.int64))
            else:
                places.append(index.cpu().long() * (plane.shape[dim] > 1))
        found.append(squashed(plane[tuple(places)]))
    return found


@rule("index _unsafe_index", _INDEXED)
def index(labels: Labels, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Planes:
    return _taken(labels, x, indices)


@rule("index_select", _INDEXED)
def index_select(labels: Labels, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Planes:
    return _taken(labels, x, [None] * (dim % x.dim()) + [index])


@rule("embedding", "rows are pinned, the other dim goes to the output")
def embedding(
    labels: Labels, out: Tensor, weight: Tensor, index: Tensor, *args: Any, **kwargs: Any
) -> Planes:
    planes = labels.planes(weight)
    labels.pin(has_channels(planes, 0), "is a row of an embedding in {}")
    labels.pin(labels.planes(index), _NUMBERS)
    return [aligned(plane.reshape(-1), out.dim()) for plane in planes if plane.shape[0] == 1]


@rule("gather take_along_dim", "pins the dim along which it gathers")
def gather(labels: Labels, out: Tensor, x: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Planes:
    dim %= x.dim()
    labels.pin(labels.planes(index), _NUMBERS)
    found = []
    for plane in labels.planes(x):
        if plane.shape[dim] == 1 and all(x.shape[d] == out.shape[d] for d in varying(plane)):
            found.append(plane)
        else:
            labels.pin([plane], "its channels are gathered by index in {}")
    return found


@rule(
    "index_add index_copy scatter scatter_add scatter_reduce index_fill index_reduce",
    "pins the dim along which it writes; other dims are united",
)
def scatter(
    labels: Labels,
    out: Tensor,
    x: Tensor,
    dim: int,
    index: Tensor,
    source: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Planes:
    dim %= x.dim()
    labels.pin(labels.planes(index), _NUMBERS)
    operands = []
    for each in [x, *([source] if isinstance(source, Tensor) else [])]:
        planes = labels.planes(each)
        if each.dim() == 0:
            continue
        labels.pin(has_channels(planes, dim), "its channels are written by index in {}")
        if not labels.is_uniform(each):
            shape = [1 if d == dim else size for d, size in enumerate(each.shape)]
            operands.append(Operand(shape, [plane for plane in planes if plane.shape[dim] == 1]))
    return combined(labels, operands)


@rule("nonzero _local_scalar_dense equal bincount", "pins: Python reads the values")
def read_by_python(labels: Labels, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Planes:
    for each in (x, *args):
        if isinstance(each, Tensor):
            labels.pin(labels.planes(each), _NUMBERS)
    return []
