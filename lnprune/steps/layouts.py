"""Strides: which tensors are laid out as a fresh one is, densely, or without an element twice."""

from __future__ import annotations

import torch
from torch import Tensor


def has_standard_strides(tensor: Tensor) -> bool:
    """Whether the strides are those of a fresh contiguous tensor, in dims of size 1 too."""
    if 1 not in tensor.shape:
        return tensor.is_contiguous()
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def contiguous(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in a dtype, with the strides that a clone in contiguous format has."""
    mask = mask.detach().to(dtype)
    return mask if has_standard_strides(mask) else mask.clone(memory_format=torch.contiguous_format)


def keeps_strides(tensor: Tensor) -> bool:
    """Whether ``empty_like`` keeps the strides: those of dense tensors, and of no others."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def may_overlap(tensor: Tensor) -> bool:
    """Whether elements share memory, as far as strides tell: each must step over all smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
