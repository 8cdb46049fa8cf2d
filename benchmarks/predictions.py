"""What the cases of the CUDA benchmark should take on an H200. Computed, not measured.

``python -m benchmarks.predictions`` prints the table that stands in docs/cuda.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.shapes import (
    RESNET50,
    TRANSFORMER_7B,
    Shape,
    convolution_of,
    dtype_name,
    matrix_of,
    shape_name,
)

# Assumptions. The first is a copy within the memory of an H200, bytes read plus bytes written, as others
# have seen it; a run of the benchmark puts its own copy in its place.
H200_COPY_BYTES_PER_SECOND = 4.3e12
EFFICIENCY = 0.9
LAUNCH_SECONDS = 4.5e-6
# Before the first launch their table is copied to the device, which takes as long as a launch.
TABLE_COPIES = 1

RANK_LAUNCHES = 1
PRUNE_LAUNCHES = 3


def predicted_seconds(
    bytes_read: int, bytes_written: int, launches: int, copy_bytes_per_second: float
) -> float:
    """Device time of a call: a fixed cost for each launch, and the bytes at nine tenths of a copy's speed.

    ``launches`` counts kernels; the copy of their table is added here. ``copy_bytes_per_second`` counts
    bytes read plus bytes written of a copy within the device's memory.
    """
    fixed = (launches + TABLE_COPIES) * LAUNCH_SECONDS
    return fixed + (bytes_read + bytes_written) / (EFFICIENCY * copy_bytes_per_second)


class Prediction(NamedTuple):
    """One case of the benchmark, with the bytes that it must move."""

    name: str
    bytes_read: int
    bytes_written: int
    launches: int

    def seconds(self, copy_bytes_per_second: float = H200_COPY_BYTES_PER_SECOND) -> float:
        return predicted_seconds(self.bytes_read, self.bytes_written, self.launches, copy_bytes_per_second)

    def share(self, copy_bytes_per_second: float = H200_COPY_BYTES_PER_SECOND) -> float:
        """Of the copy's bytes per second."""
        moved = self.bytes_read + self.bytes_written
        return moved / self.seconds(copy_bytes_per_second) / copy_bytes_per_second


def ranking(name: str, weight_bytes: int) -> Prediction:
    """Norms: every weight is read once."""
    return Prediction(f"norms, {name}", weight_bytes, 0, RANK_LAUNCHES)


def pruning(name: str, weight_bytes: int) -> Prediction:
    """A first call: weights are read to rank and to write, masks and masked weights written."""
    return Prediction(f"first call, {name}", 2 * weight_bytes, 2 * weight_bytes, PRUNE_LAUNCHES)


def pruning_again(name: str, weight_bytes: int) -> Prediction:
    """A repeated call: weight and mask are read to rank, mask and original to write; two are written."""
    return Prediction(f"repeated call, {name}", 4 * weight_bytes, 2 * weight_bytes, PRUNE_LAUNCHES)


def pruning_in_place(name: str, weight_bytes: int, pruned_share: float = 0.5) -> Prediction:
    """Pruning in place: weights are read to rank, and the pruned part of them is written."""
    written = round(pruned_share * weight_bytes)
    return Prediction(f"in place, {name}", weight_bytes, written, PRUNE_LAUNCHES)


def predictions() -> Iterator[Prediction]:
    """The cases of the benchmark that have a target, the repeated call, and half of weights in place."""
    quarter, whole = 1 << 28, 1 << 30

    def named(shape: Shape, dtype: torch.dtype) -> tuple[str, int]:
        return f"{shape_name(shape)} {dtype_name(dtype)}", math.prod(shape) * dtype.itemsize

    def total(shapes: list[tuple[int, Shape]], dtype: torch.dtype) -> int:
        return sum(count * math.prod(shape) for count, shape in shapes) * dtype.itemsize

    for size in (quarter, whole):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in (matrix_of(size, dtype), convolution_of(size, dtype)):
                yield ranking(*named(shape, dtype))
    for size in (quarter, whole):
        for dtype in (torch.float32, torch.bfloat16):
            yield pruning(*named(matrix_of(size, dtype), dtype))
    yield pruning_again(*named(matrix_of(quarter, torch.float32), torch.float32))
    yield pruning(*named((4096, 4096), torch.float32))
    yield pruning("54 weights of ResNet-50, float32, one list", total(RESNET50, torch.float32))
    yield pruning(
        "224 matrices of a 7B transformer, bfloat16, one list", total(TRANSFORMER_7B, torch.bfloat16)
    )
    yield pruning(*named((64, 64), torch.float32))
    for size in (quarter, whole):
        for dtype in (torch.float32, torch.bfloat16):
            yield pruning_in_place(*named(matrix_of(size, dtype), dtype))
    yield pruning_in_place("54 weights of ResNet-50, float32, one list", total(RESNET50, torch.float32))
    yield pruning_in_place(
        "224 matrices of a 7B transformer, bfloat16, one list", total(TRANSFORMER_7B, torch.bfloat16)
    )


def table() -> str:
    """The predictions as Markdown."""
    lines = [
        "| case | read, MB | written, MB | launches | predicted, µs | share of the copy |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in predictions():
        read, written = (f"{number / 1e6:,.{0 if number > 1e7 else 2}f}" for number in case[1:3])
        time, share = f"{case.seconds() * 1e6:,.0f}", f"{case.share():.2f}"
        lines.append(f"| {case.name} | {read} | {written} | {case.launches} | {time} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
