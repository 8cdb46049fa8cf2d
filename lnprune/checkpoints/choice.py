"""Which tensors of a checkpoint are ranked, and along which dims: what a caller says, and what is found."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Union

from lnprune.checkpoints.channel_dims import Channels, LeftAlone, channel_dims
from lnprune.checkpoints.checkpoint import Checkpoint
from lnprune.checkpoints.stored import DTYPES, StoredTensor
from lnprune.errors import shown
from lnprune.modules.application import Weight
from lnprune.plans.rows import Member, Row
from lnprune.steps.batches import Batch, channels_of

# A dim, "out" or "in" for all; or by pattern for some, where the others are "out".
StoredDim = Union[int, str, Mapping[str, Union[int, str]]]
StoredPatterns = Union[str, Sequence[str], None]


class Chosen(NamedTuple):
    """A tensor that is ranked."""

    tensor: StoredTensor
    row: Row
    why: str  # what told the dim
    is_doubtful: bool

    @property
    def dim(self) -> int:
        return self.row.members[0].dim

    @property
    def batch(self) -> Batch | None:
        return self.row.members[0].batch


class Choice(NamedTuple):
    """The tensors that are ranked, and what is said of the others."""

    chosen: list[Chosen]
    left: dict[StoredTensor, str]


def choose(
    checkpoint: Checkpoint,
    dim: StoredDim = "out",
    batch_dim: Mapping[str, int] | None = None,
    include: StoredPatterns = None,
    exclude: StoredPatterns = None,
    may_be_empty: bool = False,
) -> Choice:
    """Chooses the tensors to rank; arguments as for :func:`rank_checkpoint`.

    Raises:
        ValueError: a pattern matches nothing; a dim is not known; nothing is left to rank.
        IndexError: a dim is out of range.
        TypeError: an argument is of another type.
    """
    found = channel_dims(checkpoint.tensors, checkpoint.config)
    said = _said(dim, checkpoint.tensors, "dim")
    matrices = _said({} if batch_dim is None else batch_dim, checkpoint.tensors, "batch_dim")
    default: Any = "out" if isinstance(dim, Mapping) else dim
    taken = {tensor for tensor, where in found.items() if isinstance(where, Channels)}
    taken |= {tensor for tensor in (*said, *matrices) if len(tensor.shape) > 1}
    if include is not None:
        taken = _included(include, taken, checkpoint.tensors)
    if exclude is not None:
        taken -= _hits(exclude, taken, "exclude")
    chosen, left = [], {}
    for tensor, where in found.items():
        if tensor in taken:
            chosen.append(_chosen(tensor, where, said.get(tensor, default), matrices.get(tensor)))
        else:
            left[tensor] = where.why if isinstance(where, LeftAlone) else "is not included"
    if not chosen and not may_be_empty:
        raise ValueError(f"{checkpoint.path}: there is nothing to rank among {len(found)} tensors")
    return Choice(chosen, left)


def _matches(pattern: str, tensor: StoredTensor) -> bool:
    """As in :func:`rank`: a pattern is for the name of a tensor, or of the module that it is of."""
    return any(
        fnmatch.fnmatchcase(each, pattern)
        for name in tensor.names
        for each in (name, name.rpartition(".")[0])
    )


def _patterns(given: StoredPatterns, what: str) -> list[str]:
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
        raise TypeError(f"{what}: expected patterns of names, got {shown(given)}")
    return list(patterns)


def _hits(given: StoredPatterns, tensors: set[StoredTensor], what: str) -> set[StoredTensor]:
    found = set()
    for pattern in _patterns(given, what):
        hits = {tensor for tensor in tensors if _matches(pattern, tensor)}
        if not hits:
            raise ValueError(f"{what}: {pattern!r} matches none of {len(tensors)} tensors")
        found |= hits
    return found


def _included(
    given: StoredPatterns, taken: set[StoredTensor], tensors: Sequence[StoredTensor]
) -> set[StoredTensor]:
    """The tensors of patterns: of those that are taken anyway or, where none matches, of all matrices."""
    found = set()
    every = {tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.dtype in DTYPES}
    for pattern in _patterns(given, "include"):
        found |= {tensor for tensor in taken if _matches(pattern, tensor)} or _hits(
            pattern, every, "include"
        )
    return found


def _said(given: Any, tensors: Sequence[StoredTensor], what: str) -> dict[StoredTensor, Any]:
    """What a mapping says of each tensor; the last pattern that matches counts."""
    found: dict[StoredTensor, Any] = {}
    for pattern, value in given.items() if isinstance(given, Mapping) else ():
        for tensor in _hits(pattern, set(tensors), what):
            found[tensor] = value
    return found


def _chosen(tensor: StoredTensor, where: Channels | LeftAlone, dim: Any, batch_dim: Any) -> Chosen:
    name, shape = tensor.name, tensor.shape
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got dtype {tensor.dtype}")
    batch = None
    if batch_dim is not None:
        along = _number(batch_dim, name, shape, "batch_dim")
        if len(shape) < 3 or shape[along] == 0:
            raise ValueError(
                f"{name}: expected three dims or more, with matrices along batch_dim={along}, got shape "
                f"{shape}"
            )
        batch = Batch(along, shape[along])
    channels = where if isinstance(where, Channels) else where.channels
    why, is_doubtful = "was given", False
    if isinstance(dim, str):
        if dim not in ("out", "in"):
            raise ValueError(f"{name}: expected a number, 'out' or 'in' as its dim, got {dim!r}")
        if channels is None or batch is not None:
            word = "output" if dim == "out" else "input"
            raise ValueError(
                f"{name}: shape {' x '.join(map(str, shape))} has no known {word} dim: say batch_dim and "
                f"dim, as {{{name!r}: 0}} and {{{name!r}: 1}}, or exclude it"
            )
        along = channels.out if dim == "out" else channels.into
        why, is_doubtful = channels.why, channels.is_doubtful
    else:
        along = _number(dim, name, shape, "dim")
    if batch is not None and along == batch.dim:
        raise ValueError(f"{name}: expected a dim other than batch_dim={along}, got shape {shape}")
    member = Member(Weight(tensor.names, shape), along, batch=batch)
    row = Row(name, channels_of(shape, along, batch), [member])
    return Chosen(tensor, row, why, is_doubtful)


def _number(given: Any, name: str, shape: Sequence[int], what: str) -> int:
    try:
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{name}: expected a number as its {what}, got {shown(given)}") from None
    if not -len(shape) <= number < len(shape):
        raise IndexError(f"{name}: {what} {number} is out of range for shape {tuple(shape)}")
    return number % len(shape)
