"""What operations element by element do to label planes: what meets is one channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lnprune.removal.labels import Labels
from lnprune.removal.planes import Planes, aligned, along, outermost, varying
from lnprune.removal.rules import rule

_SHARED = "is shared by several units, as a weight that all heads have in common, in {}"


class Operand(NamedTuple):
    """The shape of an operand and its planes, both with the output's number of dims."""

    shape: Sequence[int]
    planes: Planes


def operand(labels: Labels, tensor: Tensor, dims: int) -> Operand:
    """A tensor as an operand of an output with so many dims."""
    planes = [aligned(plane, dims) for plane in labels.planes(tensor)]
    return Operand((1,) * (dims - tensor.dim()) + tuple(tensor.shape), planes)


def channel_operand(labels: Labels, tensor: Tensor, dim: int, dims: int) -> Operand:
    """A tensor of one dim as an operand along a dim of the output."""
    shape = [tensor.numel() if each == dim else 1 for each in range(dims)]
    return Operand(shape, [along(plane, dim, dims) for plane in labels.planes(tensor)])


def pointwise(labels: Labels, out: Tensor, tensors: Sequence[Tensor]) -> Planes:
    """The planes of an operation that is applied to tensors element by element."""
    operands = []
    for tensor in tensors:
        if tensor.dim() and tensor.numel() > 1 and not labels.is_uniform(tensor):
            operands.append(operand(labels, tensor, out.dim()))
        else:
            labels.read.add(id(tensor))
    return combined(labels, operands)


def combined(labels: Labels, operands: Sequence[Operand]) -> Planes:
    """The planes of what operands give together, element by element."""
    operands = [Operand(shape, list(planes)) for shape, planes in operands]
    ended: set[tuple[int, int]] = set()  # planes that are pinned and go no further, as those of positions
    for i, mine in enumerate(operands):
        for k in range(len(mine.planes)):
            for j, other in enumerate(operands):
                if i != j and not _met(labels, mine, k, other):
                    ended.add((i, k))
    found: Planes = []
    for i, (shape, planes) in enumerate(operands):
        earlier = [set(varying(plane)) for plane in found]
        for k, plane in enumerate(planes):
            dims = set(varying(plane))
            # A plane of an operand before covers it, with which it was united.
            covered = any(dims <= each and all(shape[dim] > 1 for dim in each) for each in earlier)
            if dims and (i, k) not in ended and not covered:
                found.append(plane)
    return found


def _met(labels: Labels, mine: Operand, k: int, other: Operand) -> bool:
    """Lets one plane meet another operand; whether the plane goes on."""
    plane = mine.planes[k]
    dims = varying(plane)
    full = [dim for dim in dims if other.shape[dim] > 1]
    if not full:
        return True
    meeting = [each for each in other.planes if any(each.shape[dim] > 1 for dim in dims)]
    if len(full) == len(dims):
        if not meeting:
            labels.pin_without_channels([plane])
            return False
        for m, each in enumerate(other.planes):
            theirs = varying(each)
            if not set(theirs) & set(dims):
                continue
            if set(theirs) <= set(dims):
                mine.planes[k] = labels.unite(mine.planes[k], each)
                if theirs == dims:
                    other.planes[m] = mine.planes[k]
            elif not set(theirs) > set(dims) or all(mine.shape[dim] > 1 for dim in theirs):
                labels.unite(plane, each)
    elif outermost(plane) in full:  # a factor of each unit, as the statistics of a head: it goes with it
        for each in meeting:
            labels.unite(plane, each)
        if not meeting:
            labels.pin_without_channels([plane])
    else:  # one set of weights for several units: a unit goes as a whole, the weights stay
        labels.pin([each for each in meeting if len(varying(each)) < len(dims)], _SHARED)
        mine.planes[k] = labels.unit(plane, full)
    return True


_ALONE = "element by element: labels stay"


@rule(
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli native_dropout "
    "dropout hardswish hardtanh hardsigmoid nan_to_num _fused_dropout",
    _ALONE,
)
def alone(labels: Labels, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Planes | list[Planes]:
    planes = labels.planes(x)
    return [list(planes) for _ in out] if isinstance(out, (tuple, list)) else list(planes)


@rule("prelu _prelu_kernel", "united with its weight")
def prelu(labels: Labels, out: Tensor, x: Tensor, weight: Tensor) -> Planes:
    operands = [operand(labels, x, x.dim())]
    if weight.numel() == 1:
        labels.pin(labels.planes(weight), _SHARED)
    elif weight.dim() == 1:
        operands.append(channel_operand(labels, weight, 1, x.dim()))
    else:
        operands.append(operand(labels, weight, x.dim()))
    return combined(labels, operands)


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_batch_norm_with_update _batch_norm_no_update batch_norm",
    "united with weight, bias and running statistics; its own statistics pin positions",
)
def batch_norm(labels: Labels, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Planes:
    channels = []
    for plane in labels.planes(x):
        if plane.shape[1] > 1:
            plane = labels.unit(plane, [dim for dim in range(plane.dim()) if dim != 1])
        channels.append(plane)
    statistics = [arg for arg in args[:4] if isinstance(arg, Tensor)]
    has_own = next((arg for arg in args if isinstance(arg, bool)), False) or args[2] is None
    if has_own:
        labels.pin([p for p in channels if p.shape[1] == 1], "crosses the statistics of a batch norm in {}")
    operands = [Operand(x.shape, channels)]
    operands += [channel_operand(labels, each, 1, x.dim()) for each in statistics]
    return combined(labels, operands)
