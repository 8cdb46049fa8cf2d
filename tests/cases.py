"""The dtypes, orders, shapes, layouts and devices that tests run over, and comparisons of bits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from lnprune import reference

INFINITY = math.inf
NAN = math.nan

NATIVE_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
]
# The dtypes that hold infinity and negative zero.
DTYPES_WITH_INFINITY = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e5m2,
]
# The smallest positive value of each dtype with denormals.
SMALLEST_DENORMAL = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}

NORMS = [0, 0.5, 1, 2, 2.5, 3, -1, 1.7, -2.3, INFINITY, -INFINITY]
# Orders whose norm is one of the elements or a count: no rounding.
EXACT_NORMS = {0, INFINITY, -INFINITY}
# One order of each kind of loop.
NORM_KINDS = [0, 1, 2, 3, 1.7, INFINITY, -INFINITY]
# The largest relative error of a norm that sums, 90 units of float64's rounding: chunks keep the error of
# a sum of a million terms at a few units, powers and roots add a few dozen at the most.
TOLERANCE = 2e-14

DEVICES = ["cpu"]
if torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "lnprune::channel_norms", "CUDA"
):
    DEVICES.append("cuda")

# Small shapes, each ranked along every dim. The names say what is special about them.
SMALL_SHAPES = {
    "matrix": (48, 40),
    "convolution_3x3": (20, 12, 3, 3),
    "convolution_3x3_few_channels": (70, 3, 3, 3),
    "convolution_3d": (6, 5, 3, 2, 3),
    "runs_of_63": (5, 63),
    "runs_of_64": (5, 64),
    "runs_of_65": (5, 65),
    "rows_of_runs_of_65": (3, 4, 65),
    "rows_of_odd_runs": (5, 8, 301),
    "runs_beyond_a_block": (3, 1, 1029),
    "groups_of_runs": (70, 96),
    "channels_of_two_folds": (3, 300),
    "rows_of_several_chunks": (1100, 5),
    "rows_wider_than_side_by_side": (67, 515),
    "one_row": (1, 50),
    "one_column": (50, 1),
    "one_element": (1, 1),
    "dims_of_size_one": (1, 6, 1, 4, 1),
}
# Shapes that need many elements for the path that they take, with the dim that takes it.
LARGE_SHAPES = {
    "columns_of_two_strips": ((9, 8200), 1),
    "small_runs_of_two_strips": ((3, 950, 3, 3), 1),
    "most_rows_of_a_chunk": ((4100, 514), 1),
    "narrow_matrix": ((300_000, 2), 1),
    "narrow_matrix_of_most_rows": ((900_001, 1), 1),
    "runs_of_several_chunks": ((2, 140_001), 0),
    "rows_of_runs_of_several_chunks": ((2, 2, 65_600), 1),
    "rows_of_runs_of_two_chunks": ((700, 4, 100), 1),
    "runs_of_two_strips": ((1100, 65), 0),
    "many_channels": ((30_000, 2), 0),
    "one_channel": ((1, 70_001), 0),
}
# Shapes and dims that take every path of the write step: columns with and without an inner block, more
# columns than a call takes, more rows than a task takes, runs, runs cut in the middle by a task.
WRITE_PATHS = {
    "columns": ((37, 29), 1),
    "columns_of_blocks": ((5, 12, 3, 3), 1),
    "columns_of_two_strips": ((7, 8200), 1),
    "blocks_of_two_strips": ((3, 950, 3, 3), 1),
    "rows_of_several_tasks": ((6000, 100), 1),
    "short_runs": ((9, 63), 0),
    "runs": ((9, 64), 0),
    "rows_of_runs": ((4, 5, 77), 1),
    "runs_beyond_a_block": ((3, 1030), 0),
    "runs_cut_by_tasks": ((300, 1999), 0),
    "rows_of_runs_cut_by_tasks": ((3, 40, 2503), 1),
    "dims_of_size_one": ((1, 6, 1, 4, 1), 1),
    "one_channel": ((1, 700), 0),
    "one_channel_outermost": ((700, 1), 1),
    "many_channels": ((60_000, 2), 0),
}


def contiguous(values: Tensor) -> Tensor:
    """The values as they are."""
    return values


def channels_last(values: Tensor) -> Tensor:
    """Dim 1 innermost: ``torch.channels_last`` for four dims."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def transposed(values: Tensor) -> Tensor:
    """Dim 0 innermost: all dims in reverse order."""
    order = list(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


def expanded(values: Tensor) -> Tensor:
    """The first index of the last dim, repeated with stride 0."""
    return values[..., :1].expand(values.shape)


def every_second(values: Tensor) -> Tensor:
    """Gaps of NaN between the elements."""
    room = poisoned((*values.shape[:-1], 2 * values.shape[-1]), values)[..., ::2]
    return room.copy_(values)


def rows_apart(values: Tensor) -> Tensor:
    """Gaps of NaN between the rows of the last dim."""
    room = poisoned((*values.shape[:-1], values.shape[-1] + 3), values)[..., : values.shape[-1]]
    return room.copy_(values)


def unaligned(values: Tensor) -> Tensor:
    """Contiguous from the second element of the storage on, with NaN around."""
    room = poisoned((values.numel() + 2,), values)[1:-1]
    return room.view(values.shape).copy_(values)


def odd_unit_strides(values: Tensor) -> Tensor:
    """Contiguous, with strides of no meaning where the size is 1."""
    strides = [
        3 if size == 1 else stride for size, stride in zip(values.shape, values.stride(), strict=True)
    ]
    return values.as_strided(values.shape, strides)


def poisoned(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of NaN."""
    return torch.full(shape, NAN, device=like.device).to(like.dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function
    for function in (
        contiguous,
        channels_last,
        transposed,
        expanded,
        every_second,
        rows_apart,
        unaligned,
        odd_unit_strides,
    )
}
DENSE_LAYOUTS = ["contiguous", "channels_last", "transposed", "unaligned", "odd_unit_strides"]


def in_pairs(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Runs a test over three axes, the last of which it gets as a list of values.

    In the short run, any two values of two axes meet; the rest of all combinations is marked slow.
    """
    first, second, third = (list(values) for values in axes.values())
    table = pairs(len(first), len(second), len(third))
    parameters = []
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            chosen = [c for k, c in enumerate(third) if (i, j, k) in table]
            rest = [c for c in third if c not in chosen]
            name = f"{a}-{b}"
            parameters.append(pytest.param(a, b, chosen, id=name))
            if rest:
                parameters.append(pytest.param(a, b, rest, id=f"{name}-rest", marks=pytest.mark.slow))
    return pytest.mark.parametrize(tuple(axes), parameters)


def in_turn(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Runs a test over two axes.

    In the short run each value of the first meets one of the second, which take turns; the rest is slow.
    """
    first, second = (list(values) for values in axes.values())
    assert len(first) >= len(second), "else some values of the second axis would never have their turn"
    parameters = []
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            marks = [] if i % len(second) == j else pytest.mark.slow
            parameters.append(pytest.param(a, b, id=f"{a}-{b}", marks=marks))
    return pytest.mark.parametrize(tuple(axes), parameters)


def pairs(*sizes: int) -> set[tuple[int, int, int]]:
    """Rows of three numbers below these sizes: any two of two columns stand in one of the rows."""
    # The two longest columns in full, the shortest in turn.
    a, b, c = sorted(range(3), key=lambda column: -sizes[column])
    rows = set()
    for i in range(sizes[a]):
        for j in range(sizes[b]):
            row = {a: i, b: j, c: (i + j) % sizes[c]}
            rows.add((row[0], row[1], row[2]))
    return rows


def random_values(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random values of both signs from 1/32 to about 40: none is zero, in no dtype."""
    values = (0.25 + torch.randn(shape).abs()) * 2.0 ** torch.randint(-3, 4, shape)
    return (values * (torch.randint(0, 2, shape) * 2 - 1)).to(dtype).to(device)


def special_values(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random values with infinities, NaN, both zeros, denormals and extremes among them."""
    tensor = random_values(shape, torch.float64).flatten()
    largest = torch.finfo(dtype).max
    smallest = torch.finfo(dtype).smallest_normal
    specials = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, largest, -largest, smallest]
    specials += [smallest / 2, -smallest / 4, 1.0, -1.0]
    places = torch.randperm(tensor.numel())[: max(1, tensor.numel() // 3)]
    tensor[places] = torch.tensor(specials, dtype=torch.float64)[torch.randint(len(specials), places.shape)]
    if dtype not in DTYPES_WITH_INFINITY:
        tensor[tensor.isinf()] = largest
    return tensor.view(shape).to(dtype).to(device)


def random_keep(channels: int, device: str = "cpu") -> Tensor:
    """Flags of both values wherever there are two channels."""
    keep = torch.rand(channels) < 0.5
    keep[torch.randint(channels, (1,))] = True
    if channels > 1:
        keep[(int(keep.nonzero()[0]) + 1) % channels] = False
    return keep.to(device)


def wide(tensor: Tensor) -> Tensor:
    """The values as float64, which holds those of every native dtype exactly."""
    return tensor.to(torch.float64)


def bits(tensor: Tensor) -> Tensor:
    """The bits of the elements as integers, in logical order."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.clone(memory_format=torch.contiguous_format).view(integer)


def assert_same_bits(actual: Tensor, expected: Tensor, case: object = "") -> None:
    """Equal shape, dtype and bits, where any NaN equals any other."""
    assert actual.shape == expected.shape, case
    assert actual.dtype == expected.dtype, case
    same = (bits(actual) == bits(expected)) | (wide(actual).isnan() & wide(expected).isnan())
    assert same.all(), (case, (~same).nonzero()[:5].tolist(), actual[~same][:5], expected[~same][:5])


def assert_norms_close(
    actual: Tensor, expected: Tensor, n: float, case: object = "", tolerance: float = TOLERANCE
) -> None:
    """Float64 norms within the tolerance of what is expected, exact where no sum is rounded."""
    assert actual.dtype == torch.float64, case
    assert actual.shape == expected.shape, case
    relative = 0.0 if n in EXACT_NORMS else tolerance
    close = torch.isclose(actual, expected, rtol=relative, atol=0.0, equal_nan=True)
    assert close.all(), (case, n, (~close).nonzero()[:5].tolist(), actual[~close][:5], expected[~close][:5])


def brute_force_keep(norms: list[float], pruned: int) -> list[bool]:
    """The choice by a stable sort in plain Python: NaN first, then larger, then the lower index."""
    ranking = sorted(
        range(len(norms)), key=lambda c: (0.0, 0.0) if norms[c] != norms[c] else (1.0, -norms[c])
    )
    kept = set(ranking[: len(norms) - pruned])
    return [c in kept for c in range(len(norms))]


def expected_write(
    keep: Tensor, scores: Tensor, mask: Tensor | None, original: Tensor | None, dim: int
) -> tuple[Tensor, Tensor | None]:
    """The mask and the masked original as torch multiplies them."""
    if scores.is_cuda and scores.element_size() == 1:  # torch multiplies float8 on the CPU alone
        cpu = (None if tensor is None else tensor.cpu() for tensor in (keep, scores, mask, original))
        new_mask, weight = expected_write(*cpu, dim)
        return new_mask.to(scores.device), None if weight is None else weight.to(scores.device)
    shape = [1] * scores.dim()
    shape[dim] = -1
    flags = keep.reshape(shape).to(scores.dtype)
    old = torch.ones_like(scores) if mask is None else mask
    # Torch multiplies no float8 tensor by a single element, hence dense operands.
    new_mask = old * torch.empty_like(old).copy_(flags)
    return new_mask, None if original is None else new_mask * original


def reference_norms(tensor: Tensor, n: float, dim: int) -> Tensor:
    """The norms in float64 by torch. Its sums lose up to 1e-12 in long slices."""
    return reference.channel_norms(tensor, n, dim)


def exact_norms(tensor: Tensor, n: float, dim: int) -> Tensor:
    """The norms from terms in float64 that are added in extended precision where numpy has it."""
    if n in EXACT_NORMS:
        return reference_norms(tensor, n, dim)
    slices = wide(tensor.cpu()).movedim(dim, 0).reshape(tensor.shape[dim], -1).abs()
    sums = slices.pow(n).numpy().sum(axis=1, dtype=numpy.longdouble)
    return torch.from_numpy((sums ** (1 / numpy.longdouble(n))).astype(numpy.float64)).to(tensor.device)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
