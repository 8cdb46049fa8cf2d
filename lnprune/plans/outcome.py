"""What a choice of channels comes to: the entries of a plan, and the slices that go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from lnprune.plans.layers import Parameters
from lnprune.plans.plan import NOT_COUPLED, Details
from lnprune.plans.plan_file import PlanEntry
from lnprune.plans.rows import Row, flags_of_weights
from lnprune.plans.saved_batches import SavedBatch
from lnprune.plans.saved_groups import SavedGroup, SavedMember
from lnprune.plans.selection import Arrangement


class NotCoupled(NamedTuple):
    """What goes of rows of which no one knows what reads their channels."""

    groups: list[SavedGroup]

    def compact(self, verify: bool, inplace: bool, example_inputs: Any) -> NoReturn:
        raise RuntimeError(NOT_COUPLED)


def slices_that_go(rows: Sequence[Row], keep: Sequence[Tensor]) -> NotCoupled:
    """What each row's flags prune."""
    groups = []
    for row, flags in zip(rows, keep, strict=True):
        found = flags_of_weights([row], [flags])
        for i in range(row.rankings):
            members = []
            for weight, dim, kept, part, batch in found:
                saved = None if batch is None else SavedBatch(weight.shape, dim, *batch, i)
                pruned = (~kept.view(row.rankings, -1)[i]).nonzero().flatten().tolist()
                members.append(SavedMember(weight.names, weight.shape, dim, pruned, part, batch=saved))
            groups.append(SavedGroup(members, []))
    return NotCoupled(groups)


def _batches_of(row: Row) -> list[SavedBatch | None]:
    """The matrix that each ranking of a row is about; None where it is about more, or all of a weight."""
    member = row.members[0]
    if not row.is_single or member.batch is None:
        return [None] * row.rankings
    return [SavedBatch(member.shape, member.dim, *member.batch, i) for i in range(row.rankings)]


def details_of(
    rows: Sequence[Row], arrangement: Arrangement, flags: Tensor, selection: Mapping[str, Any]
) -> Details:
    """What a plan says of the choice of an arrangement."""
    size = selection["group_size"]
    keep = flags.split(arrangement.layers.channels)
    kept = [int(each[::size].sum()) for each in keep]
    ranked = list(zip(arrangement.ranked(), kept, strict=True))
    names = [known for row in rows for known in row.names]
    batches = [each for row in rows for each in _batches_of(row)]
    owners = [row for row in rows for _ in range(row.rankings)]
    entries = [
        _entry(known[0], row, *each, size) for known, row, each in zip(names, owners, ranked, strict=True)
    ]
    parameters = arrangement.layers.parameters
    if parameters is not None:
        entries = _counted_once(entries, arrangement, parameters, keep)
    cut = arrangement.cut(flags) if selection["scope"] == "global" else None
    elements = None if parameters is None else arrangement.all_left("parameters")
    return Details(entries, names, cut, ranked, elements, batches)


def _counted_once(
    entries: Sequence[PlanEntry],
    arrangement: Arrangement,
    parameters: Sequence[Parameters],
    keep: Sequence[Tensor],
) -> list[PlanEntry]:
    """Entries that say what each choice removes beyond the ones before it."""
    every = arrangement.layers.channels
    gone = [channels - left for channels, left in zip(every, arrangement.left, strict=True)]
    touched: list[list[Parameters]] = [[] for _ in entries]  # by each layer
    for each in parameters:
        for i in {layer for layers in each.layers.values() for layer, _ in layers}:
            touched[i].append(each)
    counted = []
    for i, entry in enumerate(entries):
        before = sum(each.left(gone.__getitem__) for each in touched[i])
        gone[i] = every[i] - int(keep[i].sum())
        after = sum(each.left(gone.__getitem__) for each in touched[i])
        counted.append(replace(entry, parameters_removed=before - after))
    return counted


def _entry(name: str, row: Row, norms: Tensor, kept: int, group_size: int) -> PlanEntry:
    """What becomes of a ranking when so many of its groups stay, whose norms these are, by rank."""
    left = norms.numel()
    return PlanEntry(
        name,
        row.shape,
        row.dim,
        row.channels,
        kept * group_size,
        float(norms[kept - 1]) if kept else None,
        float(norms[kept - 1] - norms[kept]) if 0 < kept < left else None,
        (left - kept) * group_size * row.size,
    )
