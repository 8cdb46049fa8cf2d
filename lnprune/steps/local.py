"""Where values lie: the plain tensor that holds those of a tensor here, and the devices of a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# The types of tensors whose values lie in their own memory.
PLAIN_TYPES = (Tensor, nn.Parameter)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the values lie in other tensors, as a DTensor's do."""
    return hasattr(type(tensor), "__tensor_flatten__")


def held_here(tensor: Tensor, name: str) -> Tensor:
    """The plain tensor that holds the values of ``tensor`` here, to change them for good: itself.

    Raises:
        RuntimeError: it is a wrapper, whose values new data would not reach.
    """
    if is_wrapper(tensor):
        raise RuntimeError(
            f"{name}: expected a tensor that holds its own values to change them for good, got a "
            f"{type(tensor).__name__}, whose values lie in other tensors: prune with masks, or before it "
            "is distributed or wrapped"
        )
    return tensor


def flags_here(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    """The flags of those channels along ``dim`` that :func:`held_here` holds: all of them."""
    channels = tensor.shape[dim]
    if keep.numel() != channels:
        raise ValueError(f"expected {channels} keep flags, one for each channel, got {keep.numel()}")
    return keep


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
