"""Sums before the root, and the roots of sums: the two halves of a norm."""

import itertools
import math

import cases
import pytest
import torch

import lnprune
from lnprune import ops, reference

INFINITY, NAN = math.inf, math.nan
pytestmark = pytest.mark.parametrize("device", cases.DEVICES)

# Channels as columns and as runs, more of them than a block folds, and both in several chunks.
SHAPES = [
    ((20, 12, 3, 3), 1),
    ((5, 65), 0),
    ((3, 8, 301), 1),
    ((2, 700), 1),
    ((1100, 5), 1),
    ((2, 16_700), 0),
]


def sums_and_norms(tensor, dim, p):
    [sums] = ops.channel_sums([tensor], [dim], p)
    [norms] = ops.channel_norms([tensor], [dim], p)
    return sums, norms


def assert_close(actual, expected, case=""):
    assert torch.allclose(actual, expected, rtol=cases.TOLERANCE, atol=0, equal_nan=True), case


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
def test_the_roots_of_sums_are_the_norms_bit_for_bit(dtype, device):
    for (shape, dim), make in itertools.product(SHAPES, (cases.random_values, cases.special_values)):
        small = math.prod(shape) < 3000
        if make is cases.special_values and not small:
            continue
        tensor = make(shape, dtype, device)
        # All orders for small tensors; for others one of each kind of sum and of root.
        for p in cases.NORMS if small else [1, 2, 1.7, -INFINITY]:
            sums, norms = sums_and_norms(tensor, dim, p)
            [roots] = ops.norms_of_sums([sums], p)
            cases.assert_same_bits(roots, norms, (shape, dim, p))
            assert (sums.dtype, sums.shape, sums.device) == (torch.float64, (shape[dim],), tensor.device)


@pytest.mark.parametrize("p", cases.NORMS)
def test_sums_are_those_of_exact_arithmetic(p, device):
    tensor = cases.random_values((37, 21), torch.float32, device)
    for dim in (0, 1):
        sums, _ = sums_and_norms(tensor, dim, p)
        slices = tensor.double().abs().movedim(dim, 0).tolist()
        if p in cases.EXACT_NORMS:
            expected = [len(x) if p == 0 else max(x) if p > 0 else min(x) for x in slices]
            assert sums.tolist() == expected
        else:
            expected = [math.fsum(value**p for value in x) for x in slices]
            assert sums.tolist() == pytest.approx(expected, rel=cases.TOLERANCE, abs=0)


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
def test_the_reference_gives_the_same(dtype, device):
    for (shape, dim), make in itertools.product(SHAPES[:3], (cases.random_values, cases.special_values)):
        tensor = make(shape, dtype, device)
        for p in cases.NORMS:
            sums, norms = sums_and_norms(tensor, dim, p)
            expected = reference.channel_sums(tensor, p, dim)
            roots = reference.norms_of_sums(expected, p)
            assert_close(sums, expected, (shape, dim, p))
            assert_close(norms, roots, (shape, dim, p))
            assert_close(roots, reference.channel_norms(tensor, p, dim), (shape, dim, p))


# A slice of two elements, an order, its sum and its norm.
CORNERS = [
    ((0.0, -0.0), 0, 0.0, 0.0),
    ((NAN, 1.0), 0, 2.0, 2.0),
    ((INFINITY, 0.0), 0, 1.0, 1.0),
    ((-3.0, 4.0), 1, 7.0, 7.0),
    ((-3.0, 4.0), 2, 25.0, 5.0),
    ((NAN, 1.0), 2, NAN, NAN),
    ((-INFINITY, 1.0), 2, INFINITY, INFINITY),
    ((-2.0, 1.0), INFINITY, 2.0, 2.0),
    ((NAN, 1.0), INFINITY, NAN, NAN),
    ((-2.0, 1.0), -INFINITY, 1.0, 1.0),
    ((NAN, 1.0), -INFINITY, NAN, NAN),
    ((2.0, -2.0), -1, 1.0, 1.0),
    ((0.0, 2.0), -1, INFINITY, 0.0),
    ((INFINITY, INFINITY), -1, 0.0, INFINITY),
    ((0.0, 2.0), -2.3, INFINITY, 0.0),
    ((4.0, 9.0), 0.5, 5.0, 25.0),
    ((1.0, -1.0), 3, 2.0, 2 ** (1 / 3)),
]


@pytest.mark.parametrize(("values", "p", "expected_sum", "expected_norm"), CORNERS)
def test_corners(values, p, expected_sum, expected_norm, device):
    for dtype in (torch.float64, torch.float32, torch.float16):
        tensor = torch.tensor([values], dtype=dtype, device=device)
        sums, _ = sums_and_norms(tensor, 0, p)
        [norms] = ops.norms_of_sums([sums], p)
        assert sums.tolist() == pytest.approx([expected_sum], rel=1e-15, nan_ok=True)
        assert norms.tolist() == pytest.approx([expected_norm], rel=1e-15, nan_ok=True)
        assert reference.channel_sums(tensor, p, 0).tolist() == pytest.approx([expected_sum], nan_ok=True)


@pytest.mark.parametrize("p", cases.NORMS)
def test_the_sums_of_parts_make_the_sum_of_the_whole(p, device):
    tensor = cases.random_values((30, 700), torch.float32, device)
    parts = ops.channel_sums(list(tensor.split([123, 400, 177], dim=1)), [0, 0, 0], p)
    whole = torch.stack(parts)
    whole = whole.sum(0) if not math.isinf(p) else whole.amax(0) if p > 0 else whole.amin(0)
    [norms] = ops.norms_of_sums([whole], p)
    assert_close(norms, lnprune.channel_norms(tensor, p, 0))


@pytest.mark.parametrize("p", [0.0, 2.0, math.inf])
def test_lists_give_what_each_tensor_gives_and_new_tensors(p, device):
    lengths = [5, 0, 256, 257, 1, 1000]
    sums = [cases.random_values((length,), torch.float64, device).abs() for length in lengths]
    before = [tensor.clone() for tensor in sums]
    norms = ops.norms_of_sums(sums, p)
    for actual, given, held in zip(norms, sums, before, strict=True):
        assert torch.equal(given, held)
        assert actual.tolist() == [math.sqrt(x) if p == 2 else x for x in held.tolist()]
        assert actual.numel() == 0 or actual.data_ptr() != given.data_ptr()
    assert [norm.shape for norm in ops.norms_of_sums([sums[1]], p)] == [(0,)]


def test_orders_of_the_reference(device):
    tensor = cases.random_values((4, 6), torch.float32, device)
    assert torch.equal(reference.channel_sums(tensor, "fro", 0), reference.channel_sums(tensor, 2, 0))
    assert torch.equal(reference.norms_of_sums(torch.tensor([9.0]), "fro"), torch.tensor([3.0]))
    pair = torch.complex(tensor, tensor)
    assert_close(reference.channel_sums(pair, 2, 1), 2 * reference.channel_sums(tensor, 2, 1))
    for n in ("nuc", math.nan):
        expected = f"a real order or 'fro' for the sums of a norm, got '?{n}"
        with pytest.raises(ValueError, match=expected):
            reference.channel_sums(tensor, n, 0)
        with pytest.raises(ValueError, match=expected):
            reference.norms_of_sums(tensor, n)
