"""Where values lie: the plain tensor that holds a tensor's values here, and which channels; devices.

The values of a DTensor lie in shards, one on each rank of a mesh. What is here is the shard of this rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lnprune.errors import named
from lnprune.steps.batches import Batch, channels_of, rankings_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# The types of tensors whose values lie in their own memory.
PLAIN_TYPES = (Tensor, nn.Parameter)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the values lie in other tensors, as a DTensor's do."""
    return hasattr(type(tensor), "__tensor_flatten__")


def is_distributed(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether it is a DTensor, sharded over the ranks of a mesh or replicated on them."""
    if type(tensor) in PLAIN_TYPES or not is_wrapper(tensor) or not dist.is_available():
        return False
    # It takes half a second to import.
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def held_here(tensor: Tensor, name: str = "") -> Tensor:
    """The plain tensor that holds the values of ``tensor`` here: itself, or the shard of a DTensor.

    What is written to it is written to ``tensor``.

    Raises:
        RuntimeError: it is a wrapper of another kind, whose values new data would not reach.
        ValueError: it is a DTensor of which no rank holds values (Partial), or this rank holds none.
    """
    if type(tensor) in PLAIN_TYPES or not is_wrapper(tensor):
        return tensor
    with named(name):
        if not is_distributed(tensor):
            raise RuntimeError(
                f"expected a tensor that holds its own values to change them for good, got a "
                f"{type(tensor).__name__}, whose values lie in other tensors: prune with masks, or before "
                "it is wrapped"
            )
        check_is_held(tensor)
    with torch.no_grad():
        return tensor.to_local()


def check_is_held(tensor: DTensor) -> None:
    """Raises ValueError where no rank holds values of the DTensor (Partial), or this rank holds none."""
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"expected a DTensor that is sharded or replicated, got placements {tensor.placements}, by "
            "which its values are sums over ranks: redistribute it first"
        )
    if tensor.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"expected a rank of the DTensor's mesh, {tensor.device_mesh.mesh.tolist()}, got rank "
            f"{dist.get_rank()}, which holds none of its values: call on the ranks of the mesh only"
        )


def sharded_dims(tensor: DTensor) -> list[int | None]:
    """For each dim of the mesh, the dim of the tensor that it shards; None: each rank holds all of it."""
    return [getattr(placement, "dim", None) for placement in tensor.placements]


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """What decides, on a rank, which channels are here: the shape, and a DTensor's mesh and placements."""
    if not is_distributed(tensor):
        return (tuple(tensor.shape),)
    mesh = tensor.device_mesh
    return tuple(tensor.shape), mesh.device_type, tuple(mesh.shape), str(tensor.placements)


# What channels_here() gave, since torch takes 0.3 ms for it, and the weights of a model have few shapes.
_channels: dict[Any, Tensor] = {}
_MOST_CHANNELS = 64


def channels_here(tensor: Tensor, dim: int, batch: Batch | None = None) -> Tensor | None:
    """Which channels along ``dim`` :func:`held_here` holds, in their order there; None: all of them.

    Those of a batch are numbered one matrix after another.

    Returns:
        int64 indices on the device of the values, not to be changed.
    """
    if batch is None or batch.dim == dim % tensor.dim():
        return indices_here(tensor, dim)
    rows, columns = indices_here(tensor, batch.dim), indices_here(tensor, dim)
    if rows is None and columns is None:
        return None
    device = held_here(tensor).device
    rows = torch.arange(batch.size, device=device) if rows is None else rows
    columns = torch.arange(tensor.shape[dim], device=device) if columns is None else columns
    return (rows.unsqueeze(1) * tensor.shape[dim] + columns).flatten()


def batch_here(tensor: Tensor, dim: int, batch: Batch | None) -> Batch | None:
    """The batch of :func:`held_here`, where a rank may hold only some of the matrices.

    Raises:
        ValueError: a rank may hold parts of matrices.
    """
    if batch is None or not is_distributed(tensor) or batch.dim not in sharded_dims(tensor):
        return batch
    if batch.dim == dim % tensor.dim():
        return None  # channels are the indices of the dim, whatever matrices they belong to
    if tensor.shape[batch.dim] > batch.size:
        raise ValueError(
            f"expected a dim of {batch.size} matrices that is not sharded, or whose indices are the "
            f"matrices, got dim {batch.dim} of shape {tuple(tensor.shape)}, placements {tensor.placements}"
        )
    return Batch(batch.dim, held_here(tensor).shape[batch.dim])


def indices_here(tensor: Tensor, dim: int) -> Tensor | None:
    """Which indices of a dim are here, in their order; None: all of them."""
    dim %= tensor.dim()
    if not is_distributed(tensor) or dim not in sharded_dims(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    # A tensor of the channels' numbers is sharded as the weight is, by the same rules.
    placements: list[Any] = []
    for placement, along in zip(tensor.placements, sharded_dims(tensor), strict=True):
        factor = getattr(
            placement, "split_factor", None
        )  # of a dim that a later dim of the mesh shards too
        if along != dim:
            placements.append(Replicate())
        elif factor is None:
            placements.append(Shard(0))
        else:
            placements.append(type(placement)(0, split_factor=factor))  # type: ignore[call-arg]
    device, mesh = held_here(tensor).device, tensor.device_mesh
    key = (
        tensor.shape[dim],
        tuple(placements),
        tuple(mesh.shape),
        tuple(mesh.get_coordinate() or ()),
        device,
    )
    if key not in _channels:
        if len(_channels) >= _MOST_CHANNELS:
            _channels.clear()
        numbers = torch.arange(tensor.shape[dim], device=device)
        shard = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local()
        _channels[key] = shard.to(device)
    return _channels[key]


def flags_here(tensor: Tensor, dim: int, keep: Tensor, batch: Batch | None = None) -> Tensor:
    """The flags of those channels along ``dim`` that :func:`held_here` holds."""
    channels = rankings_of(batch) * channels_of(tensor.shape, dim, batch)
    if keep.numel() != channels:
        raise ValueError(f"expected {channels} keep flags, one for each channel, got {keep.numel()}")
    here = channels_here(tensor, dim, batch)
    return keep if here is None else keep[here.to(keep.device)]


def values_here(tensor: Tensor, like: Tensor) -> Tensor:
    """The values of ``tensor`` where :func:`held_here` of ``like``, of the same shape, holds its own."""
    if not is_distributed(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    with torch.no_grad():
        if not is_distributed(tensor):
            tensor = distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None)
        elif tensor.placements != placements or tensor.device_mesh != mesh:
            tensor = tensor.redistribute(mesh, placements)
        return tensor.to_local()


def as_shard(values: Tensor, like: Tensor) -> Tensor:
    """A tensor placed as ``like`` is, of the values that go where :func:`held_here` of ``like`` is."""
    if not is_distributed(like):
        return values
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[int]]:
    """Which of the tensors are on each device, in order."""
    places: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(i)
    return places


def on_cpu(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All in one, with one transfer for each device; of this dtype where there are none."""
    if not tensors:
        return torch.empty(0, dtype=dtype, device="cpu")
    places = by_device(tensors)
    if len(places) == 1:
        return torch.cat(list(tensors)).cpu()
    found: dict[int, Tensor] = {}
    for indices in places.values():
        here = torch.cat([tensors[i] for i in indices]).cpu()
        found.update(zip(indices, here.split([tensors[i].numel() for i in indices]), strict=True))
    return torch.cat([found[i] for i in range(len(tensors))])
