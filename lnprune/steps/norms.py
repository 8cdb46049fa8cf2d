"""Rank: a list of weights -> the norms of their channels.

Native code takes what it can, all weights of a device in one call. Plain torch takes the rest. Of sharded
weights each rank measures its shard, and the ranks exchange one number for each channel.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Union

import torch
from torch import Tensor

from lnprune.errors import named
from lnprune.steps import ops, reference, sharding
from lnprune.steps.batches import Batch, channels_of, is_outside, numbers, rankings_of
from lnprune.steps.factors import Factors, factors_here, product
from lnprune.steps.local import batch_here, by_device, held_here, is_distributed

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


class Asked(NamedTuple):
    """Tensors whose channels are measured, by norms of one order."""

    tensors: Sequence[Tensor]
    n: Any
    dims: Sequence[int]
    names: Sequence[str] = ()  # what errors of plain torch say of each tensor; may be none
    batches: Sequence[Batch | None] = ()  # may be none too
    factors: Sequence[Factors | None] = ()  # what elements are multiplied by; may be none too

    def batch(self, i: int) -> Batch | None:
        return self.batches[i] if self.batches else None

    def factor(self, i: int) -> Factors | None:
        return self.factors[i] if self.factors else None


def channel_norms(
    tensors: Sequence[Tensor],
    n: Any,
    dims: Sequence[int],
    names: Sequence[str] = (),
    batches: Sequence[Batch | None] = (),
) -> list[Tensor]:
    """The norms of every channel, by one native call for each device; others through plain torch.

    What plain torch raises has the name of its tensor, where there are names.
    """
    if len(tensors) == 1 and not batches and ops.is_native(tensors[0]):
        p = native_order(n)
        if p is not None:  # nothing to sort, as in most calls
            return ops.channel_norms(tensors, dims, p)
    return _measured(True, [Asked(tensors, n, dims, names, batches)])[0]


def norms_of_each(asked: Sequence[Asked]) -> list[list[Tensor]]:
    """The same of several lists, whose orders differ: of sharded tensors, with one exchange for all."""
    return _measured(True, asked)


def channel_sums(
    tensors: Sequence[Tensor],
    n: Any,
    dims: Sequence[int],
    names: Sequence[str] = (),
    batches: Sequence[Batch | None] = (),
    factors: Sequence[Factors | None] = (),
) -> list[Tensor]:
    """What :func:`channel_norms` takes the root of, which adds up where a channel has several slices."""
    return _measured(False, [Asked(tensors, n, dims, names, batches, factors)])[0]


def norms_of_sums(sums: Sequence[Tensor], n: Any) -> list[Tensor]:
    """The norms of channels with these sums, which are contiguous float64 of one device."""
    p = native_order(n)
    if p is None or any(not ops.is_native(each) for each in sums):
        return [reference.norms_of_sums(each, n) for each in sums]
    return ops.norms_of_sums(sums, p)


def _measured(has_root: bool, asked: Sequence[Asked]) -> list[list[Tensor]]:
    plain = reference.channel_norms if has_root else reference.channel_sums
    results: list[list[Any]] = []
    shards = []
    for each in asked:
        tensors, n, dims, names, *_ = each
        p = native_order(n)
        found: list[Any] = [None] * len(tensors)
        results.append(found)
        taken, sharded = [], []
        for i, tensor in enumerate(tensors):
            if p is not None and ops.is_native(tensor) and is_outside(tensor, dims[i], each.batch(i)):
                taken.append(i)
            elif is_distributed(tensor):
                sharded.append(i)
            else:
                factor, batch = each.factor(i), each.batch(i)
                with named(names[i] if names else ""):
                    wide = tensor if factor is None else product(tensor, factor, batch)
                    found[i] = plain(wide, n, dims[i], batch)
        for places in by_device(tensors[i] for i in taken).values():
            indices = [taken[place] for place in places]
            for i, result in zip(*_native(each, indices, p, has_root), strict=True):  # type: ignore[arg-type]
                found[i] = result
        if sharded:
            shards.append(_Shards(each, sharded, found))
    if shards:
        _exchange(shards, has_root)
    return results


def _native(asked: Asked, indices: list[int], p: float, has_root: bool) -> tuple[list[int], list[Tensor]]:
    """Norms, or sums, of tensors of one device: by one call, and one more for those with factors."""
    rank = ops.channel_norms if has_root else ops.channel_sums
    scaled = [i for i in indices if asked.factor(i) is not None]
    if scaled:
        indices = [i for i in indices if asked.factor(i) is None]
    tensors, dims, batches = (
        [values[i] for i in indices] for values in (asked.tensors, asked.dims, asked.batches or asked.dims)
    )
    made = rank(tensors, dims, p, numbers(batches) if asked.batches else [])  # type: ignore[arg-type]
    if scaled:
        factors: list[Any] = [asked.factor(i) for i in scaled]
        made = made + ops.scaled_norms(
            [asked.tensors[i] for i in scaled],
            [asked.dims[i] for i in scaled],
            [each.values for each in factors],
            [each.dim for each in factors],
            p,
            has_root,
            numbers([asked.batch(i) for i in scaled]),
        )
    return indices + scaled, made


class _Shards:
    """What this rank has of DTensors, and where their norms go: global, plain, equal on all ranks."""

    def __init__(self, asked: Asked, indices: Sequence[int], found: list[Any]):
        self.n, self.found = asked.n, found
        p = native_order(self.n)
        if p is None:
            # What is no order at all gets torch's error.
            reference.channel_norms(torch.ones(1, 1, device="cpu"), self.n, 0)
            raise RuntimeError(
                f"expected a norm that adds up over shards, of sharded weights, got n={self.n!r}"
            )
        self.fold = sharding.FOLDS.get(p, sharding.ADD)
        self.places: list[int] = []
        self.tensors: list[Any] = []
        self.dims: list[int] = []
        self.batches: list[Batch | None] = []  # of whole tensors
        self.held: list[Tensor] = []
        self.held_batches: list[Batch | None] = []
        self.held_factors: list[Factors | None] = []
        for i in indices:
            tensor, dim, batch = asked.tensors[i], asked.dims[i], asked.batch(i)
            name = asked.names[i] if asked.names else ""
            held = held_here(tensor, name).detach()
            with named(name):
                held_batch = batch_here(tensor, dim, batch)
                factor = asked.factor(i)
                held_factor = None if factor is None else factors_here(tensor, factor, batch)
            channels = rankings_of(batch) * channels_of(tensor.shape, dim, batch)
            if tensor.numel() == 0:  # which some orders have no norm of: on all ranks alike
                with named(name):
                    found[i] = reference.channel_norms(held.new_empty(tensor.shape), self.n, dim, batch)
            elif held.is_meta:
                found[i] = held.new_empty(channels, dtype=torch.float64)
            else:
                self.places.append(i)
                self.tensors.append(tensor)
                self.dims.append(dim)
                self.batches.append(batch)
                self.held.append(held)
                self.held_batches.append(held_batch)
                self.held_factors.append(held_factor)

    def sums(self) -> list[Tensor]:
        """Of the channels that are here."""
        found: list[Any] = [None] * len(self.held)
        full = [i for i, held in enumerate(self.held) if held.numel() > 0]
        made = channel_sums(
            [self.held[i] for i in full],
            self.n,
            [self.dims[i] for i in full],
            batches=[self.held_batches[i] for i in full],
            factors=[self.held_factors[i] for i in full],
        )
        for i, each in zip(full, made, strict=True):
            found[i] = each
        for i, held in enumerate(self.held):
            if held.numel() == 0:
                batch = self.held_batches[i]
                channels = rankings_of(batch) * channels_of(held.shape, self.dims[i], batch)
                found[i] = held.new_full((channels,), self.fold.of_nothing, dtype=torch.float64)
        return found

    def finish(self, sums: Sequence[Tensor], has_root: bool) -> None:
        """Takes the sums of whole channels."""
        for indices in by_device(sums).values():
            made = [sums[i] for i in indices]
            for i, each in zip(indices, norms_of_sums(made, self.n) if has_root else made, strict=True):
                self.found[self.places[i]] = each


def _exchange(shards: Sequence[_Shards], has_root: bool) -> None:
    """Norms, or sums, of shards, with one exchange for all of them."""
    sums = [sums for each in shards for sums in each.sums()]
    tensors = [tensor for each in shards for tensor in each.tensors]
    dims = [dim for each in shards for dim in each.dims]
    batches = [batch for each in shards for batch in each.batches]
    folds = [each.fold for each in shards for _ in each.places]
    whole = iter(sharding.folded(tensors, sums, dims, folds, batches))
    for each in shards:
        each.finish([next(whole) for _ in each.places], has_root)


def nonzero_counts(tensor: Tensor, dim: int, batch: Batch | None = None) -> Tensor:
    """How many elements of each channel are not zero, of a tensor of any dtype and any number of dims."""
    return channel_norms([countable(tensor)], 0, [dim], (), [] if batch is None else [batch])[0]


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
