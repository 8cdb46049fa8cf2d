"""Safetensors files: their headers, checked by the library of that name before a byte of data is read.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import os
import struct

from lnprune.checkpoints.failures import UnusableCheckpoint
from lnprune.checkpoints.stored import StoredTensor, is_lfs_pointer, reading

_MOST = 100_000_000  # bytes of a header, as the library has it


def read_header(path: str) -> list[StoredTensor]:
    """The tensors of a file, in the order of its header.

    Raises:
        ImportError: the library safetensors is not installed.
        UnusableCheckpoint: the file is none of this format, or not whole.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f'{path}: needs safetensors, which the extra "cli" brings: pip install "lnprune[cli]"'
        ) from error

    entries, data, size = _entries(path)
    if entries is not None:
        needed = _needed(entries)
        if needed is not None and needed != size - data:
            raise UnusableCheckpoint(
                f"{path}: header needs {needed} bytes of data, file has {size - data}: download again"
            )
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UnusableCheckpoint(f"{path}: no whole safetensors file: {error}") from None
    assert entries is not None  # the library reads what is no JSON otherwise
    found = []
    for name, entry in entries.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            place = os.fspath(path), data + first, last - first
            found.append(StoredTensor((name,), entry["dtype"], tuple(entry["shape"]), *place))
    return found


def metadata_of(path: str) -> dict[str, str]:
    """What a file says of itself; nothing where it is none of this format."""
    with contextlib.suppress(UnusableCheckpoint):
        entries, _, _ = _entries(path)
        said = None if entries is None else entries.get("__metadata__")
        if isinstance(said, dict):
            return said
    return {}


def _entries(path: str) -> tuple[dict[str, dict] | None, int, int]:
    """What the header says, where the data begins, and how many bytes the file has."""
    with reading(path) as file:
        start = bytearray(min(file.size, 64))
        file.read_into(memoryview(start), 0)
        if is_lfs_pointer(start):
            raise UnusableCheckpoint(f"{path}: is a Git LFS pointer, not the weights: git lfs pull")
        if file.size < 8:
            raise UnusableCheckpoint(f"{path}: has {file.size} bytes, too few for a header: download again")
        (length,) = struct.unpack("<Q", start[:8])
        if length > min(_MOST, file.size - 8):
            missing = min(length, _MOST) == length
            raise UnusableCheckpoint(
                f"{path}: header needs {length} bytes, file has {file.size - 8}: download again"
                if missing
                else f"{path}: is no safetensors file: its first 8 bytes, the length of the header, say "
                f"{length}"
            )
        text = bytearray(length)
        file.read_into(memoryview(text), 8)
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            entries = None
        return entries if isinstance(entries, dict) else None, 8 + length, file.size


def _needed(entries: dict[str, dict]) -> int | None:
    """How many bytes of data the entries of a header need; None where they do not say it."""
    try:
        return max(
            (entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"),
            default=0,
        )
    except (TypeError, KeyError, IndexError):
        return None
