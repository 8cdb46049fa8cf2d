"""Select: the scores of one weight and an amount -> keep flags, one for each channel."""

from __future__ import annotations

import operator
from typing import Any, Union

from torch import Tensor

from lnprune import ops, reference
from lnprune.norms import channel_norms
from lnprune.torch_internals import (
    compute_nparams_toprune,
    validate_pruning_amount,
    validate_pruning_dim,
    validate_structured_pruning,
)

__all__ = ["Amount", "keep_flags", "pruned_count"]

Amount = Union[int, float]


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
    norms = channel_norms([scores], n, [operator.index(dim)])[0]
    if ops.is_native(norms):
        return ops.select_channels([norms], [], [count], [0.0])[0]
    return reference.keep_channels(norms, count)
