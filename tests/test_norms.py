"""The rank step: channel norms against float64 torch, and the bits that must not vary."""

import json
import math
import os
import subprocess
import sys

import cases
import hypothesis
import pytest
import torch
from hypothesis import strategies

import lnprune
from lnprune import ops

pytestmark = pytest.mark.parametrize("device", cases.DEVICES)

EXAMPLES = hypothesis.settings(deadline=None, max_examples=100)
# The dtypes that torch's own norm takes.
WIDE_DTYPES = list(cases.SMALLEST_DENORMAL)


def column(values, dtype, device, channels=3, position=1):
    """A matrix whose channel ``position`` along dim 1 holds the values, and 1 elsewhere."""
    tensor = torch.ones(len(values), channels, dtype=torch.float64)
    tensor[:, position] = torch.tensor(values, dtype=torch.float64)
    return tensor.to(dtype).to(device)


def both_ways(values, dtype, device, n):
    """The norm of the values as a column, as a short run and as a long run (zeros added)."""
    matrix = column(values, dtype, device)
    as_column = lnprune.channel_norms(matrix, n, 1)
    as_row = lnprune.channel_norms(matrix.T.contiguous(), n, 0)
    as_run = lnprune.channel_norms(matrix.repeat(200, 1).T.contiguous(), n, 0)
    return [as_column[1].item(), as_row[1].item()], as_run[1].item()


@cases.in_pairs(shape=cases.SMALL_SHAPES, dtype=cases.NATIVE_DTYPES, orders=cases.NORMS)
def test_norms_of_every_dtype_order_and_dim(shape, dtype, orders, device):
    tensor = cases.random_values(cases.SMALL_SHAPES[shape], dtype, device)
    for dim in range(tensor.dim()):
        for n in orders:
            norms = lnprune.channel_norms(tensor, n, dim)
            cases.assert_norms_close(norms, cases.exact_norms(tensor, n, dim), n, dim)
            cases.assert_same_bits(lnprune.channel_norms(tensor, n, dim - tensor.dim()), norms)


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
def test_every_order_of_every_dtype_in_each_kind_of_loop(dtype, device):
    """Columns and runs, of one chunk and of more, aligned and not, with a short last row."""
    for shape, dim in (
        *(((1401, 5), 1), ((700, 64), 1), ((1100, 270), 1), ((2100, 70), 1)),
        *(((3, 20_001), 0), ((70, 2, 65), 1)),
    ):
        values = cases.random_values(shape, dtype, device)
        for tensor in (values, cases.unaligned(values)):
            for n in cases.NORM_KINDS:
                norms = lnprune.channel_norms(tensor, n, dim)
                cases.assert_norms_close(norms, cases.exact_norms(values, n, dim), n, (shape, n))


@cases.in_pairs(shape=cases.SMALL_SHAPES, layout=cases.LAYOUTS, dtypes=[torch.float32, torch.float8_e4m3fn])
def test_norms_of_every_layout(shape, layout, dtypes, device):
    for dtype in dtypes:
        values = cases.random_values(cases.SMALL_SHAPES[shape], dtype, device)
        tensor = cases.LAYOUTS[layout](values)
        for dim in range(tensor.dim()):
            for n in (2, -cases.INFINITY):
                norms = lnprune.channel_norms(tensor, n, dim)
                cases.assert_norms_close(norms, cases.exact_norms(tensor.contiguous(), n, dim), n, dim)


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.LARGE_SHAPES)
def test_norms_of_large_shapes(shape, dtype, device):
    size, dim = cases.LARGE_SHAPES[shape]
    tensor = cases.random_values(size, dtype, device)
    # The other dtypes and orders share this code, but for the width of a partial result.
    orders = cases.NORM_KINDS if dtype == torch.float32 else [2, cases.INFINITY]
    for n in orders:
        norms = lnprune.channel_norms(tensor, n, dim)
        cases.assert_norms_close(norms, cases.exact_norms(tensor, n, dim), n)


@pytest.mark.parametrize("size", [(2100, 8200), (1030, 1900, 3, 3)])
def test_norms_of_a_weight_of_very_many_blocks(size, device):
    """Large enough that blocks are cut longer than those of smaller weights."""
    tensor = cases.random_values(size, torch.float32, device)
    for dim in (0, 1):
        norms = lnprune.channel_norms(tensor, 2, dim)
        cases.assert_norms_close(norms, cases.reference_norms(tensor, 2, dim), 2, dim, tolerance=1e-12)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", ["columns_of_two_strips", "rows_of_runs_of_two_chunks", "many_channels"])
def test_norms_of_large_shapes_in_every_layout(shape, layout, device):
    size, _ = cases.LARGE_SHAPES[shape]
    tensor = cases.LAYOUTS[layout](cases.random_values(size, torch.float32, device))
    for dim in range(tensor.dim()):
        norms = lnprune.channel_norms(tensor, 2, dim)
        cases.assert_norms_close(norms, cases.exact_norms(tensor.contiguous(), 2, dim), 2, dim)


@pytest.mark.parametrize("n", cases.NORMS)
@pytest.mark.parametrize("shape", ["matrix", "convolution_3x3", "rows_of_runs_of_65"])
def test_native_norms_are_those_of_the_plain_torch_path(shape, n, device):
    tensor = cases.random_values(cases.SMALL_SHAPES[shape], torch.float32, device)
    for dim in range(tensor.dim()):
        expected = cases.reference_norms(tensor, n, dim)
        cases.assert_norms_close(lnprune.channel_norms(tensor, n, dim), expected, n, dim, 1e-12)


@pytest.mark.parametrize("n", [0.5, 1, 2, 2.5, 3, -1, 1.7, -2.3])
@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((4000, 7), 1), ((7, 4000), 0), ((40, 7, 9), 1)])
def test_error_is_never_larger_than_torchs(shape, dim, dtype, n, device):
    tensor = cases.random_values(shape, dtype, device)
    exact = cases.exact_norms(tensor.cpu(), n, dim)
    error = (lnprune.channel_norms(tensor, n, dim).cpu() - exact).abs()
    others = [d for d in range(tensor.dim()) if d != dim]
    torch_error = (torch.norm(tensor, p=n, dim=others).double().cpu() - exact).abs()
    assert (error <= torch.maximum(torch_error, cases.TOLERANCE * exact)).all()


def test_any_integer_or_float_order_of_the_same_value_gives_the_same_bits(device):
    tensor = cases.random_values((30, 20), torch.float32, device)
    for n in (0, 1, 2, 3, -1):
        cases.assert_same_bits(
            lnprune.channel_norms(tensor, n, 0), lnprune.channel_norms(tensor, float(n), 0)
        )
    for n in (None, "fro", True + True):
        cases.assert_same_bits(lnprune.channel_norms(tensor, n, 0), lnprune.channel_norms(tensor, 2, 0))


@pytest.mark.parametrize("n", [7.5, -7.5, 8, -8, 12.5, 0.01, 30, -30, 0.05, 4, 5, 6, 7, 1.5, 3.5, -0.5])
def test_orders_at_the_edges_of_the_kinds_of_loops(n, device):
    # A norm's relative error is that of the sum over n, so that small orders lose digits for everyone.
    tensor = 0.5 + torch.rand(300, 3, dtype=torch.float64, device=device)
    tolerance = cases.TOLERANCE * max(1.0, 10 / abs(n))
    for matrix, dim in ((tensor, 1), (tensor.T.contiguous(), 0)):
        norms = lnprune.channel_norms(matrix, n, dim)
        cases.assert_norms_close(norms, cases.exact_norms(matrix, n, dim), n, dim, tolerance)


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("n", cases.NORMS)
def test_nan_makes_the_norm_nan_unless_elements_are_counted(n, dtype, device):
    for length in (1, 5, 64, 700):
        for position in {0, length // 2, length - 1}:
            values = [1.0] * length
            values[position] = cases.NAN
            for matrix, dim in (
                (column(values, dtype, device), 1),
                (column(values, dtype, device).T.contiguous(), 0),
            ):
                norms = lnprune.channel_norms(matrix, n, dim).tolist()
                assert (norms[1] == length) if n == 0 else math.isnan(norms[1]), (length, position, dim)
                assert not math.isnan(norms[0])
                assert not math.isnan(norms[2])


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("payload", [1, 0x3FFFFF, 0x400000, 0x7FFFFF])
def test_nan_of_every_sign_and_payload(payload, sign, device):
    # Norms on bits must not let a large payload or the sign bit wrap around.
    pattern = (0x7F800000 | payload) - (2**31 if sign < 0 else 0)
    patterns = torch.full((70, 3), 0x3F800000, dtype=torch.int32)
    patterns[33, 1] = pattern
    tensor = patterns.view(torch.float32).to(device)
    assert tensor[33, 1].isnan()
    assert tensor[33, 1].signbit() == (sign < 0)
    for n in cases.NORMS:
        for matrix, dim in ((tensor, 1), (tensor.T.contiguous(), 0)):
            norms = lnprune.channel_norms(matrix, n, dim).tolist()
            assert norms[1] == 70 if n == 0 else math.isnan(norms[1]), (n, dim)


@pytest.mark.parametrize("dtype", cases.DTYPES_WITH_INFINITY, ids=str)
@pytest.mark.parametrize("infinity", [cases.INFINITY, -cases.INFINITY])
def test_infinity(infinity, dtype, device):
    some = [1.0, 2.0, infinity, 0.5, 4.0]
    expected_some = {0: 5.0, cases.INFINITY: math.inf, -cases.INFINITY: 0.5}
    for n in cases.NORMS:
        results, _ = both_ways(some, dtype, device, n)
        for result in results:
            if n in expected_some:
                assert result == expected_some[n], n
            elif n > 0:
                assert result == math.inf, n
            else:
                exact = sum(abs(value) ** n for value in some) ** (1 / n)
                assert result == pytest.approx(exact, rel=cases.TOLERANCE, abs=0), n
        results, run = both_ways([infinity] * 3, dtype, device, n)
        assert results == ([3.0, 3.0] if n == 0 else [math.inf, math.inf]), n
        assert run == (600.0 if n == 0 else math.inf), n


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros(zero, dtype, device):
    for n in cases.NORMS:
        results, run = both_ways([zero] * 4, dtype, device, n)
        for result in [*results, run]:
            assert result == 0.0, n
            assert math.copysign(1.0, result) == 1.0, n
        # One zero is enough for a negative order, and no more than an element for a positive one.
        results, _ = both_ways([zero, 1.0, zero], dtype, device, n)
        expected = 0.0 if n < 0 else 1.0
        assert results == [expected, expected], n


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_denormals_are_not_flushed(dtype, device):
    smallest = cases.SMALLEST_DENORMAL[dtype]
    values = [3 * smallest, -smallest, 2 * smallest]
    for n, expected in (
        (0, 3.0),
        (1, 6 * smallest),
        (cases.INFINITY, 3 * smallest),
        (-cases.INFINITY, smallest),
    ):
        results, run = both_ways(values, dtype, device, n)
        assert results == [expected, expected], n
        assert run == (expected * 200 if n in (0, 1) else expected), n
    if dtype == torch.float64:
        # Squares of these are zero in float64, and roots of these are not.
        assert both_ways(values, dtype, device, 2) == ([0.0, 0.0], 0.0)
        orders = [0.5]
    else:
        orders = [0.5, 2, 2.5, 3, -1, 1.7, -2.3]
    for n in orders:
        results, _ = both_ways(values, dtype, device, n)
        tensor = torch.tensor([[abs(value) for value in values]], dtype=torch.float64)
        expected = cases.reference_norms(tensor, n, 0).item()
        assert results == pytest.approx([expected] * 2, rel=1e-12, abs=0), n


@pytest.mark.parametrize("n", [0.5, 1, 2, 2.5, 3, 1.7])
def test_sums_beyond_the_range_of_the_weights_dtype(n, device):
    # The largest float16 in every element: sums overflow float16 and, for orders above 2, powers do.
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch.full((100, 3), torch.finfo(dtype).max, dtype=dtype, device=device)
        for dim in (0, 1):
            norms = lnprune.channel_norms(tensor, n, dim)
            assert norms.isfinite().all()
            cases.assert_norms_close(norms, cases.exact_norms(tensor, n, dim), n, dim, 1e-12)


ELEMENTS = strategies.one_of(
    strategies.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 0.5, 3.0, math.nan, math.inf, -math.inf, 2.0**-149, -(2.0**-126), 2.0**-130]
    ),
    strategies.floats(width=32, allow_nan=True, allow_infinity=True),
)


@strategies.composite
def strided_tensors(draw):
    """A tensor with any order of dims, any gaps, any base, few or many distinct values."""
    shape = draw(strategies.lists(strategies.integers(1, 7), min_size=2, max_size=4))
    if draw(strategies.booleans()):
        shape[draw(strategies.integers(0, len(shape) - 1))] = draw(
            strategies.sampled_from([63, 64, 65, 130])
        )
    order = draw(strategies.permutations(range(len(shape))))
    gaps = draw(strategies.lists(strategies.integers(0, 2), min_size=len(shape), max_size=len(shape)))
    base = draw(strategies.integers(0, 3))
    strides = [0] * len(shape)
    stride = 1
    for d, gap in zip(order, gaps, strict=True):
        step = draw(strategies.sampled_from([1, 1, 1, 2, 3]))
        strides[d] = stride * step
        stride = strides[d] * shape[d] + gap * draw(strategies.integers(0, 1))
    pool = draw(strategies.lists(ELEMENTS, min_size=1, max_size=40))
    generator = torch.Generator().manual_seed(draw(strategies.integers(0, 2**31)))
    storage = torch.tensor(pool)[torch.randint(len(pool), (base + stride,), generator=generator)]
    dtype = draw(strategies.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return storage.to(dtype).as_strided(shape, strides, base)


@EXAMPLES
@hypothesis.given(data=strategies.data())
def test_norms_of_any_strides_and_values(data, device):
    tensor = data.draw(strided_tensors()).to(device)
    dim = data.draw(strategies.integers(0, tensor.dim() - 1))
    n = data.draw(strategies.sampled_from(cases.NORMS))
    norms = lnprune.channel_norms(tensor, n, dim)
    # Powers of the smallest and largest floats lose digits in proportion to the exponent.
    cases.assert_norms_close(norms, cases.reference_norms(tensor, n, dim), n, "", 2e-12)


@pytest.mark.cpu
@pytest.mark.parametrize("n", cases.NORM_KINDS)
@pytest.mark.parametrize("shape", cases.LARGE_SHAPES)
def test_threads_do_not_change_the_bits(shape, n, device):
    size, dim = cases.LARGE_SHAPES[shape]
    tensor = cases.random_values(size, torch.float64, device)
    with cases.threads(1):
        expected = lnprune.channel_norms(tensor, n, dim)
    for count in (2, 5):
        with cases.threads(count):
            cases.assert_same_bits(lnprune.channel_norms(tensor, n, dim), expected, count)


def test_neither_threads_nor_neighbours_in_a_list_change_the_bits(device):
    tensors = []
    dims = []
    for size, dim in cases.LARGE_SHAPES.values():
        tensors.append(cases.random_values(size, torch.float32, device))
        dims.append(dim)
    for shape in cases.SMALL_SHAPES.values():
        tensors.append(cases.random_values(shape, torch.float16, device))
        dims.append(len(shape) - 1)
    expected = [lnprune.channel_norms(tensor, 2, dim) for tensor, dim in zip(tensors, dims, strict=True)]
    for count in (1, 2):
        with cases.threads(count):
            for actual, wanted in zip(ops.channel_norms(tensors, dims, 2.0), expected, strict=True):
                cases.assert_same_bits(actual, wanted, count)


def identical_channels(shape, dim, dtype, device):
    """A tensor whose channels along ``dim`` are all the same."""
    one = list(shape)
    one[dim] = 1
    values = cases.random_values(tuple(one), torch.float64)
    return values.to(dtype).expand(shape).contiguous().to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [*cases.SMALL_SHAPES, *cases.LARGE_SHAPES])
def test_identical_channels_tie_wherever_they_lie(shape, dtype, device):
    size = cases.SMALL_SHAPES.get(shape) or cases.LARGE_SHAPES[shape][0]
    dims = range(len(size)) if shape in cases.SMALL_SHAPES else [cases.LARGE_SHAPES[shape][1]]
    for dim in dims:
        tensor = identical_channels(size, dim, dtype, device)
        for n in [2, 1, 3, 1.7]:
            norms = lnprune.channel_norms(tensor, n, dim)
            assert (norms == norms[0]).all(), (dim, n, norms)


@pytest.mark.parametrize("shape", [(5, 8, 3, 3), (6, 40), (40, 6), (7, 13, 65), (3, 515)])
def test_a_channel_has_the_same_norm_at_every_position(shape, device):
    for dim in range(len(shape)):
        values = cases.random_values(shape, torch.float64, device)
        expected = lnprune.channel_norms(values, 1.7, dim)
        for shift in range(shape[dim]):
            rolled = values.roll(shift, dim)
            cases.assert_same_bits(
                lnprune.channel_norms(rolled, 1.7, dim), expected.roll(shift), (dim, shift)
            )


@cases.in_pairs(
    shape=[*cases.SMALL_SHAPES, "columns_of_two_strips", "runs_of_two_strips"],
    dtype=cases.NATIVE_DTYPES[:5],
    orders=cases.NORM_KINDS,
)
def test_an_unaligned_base_does_not_change_the_bits(shape, dtype, orders, device):
    size = cases.SMALL_SHAPES.get(shape) or cases.LARGE_SHAPES[shape][0]
    values = cases.random_values(size, dtype, device)
    for offset in (1, 3):
        room = cases.poisoned((values.numel() + 2 * offset,), values)[offset:-offset]
        moved = room.view(size).copy_(values)
        for dim in range(len(size)):
            for n in orders:
                expected = lnprune.channel_norms(values, n, dim)
                cases.assert_same_bits(lnprune.channel_norms(moved, n, dim), expected, (offset, dim, n))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_norms_leave_the_tensor_alone_and_have_no_gradient(layout, device):
    tensor = cases.LAYOUTS[layout](cases.random_values((6, 5, 3, 3), torch.float32, device))
    before = tensor.clone()
    leaf = tensor.detach().requires_grad_()
    norms = lnprune.channel_norms(leaf, 2, 0)
    assert not norms.requires_grad
    cases.assert_same_bits(tensor, before)


INSTRUCTION_SETS = ["baseline", "x86-64-v3", "x86-64-v4"]

# Prints, as JSON, the instruction set that runs and a digest of the bits of each case.
DIGESTS = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
import cases, torch
from lnprune import ops

def digest(*tensors):
    hasher = hashlib.sha256()
    for tensor in tensors:
        integers = cases.bits(tensor)
        integers[cases.wide(tensor).isnan()] = -1 if tensor.element_size() > 1 else 255
        hasher.update(integers.numpy().tobytes())
    return hasher.hexdigest()

generator = torch.Generator().manual_seed(7)
shapes = [((37, 21, 3, 3), 1), ((37, 21, 3, 3), 0), ((70, 515), 1), ((9, 2061), 0), ((4097, 5), 1)]
digests = {}
for dtype in cases.NATIVE_DTYPES:
    for shape, dim in shapes:
        ordinary = torch.randn(shape, generator=generator, dtype=torch.float64)
        special = ordinary * 2.0 ** torch.randint(-30, 8, shape, generator=generator)
        special[torch.rand(shape, generator=generator) < 0.001] = 0.0
        special[(torch.rand(shape, generator=generator) < 0.0002)] = float("inf")
        special[(torch.rand(shape, generator=generator) < 0.0002)] = float("nan")
        for name, values in (("ordinary", ordinary), ("special", special)):
            tensor = values.to(dtype)
            for n in [0.5, *cases.NORM_KINDS]:
                case = f"{name} {dtype} {shape} {dim} {n}"
                norms = ops.channel_norms([tensor], [dim], float(n))
                keep = ops.select_channels(norms, [], [shape[dim] // 2], [0.0])
                digests["norms " + case] = digest(*norms, *keep)
            first = ops.write_masks(keep, [tensor], [], [tensor], [dim])
            again = ops.write_masks(keep, [tensor], [tensor], [tensor], [dim])
            digests["write " + case] = digest(*first[0], *first[1], *again[0], *again[1])
print(json.dumps([ops.build_info()["instruction_set"], digests]))
"""


def run_with(instruction_set):
    """The instruction set that ran and the digests of the cases."""
    environment = {**os.environ, "LNPRUNE_INSTRUCTION_SET": instruction_set}
    here = os.path.dirname(os.path.abspath(cases.__file__))
    command = [sys.executable, "-c", DIGESTS, here]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def baseline_digests():
    name, digests = run_with("baseline")
    assert name == "baseline"
    return digests


@pytest.mark.cpu
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[1:])
def test_every_instruction_set_gives_the_same_bits(instruction_set, device, request):
    if device != "cpu":
        pytest.skip("instruction sets are of the CPU")
    baseline_digests = request.getfixturevalue("baseline_digests")
    name, digests = run_with(instruction_set)
    if name != instruction_set:
        pytest.skip(f"this processor or build runs {name}, not {instruction_set}")
    assert len(digests) > 700
    assert [case for case in digests if digests[case] != baseline_digests[case]] == []


def test_an_order_whose_inverse_overflows_is_left_to_torch(device):
    weight = torch.stack([torch.ones(5), torch.full((5,), 2.0)]).to(device)
    expected = torch.norm(weight.double(), p=1e-320, dim=1)
    assert torch.equal(lnprune.channel_norms(weight, 1e-320, 0), expected)
    assert torch.equal(
        lnprune.channel_norms(weight[:, :1], 1e-320, 0)[:1],
        torch.ones(1, dtype=torch.float64, device=device),
    )
