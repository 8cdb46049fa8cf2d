"""Tensors as files hold them: where the bytes are, and what they mean; read without a map of the file."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lnprune.checkpoints.failures import UnusableCheckpoint

# The floating-point dtypes that channels are measured in, by their names in safetensors files.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        names: what it is called; several where weights are tied.
        dtype: as safetensors files name it: ``"BF16"``.
        shape: of it.
        file: the path of its file.
        offset: where its first element is in the file, in bytes.
        length: how many bytes hold its elements, from the first to the last.
        strides: of its elements; None: they lie one after another.
    """

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int
    strides: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after another."""
        if self.strides is None:
            return True
        expected = 1
        for size, stride in reversed(list(zip(self.shape, self.strides, strict=True))):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def row_length(self) -> int:
        """How many bytes an index of the first dim has, of a contiguous tensor."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    def of(self, data: Tensor) -> Tensor:
        """The tensor in its bytes, uint8 of shape ``(length,)``; a view."""
        flat = data.view(DTYPES[self.dtype])
        if self.strides is None or self.is_contiguous:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.strides)

    def rows_of(self, data: Tensor, count: int) -> Tensor:
        """So many indices of the first dim, of a contiguous tensor, in their bytes; a view."""
        return data.view(DTYPES[self.dtype]).view(count, *self.shape[1:])


def row_blocks(tensor: StoredTensor, length: int) -> Iterator[tuple[int, int]]:
    """Blocks of about so many bytes of a contiguous tensor: the first index, and how many."""
    step = max(1, length // max(1, tensor.row_length))
    for row in range(0, tensor.shape[0], step):
        yield row, min(step, tensor.shape[0] - row)


def is_lfs_pointer(start: bytes | bytearray) -> bool:
    """Whether a file that starts so stands for one that Git LFS keeps."""
    return start.startswith(b"version https://git-lfs")


class Reader:
    """A file that is read from any place, and that must not change meanwhile."""

    def __init__(self, path: str):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnusableCheckpoint(f"{path}: {error.strerror}") from None
        self._before = self._state()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    @property
    def size(self) -> int:
        """How many bytes it had when it was opened."""
        return self._before[0]

    @property
    def number(self) -> int:
        """Its file descriptor."""
        return self._file

    def read_into(self, data: memoryview, offset: int) -> None:
        """Fills memory with the bytes from a place on."""
        done = 0
        while done < len(data):
            try:
                count = os.preadv(self._file, [data[done:]], offset + done)
            except OSError as error:
                raise UnusableCheckpoint(f"{self.path}: {error.strerror}") from None
            if count == 0:
                raise UnusableCheckpoint(
                    f"{self.path}: ended at byte {offset + done}, of {self.size} when it was opened: it "
                    "changed while it was read"
                )
            done += count

    def check_unchanged(self) -> None:
        """Raises where the file was written to since it was opened."""
        if self._state() != self._before:
            raise UnusableCheckpoint(f"{self.path}: changed while it was read")

    def close(self) -> None:
        os.close(self._file)


@contextlib.contextmanager
def reading(path: str) -> Iterator[Reader]:
    """A file for the time of the block, which raises at its end where the file changed."""
    reader = Reader(path)
    try:
        yield reader
        reader.check_unchanged()
    finally:
        reader.close()


def in_file_order(tensors: Sequence[StoredTensor]) -> list[int]:
    """The numbers of tensors in the order in which their files hold them."""
    return sorted(range(len(tensors)), key=lambda i: (tensors[i].file, tensors[i].offset))
