"""Select: what to prune of a weight, by amount or by keep flags, and from scores and amounts to flags."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor

from lnprune.errors import named
from lnprune.steps import ops, reference
from lnprune.steps.local import channels_here, is_distributed
from lnprune.steps.norms import Asked, channel_norms, norms_of_each
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
    """Rank and select: flags for requests about sharded weights, in one exchange.

    So many channels are pruned as their counts say. Where there is a mask, the amount is one of the
    channels that it leaves.
    """
    if not requests:
        return
    if reference.ranks_like_torch():
        _choose_like_torch(requests, n)
        return
    scores = [request.scores for request in requests]
    dims = [operator.index(request.dim) for request in requests]
    names = [request.name for request in requests]
    masked = [i for i, request in enumerate(requests) if request.old_mask is not None]
    masks: list[Any] = [requests[i].old_mask for i in masked]
    norms, found = norms_of_each(
        [
            Asked(scores, n, dims, names),
            Asked(masks, 0, [dims[i] for i in masked], [names[i] for i in masked]),
        ]
    )
    counts = dict(zip(masked, found, strict=True))
    with named() as about:
        for i, request in enumerate(requests):
            about.name = request.name
            if i not in counts:
                request.keep = _kept(norms[i], request.count)
                continue
            left = int(torch.count_nonzero(counts[i]))
            count = compute_nparams_toprune(request.amount, left)
            validate_pruning_amount(count, left)
            # Channels that are gone rank last, behind all others, and go first.
            gone = counts[i] == 0
            last = torch.where(gone.to(norms[i].device), -1.0, norms[i])
            request.keep = _kept(last, int(count) + norms[i].numel() - left)


def _choose_like_torch(requests: Sequence[Request], n: Any) -> None:
    """What torch chooses of DTensors, where it chooses: of channels that are all on each rank."""
    for request in requests:
        if channels_here(request.scores, request.dim) is not None or request.old_mask is not None:
            raise RuntimeError(
                f"{request.name or 'reference_ranking'}: expected a first mask of channels that are all on "
                "each rank: torch ranks no others, so prune outside of reference_ranking()"
            )
        keep = reference.torch_keep_channels(request.scores, n, request.dim, request.count)
        request.keep = keep.full_tensor() if is_distributed(keep) else keep


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
