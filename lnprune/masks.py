"""Write: keep flags, or amounts, of a list of weights -> masks and masked weights, or zeros in place.

Native code takes what it can, all weights of a device in one call. Plain torch takes the rest.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock
from torch.nn.utils.prune import LnStructured as StockLnStructured

from lnprune import ops, reference
from lnprune.errors import named
from lnprune.flags import keep_flags, pruned_count
from lnprune.norms import check_order, native_order
from lnprune.torch_internals import (
    OperatorMode,
    compute_nparams_toprune,
    foreach_mul_,
    validate_pruning_amount,
    validate_pruning_amount_init,
)
from lnprune.transaction import Transaction, Values

__all__ = [
    "Request",
    "check_own_values",
    "compute_mask",
    "is_wrapper",
    "is_writable",
    "masked",
    "multiplies_in_place",
    "outside_inference_mode",
    "write_in_place",
    "write_masks",
]

# A mask and its masked weight can be written in one pass, after which the weight is handed to autograd; or
# the mask alone, after which autograd multiplies in a second pass. On the CPU handing over takes longer
# than a second pass over few bytes, so one pass is taken from so many bytes of weights on:
# _FUSED_CALL_BYTES, and _FUSED_WEIGHT_BYTES more for each weight of the call. On CUDA one pass always saves
# launches.
_FUSED_CALL_BYTES = 7 << 17
_FUSED_WEIGHT_BYTES = 1 << 17


class Request:
    """One weight to prune along ``dim``: by an amount of the channels left, or by keep flags."""

    old_mask: Tensor | None = None  # None: ones
    container: Any = None  # a user's own, which combines masks in its own way

    layout: Tensor  # a tensor of the layout that the mask is to have
    count = 0  # how many channels to prune; where it is negative, `fraction` says it
    fraction = 0.0  # the share of the channels that are left

    mask: Tensor  # write_masks() makes both
    weight: Tensor

    def __init__(
        self, scores: Tensor, original: Tensor, dim: int, amount: Any, keep: Tensor | None, name: str
    ):
        self.scores = scores  # what is ranked; a first mask has its dtype and layout
        self.original = original  # what the mask is multiplied with, or what is zeroed in place
        self.dim = dim
        self.amount = amount
        self.keep = keep  # bool, on any device
        self.name = name  # for messages


def compute_mask(method: StockLnStructured, t: Tensor, default_mask: Tensor) -> Tensor:
    """``LnStructured.compute_mask``: the mask of the scores ``t``, on top of ``default_mask``."""
    count = pruned_count(t, method.amount, method.dim)
    if count == 0:
        check_order(t, method.n, method.dim)
        return default_mask
    keep = keep_flags(t, method.n, method.dim, count)
    if ops.are_native(t, default_mask) and _has_standard_strides(t) and default_mask.shape == t.shape:
        mask = _contiguous(default_mask, t.dtype)
        return ops.write_masks([keep], [t], [mask], [], [operator.index(method.dim)])[0][0]
    return reference.write_mask(keep, t, default_mask, method.dim)


class _LnStructured(StockLnStructured):
    """The last method of a stock container, which the container calls for its mask."""

    _tensor_name = ""  # any name will do, as long as all methods of the container have the same
    compute_mask = compute_mask


# Layouts.


def _has_standard_strides(tensor: Tensor) -> bool:
    """Whether the strides are those of a fresh contiguous tensor, in dims of size 1 too."""
    if 1 not in tensor.shape:
        return tensor.is_contiguous()
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _contiguous(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in a dtype, with the strides that a clone in contiguous format has."""
    mask = mask.detach().to(dtype)
    return mask if _has_standard_strides(mask) else mask.clone(memory_format=torch.contiguous_format)


def _keeps_strides(tensor: Tensor) -> bool:
    """Whether ``empty_like`` keeps the strides: those of dense tensors, and of no others."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


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
    return _has_standard_strides(original) or (1 not in original.shape and _keeps_strides(original))


# Masks and masked weights.


def write_masks(requests: Sequence[Request], n: Any, about: named) -> None:
    """Gives every request its mask, and its masked weight, differentiable in the original.

    That takes one native call for each device. It takes more where the requests differ in kind: flags or
    amounts, first or repeated pruning, large weights or unusual layouts. ``about`` learns which request an
    error is about.
    """
    p = None if reference.ranks_like_torch() else native_order(n)
    groups: dict[tuple[int, bool, bool], list[Request]] = {}
    for request in requests:
        about.name = request.name
        if _prepare(request, n, p):
            key = request.original.get_device(), request.old_mask is None, request.keep is None
            groups.setdefault(key, []).append(request)
        else:
            request.mask = _plain_mask(request, n)
            request.weight = masked(request.mask, request.original)
    about.name = ""
    for (_, first, ranked), group in groups.items():
        for fused, rows in _by_fusing(group):
            columns = [
                (row.scores, row.layout, row.original, row.dim, row.count, row.fraction) for row in rows
            ]
            scores, layouts, originals, dims, counts, fractions = zip(*columns)  # noqa: B905
            masks, written = () if first else layouts, originals if fused else ()
            if ranked:
                made = ops.prune_channels(scores, masks, written, dims, p, counts, fractions)  # type: ignore[arg-type]
            else:
                made = ops.write_masks(_flags(rows), scores, masks, written, dims)
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


def _flags(rows: Sequence[Request]) -> list[Tensor]:
    """The flags of requests of one device, brought there in one transfer."""
    flags: list[Any] = [row.keep for row in rows]
    device = rows[0].original.device
    if all(keep.device == device for keep in flags):
        return flags
    return list(
        torch.cat([keep.cpu() for keep in flags]).to(device).split([keep.numel() for keep in flags])
    )


def _prepare(request: Request, n: Any, p: float | None) -> bool:
    """Whether native code takes the request. If so, it has been checked, and has what native code needs.

    That is the layout of the new mask and, where there are no flags, how many channels to prune.
    """
    scores, dim, old_mask = request.scores, request.dim, request.old_mask
    if request.container is not None:
        return False
    if old_mask is None:
        if not ops.are_native(scores, request.original):
            return False
        if request.keep is None:
            count = pruned_count(scores, request.amount, dim)
            if count == 0:
                return False
            request.count, request.fraction = count, 0.0
            if p is None:
                request.keep = keep_flags(scores, n, dim, count)
        request.layout, request.dim = scores, operator.index(dim)
        return True
    if not ops.are_native(scores, old_mask) or old_mask.shape != scores.shape:
        return False
    if request.keep is not None:
        request.layout = _contiguous(old_mask, scores.dtype)
        return True
    dims = scores.dim()
    if p is None or dims < 2 or type(dim) is not int or not -dims <= dim < dims:
        return False
    request.layout = _contiguous(old_mask, scores.dtype)
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
    old_mask, container = request.old_mask, request.container
    if request.keep is not None:
        return reference.write_mask(request.keep, scores.detach(), old_mask, dim)
    if old_mask is None:
        # Before the checks, as in torch: what cannot have a mask of ones fails here.
        ones = torch.ones_like(original, requires_grad=False)
        return compute_mask(StockLnStructured(amount, n, dim), scores, ones)
    reference.check_slices(scores, n, dim)  # which a container of the user's would not
    if container is None:
        container = stock.PruningContainer(_LnStructured(amount, n, dim))
    default_mask = old_mask.detach().clone(memory_format=torch.contiguous_format)
    return container.compute_mask(scores, default_mask=default_mask)


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


# In place.


def is_writable(tensor: Tensor) -> bool:
    """Whether the tensor can be written in place, one element without another."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_inference()
        and (tensor.is_contiguous() or not _may_overlap(tensor))
    )


def _first_read_only(tensors: Sequence[Tensor]) -> Tensor | None:
    """A tensor whose memory is a read-only mapping of a file, where a write ends the process."""
    here = [tensor for tensor in tensors if tensor.is_cpu]
    place = ops.first_unwritable([tensor.data_ptr() for tensor in here])
    return here[place] if place < len(here) else None


def _may_overlap(tensor: Tensor) -> bool:
    """Whether elements share memory, as far as strides tell: each must step over all smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def write_in_place(
    requests: Sequence[Request],
    pairs: Sequence[tuple[Tensor, Tensor]],
    n: Any,
    transaction: Transaction,
    keep_values: bool = False,
) -> None:
    """Writes +0.0 to the pruned channels of ``requests``, and masked values to the originals of ``pairs``.

    All checks, choices and conversions come before the first write. Where there are several writes, the
    transaction gets what all but the last one overwrite, to put it back where a later one fails. With
    ``keep_values`` it also gets what the last one overwrites, but for the values of ``pairs``, which the
    caller keeps.
    """
    p = None if reference.ranks_like_torch() else native_order(n)
    native, plain = _checked(requests, n, p)
    made = _products(pairs)
    rounds = _rounds(pairs, made)
    lists = [[row for row in native if row.original.is_cpu is on_cpu] for on_cpu in (True, False)]
    lists = [rows for rows in lists if rows]
    writes = len(lists) + len(rounds)
    is_one_call = writes == 1 and not keep_values and all(row.keep is None for row in native)
    zeros = []
    for rows in () if is_one_call else lists:
        _choose([row for row in rows if row.keep is None], p)
        on_devices = list(_by_device(rows).values())
        flags = [keep for group in on_devices for keep in _flags(group)]
        ordered = [row for group in on_devices for row in group]
        zeros.append(([row.original for row in ordered], flags, [row.dim for row in ordered]))
        writes -= 1
        if writes > 0 or keep_values:
            for row in rows:
                _note(row, transaction)
    for round_ in rounds[:-1] if not keep_values else ():
        transaction.values.extend(Values(original, 0) for original, _ in round_)
    noted = [_note(row, transaction) for row in plain]
    if not keep_values:
        transaction.values.extend(Values(original, 0, copied=False) for original, _ in made.values())

    for values in noted:
        values.write(torch.zeros_like(values.saved))
    for original, product in made.values():
        original.data = product
    if is_one_call and native:
        counts = [row.count for row in native]
        scores, tensors = [row.scores for row in native], [row.original for row in native]
        dims = [row.dim for row in native]
        ops.prune_channels_(scores, tensors, dims, p, counts, [0.0] * len(native))  # type: ignore[arg-type]
    for tensors, flags, dims in zeros:
        ops.zero_channels_(tensors, flags, dims)
    with torch.no_grad():
        for round_ in rounds:
            foreach_mul_(*map(list, zip(*round_, strict=True)))


def _checked(requests: Sequence[Request], n: Any, p: float | None) -> tuple[list[Request], list[Request]]:
    """The requests that native code writes, and the others, each with flags or with a count to rank by."""
    read_only = _first_read_only([request.original for request in requests])
    for request in requests if read_only is not None else ():
        if request.original is read_only:
            raise RuntimeError(
                f"{request.name}: expected memory that can be written, to prune in place, got a read-only "
                "mapping"
            )
    native: list[Request] = []
    plain: list[Request] = []
    checked = None  # the amount before; most often all have the same
    for request in requests:
        tensor, scores = request.original, request.scores
        is_native = ops.is_native(tensor) and _keeps_strides(tensor)
        (native if is_native else plain).append(request)
        if request.keep is None:
            with named(request.name):
                if request.amount is not checked:
                    validate_pruning_amount_init(request.amount)
                    checked = request.amount
                request.count = pruned_count(scores, request.amount, request.dim)
                together = scores is tensor or ops.are_native(scores, tensor)
                if not is_native or p is None or not together:
                    request.keep = keep_flags(scores, n, request.dim, request.count)
    return native, plain


def _by_device(rows: Sequence[Request]) -> dict[torch.device, list[Request]]:
    groups: dict[torch.device, list[Request]] = {}
    for row in rows:
        groups.setdefault(row.original.device, []).append(row)
    return groups


def _choose(rows: Sequence[Request], p: float | None) -> None:
    """Rank and select: gives native requests their flags."""
    if rows:
        norms = ops.channel_norms([row.scores for row in rows], [row.dim for row in rows], p)  # type: ignore[arg-type]
        flags = ops.select_channels(norms, [], [row.count for row in rows], [0.0] * len(rows))
        for row, keep in zip(rows, flags, strict=True):
            row.keep = keep


def _note(row: Request, transaction: Transaction) -> Values:
    """Gives the transaction what the request is going to overwrite."""
    assert row.keep is not None
    pruned = (~row.keep).nonzero().flatten().to(row.original.device)
    values = Values(row.original, row.dim, pruned)
    transaction.values.append(values)
    return values


def outside_inference_mode() -> contextlib.AbstractContextManager[Any]:
    """A block whose tensors are no inference tensors, so that they can be written later, outside."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def multiplies_in_place(original: Tensor) -> bool:
    """Whether torch multiplies the tensor in place; others are given new values."""
    return (
        is_writable(original)
        and original.is_floating_point()
        and original.element_size() > 1
        and _first_read_only([original]) is None
    )


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the values lie in other tensors, as a DTensor's do."""
    return hasattr(type(tensor), "__tensor_flatten__")


def check_own_values(tensor: Tensor, name: str) -> None:
    """Refuses wrappers: new data would not reach their values."""
    if is_wrapper(tensor):
        raise RuntimeError(
            f"{name}: expected a tensor that holds its own values to change them for good, got a "
            f"{type(tensor).__name__}, whose values lie in other tensors: prune with masks, or before it "
            "is distributed or wrapped"
        )


def _products(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """By identity, the originals that cannot be multiplied in place, each with its masked values."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with outside_inference_mode():
        for original, mask in pairs:
            if not multiplies_in_place(original):
                _, values = found.get(id(original), (original, original.detach()))
                found[id(original)] = original, mask.to(original.dtype) * values
    return found


def _rounds(
    pairs: Sequence[tuple[Tensor, Tensor]], made: dict[int, tuple[Tensor, Tensor]]
) -> list[list[tuple[Tensor, Tensor]]]:
    """The other pairs, in rounds of one write each. No original is twice in a round."""
    left = [(original, mask.to(original.dtype)) for original, mask in pairs if id(original) not in made]
    rounds = []
    while left:
        # A weight that modules share is multiplied by one of its masks at a time.
        now = {id(original): (original, mask) for original, mask in reversed(left)}
        left = [pair for pair in left if now[id(pair[0])][1] is not pair[1]]
        rounds.append(list(now.values()))
    return rounds
