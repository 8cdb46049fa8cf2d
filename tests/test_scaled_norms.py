"""Norms of elements times factors: the same as those of the product in float64, which is never made."""

import math

import cases
import pytest
import torch

from lnprune import ops
from lnprune.steps.batches import Batch, matrices, numbers
from lnprune.steps.factors import Factors, product

# Shape, the dim of the channels, that of the factors, the batch.
CASES = {
    "rows": ((40, 66), 0, 1, None),
    "columns": ((40, 66), 1, 0, None),
    "short_rows": ((300, 5), 0, 1, None),
    "narrow_columns": ((300, 5), 1, 0, None),
    "long_rows": ((3, 9000), 0, 1, None),
    "odd_rows": ((7, 1029), 0, 1, None),
    "long_columns": ((9000, 9), 1, 0, None),
    "wide_columns": ((5, 9000), 1, 0, None),
    "convolution_by_inputs": ((6, 5, 3, 3), 0, 1, None),
    "convolution_by_outputs": ((6, 5, 3, 3), 1, 0, None),
    "wide_convolution_by_inputs": ((12, 140, 3, 3), 0, 1, None),
    "wide_convolution_by_outputs": ((300, 20, 3, 3), 1, 0, None),
    "convolution_of_long_kernels": ((3, 5, 70, 30), 1, 0, None),
    "experts_by_inputs": ((4, 30, 20), 1, 2, Batch(0, 4)),
    "experts_by_outputs": ((4, 30, 20), 2, 1, Batch(0, 4)),
    "wide_experts_by_inputs": ((3, 33, 300), 1, 2, Batch(0, 3)),
    "many_experts_by_outputs": ((50, 130, 6), 2, 1, Batch(0, 50)),
    "flat_experts": ((24, 10), 1, 0, Batch(0, 4)),
    "heads": ((24, 10), 0, 1, Batch(0, 4)),
    "one_channel": ((1, 70), 0, 1, None),
    "one_channel_of_columns": ((70, 1), 1, 0, None),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float8_e4m3fn]


def factors_for(shape, other, batch, apart):
    """Of both signs, with zeros; of each matrix where they are apart."""
    length = shape[other] // (batch.size if batch is not None and batch.dim == other else 1)
    values = torch.randn((batch.size if apart else 1) * length, dtype=torch.float64)
    values[torch.rand(len(values)) < 0.2] = 0.0
    return values


def brute_force(values, dim, other, factors, batch, n):
    """Matrix by matrix, by the definition."""
    batch = batch or Batch(0, 1)
    wide = values.cpu().double()
    parts = (
        wide.unsqueeze(0)
        if batch.size == 1
        else wide.unflatten(batch.dim, (batch.size, -1)).movedim(batch.dim, 0)
    )
    rows = factors.view(-1, parts.shape[1 + other])
    norms = []
    for i, part in enumerate(parts):
        shape = [1] * part.dim()
        shape[other] = -1
        slices = (part * rows[i % len(rows)].view(shape)).movedim(dim, 0).flatten(1)
        norms.append(cases.exact_norms(slices, n, 0))
    return torch.cat(norms)


@pytest.mark.parametrize("device", cases.DEVICES)
@cases.in_turn(name=CASES, dtype=DTYPES)
def test_norms_are_those_of_the_product(name, dtype, device):
    shape, dim, other, batch = CASES[name]
    values = cases.random_values(shape, dtype, device)
    for apart in (False, True) if batch is not None and batch.dim not in (dim, other) else (False,):
        factors = factors_for(shape, other, batch, apart)
        given = [values], [dim], [factors.to(device)], [other]
        for n in cases.NORM_KINDS:
            [norms] = ops.scaled_norms(*given, float(n), True, numbers([batch]))
            expected = brute_force(values, dim, other, factors, batch, n)
            cases.assert_norms_close(norms.cpu(), expected, n, (name, apart))
            unaligned = cases.unaligned(values)
            [again] = ops.scaled_norms([unaligned], *given[1:], float(n), True, numbers([batch]))
            cases.assert_same_bits(again, norms, "another alignment")
        [sums] = ops.scaled_norms(*given, 2.0, False, numbers([batch]))
        [norms] = ops.scaled_norms(*given, 2.0, True, numbers([batch]))
        cases.assert_norms_close(sums.sqrt(), norms, 2)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
def test_norms_in_any_layout(layout, device):
    for shape, dim, other in (
        ((12, 10, 3, 3), 0, 1),
        ((12, 10, 3, 3), 1, 0),
        ((33, 70), 0, 1),
        ((33, 70), 1, 0),
    ):
        values = cases.LAYOUTS[layout](cases.random_values(shape, torch.float32, device))
        factors = factors_for(shape, other, None, False)
        for n in (2, 0.5, math.inf):
            [norms] = ops.scaled_norms([values], [dim], [factors.to(device)], [other], float(n))
            cases.assert_norms_close(
                norms.cpu(), brute_force(values, dim, other, factors, None, n), n, layout
            )


@pytest.mark.parametrize("device", cases.DEVICES)
def test_special_values(device):
    values = cases.special_values((30, 40), torch.float32, device)
    factors = torch.randn(40, dtype=torch.float64)
    factors[3], factors[5], factors[7] = math.nan, math.inf, 0.0
    for part in (factors, factors.clone().nan_to_num(1.0, 1.0, 1.0)):
        for n in (0, 1, 2, math.inf, -math.inf):
            [norms] = ops.scaled_norms([values], [0], [part.to(device)], [1], float(n))
            made = values.cpu().double() * part
            expected = (
                made.ne(0).sum(dim=1).double() if n == 0 else torch.linalg.vector_norm(made, n, dim=1)
            )
            cases.assert_norms_close(norms.cpu(), expected, n)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_a_list_and_equal_channels(device):
    tensors = [cases.random_values(shape, torch.float32, device) for shape, *_ in CASES.values()]
    dims, others = [case[1] for case in CASES.values()], [case[2] for case in CASES.values()]
    batches = [case[3] for case in CASES.values()]
    factors = [factors_for(*case[:1], case[2], case[3], False).to(device) for case in CASES.values()]
    together = ops.scaled_norms(tensors, dims, factors, others, 2.0, True, numbers(batches))
    for i, norms in enumerate(together):
        [alone] = ops.scaled_norms(
            tensors[i : i + 1],
            dims[i : i + 1],
            factors[i : i + 1],
            others[i : i + 1],
            2.0,
            True,
            numbers(batches[i : i + 1]),
        )
        assert torch.equal(norms, alone)
    row = cases.random_values((1, 700), torch.float32, device)
    values = torch.cat([row, cases.random_values((3, 700), torch.float32, device), row])
    for dim, tensor in ((0, values), (1, values.T.contiguous())):
        [norms] = ops.scaled_norms(
            [tensor], [dim], [torch.rand(700, dtype=torch.float64).to(device)], [1 - dim], 1.7
        )
        assert norms[0] == norms[4]


@pytest.mark.parametrize("name", CASES)
def test_products_in_plain_torch(name):
    shape, dim, other, batch = CASES[name]
    values = torch.randn(shape)
    factors = factors_for(shape, other, batch, False)
    made = product(values, Factors(factors, other), batch)
    assert made.dtype == torch.float64
    made = made.unsqueeze(0) if batch is None else matrices(made, batch)
    norms = torch.cat([part.flatten() for part in made]).norm()
    wide = brute_force(values, dim, other, factors, batch, 2).norm()
    torch.testing.assert_close(norms, wide, rtol=1e-13, atol=0)


def test_bad_factors():
    values, factors = torch.randn(4, 6), torch.ones(6, dtype=torch.float64)
    for arguments, says in (
        (([values], [0], [], [1]), "expected factors and their dim for each of 1 tensors, got 0 and 1"),
        (
            ([values], [0], [factors], [0]),
            "a dim of the factors from 0 on that is not the channels', got 0",
        ),
        (([values], [0], [factors[:5]], [1]), "expected 6 factors, or as many for each matrix, got 5"),
        (([values], [0], [factors.float()], [1]), "expected contiguous float64 factors"),
    ):
        with pytest.raises(RuntimeError, match=says):
            ops.scaled_norms(*arguments, 2.0)
    assert ops.scaled_norms([], [], [], [], 2.0) == []
