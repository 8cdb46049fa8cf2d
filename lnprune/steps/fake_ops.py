"""What the native ops return for tensors without values: their shapes and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

NONE: list[int] = []  # no batches, or one ranking for each tensor; nobody changes it


def _check_devices(*lists: list[Tensor]) -> None:
    """Raises where every backend would: for meta tensors beside others the fake kernels are asked."""
    types = sorted({tensor.device.type for tensors in lists for tensor in tensors})
    if len(types) > 1:
        raise RuntimeError(
            f"lnprune: expected all tensors of a call on devices of one type, got {' and '.join(types)}"
        )


def _numbers(tensors: list[Tensor], dims: list[int], batches: list[int]) -> list[Tensor]:
    """One for each channel of each matrix."""
    sizes = []
    for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        along, count = batches[2 * i : 2 * i + 2] or (dim, 1)
        is_split = along % tensor.dim() == dim % tensor.dim()
        sizes.append(tensor.shape[dim] * (1 if is_split else count))
    return [
        tensor.new_empty(size, dtype=torch.float64) for tensor, size in zip(tensors, sizes, strict=True)
    ]


@torch.library.register_fake("lnprune::channel_norms")
@torch.library.register_fake("lnprune::channel_sums")
def _(tensors: list[Tensor], dims: list[int], p: float, batches: list[int] = NONE) -> list[Tensor]:
    _check_devices(tensors)
    return _numbers(tensors, dims, batches)


@torch.library.register_fake("lnprune::scaled_norms")
def _(
    tensors: list[Tensor],
    dims: list[int],
    factors: list[Tensor],
    factor_dims: list[int],
    p: float,
    rooted: bool = True,
    batches: list[int] = NONE,
) -> list[Tensor]:
    _check_devices(tensors, factors)
    return _numbers(tensors, dims, batches)


@torch.library.register_fake("lnprune::norms_of_sums")
def _(sums: list[Tensor], p: float) -> list[Tensor]:
    _check_devices(sums)
    return [torch.empty_like(tensor) for tensor in sums]


@torch.library.register_fake("lnprune::select_channels")
def _(
    norms: list[Tensor],
    mask_counts: list[Tensor],
    counts: list[int],
    fractions: list[float],
    rankings: list[int] = NONE,
) -> list[Tensor]:
    _check_devices(norms, mask_counts)
    return [torch.empty_like(norm, dtype=torch.bool) for norm in norms]


def _fake_masks(
    scores: list[Tensor], masks: list[Tensor], originals: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    new_masks = (
        [torch.empty_like(mask, memory_format=torch.contiguous_format) for mask in masks]
        if masks
        else [torch.empty_like(score) for score in scores]
    )
    return new_masks, [torch.empty_like(original) for original in originals]


@torch.library.register_fake("lnprune::write_masks")
def _(
    keep: list[Tensor],
    scores: list[Tensor],
    masks: list[Tensor],
    originals: list[Tensor],
    dims: list[int],
    batches: list[int] = NONE,
) -> tuple[list[Tensor], list[Tensor]]:
    _check_devices(keep, scores, masks, originals)
    return _fake_masks(scores, masks, originals)


@torch.library.register_fake("lnprune::prune_channels")
def _(
    scores: list[Tensor],
    masks: list[Tensor],
    originals: list[Tensor],
    dims: list[int],
    p: float,
    counts: list[int],
    fractions: list[float],
    batches: list[int] = NONE,
) -> tuple[list[Tensor], list[Tensor]]:
    _check_devices(scores, masks, originals)
    return _fake_masks(scores, masks, originals)


@torch.library.register_fake("lnprune::zero_channels_")
def _(tensors: list[Tensor], keep: list[Tensor], dims: list[int], batches: list[int] = NONE) -> None:
    _check_devices(tensors, keep)


@torch.library.register_fake("lnprune::prune_channels_")
def _(
    scores: list[Tensor],
    weights: list[Tensor],
    dims: list[int],
    p: float,
    counts: list[int],
    fractions: list[float],
    batches: list[int] = NONE,
) -> None:
    _check_devices(scores, weights)
