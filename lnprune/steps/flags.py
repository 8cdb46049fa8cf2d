"""Select: what to prune of a weight, by amount or by keep flags, and from scores and amounts to flags."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor

from lnprune.steps import ops, reference
from lnprune.steps.norms import channel_norms
from lnprune.torch_internals import (
    compute_nparams_toprune,
    validate_pruning_amount,
    validate_pruning_dim,
    validate_structured_pruning,
)

Amount = Union[int, float]


class Request:
    """One weight to prune along ``dim``: by an amount of the channels left, or by keep flags."""

    old_mask: Tensor | None = None  # None: ones
    container: Any = None  # a user's own, which combines masks in its own way

    layout: Tensor  # a tensor of the layout that the mask is to have
    count = 0  # how many channels to prune; where it is negative, `fraction` says it
    fraction = 0.0  # the share of the channels that are left

    mask: Tensor  # write_masks() makes both
    weight: Tensor

    held: Tensor  # to write in place: the plain tensor that holds the original's values here

    def __init__(
        self, scores: Tensor, original: Tensor, dim: int, amount: Any, keep: Tensor | None, name: str
    ):
        self.scores = scores  # what is ranked; a first mask has its dtype and layout
        self.original = original  # what the mask is multiplied with, or what is zeroed in place
        self.dim = dim
        self.amount = amount
        self.keep = keep  # bool, on any device, of all channels; to write in place: of those that are here
        self.name = name  # for messages


def pruned_count(tensor: Tensor, amount: Amount, dim: int) -> int:
    """How many channels to prune, after the reference's checks in the reference's order."""
    if tensor.dim() < 2:
        validate_structured_pruning(tensor)
    validate_pruning_dim(tensor, dim)
    channels = tensor.shape[dim]
    if type(amount) is float:
        return round(amount * channels)
    count = compute_nparams_toprune(amount, channels)
    validate_pruning_amount(count, channels)
    return int(count)


def keep_flags(scores: Tensor, n: Any, dim: int, count: int) -> Tensor:
    """Rank and select: bool keep flags of shape ``(channels,)`` when ``count`` are pruned."""
    if reference.ranks_like_torch():
        return reference.torch_keep_channels(scores, n, dim, count)
    return _kept(channel_norms([scores], n, [operator.index(dim)])[0], count)


def choose_of_shards(requests: Sequence[Request], n: Any) -> None:
    """Rank and select: flags for requests about sharded weights of known counts, in one exchange."""
    if not requests:
        return
    if reference.ranks_like_torch():
        raise RuntimeError(
            f"{requests[0].name or 'reference_ranking'}: expected a weight that is whole here: torch "
            "ranks no shards, so that there is nothing to rank alike: prune outside of reference_ranking()"
        )
    scores = [request.scores for request in requests]
    dims = [operator.index(request.dim) for request in requests]
    norms = channel_norms(scores, n, dims, [request.name for request in requests])
    for request, each in zip(requests, norms, strict=True):
        request.keep = _kept(each, request.count)


def _kept(norms: Tensor, count: int) -> Tensor:
    if ops.is_native(norms):
        return ops.select_channels([norms], [], [count], [0.0])[0]
    return reference.keep_channels(norms, count)


def flags_of(rows: Sequence[Request]) -> list[Tensor]:
    """The flags of requests of one device, brought there in one transfer."""
    flags: list[Any] = [row.keep for row in rows]
    device = rows[0].original.device
    if all(keep.device == device for keep in flags):
        return flags
    return list(
        torch.cat([keep.cpu() for keep in flags]).to(device).split([keep.numel() for keep in flags])
    )
