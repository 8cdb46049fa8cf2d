"""Ranks: sums of shards folded in the order of ranks, and calls that all ranks make alike or not at all.

The engine is torch.distributed. A fold takes two collectives for each process group whose ranks shard a
weight: ``all_to_all_single`` gives each rank its share of all vectors, ``all_gather_into_tensor`` the
results. A plain ``all_reduce`` moves as many bytes, but adds in an order that depends on the place in the
buffer: equal channels would not tie, and gloo's maximum loses NaN.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lnprune.errors import shown
from lnprune.steps.batches import Batch, channels_of, rankings_of
from lnprune.steps.local import channels_here, is_distributed, layout_of, sharded_dims

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class Fold(NamedTuple):
    """How sums of parts make the sum of the whole."""

    of_two: Callable[..., Tensor]  # elementwise; keeps NaN
    of_nothing: float


class Vector(NamedTuple):
    """Sums of the channels of a weight that are here."""

    part: Tensor  # float64
    here: Tensor | None  # which channels; None: all
    length: int  # how many channels there are
    fold: Fold

    def empty(self) -> Tensor:
        """For the sums of all channels."""
        return self.part.new_empty(self.length)

    def written(self, whole: Tensor) -> Tensor:
        """The sums of all channels, those that are not here nothing, into a tensor for them."""
        if self.here is None:
            return whole.copy_(self.part)
        return whole.fill_(self.fold.of_nothing).index_copy_(
            0, self.here.to(whole.device), self.part.to(whole.device)
        )


ADD = Fold(torch.add, 0.0)
FOLDS = {math.inf: Fold(torch.maximum, 0.0), -math.inf: Fold(torch.minimum, math.inf)}  # by order

_FAILED = -1  # what a rank says in place of a digest, which is never negative, when it has raised


def folded(
    tensors: Sequence[DTensor],
    sums: Sequence[Tensor],
    dims: Sequence[int],
    folds: Sequence[Fold],
    batches: Sequence[Batch | None],
) -> list[Tensor]:
    """The sums of whole channels from those of their parts here, the same bits on all ranks.

    Args:
        tensors: sharded weights.
        sums: of the channels that each has here, float64 of shape ``(channels here,)``.
        dims: those of the channels.
        folds: of each, how its parts make the whole.
        batches: of each, that of matrices with channels of their own.
    """
    vectors = []
    known: dict[Any, Tensor | None] = {}  # a model has few kinds of weights
    for tensor, part, dim, fold, batch in zip(tensors, sums, dims, folds, batches, strict=True):
        shape = tensor.shape if batch is not None else tensor.shape[dim]
        kind = tensor.device_mesh, tensor.placements, shape, dim, batch, part.device
        if kind not in known:
            here = channels_here(tensor, dim, batch)
            known[kind] = None if here is None else here.to(part.device)
        length = rankings_of(batch) * channels_of(tensor.shape, dim, batch)
        vectors.append(Vector(part, known[kind], length, fold))
    for group, mesh, places in _groups(tensors):
        mine = [vectors[i] for i in places]
        made = folded_over(group, mine, _device(mesh, mine[0].part))
        for i, part in zip(places, made, strict=True):
            vectors[i] = vectors[i]._replace(part=part.to(vectors[i].part.device), here=None)
    return [vector.part if vector.here is None else vector.written(vector.empty()) for vector in vectors]


def _groups(tensors: Sequence[DTensor]) -> list[tuple[Any, DeviceMesh, list[int]]]:
    """The process groups whose ranks hold different shards, in order of first use, and of which tensors."""
    found: dict[str, tuple[Any, DeviceMesh, list[int]]] = {}
    for i, tensor in enumerate(tensors):
        mesh = tensor.device_mesh
        for mesh_dim, dim in enumerate(sharded_dims(tensor)):
            if dim is not None and mesh.size(mesh_dim) > 1:
                group = mesh.get_group(mesh_dim)
                found.setdefault(group.group_name, (group, mesh, []))[2].append(i)
    return list(found.values())


def _device(mesh: DeviceMesh, tensor: Tensor | None = None) -> torch.device:
    """Where collectives of a mesh take place: the tensor's device, if it is one of the mesh's."""
    if tensor is not None and tensor.device.type == mesh.device_type:
        return tensor.device
    return torch.device(mesh.device_type)


def folded_over(group: Any, vectors: Sequence[Vector], device: torch.device) -> Sequence[Tensor]:
    """Vectors of all ranks' vectors: element by element, in the order of ranks."""
    ranks = dist.get_world_size(group)
    lengths = [vector.length for vector in vectors]
    total = sum(lengths)
    share = -(-total // ranks)
    sent = torch.empty(ranks * share, dtype=torch.float64, device=device)
    sent[total:] = 0
    wholes = sent[:total].split(lengths)
    for vector, whole in zip(vectors, wholes, strict=True):
        vector.written(whole)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    rows = received.view(ranks, share)
    first = dist.get_rank(group) * share  # of the elements that are folded here
    start = 0
    for fold, run in itertools.groupby(vectors, key=lambda vector: vector.fold):
        end = start + sum(vector.length for vector in run)
        mine = rows[:, max(0, start - first) : max(0, end - first)]
        for row in mine[1:]:
            fold.of_two(mine[0], row, out=mine[0])
        start = end
    _all_gather(sent, rows[0], group)
    return wholes


def _all_gather(whole: Tensor, mine: Tensor, group: Any) -> None:
    """One collective, under the name that the running torch has for it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, mine, group=group)


def has_ranks() -> bool:
    """Whether this process may be one of several."""
    return dist.is_available() and dist.is_initialized()


class Agreement:
    """A call that all ranks make: they ask for the same, or all of them raise.

    A block around the checks of a call. What it raises is told to the other ranks, so that none waits for
    one that is gone. Where no tensor is sharded it does nothing.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        # Of all dims of a mesh that shards something: replicas of a shard must not part ways.
        self._groups: dict[str, tuple[Any, DeviceMesh]] = {}
        self._is_open = False
        known = set()
        for tensor in tensors if has_ranks() else ():
            if is_distributed(tensor) and id(tensor.device_mesh) not in known and _is_split(tensor):
                mesh = tensor.device_mesh
                known.add(id(mesh))
                for mesh_dim in range(mesh.ndim):
                    if mesh.size(mesh_dim) > 1:
                        group = mesh.get_group(mesh_dim)
                        self._groups.setdefault(group.group_name, (group, mesh))
                        self._is_open = True

    def confirm(self, *asked: Any) -> None:
        """Raises RuntimeError on all ranks where one raised before, or where they ask for different things.

        Called before the first exchange and before the first write.

        Args:
            asked: what the call is about. Flags count by their values, other tensors by their layouts.
        """
        if self._is_open:
            self._exchange(_digest(asked))

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, Exception) and self._is_open:  # an interrupt waits for nobody
            self._exchange(_FAILED)

    def _exchange(self, mine: int) -> None:
        self._is_open = False
        failed: set[int] = set()
        others: set[int] = set()
        for group, mesh in self._groups.values():
            # Who has found trouble in one group says so in the next ones, until all ranks know.
            said = torch.tensor([_FAILED if failed or others else mine], device=_device(mesh))
            heard = said.new_empty(dist.get_world_size(group))
            _all_gather(heard, said, group)
            for rank, word in zip(dist.get_process_group_ranks(group), heard.tolist(), strict=True):
                if rank != dist.get_rank() and word != mine:
                    (failed if word == _FAILED else others).add(rank)
        if mine == _FAILED:
            return
        if others:
            raise RuntimeError(
                f"expected the same call on all ranks, with the same weights, got another one on rank "
                f"{_listed(others)} than here, on rank {dist.get_rank()}: nothing is changed"
            )
        if failed:
            raise RuntimeError(
                f"the same call raised on rank {_listed(failed)}, or on a rank that this one shares shards "
                "with, so that no rank goes on: nothing is changed"
            )


class Group:
    """A call that all ranks of a process group make about layers of their own: all go on, or all raise.

    A block around the call. What it raises is told to the other ranks.
    """

    def __init__(self, group: Any):
        known = dist.is_available() and isinstance(group, dist.ProcessGroup)
        if known or (dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER):
            self.rank = dist.get_rank(group) if known else -1
            if self.rank < 0:
                raise ValueError("group: expected one that this rank is in, got one without it")
        else:
            raise TypeError(f"group: expected a torch.distributed.ProcessGroup, got {shown(group)}")
        self._group = group
        self._is_open = True

    def exchange(self, mine: Any) -> list[Any]:
        """What every rank has, in the order of ranks; pickled.

        Raises:
            RuntimeError: another rank raised before.
        """
        self._is_open = False
        told: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, mine, group=self._group)
        failed = [rank for rank, each in enumerate(told) if each is None]
        if failed and mine is not None:
            ranks = dist.get_process_group_ranks(self._group)
            raise RuntimeError(
                f"the same call raised on rank {_listed(ranks[rank] for rank in failed)} of the group, so "
                "that no rank goes on: nothing is changed"
            )
        return told

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, Exception) and self._is_open:
            self.exchange(None)


def _is_split(tensor: DTensor) -> bool:
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        return False  # a rank that takes no part
    return any(
        dim is not None and mesh.size(mesh_dim) > 1 for mesh_dim, dim in enumerate(sharded_dims(tensor))
    )


def _digest(asked: Any) -> int:
    """A number of 63 bits, the same on all ranks for the same things."""
    return int.from_bytes(hashlib.sha256(repr(_told(asked)).encode()).digest()[:8], "big") >> 1


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        is_flags = value.dtype is torch.bool and not is_distributed(value)
        return (
            bytes(value.tolist())
            if is_flags
            else (type(value).__name__, str(value.dtype), layout_of(value))
        )
    return [_told(each) for each in value] if isinstance(value, (list, tuple)) else value


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
