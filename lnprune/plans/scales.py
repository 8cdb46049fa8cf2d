"""What a caller multiplies the norms of rows by: vectors by name, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lnprune.errors import shown
from lnprune.plans.rows import Row
from lnprune.steps.factors import checked_vector


def scales_of(
    rows: Sequence[Row], tensors: Sequence[Tensor], given: Mapping[str, Tensor] | None
) -> dict[int, Tensor]:
    """What the norms of rows are multiplied by, float64, by the number of the row.

    Args:
        rows: what is ranked.
        tensors: of each row one that is where its norms are.
        given: the vectors, by the names of rows or of their rankings.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"scale: expected a mapping from a name to a vector, got {shown(given)}")
    index = {name: i for i, row in enumerate(rows) for name in row.known_as}
    found: dict[int, Tensor] = {}
    for name, vector in given.items():
        base, bracket, number = name.rpartition("[")
        i = index.get(name, index.get(base) if bracket else None)
        is_one = name not in index
        if i is None or (is_one and rows[i].members[0].batch is None):
            raise ValueError(f"scale: {name!r} is none of the {len(rows)} parameters")
        row = rows[i]
        tensor = tensors[i]
        shape: tuple[int, ...] = (row.channels,)
        if row.members[0].batch is not None and not is_one:
            shape = row.rankings, row.channels
        values = checked_vector(vector, [shape], tensor, f"{name}: scale").abs()
        whole = found.setdefault(
            i, torch.ones(row.rankings, row.channels, dtype=torch.float64, device=tensor.device)
        )
        if is_one:
            number = number.removesuffix("]")
            if not number.isdigit() or int(number) >= row.rankings:
                raise ValueError(f"scale: {name!r} is none of the {row.rankings} rankings of {base}")
            whole[int(number)] = values
        else:
            whole.copy_(values.view_as(whole))
    return {i: whole.flatten() for i, whole in found.items()}
