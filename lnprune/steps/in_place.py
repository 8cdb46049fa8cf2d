"""Write in place: keep flags, or amounts, of a list of tensors -> zeros in them, wherever they live.

Native code takes what it can, all tensors of a device in one call. Plain torch takes the rest.
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
from lnprune.steps.bits import bits
from lnprune.steps.flags import Request, flags_of, keep_flags, pruned_count
from lnprune.steps.layouts import keeps_strides, may_overlap
from lnprune.steps.local import PLAIN_TYPES, by_device, flags_here
from lnprune.steps.norms import native_order
from lnprune.torch_internals import foreach_mul_, validate_pruning_amount_init

# Called before values are overwritten: the tensor, the dim of its channels, which of them (None: all), and
# whether to copy the values. Where not, the tensor gets new memory, and its old memory keeps them.
Before = Callable[[Tensor, int, "Tensor | None", bool], None]


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
) -> None:
    """Writes +0.0 to the pruned channels of ``requests``, and masked values to the originals of ``pairs``.

    All checks, choices and conversions come before the first write. Where there are several writes,
    ``before`` is told of all but the last one, so that the values can be put back where a later one fails.
    With ``keep_values`` it is told of the last one too, but not of ``pairs``, which the caller keeps.
    """
    p = None if reference.ranks_like_torch() else native_order(n)
    native, plain = _checked(requests, n, p)
    made = _products(pairs)
    rounds = _rounds(pairs, made)
    # The two backends, each with one call for all of its devices.
    lists = [[row for row in native if row.original.is_cpu is on_cpu] for on_cpu in (True, False)]
    lists = [rows for rows in lists if rows]
    writes = len(lists) + len(rounds)
    is_one_call = writes == 1 and not keep_values and all(row.keep is None for row in native)
    zeros = []
    for rows in () if is_one_call else lists:
        _choose([row for row in rows if row.keep is None], p)
        devices = by_device(row.original for row in rows).values()
        flags = [keep for places in devices for keep in flags_of([rows[i] for i in places])]
        ordered = [rows[i] for places in devices for i in places]
        zeros.append(([row.original for row in ordered], flags, [row.dim for row in ordered]))
        writes -= 1
        if writes > 0 or keep_values:
            for row in rows:
                before(row.original, row.dim, _pruned(row), True)
    for round_ in rounds[:-1] if not keep_values else ():
        for original, _ in round_:
            before(original, 0, None, True)
    for row in plain:
        before(row.original, row.dim, _pruned(row), True)
    for original, _ in made.values() if not keep_values else ():
        before(original, 0, None, False)

    for row in plain:
        bits(row.original.data).index_fill_(row.dim, _pruned(row), 0)
        increment_version(row.original)
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
    with named() as about:
        for request in requests:
            tensor, scores = request.original, request.scores
            about.name = request.name
            is_native = ops.is_native(tensor) and keeps_strides(tensor)
            (native if is_native else plain).append(request)
            if request.keep is None:
                if request.amount is not checked:
                    validate_pruning_amount_init(request.amount)
                    checked = request.amount
                request.count = pruned_count(scores, request.amount, request.dim)
                together = scores is tensor or ops.are_native(scores, tensor)
                if not is_native or p is None or not together:
                    request.keep = keep_flags(scores, n, request.dim, request.count)
            else:
                request.keep = flags_here(tensor, request.dim, request.keep)
            request.dim %= tensor.dim()
    return native, plain


def _choose(rows: Sequence[Request], p: float | None) -> None:
    """Rank and select: gives native requests their flags."""
    if rows:
        norms = ops.channel_norms([row.scores for row in rows], [row.dim for row in rows], p)  # type: ignore[arg-type]
        flags = ops.select_channels(norms, [], [row.count for row in rows], [0.0] * len(rows))
        for row, keep in zip(rows, flags, strict=True):
            row.keep = keep


def _pruned(row: Request) -> Tensor:
    """The indices of the channels that the request prunes."""
    assert row.keep is not None
    return (~row.keep).nonzero().flatten().to(row.original.device)


def _first_read_only(tensors: Sequence[Tensor]) -> Tensor | None:
    """A tensor whose memory is a read-only mapping of a file, where a write ends the process."""
    here = [tensor for tensor in tensors if tensor.is_cpu]
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
