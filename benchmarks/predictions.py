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
# Of the selection: a load that finds its data in the L2 cache, and a pass over the keys that the threads
# of a block hold. Both are about a thousand cycles.
ROUND_TRIP_SECONDS = 0.5e-6
PASS_SECONDS = 0.5e-6
HISTOGRAMS = 2  # each in a pass, after one for the range of the keys, which are neither far apart nor equal
# A sum over the threads of a block: five shuffles, two barriers of 50 cycles each, and the sums of its
# warps one after another. About 500 cycles.
SUM_SECONDS = 0.25e-6
# What a multiprocessor receives from the L2 cache: 64 bytes a cycle of 1.98 GHz.
BLOCK_BYTES_PER_SECOND = 64 * 1.98e9
# How often a block of the select step's own kernel reads every norm, if they are more than it holds: for
# their range, for one histogram, and to move what is left to the threads.
READINGS = 3

# As in csrc/cuda/launches.h: what the rank step selects from itself, what a block of the select step holds,
# and how many tensors the table of one launch describes.
MOST_CHANNELS_OF_RANK = 4096
CHANNELS_OF_SELECT_BLOCK = 8192
KEYS_OF_THREAD = 16
RANK_HISTOGRAM_BITS = 10
SELECT_HISTOGRAM_BITS = 11
RANK_TENSORS = 174
SELECT_TENSORS = 545
WRITE_TENSORS = 303
ZERO_TENSORS = 389


def rank_launches(tensors: int = 1) -> int:
    """Of norms of a list of one dtype."""
    return math.ceil(tensors / RANK_TENSORS)


def prune_launches(channels: list[int], *, repeated: bool = False, in_place: bool = False) -> int:
    """Of a call on a list of one dtype, whose tensors have so many channels."""
    ranked = len(channels) * (2 if repeated else 1)
    large = sum(count > MOST_CHANNELS_OF_RANK for count in channels)
    third = math.ceil(len(channels) / (ZERO_TENSORS if in_place else WRITE_TENSORS))
    return rank_launches(ranked) + math.ceil(large / SELECT_TENSORS) + third


def predicted_seconds(
    bytes_read: int, bytes_written: int, launches: int, copy_bytes_per_second: float
) -> float:
    """Device time of a call: a fixed cost for each launch, and the bytes at nine tenths of a copy's speed.

    ``copy_bytes_per_second`` counts bytes read plus bytes written of a copy within the device's memory.
    """
    return launches * LAUNCH_SECONDS + (bytes_read + bytes_written) / (EFFICIENCY * copy_bytes_per_second)


def predicted_selection_seconds(channels: int, *, longest: bool = False) -> float:
    """The selection of one tensor from its norms, by one block, its launch included where it has one.

    The longest one has norms far apart and many that are equal, of which the cut keeps some.
    """
    by_rank = channels <= MOST_CHANNELS_OF_RANK
    bits = RANK_HISTOGRAM_BITS if by_rank else SELECT_HISTOGRAM_BITS
    histograms = math.ceil(64 / bits) if longest else HISTOGRAMS
    in_block = ROUND_TRIP_SECONDS + (1 + histograms) * PASS_SECONDS + PASS_SECONDS / 2  # half for the flags
    if longest:
        in_block += KEYS_OF_THREAD * SUM_SECONDS
    if by_rank:
        return in_block
    tiles = math.ceil(channels / CHANNELS_OF_SELECT_BLOCK)
    reading = max(8 * channels / BLOCK_BYTES_PER_SECOND, tiles * ROUND_TRIP_SECONDS)
    # At the longest each histogram reads all norms, and ties are counted in the tiles before the last.
    readings = 1 if tiles == 1 else 1 + histograms + 1 if longest else READINGS
    return LAUNCH_SECONDS + readings * reading + in_block


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
    return Prediction(f"norms, {name}", weight_bytes, 0, rank_launches())


def pruning(name: str, weight_bytes: int, channels: list[int]) -> Prediction:
    """A first call: weights are read to rank and to write, masks and masked weights written."""
    launches = prune_launches(channels)
    return Prediction(f"first call, {name}", 2 * weight_bytes, 2 * weight_bytes, launches)


def pruning_again(name: str, weight_bytes: int, channels: list[int]) -> Prediction:
    """A repeated call: weight and mask are read to rank, mask and original to write; two are written."""
    launches = prune_launches(channels, repeated=True)
    return Prediction(f"repeated call, {name}", 4 * weight_bytes, 2 * weight_bytes, launches)


def pruning_in_place(
    name: str, weight_bytes: int, channels: list[int], pruned_share: float = 0.5
) -> Prediction:
    """Pruning in place: weights are read to rank, and the pruned part of them is written."""
    written = round(pruned_share * weight_bytes)
    launches = prune_launches(channels, in_place=True)
    return Prediction(f"in place, {name}", weight_bytes, written, launches)


def predictions() -> Iterator[Prediction]:
    """The cases of the benchmark that have a target, the repeated call, and half of weights in place."""
    quarter, whole = 1 << 28, 1 << 30

    def named(shape: Shape, dtype: torch.dtype) -> tuple[str, int]:
        return f"{shape_name(shape)} {dtype_name(dtype)}", math.prod(shape) * dtype.itemsize

    def pruned(shape: Shape, dtype: torch.dtype) -> tuple[str, int, list[int]]:
        return *named(shape, dtype), [shape[0]]

    def all_of(
        name: str, shapes: list[tuple[int, Shape]], dtype: torch.dtype
    ) -> tuple[str, int, list[int]]:
        elements = sum(count * math.prod(shape) for count, shape in shapes)
        channels = [shape[0] for count, shape in shapes for _ in range(count)]
        return f"{name}, {dtype_name(dtype)}, one list", elements * dtype.itemsize, channels

    resnet50 = all_of("54 weights of ResNet-50", RESNET50, torch.float32)
    transformer = all_of("224 matrices of a 7B transformer", TRANSFORMER_7B, torch.bfloat16)

    for size in (quarter, whole):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in (matrix_of(size, dtype), convolution_of(size, dtype)):
                yield ranking(*named(shape, dtype))
    for size in (quarter, whole):
        for dtype in (torch.float32, torch.bfloat16):
            yield pruning(*pruned(matrix_of(size, dtype), dtype))
    yield pruning_again(*pruned(matrix_of(quarter, torch.float32), torch.float32))
    yield pruning(*pruned((4096, 4096), torch.float32))
    yield pruning(*resnet50)
    yield pruning(*transformer)
    yield pruning(*pruned((64, 64), torch.float32))
    for size in (quarter, whole):
        for dtype in (torch.float32, torch.bfloat16):
            yield pruning_in_place(*pruned(matrix_of(size, dtype), dtype))
    yield pruning_in_place(*resnet50)
    yield pruning_in_place(*transformer)


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


def selection_table() -> str:
    """The selection of one tensor as Markdown."""
    lines = ["| channels | by | predicted, µs | the longest, µs |", "|---:|---|---:|---:|"]
    for channels in (64, MOST_CHANNELS_OF_RANK, 8192, 16_384, 128_256):
        by = "the rank step" if channels <= MOST_CHANNELS_OF_RANK else "a launch of its own"
        times = (predicted_selection_seconds(channels, longest=longest) for longest in (False, True))
        usual, most = (f"{seconds * 1e6:.0f}" for seconds in times)
        lines.append(f"| {channels:,} | {by} | {usual} | {most} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), selection_table(), sep="\n\n")
