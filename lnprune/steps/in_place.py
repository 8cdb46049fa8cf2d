"""Write in place: keep flags, or amounts, of a list of tensors -> zeros in them, wherever they live.

Native code takes what it can, all tensors of a device in one call. Plain torch takes the rest. Of sharded
tensors each rank writes to its shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lnprune.errors import named
from lnprune.steps import ops, reference
from lnprune.steps.batches import Batch, filled, is_outside, numbers, rankings_of
from lnprune.steps.bits import bits
from lnprune.steps.flags import (
    Request,
    choose_of_shards,
    flags_of,
    keep_flags,
    pruned_count,
    pruned_counts,
)
from lnprune.steps.layouts import keeps_strides, may_overlap
from lnprune.steps.local import (
    PLAIN_TYPES,
    batch_here,
    by_device,
    flags_here,
    held_here,
    is_distributed,
    values_here,
)
from lnprune.steps.norms import native_order
from lnprune.torch_internals import foreach_mul_, validate_pruning_amount_init

# Called before values are overwritten: the tensor, the dim of its channels, which of them (None: all),
# whether to copy the values, and the batch of the channels. Where not copied, the tensor gets new memory,
# and its old memory keeps the values.
Before = Callable[[Tensor, int, "Tensor | None", bool, "Batch | None"], None]


def is_writable(tensor: Tensor) -> bool:
    """Whether the tensor can be written in place, one element without another."""
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_inference()
        and (tensor.is_contiguous() or not may_overlap(tensor))
    )


def multiplies_in_place(tensor: Tensor) -> bool:
    """Whether torch multiplies the tensor in place; others are given new values."""
    return (
        is_writable(tensor)
        and tensor.is_floating_point()
        and tensor.element_size() > 1
        and _first_read_only([tensor]) is None
    )


def outside_inference_mode() -> contextlib.AbstractContextManager[Any]:
    """A block whose tensors are no inference tensors, so that they can be written later, outside."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def write_in_place(
    requests: Sequence[Request],
    pairs: Sequence[tuple[Tensor, Tensor]],
    n: Any,
    before: Before,
    keep_values: bool = False,
    agree: Callable[[], None] = lambda: None,
) -> None:
    """Writes +0.0 to the pruned channels of ``requests``, and masked values to the originals of ``pairs``.

    All checks, choices and conversions come before the first write. Where there are several writes,
    ``before`` is told of all but the last one, so that the values can be put back where a later one fails.
    With ``keep_values`` it is told of the last one too, but not of ``pairs``, which the caller keeps.

    What may raise on one rank alone comes before ``agree``, and what ranks exchange or write after it.
    """
    p = None if reference.ranks_like_torch() else native_order(n)
    native, plain = _checked(requests, n, p)
    pairs, wholes = _held_pairs(pairs)
    made = _products(pairs)
    rounds = _rounds(pairs, made)
    # In the order that all ranks have: which rows are native differs with their shards.
    unranked = [row for row in requests if row.keep is None and _is_sharded(row)]
    if unranked:
        agree()
        choose_of_shards(unranked, n)
        for row in unranked:
            row.keep = flags_here(row.original, row.dim, row.keep, row.batch)  # type: ignore[arg-type]
    # The two backends, each with one call for all of its devices.
    lists = [[row for row in native if row.held.is_cpu is on_cpu] for on_cpu in (True, False)]
    lists = [rows for rows in lists if rows]
    writes = len(lists) + len(rounds)
    is_one_call = writes == 1 and not keep_values and all(row.keep is None for row in native)
    zeros = []
    for rows in () if is_one_call else lists:
        _choose([row for row in rows if row.keep is None], p)
        devices = by_device(row.held for row in rows).values()
        flags = [keep for places in devices for keep in flags_of([rows[i] for i in places])]
        ordered = [rows[i] for places in devices for i in places]
        batches = numbers([row.held_batch for row in ordered])
        zeros.append(([row.held for row in ordered], flags, [row.dim for row in ordered], batches))
        writes -= 1
        if writes > 0 or keep_values:
            for row in rows:
                before(row.original, row.dim, _pruned(row), True, row.held_batch)
    for round_ in rounds[:-1] if not keep_values else ():
        for original, _ in round_:
            before(wholes.get(id(original), original), 0, None, True, None)
    for row in plain:
        before(row.original, row.dim, _pruned(row), True, row.held_batch)
    for original, _ in made.values() if not keep_values else ():
        whole = wholes.get(id(original), original)
        before(whole, 0, None, whole is not original, None)
    if not unranked:
        agree()

    for row in plain:
        filled(bits(row.held.data), row.dim, row.held_batch, _pruned(row), 0)
        increment_version(row.held)
    for original, product in made.values():
        if id(original) in wholes:
            original.copy_(product)
        else:
            original.data = product
    if is_one_call and native:
        counts = [row.count for row in native]
        scores, tensors = [row.scores for row in native], [row.held for row in native]
        dims = [row.dim for row in native]
        batches = numbers([row.batch for row in native])
        ops.prune_channels_(scores, tensors, dims, p, counts, [0.0] * len(native), batches)  # type: ignore[arg-type]
    for tensors, flags, dims, batches in zeros:
        ops.zero_channels_(tensors, flags, dims, batches)
    with torch.no_grad():
        for round_ in rounds:
            foreach_mul_(*map(list, zip(*round_, strict=True)))
    sharded = [row.original for row in requests if row.held is not row.original]
    if sharded or wholes:  # a DTensor counts its changes itself, for autograd
        increment_version([*sharded, *wholes.values()])


def write_zeros(
    tensors: Sequence[Tensor],
    keep: Sequence[Tensor],
    dims: Sequence[int],
    batches: Sequence[Batch | None],
) -> None:
    """Writes +0.0 to the channels along each dim that are not flagged, again and again.

    Nothing is checked but whether native code takes a tensor. The flags are those of the channels that are
    here, on the tensors' devices.
    """
    native: dict[bool, list[tuple[Tensor, Tensor, int, Batch | None]]] = {}
    for tensor, flags, dim, batch in zip(tensors, keep, dims, batches, strict=True):
        held, batch = held_here(tensor), batch_here(tensor, dim, batch)
        if ops.is_native(held) and keeps_strides(held) and is_outside(held, dim, batch):
            native.setdefault(held.is_cpu, []).append((held, flags, dim % held.dim(), batch))
        else:
            filled(bits(held.data), dim % held.dim(), batch, (~flags).nonzero().flatten(), 0)
            increment_version(held)
    for rows in native.values():
        rows.sort(key=lambda row: str(row[0].device))  # one call takes those of a device together
        tensors, flags_of_all, dims, found = map(list, zip(*rows, strict=True))
        ops.zero_channels_(tensors, flags_of_all, dims, numbers(found))
    increment_version([tensor for tensor in tensors if is_distributed(tensor)])


def _is_sharded(row: Request) -> bool:
    """Whether the request's scores are ranked, or its flags needed, on several ranks."""
    is_shard = row.held is not row.original
    return is_shard or (row.scores is not row.original and is_distributed(row.scores))


def _held_pairs(
    pairs: Sequence[tuple[Tensor, Tensor]],
) -> tuple[list[tuple[Tensor, Tensor]], dict[int, Tensor]]:
    """The same of what is here; and by identity of the shards there, the DTensors that they are of."""
    found: list[tuple[Tensor, Tensor]] = []
    wholes: dict[int, Tensor] = {}
    shards: dict[int, Tensor] = {}
    for original, mask in pairs:
        held = original
        if is_distributed(original):
            held = shards.setdefault(id(original), held_here(original))
            wholes[id(held)] = original
            mask = values_here(mask, original)
        found.append((held, mask))
    return found, wholes


def _checked(requests: Sequence[Request], n: Any, p: float | None) -> tuple[list[Request], list[Request]]:
    """The requests that native code writes, and the others, each with flags or with a count to rank by."""
    for request in requests:
        request.held = held_here(request.original, request.name)
        if request.batch is not None:
            with named(request.name):
                request.held_batch = batch_here(request.original, request.dim, request.batch)
    read_only = _first_read_only([request.held for request in requests])
    for request in requests if read_only is not None else ():
        if request.held is read_only:
            raise RuntimeError(
                f"{request.name}: expected memory that can be written, to prune in place, got a read-only "
                "mapping"
            )
    native: list[Request] = []
    plain: list[Request] = []
    checked = None  # the amount before; most often all have the same
    with named() as about:
        for request in requests:
            tensor, scores = request.held, request.scores
            about.name = request.name
            is_native = ops.is_native(tensor) and keeps_strides(tensor)
            if request.batch is not None:
                is_native = is_native and is_outside(tensor, request.dim, request.held_batch)
            (native if is_native else plain).append(request)
            if request.keep is None:
                batch, amounts = request.batch, request.amount
                is_one = type(amounts) is not tuple
                if amounts is not checked:
                    for amount in (amounts,) if is_one else amounts:
                        validate_pruning_amount_init(amount)
                    checked = amounts
                request.count = pruned_count(scores, amounts if is_one else amounts[0], request.dim, batch)
                together = scores is tensor or (
                    ops.are_native(scores, tensor) and is_outside(scores, request.dim, batch)
                )
                if _is_sharded(request):
                    pass  # ranked with the others
                elif not is_native or p is None or not together or not is_one:
                    counts = pruned_counts(scores, request.amount, request.dim, batch)
                    request.keep = keep_flags(scores, n, request.dim, counts, batch)
            else:
                request.keep = flags_here(request.original, request.dim, request.keep, request.batch)
            request.dim %= tensor.dim()
    return native, plain


def _choose(rows: Sequence[Request], p: float | None) -> None:
    """Rank and select: gives native requests their flags."""
    if rows:
        batches = numbers([row.batch for row in rows])
        norms = ops.channel_norms([row.scores for row in rows], [row.dim for row in rows], p, batches)  # type: ignore[arg-type]
        rankings = [rankings_of(row.batch) for row in rows]
        counts = [row.count for row, count in zip(rows, rankings, strict=True) for _ in range(count)]
        flags = ops.select_channels(norms, [], counts, [0.0] * len(counts), rankings)
        for row, keep in zip(rows, flags, strict=True):
            row.keep = keep


def _pruned(row: Request) -> Tensor:
    """The indices of the channels that the request prunes."""
    assert row.keep is not None
    return (~row.keep).nonzero().flatten().to(row.held.device)


def _first_read_only(tensors: Sequence[Tensor]) -> Tensor | None:
    """A tensor whose memory is a read-only mapping of a file, where a write ends the process."""
    here = [tensor for tensor in tensors if tensor.is_cpu and tensor.numel() > 0]
    place = ops.first_unwritable([tensor.data_ptr() for tensor in here])
    return here[place] if place < len(here) else None


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
