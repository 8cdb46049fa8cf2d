"""Write, of sharded weights: flags or amounts -> masks that are DTensors, placed as the weights are.

Each rank writes the masks of its shards, by one native call for each device, where native code takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lnprune.steps import ops, reference
from lnprune.steps.batches import is_outside, numbers
from lnprune.steps.flags import Request, choose_of_shards, pruned_counts
from lnprune.steps.local import as_shard, batch_here, by_device, flags_here, held_here, values_here


def write_sharded_masks(requests: Sequence[Request], n: Any) -> None:
    """Gives every request its mask. No exchange but those of norms, and of what is placed otherwise."""
    unranked = [request for request in requests if request.keep is None]
    for request in unranked:
        pruned_counts(request.scores, request.amount, request.dim, request.batch)  # its checks
    choose_of_shards(unranked, n)
    rows = [_Shard(request) for request in requests]
    for first in (True, False):
        native = [row for row in rows if row.is_native and (row.old_mask is None) is first]
        for places in by_device(row.layout for row in native).values():
            group = [native[i] for i in places]
            olds = [row.old_mask for row in group if row.old_mask is not None]
            layouts, flags, dims = zip(*((row.layout, row.flags, row.dim) for row in group), strict=True)
            batches = numbers([row.batch for row in group])
            made, _ = ops.write_masks(flags, layouts, olds, [], dims, batches)
            for row, mask in zip(group, made, strict=True):
                row.request.mask = as_shard(mask, row.request.original)
    for row in rows:
        if not row.is_native:
            mask = reference.write_mask(row.flags, row.layout, row.old_mask, row.dim, row.batch)
            row.request.mask = as_shard(mask, row.request.original)


class _Shard:
    """What this rank has of a request."""

    def __init__(self, request: Request):
        held = held_here(request.original).detach()
        assert request.keep is not None
        self.request, self.dim = request, request.dim % held.dim()
        self.flags = flags_here(request.original, self.dim, request.keep, request.batch).to(held.device)
        self.batch = batch_here(request.original, self.dim, request.batch)
        # Of the layout and the dtype of the new mask.
        dtype = request.scores.dtype
        self.layout = held if held.dtype == dtype else torch.empty_like(held, dtype=dtype)
        self.old_mask: Tensor | None = None
        if request.old_mask is not None:
            self.old_mask = values_here(request.old_mask, request.original).detach().to(dtype).contiguous()
        written = self.layout if self.old_mask is None else self.old_mask
        self.is_native = ops.is_native(self.layout) and is_outside(written, self.dim, self.batch)
