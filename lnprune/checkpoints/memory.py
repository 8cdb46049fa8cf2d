"""Memory for the bytes of one tensor after another."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from lnprune.checkpoints.stored import Reader

# Bytes of a piece: it stays in the caches of a core between the read and what is done with it.
PIECE = 2**22

Progress = Callable[[int], None]  # told of bytes that are done


class Memory:
    """Memory for the bytes of one tensor after another, which grows to those of the largest."""

    def __init__(self) -> None:
        self._data = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._bytes = memoryview(b"")

    def read(self, file: Reader, offset: int, length: int) -> Tensor:
        """The bytes of a file from a place on, uint8, until the next call."""
        if length > len(self._data):
            self._data, self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu"), memoryview(b"")
            pages = mmap.mmap(-1, max(length, PIECE))
            self._data, self._bytes = torch.frombuffer(pages, dtype=torch.uint8), memoryview(pages)
        file.read_into(self._bytes[:length], offset)
        return self._data[:length]

    def bytes_of(self, first: int, last: int) -> memoryview:
        """Those that were read, as they are now, from one on to before another."""
        return self._bytes[first:last]
