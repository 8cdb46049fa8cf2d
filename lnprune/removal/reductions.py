"""What reductions, statistics and windows do to label planes: across channels they pin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lnprune.removal.labels import Labels
from lnprune.removal.planes import Planes, varying
from lnprune.removal.pointwise import Operand, channel_operand, combined, operand, pointwise
from lnprune.removal.rules import rule

_CROSSES = "across channels they pin, across a part of a unit they make it one; positions are kept"


def across(labels: Labels, planes: Planes, dims: Sequence[int], what: str, stays: bool = False) -> Planes:
    """The planes behind statistics over dims: channels that they cross are pinned, parts of units united.

    ``stays``: whether the output has a value for each of the channels still.
    """
    found = []
    for plane in planes:
        inside = [dim for dim in varying(plane) if dim in dims]
        if inside and len(inside) == len(varying(plane)):
            labels.pin([plane], f"its channels cross {what} in {{}}")
            if not stays:
                continue
        elif inside:
            plane = labels.unit(plane, inside)
        found.append(plane)
    return found


def _dims_of(name: str, args: Sequence[Any], kwargs: Any) -> Any:
    """Which dims a reduction is over, by its arguments after the tensor; None: all."""
    if "dim" in kwargs:
        return kwargs["dim"]
    if name in ("topk", "kthvalue"):
        return args[1] if len(args) > 1 else -1
    if name in ("norm", "linalg_vector_norm"):
        args = args[1:]  # the order
    for arg in args:
        if isinstance(arg, (int, list, tuple)) and not isinstance(arg, bool):
            return arg
    return -1 if name == "sort" else None


def _reduction(name: str, stays: bool = False) -> None:
    @rule(name, _CROSSES)
    def reduced(labels: Labels, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Planes | list[Planes]:
        if args and isinstance(args[0], Tensor):  # max(x, y)
            return pointwise(labels, out, [x, args[0]])
        given = _dims_of(name, args, kwargs)
        if given is None or given == [] or not x.dim():
            dims = list(range(x.dim()))
        else:
            dims = [dim % x.dim() for dim in (given if isinstance(given, (list, tuple)) else [given])]
        first = out[0] if isinstance(out, (tuple, list)) else out
        keeps = stays and first.shape == x.shape
        planes = across(labels, labels.planes(x), dims, f"a {name.strip('_')}", keeps)
        if first.dim() != x.dim():
            planes = [_without(plane, dims) for plane in planes] if first.dim() else []
        return [list(planes) for _ in out] if isinstance(out, (tuple, list)) else planes


def _without(plane: Tensor, dims: Sequence[int]) -> Tensor:
    return plane.reshape([size for dim, size in enumerate(plane.shape) if dim not in dims])


_REDUCTIONS = (
    "sum mean amax amin prod var std var_mean std_mean any all argmax argmin max min norm "
    "linalg_vector_norm logsumexp median aminmax nansum count_nonzero"
)
for _name in _REDUCTIONS.split():
    _reduction(_name)
_ALONG = (
    "_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod sort topk kthvalue "
    "logcumsumexp cummax cummin"
)
for _name in _ALONG.split():
    _reduction(_name, stays=True)


@rule("native_layer_norm layer_norm _fused_rms_norm rms_norm", "pinned: statistics across channels")
def layer_norm(
    labels: Labels, out: Any, x: Tensor, shape: Sequence[int], *args: Any, **kwargs: Any
) -> Planes:
    dims = range(x.dim() - len(shape), x.dim())
    planes = across(labels, labels.planes(x), dims, "the statistics of a layer norm", stays=True)
    affine = [operand(labels, arg, x.dim()) for arg in args if isinstance(arg, Tensor) and arg.dim()]
    return combined(labels, [Operand(x.shape, planes), *affine])


@rule("native_group_norm group_norm", "pinned: statistics across channels")
def group_norm(labels: Labels, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Planes:
    planes = list(labels.planes(x))
    labels.pin(planes, "its channels cross the statistics of a group norm in {}")
    affine = [channel_operand(labels, arg, 1, x.dim()) for arg in args if isinstance(arg, Tensor)]
    return combined(labels, [Operand(x.shape, planes), *affine])


@rule("_weight_norm_interface _weight_norm", "united with the norms; dims that the norm crosses are pinned")
def weight_norm(labels: Labels, out: Any, v: Tensor, g: Tensor, dim: int = 0) -> Planes:
    others = [each for each in range(v.dim()) if each != dim]
    planes = across(labels, labels.planes(v), others, "the norm of a weight", stays=True)
    return combined(labels, [Operand(v.shape, planes), operand(labels, g, v.dim())])


def _window(name: str, dims: int) -> None:
    @rule(name, "windows over positions: channels stay, what depends on positions is pinned")
    def window(labels: Labels, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Planes | list[Planes]:
        for arg in args:
            if isinstance(arg, Tensor):
                labels.pin(labels.planes(arg), "its values are positions in {}")
        positions = range(x.dim() - dims, x.dim())
        planes = across(labels, labels.planes(x), positions, f"the windows of {name}")
        return [list(planes) for _ in out] if isinstance(out, (tuple, list)) else planes


_WINDOWS = (
    "avg_pool adaptive_avg_pool max_pool adaptive_max_pool upsample_nearest "
    "_upsample_nearest_exact reflection_pad replication_pad"
)
for _name in _WINDOWS.split():
    for _dims in (1, 2, 3):
        _window(f"{_name}{_dims}d", _dims)
_WINDOWS_OF_DIMS = {
    1: "max_pool1d_with_indices upsample_linear1d",
    2: "max_pool2d_with_indices upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa grid_sampler_2d _adaptive_avg_pool2d mkldnn_adaptive_avg_pool2d",
    3: "max_pool3d_with_indices upsample_trilinear3d _adaptive_avg_pool3d",
}
for _dims, _names in _WINDOWS_OF_DIMS.items():
    for _name in _names.split():
        _window(_name, _dims)
