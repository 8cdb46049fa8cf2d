"""The steps in plain torch: what they mean, the oracle of the tests, and the path for all other inputs.

Those are complex, sparse, meta and fake tensors, tensor subclasses such as DTensor, empty tensors, and
devices without native code.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lnprune.steps.batches import Batch, dim_in_matrix, matrices
from lnprune.torch_internals import compute_norm


def other_dims(tensor: Tensor, dim: int) -> list[int]:
    """Every dim of ``tensor`` but ``dim``: those that a channel's slice spans."""
    dims = list(range(tensor.dim()))
    dims.remove(dims[dim])
    return dims


def channel_norms(tensor: Tensor, n: Any, dim: int, batch: Batch | None = None) -> Tensor:
    """The rank step: the L\\ ``n`` norm of every slice along ``dim``, in float64.

    Args:
        tensor: at least two dims, any real floating-point or complex dtype.
        n: any order that the running torch's pruning takes; ``'fro'`` is 2 for every shape.
        dim: the dim of the channels.
        batch: of matrices with channels of their own.

    Returns:
        float64 norms of shape ``(tensor.shape[dim],)``, or those of all matrices, one after another. They
        are on the tensor's device, or on the CPU where that has no float64.
    """
    if batch is not None:
        return _of_matrices(channel_norms, tensor, n, dim, batch)
    if isinstance(n, str) and n == "fro":
        n = 2.0
    check_slices(tensor, n, dim)
    if isinstance(n, str) and n == "nuc":
        return torch.norm(_widened(tensor), p=n, dim=other_dims(tensor, dim))
    return compute_norm(_widened(tensor), n, dim)


def _of_matrices(
    rank: Callable[..., Tensor], tensor: Tensor, n: Any, dim: int, batch: Batch, *more: Any
) -> Tensor:
    """What is found of each matrix, one after another."""
    parts, dim = matrices(tensor, batch), dim_in_matrix(tensor.shape, dim, batch)
    if len(parts) == 0:  # of a shard
        return tensor.new_empty(0, dtype=torch.float64)
    parts = parts if parts.dim() > 2 else parts.unsqueeze(-1)
    return torch.cat([rank(part, n, dim, *more) for part in parts])


def check_slices(tensor: Tensor, n: Any, dim: int) -> None:
    """Refuses the nuclear norm of slices that are no matrices, which some versions of torch take."""
    if isinstance(n, str) and n == "nuc" and tensor.dim() != 3:
        raise RuntimeError(
            f"n='nuc' is a norm of matrices: expected a tensor of three dims, whose slices along dim {dim} "
            f"are matrices, got shape {tuple(tensor.shape)}"
        )


def torch_norms(scores: Tensor, n: Any, dim: int, batch: Batch | None = None) -> Tensor:
    """Torch's own norms, in the dtype of the scores."""
    if batch is not None:
        return _of_matrices(torch_norms, scores, n, dim, batch)
    check_slices(scores, n, dim)
    return compute_norm(scores.detach(), n, dim)


def _widened(tensor: Tensor) -> Tensor:
    """In float64 or complex128, on the CPU where the device has no such types; others stay as they are."""
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return (tensor if _has_float64(tensor.device.type) else tensor.cpu()).to(wide)


@functools.cache
def _has_float64(device_type: str) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=device_type)
    except TypeError:  # Apple's MPS
        return False
    return True


def channel_sums(tensor: Tensor, n: Any, dim: int, batch: Batch | None = None) -> Tensor:
    """The rank step before the root: the sum of ``|x|**n`` of every slice along ``dim``, in float64.

    For order 0 the count of elements that are not zero, for infinite orders the largest or the smallest
    magnitude.

    Args:
        tensor: at least two dims, any real floating-point or complex dtype.
        n: a real order; ``'fro'`` is 2 for every shape.
        dim: the dim of the channels.
        batch: of matrices with channels of their own.

    Returns:
        float64 sums of shape ``(tensor.shape[dim],)``, or of all matrices, one after another.
    """
    if batch is not None:
        return _of_matrices(channel_sums, tensor, n, dim, batch)
    order = _real_order(n)
    dims = other_dims(tensor, dim)
    magnitudes = _widened(tensor).abs()
    if order == 0:
        return magnitudes.ne(0).sum(dims, dtype=torch.float64)
    if math.isinf(order):
        return magnitudes.amax(dims) if order > 0 else magnitudes.amin(dims)
    return magnitudes.pow(order).sum(dims)


def norms_of_sums(sums: Tensor, n: Any) -> Tensor:
    """The norms of order ``n`` of slices with the sums that :func:`channel_sums` gives, of their shape."""
    order = _real_order(n)
    return sums.clone() if order == 0 or math.isinf(order) else sums.pow(1 / order)


def _real_order(n: Any) -> float:
    if n is None or (isinstance(n, str) and n == "fro"):
        return 2.0
    if isinstance(n, str) or math.isnan(n):
        raise ValueError(f"lnprune: expected a real order or 'fro' for the sums of a norm, got {n!r}")
    return float(n)


def keep_channels(norms: Tensor, pruned: int) -> Tensor:
    """The select step: NaN first, then larger norms, then lower indices; the last are pruned.

    Returns:
        bool keep flags of the shape of the norms of one ranking, ``(channels,)``.
    """
    ranking = torch.sort(norms, descending=True, stable=True).indices
    keep = torch.ones_like(norms, dtype=torch.bool)
    keep[ranking[norms.numel() - pruned :]] = False
    return keep


def write_mask(
    keep: Tensor, scores: Tensor, mask: Tensor | None, dim: int, batch: Batch | None = None
) -> Tensor:
    """The write step: ``mask * keep``, in the dtype and memory format of ``zeros_like(scores)``.

    A ``mask`` of None stands for ones.
    """
    new_mask = torch.zeros_like(scores, requires_grad=False)
    parts, along = new_mask, dim % scores.dim()
    shape = [1] * scores.dim()
    if batch is not None:
        parts, along = matrices(new_mask, batch), dim_in_matrix(scores.shape, dim, batch) + 1
        shape = [batch.size, *[1] * (parts.dim() - 1)]
    shape[along] = parts.shape[along]
    parts += keep.reshape(shape).to(new_mask.device, new_mask.dtype)
    if mask is not None:
        new_mask *= mask.to(new_mask.dtype)
    return new_mask


def torch_keep_channels(
    scores: Tensor, n: Any, dim: int, pruned: Sequence[int], batch: Batch | None = None
) -> Tensor:
    """Torch's own choice, bit for bit: norms by :func:`torch.norm`, choice by :func:`torch.topk`.

    ``pruned`` are the counts of all rankings.
    """
    norms = torch_norms(scores, n, dim, batch)
    if batch is not None:
        rankings = norms.view(batch.size, -1)
        return torch.cat([_torch_choice(each, count) for each, count in zip(rankings, pruned, strict=True)])
    return _torch_choice(norms, pruned[0])


def _torch_choice(norms: Tensor, pruned: int) -> Tensor:
    keep = torch.zeros_like(norms, dtype=torch.bool)
    keep[torch.topk(norms, k=norms.numel() - pruned, largest=True).indices] = True
    return keep


_reference_ranking = contextvars.ContextVar("lnprune.reference_ranking", default=False)
ranks_like_torch = _reference_ranking.get


@contextlib.contextmanager
def reference_ranking() -> Iterator[None]:
    """Inside, channels are ranked exactly as torch ranks them, rounding and ties included.

    Norms come from :func:`torch.norm` in the weight's dtype and the choice from :func:`torch.topk`, on
    the weight's device, so the state of a pruned module equals torch's bit for bit. Outside, norms are
    float64 and ties go to the lower index. The mode belongs to the thread, or asyncio task, that enters it.

    Example:
        >>> import lnprune
        >>> import torch
        >>> module = torch.nn.Linear(8, 4)
        >>> with lnprune.reference_ranking():
        ...     _ = lnprune.ln_structured(module, "weight", amount=0.5, n=2, dim=0)
    """
    token = _reference_ranking.set(True)
    try:
        yield
    finally:
        _reference_ranking.reset(token)
