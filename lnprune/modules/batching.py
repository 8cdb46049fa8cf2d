"""Where a parameter holds many matrices, as experts or heads, each with a ranking of its own."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Union

from lnprune.errors import shown
from lnprune.steps.batches import Batch

BatchDim = Union[int, None, Sequence[Union[int, None]], Mapping[str, Union[int, None]]]

UNSAID = object()  # of a parameter that nothing is said about


def names_of(name: str, batch: Batch | None) -> list[str]:
    """The names of a parameter's rankings."""
    return [name] if batch is None else [f"{name}[{i}]" for i in range(batch.size)]


def per_parameter(given: Any, names: Sequence[str], what: str) -> list[Any]:
    """What is said of each parameter: by one number for all, one each, or by names and patterns."""
    if isinstance(given, Mapping):
        said: list[Any] = [UNSAID] * len(names)
        for pattern, value in given.items():
            hits = [i for i, name in enumerate(names) if _matches(pattern, name)]
            if not hits:
                some = ", ".join(names[:3])
                raise ValueError(
                    f"{what}: {shown(pattern)} matches none of the {len(names)} parameters "
                    f"({some}{', ...' if len(names) > 3 else ''})"
                )
            for i in hits:
                said[i] = value
        return said
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != len(names):
            raise ValueError(f"{what}: expected one per parameter, {len(names)}, got {len(given)}")
        return list(given)
    return [UNSAID if given is None else given] * len(names)


def _matches(pattern: Any, name: str) -> bool:
    """As the patterns of ``include`` do: the name of the parameter or of its module."""
    if not isinstance(pattern, str):
        return False
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[0], pattern)


def batch_of(
    name: str, shape: Sequence[int], dim: int, batch_dim: Any, batch_size: Any, known: Batch | None
) -> Batch | None:
    """The batch of a parameter whose channels lie along ``dim``.

    Args:
        name: of the parameter.
        shape: of it.
        dim: counted from the first.
        batch_dim: what is said of it: a number, None for no batch, or UNSAID.
        batch_size: the same of how many matrices lie along it.
        known: the batch that the parameter's module is known to have. Where its matrices are the channels,
            as whole experts are, there is none.
    """
    if batch_dim is UNSAID and batch_size is UNSAID and known is not None:
        return None if known.dim == dim and known.size == shape[dim] else known
    batch_size = None if batch_size is UNSAID else batch_size
    if batch_dim is UNSAID or batch_dim is None:
        if batch_size is not None:
            raise ValueError(f"{name}: expected a batch_dim for batch_size={shown(batch_size)}, got none")
        return None
    shape = tuple(shape)
    try:
        along = operator.index(batch_dim)
    except TypeError:
        raise TypeError(f"{name}: expected a number as its batch_dim, got {shown(batch_dim)}") from None
    if not -len(shape) <= along < len(shape):
        raise IndexError(f"{name}: batch_dim {along} is out of range for shape {shape}")
    along %= len(shape)
    if batch_size is None:
        if along == dim:
            raise ValueError(
                f"{name}: expected a batch_dim other than the dim of its channels, {dim}, or batch_size=, "
                f"how many matrices lie along it, got shape {shape}"
            )
        if len(shape) < 3:
            raise ValueError(
                f"{name}: expected a weight of three dims or more for batch_dim={along}, or batch_size=, "
                f"how many matrices lie along it, got shape {shape}"
            )
        if shape[along] == 0:
            raise ValueError(f"{name}: expected matrices along batch_dim={along}, got shape {shape}")
        return Batch(along, shape[along])
    if type(batch_size) is not int:
        raise TypeError(f"{name}: expected a number as its batch_size, got {shown(batch_size)}")
    if batch_size < 1 or shape[along] == 0 or shape[along] % batch_size:
        raise ValueError(
            f"{name}: expected a batch_size that divides the {shape[along]} indices along "
            f"batch_dim={along} of shape {shape}, got {batch_size}"
        )
    if along == dim and batch_size == shape[along]:
        raise ValueError(
            f"{name}: expected a batch_size that leaves several channels along dim {dim}, got {batch_size} "
            f"of shape {shape}"
        )
    return Batch(along, batch_size)
