"""Measurements: what a ranking is made of, and the file that keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnprune.atomic_file import replacing
from lnprune.checkpoints.failures import UnusableCheckpoint
from lnprune.checkpoints.safetensors_file import metadata_of, read_header
from lnprune.errors import named
from lnprune.modules.application import Weight
from lnprune.plans import fields, plan_file
from lnprune.plans.ranking import Ranking
from lnprune.plans.rows import Member, Row
from lnprune.steps.batches import Batch, channels_of

FORMAT = "lnprune ranking"
_VERSION = 1
_COUNTS = "/nonzero"  # behind a name, the key of the counts


class Measurements(NamedTuple):
    """Norms of rows of single weights.

    Attributes:
        rows: what was measured.
        n: the order of the norms.
        norms: float64, of the channels of each row.
        counts: of rows whose norms do not say what is zero, by their number: nonzero elements, float64.
        left: what was not measured, and why.
    """

    rows: Sequence[Row]
    n: Any
    norms: Sequence[Tensor]
    counts: Mapping[int, Tensor]
    left: Sequence[str] = ()

    def ranking(self) -> Ranking:
        """What selects from them."""
        left: Callable[[], list[str]] = lambda: list(self.left)  # noqa: E731
        return Ranking(self.rows, self.n, self.norms, element_counts=self.counts, left_out=left)


def save(found: Measurements, path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file, whole or not at all: vectors of norms by name, and what they are."""
    from safetensors.torch import save as to_bytes

    rows = []
    tensors: dict[str, Tensor] = {}
    for i, row in enumerate(found.rows):
        member = row.members[0]
        batch = None if member.batch is None else list(member.batch)
        shape = list(member.weight.shape)
        rows.append({"names": member.weight.names, "shape": shape, "dim": member.dim, "batch": batch})
        tensors[row.name] = found.norms[i].contiguous()
        if i in found.counts:
            tensors[row.name + _COUNTS] = found.counts[i].contiguous()
    head = {"n": fields.plain(found.n), "parameters": rows, "left": list(found.left)}
    said = {"format": FORMAT, "version": str(_VERSION), "ranking": json.dumps(head, allow_nan=False)}
    with replacing(path) as file:
        file.write(to_bytes(tensors, said))


def is_ranking(path: str) -> bool:
    """Whether a file is one that :func:`save` wrote."""
    return (
        path.endswith(".safetensors") and os.path.isfile(path) and metadata_of(path).get("format") == FORMAT
    )


def load(path: str) -> Measurements:
    """Reads what :func:`save` wrote; raises UnusableCheckpoint with the path and the field otherwise."""
    from safetensors.torch import load_file

    read_header(path)
    said = metadata_of(path)
    if said.get("version") != str(_VERSION):
        raise UnusableCheckpoint(
            f"{path}: expected version {_VERSION} of a ranking, got {said.get('version')}"
        )
    tensors = load_file(path)
    try:
        with named(f"{path}: the ranking is damaged"):
            head = json.loads(said.get("ranking", ""))
            if not isinstance(head, dict):
                raise ValueError("expected an object")
            n = plan_file.order_of(head)
            rows = []
            for i, values in enumerate(fields.list_of(head, "parameters", dict)):
                with named(f"parameters[{i}]", "."):
                    rows.append(_row(values))
            norms = [_vector(tensors, row.name, row) for row in rows]
            counts = {
                i: _vector(tensors, row.name + _COUNTS, row)
                for i, row in enumerate(rows)
                if row.name + _COUNTS in tensors
            }
            return Measurements(rows, n, norms, counts, fields.list_of(head, "left", str))
    except (ValueError, TypeError) as error:
        raise UnusableCheckpoint(str(error)) from None


def _row(values: dict[str, Any]) -> Row:
    names = fields.list_of(values, "names", str)
    shape = tuple(fields.list_of(values, "shape", int))
    dim = fields.count(values, "dim")
    said = values.get("batch")
    numbers = [] if said is None else fields.list_of(values, "batch", int)
    if not names or not dim < len(shape) or any(size < 0 for size in shape):
        raise ValueError(f"names, shape, dim: expected a name, sizes and a dim of them, got {values}")
    batch = None
    if said is not None:
        along, size = numbers if len(numbers) == 2 else (-1, 0)
        if not 0 <= along < len(shape) or size < 1 or shape[along] % size:
            raise ValueError(f"batch: expected a dim and a count that divides it, got {said}")
        batch = Batch(along, size)
    return Row(names[0], channels_of(shape, dim, batch), [Member(Weight(names, shape), dim, batch=batch)])


def _vector(tensors: Mapping[str, Tensor], name: str, row: Row) -> Tensor:
    vector = tensors.get(name)
    shape = (row.rankings * row.channels,)
    if vector is None or vector.dtype != torch.float64 or tuple(vector.shape) != shape:
        raise ValueError(
            f"{name}: expected float64 of shape {shape}, got {vector if vector is None else vector.dtype}"
        )
    return vector
