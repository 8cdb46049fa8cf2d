"""Rank: a list of weights -> the norms of their channels.

Native code takes what it can, all weights of a device in one call. Plain torch takes the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, Union

import torch
from torch import Tensor

from lnprune.errors import named
from lnprune.steps import ops, reference
from lnprune.steps.local import by_device

Order = Union[int, float, Literal["fro", "nuc"], None]

_NUMBERS = frozenset({float, int, bool})


def native_order(n: Any) -> float | None:
    """The order of the norm as a float, or None where plain torch is to judge it."""
    if type(n) in _NUMBERS:
        try:
            p = float(n)
        except OverflowError:
            return None
        # NaN, and orders so small that their inverse is not finite, are left to torch.
        return p if p == 0 or abs(p) > sys.float_info.min else None
    if n is None or (isinstance(n, str) and n == "fro"):
        return 2.0
    if isinstance(n, str | complex):
        return None
    try:  # numpy scalars and 0-d tensors, where torch takes them
        torch.norm(torch.ones(1, device="cpu"), p=n, dim=[0])
        return native_order(float(n))
    except (TypeError, RuntimeError, ValueError):
        return None


def channel_norms(
    tensors: Sequence[Tensor], n: Any, dims: Sequence[int], names: Sequence[str] = ()
) -> list[Tensor]:
    """The norms of every channel, by one native call for each device; others through plain torch.

    What plain torch raises has the name of its tensor, where there are names.
    """
    return _measured(ops.channel_norms, reference.channel_norms, tensors, n, dims, names)


def channel_sums(
    tensors: Sequence[Tensor], n: Any, dims: Sequence[int], names: Sequence[str] = ()
) -> list[Tensor]:
    """What :func:`channel_norms` takes the root of, which adds up where a channel has several slices."""
    return _measured(ops.channel_sums, reference.channel_sums, tensors, n, dims, names)


def norms_of_sums(sums: Sequence[Tensor], n: Any) -> list[Tensor]:
    """The norms of channels with these sums, which are contiguous float64 of one device."""
    p = native_order(n)
    return [reference.norms_of_sums(each, n) for each in sums] if p is None else ops.norms_of_sums(sums, p)


def _measured(
    native: Any, plain: Any, tensors: Sequence[Tensor], n: Any, dims: Sequence[int], names: Sequence[str]
) -> list[Tensor]:
    p = native_order(n)
    found: list[Any] = [None] * len(tensors)
    taken = []
    for i, tensor in enumerate(tensors):
        if p is not None and ops.is_native(tensor):
            taken.append(i)
        else:
            with named(names[i] if names else ""):
                found[i] = plain(tensor, n, dims[i])
    for places in by_device(tensors[i] for i in taken).values():
        indices = [taken[place] for place in places]
        made = native([tensors[i] for i in indices], [dims[i] for i in indices], p)
        for i, each in zip(indices, made, strict=True):
            found[i] = each
    return found


def nonzero_counts(tensors: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """How many elements of each channel are not zero, of tensors of any dtype and any number of dims."""
    return channel_norms([countable(tensor) for tensor in tensors], 0, dims)


def countable(tensor: Tensor) -> Tensor:
    """A tensor that norms take, of two dims or more, whose zeros are where the tensor's are."""
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = (tensor != 0).float()
    return tensor if tensor.dim() > 1 else tensor.unsqueeze(-1)


def zero_norms_are_zeros(dtype: torch.dtype, n: Any) -> bool:
    """Whether a channel of this dtype whose norm is 0 has no element but zeros."""
    p = native_order(n)
    if p is None or p < 0:
        return False
    if p == 0 or math.isinf(p):
        return True
    # Powers of small numbers are 0 for large orders, roots of what rounds to 1 for small ones.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return p > 1e-3 and smallest**p > 0


def check_order(scores: Tensor, n: Any, dim: int) -> None:
    """Raises what the norm would raise, for calls that prune nothing and so need no norm."""
    if reference.ranks_like_torch():
        reference.torch_norms(scores, n, dim)
    elif native_order(n) is None or not ops.is_native(scores):
        reference.channel_norms(scores, n, dim)
