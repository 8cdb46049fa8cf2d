"""Layers on several ranks, as the stages of a pipeline have them: ranked together, by exchanged norms."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from lnprune.modules.application import Batch, Weight
from lnprune.plans.rows import Member, Row
from lnprune.steps.batches import rankings_of
from lnprune.steps.norms import native_order
from lnprune.steps.sharding import Group


class Found(NamedTuple):
    """Rows, and what was measured of their channels."""

    rows: list[Row]
    norms: list[Tensor]  # float64
    # By the row's index, where they are needed: nonzero elements of masks, and of weights.
    mask_counts: dict[int, Tensor]
    element_counts: dict[int, Tensor]


class _Told(NamedTuple):
    """What a rank tells the others of its rows."""

    order: str
    names: list[list[str]]
    shapes: list[tuple[int, ...]]  # of weights, or what stands for several
    dims: list[int]
    batches: list[Batch | None]
    norms: list[Tensor]
    mask_counts: dict[int, Tensor]
    element_counts: dict[int, Tensor]


def _told_of(row: Row) -> tuple[tuple[int, ...], int, Batch | None]:
    """A shape, a dim and a batch by which the other ranks know a row."""
    member = row.members[0]
    if row.is_single:
        return member.shape, member.dim, member.batch
    if member.batch is None:
        return row.shape, 0, None
    return (row.rankings, *row.shape), 1, Batch(0, row.rankings)


def together(measured: Found, n: Any, group: Group) -> tuple[Found, range]:
    """The rows of all ranks, in the order of ranks, and which of them are this rank's.

    Rows of other ranks have weights without places. A name that several ranks have gets the rank's number,
    as in ``"experts.0.weight@1"``.

    Raises:
        RuntimeError: another rank raised, or measured norms of another order; on all ranks.
    """
    p = native_order(n)
    told = group.exchange(
        _Told(
            repr(n if p is None else p),
            [row.known_as for row in measured.rows],
            [_told_of(row)[0] for row in measured.rows],
            [_told_of(row)[1] for row in measured.rows],
            [_told_of(row)[2] for row in measured.rows],
            [norms.cpu() for norms in measured.norms],
            {i: counts.cpu() for i, counts in measured.mask_counts.items()},
            {i: counts.cpu() for i, counts in measured.element_counts.items()},
        )
    )
    orders = sorted({each.order for each in told})
    if len(orders) > 1:
        raise RuntimeError(
            f"expected norms of one order on all ranks of the group, got {', '.join(orders)}"
        )
    seen = Counter(name for each in told for names in each.names for name in names)
    whole = Found([], [], {}, {})
    here = range(0)
    for rank, each in enumerate(told):
        start = len(whole.rows)
        mine = measured if rank == group.rank else None
        for i, names in enumerate(each.names):
            names = [f"{name}@{rank}" if seen[name] > 1 else name for name in names]
            old = None if mine is None else mine.rows[i].members[0].weight
            weight = Weight(names, each.shapes[i], () if old is None else old.places)
            weight.reader = None if old is None else old.reader
            batch = each.batches[i]
            channels = each.norms[i].numel() // rankings_of(batch)
            row = Row(names[0], channels, [Member(weight, each.dims[i], batch=batch)])
            if mine is not None and not mine.rows[i].is_single:
                row = replace(mine.rows[i], name=names[0])
            whole.rows.append(row)
            whole.norms.append(each.norms[i] if mine is None else mine.norms[i])
        for counts, found in (
            (whole.mask_counts, each.mask_counts),
            (whole.element_counts, each.element_counts),
        ):
            counts.update((start + i, tensor) for i, tensor in found.items())
        if mine is not None:
            here = range(start, len(whole.rows))
    return whole, here
