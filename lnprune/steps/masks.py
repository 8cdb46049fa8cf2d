"""Write: keep flags, or amounts, of a list of weights -> masks and masked weights.

Nothing that is given is changed. Native code takes what it can, all weights of a device in one call. Plain
torch takes the rest. Of sharded weights each rank writes the masks of its shards.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune as stock
from torch.nn.utils.prune import LnStructured as StockLnStructured

from lnprune.errors import named
from lnprune.steps import ops, reference
from lnprune.steps.batches import (
    Batch,
    dim_in_matrix,
    is_outside,
    matrices,
    numbers,
    rankings_of,
)
from lnprune.steps.flags import (
    Request,
    choose_of_shards,
    flags_of,
    keep_flags,
    keep_flags_of_left,
    pruned_count,
    pruned_counts,
)
from lnprune.steps.layouts import contiguous, has_standard_strides, keeps_strides
from lnprune.steps.local import is_distributed
from lnprune.steps.norms import check_order, native_order
from lnprune.steps.sharded_masks import write_sharded_masks
from lnprune.torch_internals import OperatorMode, compute_nparams_toprune, validate_pruning_amount

# A mask and its masked weight can be written in one pass, after which the weight is handed to autograd; or
# the mask alone, after which autograd multiplies in a second pass. On the CPU handing over takes longer
# than a second pass over few bytes, so one pass is taken from so many bytes of weights on:
# _FUSED_CALL_BYTES, and _FUSED_WEIGHT_BYTES more for each weight of the call. On CUDA one pass always saves
# launches.
_FUSED_CALL_BYTES = 7 << 17
_FUSED_WEIGHT_BYTES = 1 << 17


def compute_mask(method: StockLnStructured, t: Tensor, default_mask: Tensor) -> Tensor:
    """``LnStructured.compute_mask``: the mask of the scores ``t``, on top of ``default_mask``."""
    count = pruned_count(t, method.amount, method.dim)
    if count == 0:
        check_order(t, method.n, method.dim)
        return default_mask
    if is_distributed(t):
        request = Request(t, t, operator.index(method.dim), method.amount, None, "")
        choose_of_shards([request], method.n)
        request.old_mask = default_mask
        write_sharded_masks([request], method.n)
        return request.mask
    keep = keep_flags(t, method.n, method.dim, [count])
    if ops.are_native(t, default_mask) and has_standard_strides(t) and default_mask.shape == t.shape:
        mask = contiguous(default_mask, t.dtype)
        return ops.write_masks([keep], [t], [mask], [], [operator.index(method.dim)])[0][0]
    return reference.write_mask(keep, t, default_mask, method.dim)


class _LnStructured(StockLnStructured):
    """The last method of a stock container, which the container calls for its mask."""

    _tensor_name = ""  # any name will do, as long as all methods of the container have the same
    compute_mask = compute_mask


def _can_fuse(layout: Tensor, original: Tensor) -> bool:
    """Whether the native code can write the weight together with a mask of this layout."""
    if layout is not original and not (
        ops.are_native(layout, original)
        and layout.dtype == original.dtype
        and layout.shape == original.shape
        and layout.stride() == original.stride()
    ):
        return False
    # Torch's product recomputes the strides of dims of size 1.
    return has_standard_strides(original) or (1 not in original.shape and keeps_strides(original))


def write_masks(requests: Sequence[Request], n: Any, about: named) -> None:
    """Gives every request its mask, and its masked weight, differentiable in the original.

    That takes one native call for each device. It takes more where the requests differ in kind: flags or
    amounts, first or repeated pruning, large weights or unusual layouts. ``about`` learns which request an
    error is about.
    """
    p = None if reference.ranks_like_torch() else native_order(n)
    groups: dict[tuple[int, bool, bool], list[Request]] = {}
    sharded = []
    for request in requests:
        about.name = request.name
        if _prepare(request, n, p):
            key = request.original.get_device(), request.old_mask is None, request.keep is None
            groups.setdefault(key, []).append(request)
        elif is_distributed(request.original) and request.container is None:
            sharded.append(request)
        else:
            request.mask = _plain_mask(request, n)
            request.weight = masked(request.mask, request.original)
    about.name = ""
    if sharded:
        write_sharded_masks(sharded, n)
        for request in sharded:
            request.weight = masked(request.mask, request.original)
    for (_, first, ranked), group in groups.items():
        for fused, rows in _by_fusing(group):
            columns = [
                (row.scores, row.layout, row.original, row.dim, row.count, row.fraction, row.batch)
                for row in rows
            ]
            scores, layouts, originals, dims, counts, fractions, batches = zip(*columns)  # noqa: B905
            masks, written = () if first else layouts, originals if fused else ()
            along = numbers(batches)
            if ranked:
                made = ops.prune_channels(scores, masks, written, dims, p, counts, fractions, along)  # type: ignore[arg-type]
            else:
                made = ops.write_masks(flags_of(rows), scores, masks, written, dims, along)
            new_masks, weights = made
            if fused:
                weights = _with_gradients(new_masks, originals, weights)
            for i, row in enumerate(rows):
                row.mask = new_masks[i]
                row.weight = weights[i] if fused else masked(row.mask, row.original)


def _by_fusing(rows: list[Request]) -> list[tuple[bool, list[Request]]]:
    """The requests that are written together with their weights, and those that are written without."""
    if rows[0].original.is_cpu:
        size = 0
        for row in rows:
            size += row.original.numel() * row.original.element_size()
        if size < _FUSED_CALL_BYTES + _FUSED_WEIGHT_BYTES * len(rows):
            return [(False, rows)]
    parts: tuple[list[Request], list[Request]] = ([], [])
    for row in rows:
        parts[_can_fuse(row.layout, row.original)].append(row)
    return [(fused, parts[fused]) for fused in (True, False) if parts[fused]]


def _prepare(request: Request, n: Any, p: float | None) -> bool:
    """Whether native code takes the request. If so, it has been checked, and has what native code needs.

    That is the layout of the new mask and, where there are no flags, how many channels to prune.
    """
    scores, dim, old_mask, batch = request.scores, request.dim, request.old_mask, request.batch
    if request.container is not None:
        return False
    if old_mask is None:
        if not ops.are_native(scores, request.original):
            return False
        if batch is not None:
            if not is_outside(scores, dim, batch):
                return False
            if request.keep is None and isinstance(request.amount, tuple):
                counts = pruned_counts(scores, request.amount, dim, batch)
                request.keep = keep_flags(scores, n, dim, counts, batch)
        if request.keep is None:
            count = pruned_count(scores, request.amount, dim, batch)
            if count == 0:
                return False
            request.count, request.fraction = count, 0.0
            if p is None:
                request.keep = keep_flags(scores, n, dim, [count] * rankings_of(batch), batch)
        request.layout, request.dim = scores, operator.index(dim)
        return True
    if not ops.are_native(scores, old_mask) or old_mask.shape != scores.shape:
        return False
    if batch is not None and not is_outside(contiguous(old_mask, scores.dtype), dim, batch):
        return False
    if batch is not None and not isinstance(request.amount, float) and p is not None:
        request.keep = keep_flags_of_left(request, n) if request.keep is None else request.keep
    if request.keep is not None:
        request.layout = contiguous(old_mask, scores.dtype)
        return True
    dims = scores.dim()
    if p is None or dims < 2 or type(dim) is not int or not -dims <= dim < dims:
        return False
    request.layout = contiguous(old_mask, scores.dtype)
    amount = request.amount
    if type(amount) is float and amount == amount:
        request.count, request.fraction = -1, amount
    else:
        # How many channels are left has to be known here. On a GPU this waits for it.
        alive = int(torch.count_nonzero(ops.channel_norms([request.layout], [dim], 0.0)[0]))
        count = compute_nparams_toprune(amount, alive)
        validate_pruning_amount(count, alive)
        request.count, request.fraction = int(count), 0.0
    return True


def _plain_mask(request: Request, n: Any) -> Tensor:
    """The mask by the steps of the reference, in plain torch where the native code takes no part of it."""
    scores, original, dim, amount = request.scores, request.original, request.dim, request.amount
    old_mask, container, batch = request.old_mask, request.container, request.batch
    if request.keep is not None:
        return reference.write_mask(request.keep, scores.detach(), old_mask, dim, batch)
    if batch is not None:
        return _plain_masks(request, batch, n)
    if old_mask is None:
        # Before the checks, as in torch: what cannot have a mask of ones fails here.
        ones = torch.ones_like(original, requires_grad=False)
        return compute_mask(StockLnStructured(amount, n, dim), scores, ones)
    reference.check_slices(scores, n, dim)  # which a container of the user's would not
    if container is None:
        container = stock.PruningContainer(_LnStructured(amount, n, dim))
    default_mask = old_mask.detach().clone(memory_format=torch.contiguous_format)
    return container.compute_mask(scores, default_mask=default_mask)


def _plain_masks(request: Request, batch: Batch, n: Any) -> Tensor:
    """The same of each matrix by itself, as a tensor of its own."""
    mask = torch.zeros_like(request.scores, requires_grad=False)
    if request.old_mask is not None:
        mask = mask.contiguous()
    dim = dim_in_matrix(mask.shape, request.dim, batch)
    amounts = request.amount if isinstance(request.amount, tuple) else (request.amount,) * batch.size
    scores, originals = matrices(request.scores, batch), matrices(request.original, batch)
    for i, part in enumerate(matrices(mask, batch)):
        one = Request(scores[i], originals[i], dim, amounts[i], None, request.name)
        if request.old_mask is not None:
            one.old_mask = matrices(request.old_mask, batch)[i]
        one.container = request.container
        part.copy_(_plain_mask(one, n))
    return mask


class _Product(OperatorMode):
    """A multiplication inside is not computed: its result is a product that native code has made.

    Autograd, above the dispatch mode, records torch's own MulBackward0 all the same. A function of
    autograd's public interface takes as long, and would stay in the model as a class of lnprune.
    """

    product: Tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.mul.Tensor:
            return self.product
        return func(*args, **(kwargs or {}))


def _with_gradients(
    masks: list[Tensor], originals: Sequence[Tensor], products: list[Tensor]
) -> list[Tensor]:
    """``mask * original`` of each, differentiable in the originals, with the values of ``products``."""
    if not torch.is_grad_enabled():
        return products
    mode = _Product()
    weights = []
    with mode:
        for mask, original, product in zip(masks, originals, products, strict=True):
            mode.product = product
            weights.append(mask * original if original.requires_grad else product)
    return weights


def masked(mask: Tensor, original: Tensor) -> Tensor:
    """``mask * original`` in the original's dtype, as torch's hook computes it."""
    return (mask if mask.dtype == original.dtype else mask.to(original.dtype)) * original
