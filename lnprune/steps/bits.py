"""The bits of tensors: values that copy and compare in any dtype, without a change of any bit."""

from __future__ import annotations

import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, which copy and compare in any dtype without a change of any bit."""
    if tensor.is_conj() or tensor.is_neg():
        return tensor
    if tensor.dtype is torch.complex128:
        tensor = torch.view_as_real(tensor)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


def from_bits(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor of this dtype with these bits."""
    if integers.dtype == dtype:
        return integers
    if dtype is torch.complex128:
        return torch.view_as_complex(integers.view(torch.float64))
    return integers.view(dtype)


def is_zero(integers: Tensor) -> Tensor:
    """Which of these bits are those of 0.0 or -0.0."""
    if integers.is_floating_point() or integers.is_complex():
        return integers == 0
    return (integers << 1) == 0
