"""A file with zeros in some of its tensors: one pass over the source; all other bytes stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from lnprune.checkpoints.memory import PIECE, Memory, Progress
from lnprune.checkpoints.stored import Reader, reading, row_blocks
from lnprune.checkpoints.system_calls import begin_writing
from lnprune.checkpoints.zeros import Job
from lnprune.checkpoints.zip_checksums import renew_checksums

# Bytes after which the kernel is to begin writing.
_STRETCH = 2**24


class _Sink:
    """A file that is written from its begin to its end, so that the disk is at work from the start."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._done = self._begun = 0  # bytes that are handed over, and those that the disk was told of

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        self._done += len(data)
        if self._done - self._begun >= _STRETCH:
            self._file.flush()
            begin_writing(self._file.fileno(), self._begun, self._done - self._begun)
            self._begun = self._done


def write_file(source: str, jobs: Sequence[Job], target: BinaryIO, progress: Progress) -> None:
    """Writes the bytes of a file, with zeros as the jobs say, to one that is open and empty.

    Raises:
        UnusableCheckpoint: the source changed meanwhile, or cannot be read.
        OSError: the target cannot be written.
    """
    memory, sink = Memory(), _Sink(target)
    with reading(source) as file:
        position = 0
        regions = _regions(jobs)
        for first, last, inside in regions:
            _copy(file, sink, position, first, memory, progress)
            if len(inside) == 1:
                _write_tensor(file, sink, inside[0], memory, progress)
            else:
                _write_region(file, sink, first, last, inside, memory, progress)
            position = last
        _copy(file, sink, position, file.size, memory, progress)
    if not source.endswith(".safetensors"):
        renew_checksums(target, [(first, last) for first, last, _ in regions])


def _regions(jobs: Sequence[Job]) -> list[tuple[int, int, list[Job]]]:
    """The places of jobs in their file, from the first on; tensors that overlap have one."""
    found: list[tuple[int, int, list[Job]]] = []
    for job in sorted(jobs, key=lambda job: job.tensor.offset):
        first, last = job.tensor.offset, job.tensor.offset + job.tensor.length
        if found and first < found[-1][1]:
            before, end, inside = found[-1]
            found[-1] = before, max(end, last), [*inside, job]
        elif last > first:
            found.append((first, last, [job]))
    return found


def _copy(file: Reader, sink: _Sink, first: int, last: int, memory: Memory, progress: Progress) -> None:
    for start in range(first, last, PIECE):
        length = min(PIECE, last - start)
        memory.read(file, start, length)
        sink.write(memory.bytes_of(0, length))
        progress(length)


def _write_tensor(file: Reader, sink: _Sink, job: Job, memory: Memory, progress: Progress) -> None:
    """The bytes of one tensor: in blocks of rows, where what is zeroed allows it."""
    tensor = job.tensor
    if not tensor.is_contiguous or not all(zeros.is_by_rows(tensor.shape[0]) for zeros in job.zeros):
        _write_region(file, sink, tensor.offset, tensor.offset + tensor.length, [job], memory, progress)
        return
    for row, count in row_blocks(tensor, PIECE):
        length = count * tensor.row_length
        data = memory.read(file, tensor.offset + row * tensor.row_length, length)
        values = tensor.rows_of(data, count)
        for zeros in job.zeros:
            zeros.rows(row, count).write(values)
        sink.write(memory.bytes_of(0, length))
        progress(length)


def _write_region(
    file: Reader,
    sink: _Sink,
    first: int,
    last: int,
    jobs: Sequence[Job],
    memory: Memory,
    progress: Progress,
) -> None:
    data = memory.read(file, first, last - first)
    for tensor, several in jobs:
        values = tensor.of(data[tensor.offset - first :][: tensor.length])
        for zeros in several:
            zeros.write(values)
    sink.write(memory.bytes_of(0, last - first))
    progress(last - first)
