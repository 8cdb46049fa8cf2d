"""What products do to label planes: what is summed over is united, what is free goes to the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lnprune.removal.labels import NOT_CHANNELS, Labels
from lnprune.removal.planes import ANY, Planes, has_channels, varying
from lnprune.removal.pointwise import Operand, combined, operand
from lnprune.removal.reductions import across
from lnprune.removal.rules import rule

_PRODUCT = "what is summed over is united, what is free goes to the output; a head is one unit"
_SHARED = "is shared by several units, as a weight that all heads have in common, in {}"


def _contracted(labels: Labels, a: Planes, dim_a: int, b: Planes, dim_b: int) -> tuple[Planes, Planes]:
    """The planes of both operands behind a sum of products over a dim of each."""
    free_a, free_b = ([p for p in planes if p.shape[dim] == 1] for planes, dim in ((a, dim_a), (b, dim_b)))
    inside_a, inside_b = has_channels(a, dim_a), has_channels(b, dim_b)
    fits_any = any(int(plane.max()) == ANY for plane in inside_a + inside_b)
    inside_a, inside_b = ([p for p in planes if int(p.max()) != ANY] for planes in (inside_a, inside_b))
    plain = [plane for plane in inside_a + inside_b if len(varying(plane)) == 1]
    if len(plain) == len(inside_a) + len(inside_b):
        if not (inside_a and inside_b) and not fits_any:
            labels.pin_without_channels(plain)
        for left in inside_a:
            for right in inside_b:
                labels.unite(left.reshape(-1), right.reshape(-1))
    else:  # labels that depend on another dim too, as those of heads: a head goes as a whole
        labels.pin(plain, _SHARED)
        free_a += [labels.unit(plane, [dim_a]) for plane in inside_a if len(varying(plane)) > 1]
        free_b += [labels.unit(plane, [dim_b]) for plane in inside_b if len(varying(plane)) > 1]
    return free_a, free_b


@rule("mm", _PRODUCT)
def mm(labels: Labels, out: Tensor, a: Tensor, b: Tensor) -> Planes:
    left, right = _contracted(labels, labels.summed_over(a, 1), 1, labels.summed_over(b, 0), 0)
    return left + right


@rule("addmm", _PRODUCT)
def addmm(labels: Labels, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Planes:
    return combined(labels, [Operand(out.shape, mm(labels, out, a, b)), operand(labels, bias, 2)])


@rule("mv", _PRODUCT)
def mv(labels: Labels, out: Tensor, a: Tensor, b: Tensor) -> Planes:
    left, _ = _contracted(labels, labels.summed_over(a, 1), 1, labels.summed_over(b, 0), 0)
    return [plane.reshape(-1) for plane in left]


@rule("addmv", _PRODUCT)
def addmv(labels: Labels, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Planes:
    return combined(labels, [Operand(out.shape, mv(labels, out, a, b)), operand(labels, bias, 1)])


@rule("dot", _PRODUCT)
def dot(labels: Labels, out: Tensor, a: Tensor, b: Tensor) -> Planes:
    _contracted(labels, labels.summed_over(a, 0), 0, labels.summed_over(b, 0), 0)
    return []


@rule("bmm", _PRODUCT)
def bmm(labels: Labels, out: Tensor, a: Tensor, b: Tensor) -> Planes:
    left, right = _contracted(labels, labels.summed_over(a, 2), 2, labels.summed_over(b, 1), 1)
    batch_left, batch_right = has_channels(left, 0), has_channels(right, 0)
    if a.shape[0] > 1 and not (batch_left and batch_right):
        labels.pin_without_channels(batch_left + batch_right)
    for plane in batch_left:
        # Samples and heads are one dim here: what has as many labels meets, heads and heads.
        count = _count_in_batch(plane)
        same = [each for each in batch_right if _count_in_batch(each) == count]
        for each in same or batch_right:
            labels.unite(plane, each)
    # A plane of the batch alone is there already, from the left.
    rest = [p for p in right if p.shape[0] == 1 or len(varying(p)) > 1 or not batch_left]
    return left + rest


def _count_in_batch(plane: Tensor) -> int:
    return plane[:, 0, 0].unique().numel()


@rule("baddbmm", _PRODUCT)
def baddbmm(labels: Labels, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Planes:
    return combined(labels, [Operand(out.shape, bmm(labels, out, a, b)), operand(labels, bias, 3)])


@rule(
    "convolution _convolution convolution_overrideable",
    "inputs are united with the weight's inputs, its outputs go on; of groups, the same channel of each "
    "goes together; depthwise, output goes with input; kernel positions are pinned",
)
def convolution(
    labels: Labels,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *rest: Any,
) -> Planes:
    positions = range(2, x.dim())
    inputs, batch = _convolution_inputs(labels, x, positions)
    of_weight = labels.planes(weight)
    kernel = [p for p in of_weight if any(p.shape[dim] > 1 for dim in positions)]
    labels.pin(kernel, NOT_CHANNELS)
    of_weight = [p for p in of_weight if all(p.shape[dim] == 1 for dim in positions)]
    computed = [plane for plane in of_weight if len(varying(plane)) > 1]
    labels.pin(computed, "is part of a weight that is computed from channels in {}")
    of_weight = [plane for plane in of_weight if len(varying(plane)) == 1]
    dim_in, dim_out = (0, 1) if transposed else (1, 0)
    labels.note_summed(weight, has_channels(of_weight, dim_in))
    weight_in = [plane.reshape(-1) for plane in has_channels(of_weight, dim_in)]
    weight_out = [plane.reshape(-1) for plane in has_channels(of_weight, dim_out)]
    if groups > 1 and weight.shape[dim_in] == (groups if transposed else 1):
        outputs = _depthwise(labels, inputs, weight_in, weight_out, groups, out.shape[1], transposed)
    else:
        outputs = _grouped(labels, inputs, weight_in, weight_out, groups, transposed)
    if bias is not None:
        for plane in labels.planes(bias):
            for each in outputs:
                labels.unite(each, plane)
            if not outputs:
                labels.pin_without_channels([plane])
    shape = [1, -1] + [1] * len(positions)
    return [plane.reshape(shape) for plane in outputs] + batch


def _convolution_inputs(labels: Labels, x: Tensor, positions: Sequence[int]) -> tuple[Planes, Planes]:
    """The labels of the input's channels, each of one dim, and the planes of its batch."""
    planes = []
    for plane in labels.planes(x):
        planes.append(labels.unit(plane, positions) if plane.shape[1] > 1 else plane)
    planes = across(labels, planes, positions, "the windows of a convolution")
    batch = [plane for plane in planes if plane.shape[1] == 1]
    mixed = [plane for plane in planes if plane.shape[0] > 1 and plane.shape[1] > 1]
    labels.pin(mixed, "its channels are in the batch of a convolution in {}")
    inside = [plane.reshape(-1) for plane in planes if plane.shape[1] > 1 and plane.shape[0] == 1]
    return inside, batch


def _depthwise(
    labels: Labels,
    inputs: Planes,
    weight_in: Planes,
    weight_out: Planes,
    groups: int,
    outputs: int,
    transposed: bool,
) -> Planes:
    """The outputs of a convolution with one input channel for each group: they go with their input."""
    factor = outputs // groups
    if transposed:
        # The weight has a slice for each input; its outputs are those of all groups.
        labels.pin(weight_out, "is the multiplier of a depthwise convolution in {}")
        for plane in inputs:
            for each in weight_in:
                labels.unite(plane, each)
        found = [plane.repeat_interleave(factor) for plane in (inputs or weight_in)[:1]]
    else:
        for plane in inputs:
            for each in weight_out:
                labels.unite(plane.view(groups, 1), each.view(groups, factor))
        for each in weight_out:
            labels.unit(each.view(groups, factor), [1])
        found = weight_out or [plane.repeat_interleave(factor) for plane in inputs]
        if not weight_out:
            labels.pin_without_channels(inputs)
    if not inputs:
        labels.pin_without_channels(found)
    return found


def _grouped(
    labels: Labels, inputs: Planes, weight_in: Planes, weight_out: Planes, groups: int, transposed: bool
) -> Planes:
    """The outputs of a convolution in groups, of one say: the same channel of each group goes together."""
    if not (inputs and weight_in):
        labels.pin_without_channels(inputs + weight_in)
    if transposed:  # inputs of all groups lie along the weight, its outputs are those of each group
        for each in weight_in:
            labels.unit(each.view(groups, -1), [0])
        for plane in inputs:
            for each in weight_in:
                labels.unite(plane, each)
        return [plane.repeat(groups) for plane in weight_out]
    for plane in inputs:
        if groups > 1:
            labels.unit(plane.view(groups, -1), [0])
        for each in weight_in:
            labels.unite(plane.view(groups, -1), each.view(1, -1))
    if groups > 1:
        for each in weight_out:
            labels.unit(each.view(groups, -1), [0])
    return weight_out
