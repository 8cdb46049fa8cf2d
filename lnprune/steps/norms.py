"""Rank: a list of weights -> the norms of their channels.

Native code takes what it can, all weights of a device in one call. Plain torch takes the rest. Of sharded
weights each rank measures its shard, and the ranks exchange one number for each channel.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, Union

import torch
from torch import Tensor

from lnprune.errors import named
from lnprune.steps import ops, reference, sharding
from lnprune.steps.local import by_device, held_here, is_distributed

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
    return _measured(True, tensors, n, dims, names)


def channel_sums(
    tensors: Sequence[Tensor], n: Any, dims: Sequence[int], names: Sequence[str] = ()
) -> list[Tensor]:
    """What :func:`channel_norms` takes the root of, which adds up where a channel has several slices."""
    return _measured(False, tensors, n, dims, names)


def norms_of_sums(sums: Sequence[Tensor], n: Any) -> list[Tensor]:
    """The norms of channels with these sums, which are contiguous float64 of one device."""
    p = native_order(n)
    if p is None or any(not ops.is_native(each) for each in sums):
        return [reference.norms_of_sums(each, n) for each in sums]
    return ops.norms_of_sums(sums, p)


def _measured(
    has_root: bool, tensors: Sequence[Tensor], n: Any, dims: Sequence[int], names: Sequence[str]
) -> list[Tensor]:
    native = ops.channel_norms if has_root else ops.channel_sums
    plain = reference.channel_norms if has_root else reference.channel_sums
    p = native_order(n)
    found: list[Any] = [None] * len(tensors)
    taken, sharded = [], []
    for i, tensor in enumerate(tensors):
        if p is not None and ops.is_native(tensor):
            taken.append(i)
        elif is_distributed(tensor):
            sharded.append(i)
        else:
            with named(names[i] if names else ""):
                found[i] = plain(tensor, n, dims[i])
    for places in by_device(tensors[i] for i in taken).values():
        indices = [taken[place] for place in places]
        made = native([tensors[i] for i in indices], [dims[i] for i in indices], p)  # type: ignore[arg-type]
        for i, each in zip(indices, made, strict=True):
            found[i] = each
    if sharded:
        asked = [tensors[i] for i in sharded], n, [dims[i] for i in sharded]
        made = _of_shards(has_root, *asked, [names[i] for i in sharded if names])
        for i, each in zip(sharded, made, strict=True):
            found[i] = each
    return found


_FOLDS = {math.inf: torch.maximum, -math.inf: torch.minimum}  # which keep NaN; other orders add


def _of_shards(
    has_root: bool, tensors: Sequence[Any], n: Any, dims: Sequence[int], names: Sequence[str]
) -> list[Tensor]:
    """The same of DTensors: global, plain, and equal on all ranks."""
    p = native_order(n)
    if p is None:
        # What is no order at all gets torch's error.
        reference.channel_norms(torch.ones(1, 1, device="cpu"), n, 0)
        raise RuntimeError(
            f"{names[0] if names else 'n'}: expected a norm that is a sum over elements, for a sharded "
            f"weight, got n={n!r}"
        )
    identity = math.inf if p == -math.inf else 0.0
    found: list[Any] = [None] * len(tensors)
    shared, sums = [], {}
    for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        here = held_here(tensor, names[i] if names else "")
        if tensor.numel() == 0:  # which some orders have no norm of: on all ranks alike
            with named(names[i] if names else ""):
                found[i] = reference.channel_norms(here.new_empty(tensor.shape), n, dim)
        elif here.is_meta:
            found[i] = here.new_empty(tensor.shape[dim], dtype=torch.float64)
        else:
            shared.append(i)
            if here.numel() == 0:
                sums[i] = here.new_full((here.shape[dim],), identity, dtype=torch.float64)
    full = [i for i in shared if i not in sums]
    held = [held_here(tensors[i]).detach() for i in full]
    sums.update(zip(full, _measured(False, held, n, [dims[i] for i in full], ()), strict=True))
    whole = sharding.folded(
        [tensors[i] for i in shared],
        [sums[i] for i in shared],
        [dims[i] for i in shared],
        _FOLDS.get(p, torch.add),
        identity,
    )
    for places in by_device(whole).values():
        made = [whole[place] for place in places]
        if has_root:
            made = norms_of_sums(made, n)
        for place, each in zip(places, made, strict=True):
            found[shared[place]] = each
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
