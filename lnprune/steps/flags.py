"""Select: what to prune of a weight, by amount or by keep flags, and from scores and amounts to flags."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor

from lnprune.errors import named
from lnprune.steps import ops, reference
from lnprune.steps.batches import Batch, channels_of, rankings_of
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
    batch: Batch | None = None  # of matrices with channels of their own
    container: Any = None  # a user's own, which combines masks in its own way

    layout: Tensor  # a tensor of the layout that the mask is to have
    count = 0  # how many channels to prune; where it is negative, `fraction` says it
    fraction = 0.0  # the share of the channels that are left

    mask: Tensor  # write_masks() makes both
    weight: Tensor

    held: Tensor  # to write in place: the plain tensor that holds the original's values here
    held_batch: Batch | None = None  # and its batch

    def __init__(
        self, scores: Tensor, original: Tensor, dim: int, amount: Any, keep: Tensor | None, name: str
    ):
        self.scores = scores  # what is ranked; a first mask has its dtype and layout
        self.original = original  # what the mask is multiplied with, or what is zeroed in place
        self.dim = dim
        self.amount = amount  # a tuple: one for each ranking
        self.keep = keep  # bool, on any device, of all channels; to write in place: of those that are here
        self.name = name  # for messages


def pruned_count(tensor: Tensor, amount: Amount, dim: int, batch: Batch | None = None) -> int:
    """How many channels of a ranking to prune, after the reference's checks in the reference's order."""
    if tensor.dim() < 2:
        validate_structured_pruning(tensor)
    validate_pruning_dim(tensor, dim)
    channels = tensor.shape[dim] if batch is None else channels_of(tensor.shape, dim, batch)
    if type(amount) is float:
        return round(amount * channels)
    count = compute_nparams_toprune(amount, channels)
    validate_pruning_amount(count, channels)
    return int(count)


def pruned_counts(tensor: Tensor, amount: Any, dim: int, batch: Batch | None) -> list[int]:
    """The same of all rankings, which may have amounts of their own, as a tuple."""
    if not isinstance(amount, tuple):
        return [pruned_count(tensor, amount, dim, batch)] * rankings_of(batch)
    return [pruned_count(tensor, each, dim, batch) for each in amount]


def keep_flags(
    scores: Tensor, n: Any, dim: int, counts: Sequence[int], batch: Batch | None = None
) -> Tensor:
    """Rank and select: bool keep flags of the channels of all rankings when ``counts`` are pruned."""
    if reference.ranks_like_torch():
        return reference.torch_keep_channels(scores, n, dim, counts, batch)
    batches = [] if batch is None else [batch]
    return _kept(channel_norms([scores], n, [operator.index(dim)], (), batches)[0], counts)


def keep_flags_of_left(request: Request, n: Any) -> Tensor:
    """The same where a mask has pruned before: amounts are those of the channels that it leaves."""
    batches = [] if request.batch is None else [request.batch]
    norms = channel_norms([request.scores], n, [request.dim], (), batches)[0]
    alive = channel_norms([request.old_mask], 0, [request.dim], (), batches)[0]  # type: ignore[list-item]
    return _kept_of_left(request, norms, alive != 0)


def _kept_of_left(request: Request, norms: Tensor, alive: Tensor) -> Tensor:
    """Channels that are gone rank last, behind all others, and go first."""
    left = alive.view(rankings_of(request.batch), -1).sum(dim=1).tolist()
    amounts = request.amount if isinstance(request.amount, tuple) else (request.amount,) * len(left)
    channels, counts = norms.numel() // max(1, len(left)), []
    for amount, count in zip(amounts, left, strict=True):
        pruned = compute_nparams_toprune(amount, count)
        validate_pruning_amount(pruned, count)
        counts.append(int(pruned) + channels - count)
    return _kept(torch.where(alive.to(norms.device), norms, -1.0), counts)


def choose_of_shards(requests: Sequence[Request], n: Any) -> None:
    """Rank and select: flags for requests about sharded weights, in one exchange.

    So many channels are pruned as their amounts say; where there is a mask, of the channels that it leaves.
    """
    if not requests:
        return
    if reference.ranks_like_torch():
        _choose_like_torch(requests, n)
        return
    scores = [request.scores for request in requests]
    dims = [operator.index(request.dim) for request in requests]
    names = [request.name for request in requests]
    batches = [request.batch for request in requests]
    masked = [i for i, request in enumerate(requests) if request.old_mask is not None]
    masks: list[Any] = [requests[i].old_mask for i in masked]
    norms, found = norms_of_each(
        [
            Asked(scores, n, dims, names, batches),
            Asked(
                *(masks, 0, [dims[i] for i in masked], [names[i] for i in masked]),
                [batches[i] for i in masked],
            ),
        ]
    )
    counts = dict(zip(masked, found, strict=True))
    with named() as about:
        for i, request in enumerate(requests):
            about.name = request.name
            if i not in counts:
                amounts = pruned_counts(request.scores, request.amount, request.dim, request.batch)
                request.keep = _kept(norms[i], amounts)
                continue
            request.keep = _kept_of_left(request, norms[i], counts[i] != 0)


def _choose_like_torch(requests: Sequence[Request], n: Any) -> None:
    """What torch chooses of DTensors, where it chooses: of channels that are all on each rank."""
    for request in requests:
        here = channels_here(request.scores, request.dim, request.batch)
        if here is not None or request.old_mask is not None:
            raise RuntimeError(
                f"{request.name or 'reference_ranking'}: expected a first mask of channels that are all on "
                "each rank: torch ranks no others, so prune outside of reference_ranking()"
            )
        counts = pruned_counts(request.scores, request.amount, request.dim, request.batch)
        keep = reference.torch_keep_channels(request.scores, n, request.dim, counts, request.batch)
        request.keep = keep.full_tensor() if is_distributed(keep) else keep


def _kept(norms: Tensor, counts: Sequence[int]) -> Tensor:
    """The flags of all rankings, which have one count each."""
    if ops.is_native(norms):
        return ops.select_channels([norms], [], counts, [0.0] * len(counts), [len(counts)])[0]
    rankings = norms.view(len(counts), -1)
    return torch.cat(
        [reference.keep_channels(each, count) for each, count in zip(rankings, counts, strict=True)]
    )


def flags_of(rows: Sequence[Request]) -> list[Tensor]:
    """The flags of requests of one device, brought there in one transfer."""
    flags: list[Any] = [row.keep for row in rows]
    device = rows[0].original.device
    if all(keep.device == device for keep in flags):
        return flags
    return list(
        torch.cat([keep.cpu() for keep in flags]).to(device).split([keep.numel() for keep in flags])
    )
