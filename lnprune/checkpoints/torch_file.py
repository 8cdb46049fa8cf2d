"""Files of torch.save: names and places of the tensors in them, without their data and other objects."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lnprune.checkpoints.failures import UnusableCheckpoint
from lnprune.checkpoints.stored import NAMES, StoredTensor, is_lfs_pointer, reading
from lnprune.torch_internals import load_without_data, place_in_file

# Where a training loop keeps its model beside other things.
_INSIDE = ("state_dict", "model_state_dict", "model", "module")


def read_state_dict(path: str) -> list[StoredTensor]:
    """The tensors of a state dict in a file, in its order. Nothing is unpickled but tensors and containers.

    Raises:
        UnusableCheckpoint: the file is no archive of torch.save, or holds objects, or no state dict.
    """
    with reading(path) as file:
        start = bytearray(min(file.size, 64))
        file.read_into(memoryview(start), 0)
        size = file.size
    if is_lfs_pointer(start):
        raise UnusableCheckpoint(f"{path}: is a Git LFS pointer, not the weights: git lfs pull")
    if not zipfile.is_zipfile(path):
        trouble = (
            "is in torch's format before 1.6: torch.load it, and torch.save it again"
            if start[:1] == b"\x80"
            else "is no whole archive of torch.save: download again"
        )
        raise UnusableCheckpoint(f"{path}: {trouble}")
    try:
        saved = load_without_data(path)
    except pickle.UnpicklingError:
        raise UnusableCheckpoint(
            f"{path}: holds objects, not only tensors; never unpickled here: save its state_dict"
        ) from None
    except Exception as error:
        raise UnusableCheckpoint(f"{path}: no state dict of torch.save: {_short(error)}") from None
    tensors = _state_dict(saved, path)
    found: dict[Any, StoredTensor] = {}
    for name, tensor in tensors.items():
        place = place_in_file(tensor)
        if place is None:
            raise UnusableCheckpoint(
                f"{path}: {name} has no place in the file, as a {type(tensor).__name__}"
            )
        itemsize = tensor.element_size()
        shape, strides = tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))
        offset = place + int(tensor.storage_offset()) * itemsize
        last: int = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        length = (last + 1) * itemsize if tensor.numel() else 0
        if offset + length > size:
            raise UnusableCheckpoint(f"{path}: {name} ends at byte {offset + length}, file has {size}")
        dtype = NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        key = offset, length, dtype, shape, strides
        known = found[key].names if key in found and length else ()
        names = (*known, name)
        stored = StoredTensor(names, dtype, shape, os.fspath(path), offset, length, strides)
        found[key if length else (*key, name)] = stored
    return list(found.values())


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _state_dict(saved: Any, path: str) -> dict[str, Tensor]:
    """The mapping from names to tensors in what was saved."""
    if isinstance(saved, Mapping):
        tensors = {name: each for name, each in saved.items() if isinstance(each, Tensor)}
        if tensors:
            return tensors
        for key in _INSIDE:
            if isinstance(saved.get(key), Mapping):
                return _state_dict(saved[key], path)
        got = f"the keys {', '.join(map(repr, list(saved)[:5]))}"
    else:
        got = f"a {type(saved).__name__}"
    raise UnusableCheckpoint(
        f"{path}: expected a state dict, from names to tensors, or one under {', '.join(_INSIDE)}, "
        f"got {got}"
    )
