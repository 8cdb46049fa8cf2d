"""The weights that the benchmarks time: real models' shapes, and the dtypes and orders to go with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

Shape = tuple[int, ...]

# Every convolution of ResNet-50 and its classifier: (how many weights have the shape, the shape).
RESNET50: list[tuple[int, Shape]] = [
    (1, (64, 3, 7, 7)),
    (1, (64, 64, 1, 1)),
    (3, (64, 64, 3, 3)),
    (4, (256, 64, 1, 1)),
    (2, (64, 256, 1, 1)),
    (1, (128, 256, 1, 1)),
    (4, (128, 128, 3, 3)),
    (4, (512, 128, 1, 1)),
    (1, (512, 256, 1, 1)),
    (3, (128, 512, 1, 1)),
    (1, (256, 512, 1, 1)),
    (6, (256, 256, 3, 3)),
    (6, (1024, 256, 1, 1)),
    (1, (1024, 512, 1, 1)),
    (5, (256, 1024, 1, 1)),
    (1, (512, 1024, 1, 1)),
    (3, (512, 512, 3, 3)),
    (3, (2048, 512, 1, 1)),
    (1, (2048, 1024, 1, 1)),
    (2, (512, 2048, 1, 1)),
    (1, (1000, 2048)),
]

# The matrices of a transformer of 7 billion parameters, 32 layers.
TRANSFORMER_7B: list[tuple[int, Shape]] = [
    (128, (4096, 4096)),
    (64, (11008, 4096)),
    (32, (4096, 11008)),
]

TINY: Shape = (8, 8)
MINILM: Shape = (384, 384)
MLP: Shape = (4096, 11008)

# Convolutions and the classifier of ResNet-50, and matrices of a sentence encoder and of a transformer.
TIMED: list[Shape] = [
    (256, 256, 3, 3),
    (512, 512, 3, 3),
    (1000, 2048),
    (1536, 384),
    (30522, 384),
    MLP,
]
TIMED_QUICK: list[Shape] = [(512, 512, 3, 3), (1536, 384)]

# From this many elements on, a norm of torch takes a tenth of a second and more: fewer orders.
HUGE = 40_000_000

INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# One of the four that the native code takes.
FLOAT8_DTYPES = [torch.float8_e4m3fn]
NAMED_ORDERS = [0, 1, 2, INF, -INF]
GENERIC_ORDERS = [0.5, 3]
DIMS = [0, 1]


# Layouts besides square matrices and 3x3 convolutions, each of a quarter of a gigabyte or more in float32:
# few long channels, many short ones, few and many rows of columns, rows of runs, larger kernels.
FURTHER_LAYOUTS: list[tuple[Shape, int]] = [
    ((64, 1 << 20), 0),
    ((1 << 20, 64), 0),
    ((64, 1 << 20), 1),
    ((1 << 20, 64), 1),
    ((64, 4096, 256), 1),
    ((1024, 2048, 7, 7), 0),
    ((1024, 2048, 7, 7), 1),
]


class Case(NamedTuple):
    """One weight and one way to rank it."""

    shape: Shape
    dtype: torch.dtype
    dim: int
    n: float

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def channels(self) -> int:
        return self.shape[self.dim]

    @property
    def other_dims(self) -> list[int]:
        return [dim for dim in range(len(self.shape)) if dim != self.dim]


def cases(
    shapes: list[Shape],
    dtypes: list[torch.dtype],
    orders: list[float],
    least_bytes: int = 0,
    huge_orders: tuple[float, ...] = (2, INF),
) -> Iterator[Case]:
    """The grid, ordered so that cases with the same weight follow each other."""
    for shape in shapes:
        huge = math.prod(shape) >= HUGE
        for dtype in dtypes:
            for dim in DIMS:
                for n in orders:
                    case = Case(shape, dtype, dim, n)
                    if case.bytes >= least_bytes and (not huge or n in huge_orders):
                        yield case


def _powers_of_two(product: int) -> Shape:
    """Two powers of two, the second at most twice the first, whose product is the one asked for."""
    exponent = (product - 1).bit_length()
    return 1 << exponent // 2, 1 << (exponent + 1) // 2


def matrix_of(size: int, dtype: torch.dtype) -> Shape:
    """A matrix of at least so many bytes, square or twice as wide as high."""
    return _powers_of_two(size // dtype.itemsize)


# Square and nearly square matrices of float32, from 16 KiB to 64 MiB, and one more.
CURVE: list[Shape] = [*(matrix_of(1 << exponent, torch.float32) for exponent in range(14, 27, 2)), MLP]


def convolution_of(size: int, dtype: torch.dtype) -> Shape:
    """The weight of a 3x3 convolution of at least so many bytes."""
    return *_powers_of_two(-(-size // (9 * dtype.itemsize))), 3, 3


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(shape: Shape) -> str:
    return " x ".join(map(str, shape))
