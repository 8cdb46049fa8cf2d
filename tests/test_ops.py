"""The ops themselves: their registration, their fake kernels, their errors, many threads at once."""

import concurrent.futures
import math

import cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lnprune import ops

pytestmark = pytest.mark.parametrize("device", cases.DEVICES)

NAMES = [
    *("channel_norms", "channel_sums", "norms_of_sums", "select_channels", "write_masks"),
    *("prune_channels", "zero_channels_", "prune_channels_"),
]


def sample(layout, dtype, device):
    """Scores of the layout, an original for a first mask, an old mask, an original for a repeated one."""
    scores = cases.LAYOUTS[layout](cases.random_values((6, 5, 3, 3), dtype, device))
    original = torch.empty_like(scores).copy_(scores)
    mask = cases.LAYOUTS[layout](torch.randint(0, 2, scores.shape).to(dtype).to(device))
    return scores, original, mask, original.contiguous()


def calls(layout, dtype, device):
    """Arguments of every op: one tensor, and two with another shape beside it."""
    scores, original, mask, repeated = sample(layout, dtype, device)
    matrix = cases.random_values((4, 70), dtype, device)
    pair, dims = [scores, matrix], [1, 0]
    norms = ops.channel_norms(pair, dims, 2.0)
    keeps = ops.select_channels(norms, [], [2, -1], [0.0, 0.5])
    pair_masks, pair_repeated = [mask, torch.ones_like(matrix)], [repeated, matrix]
    yield "channel_norms", ([scores], [-1], 2.0)
    yield "channel_norms", (pair, dims, math.inf)
    yield "channel_sums", (pair, dims, 3.0)
    yield "norms_of_sums", (norms, 3.0)
    yield "select_channels", (norms, [], [2, -1], [0.0, 0.5])
    yield "select_channels", (norms[:1], [torch.ones_like(norms[0])], [-1], [0.5])
    yield "write_masks", (keeps, pair, [], [], dims)
    yield "write_masks", (keeps, pair, [], [original, matrix], dims)
    yield "write_masks", (keeps, pair, pair_masks, pair_repeated, dims)
    yield "write_masks", (keeps[:1], [scores], [mask], [], dims[:1])
    yield "prune_channels", ([scores], [], [original], [1], 2.0, [2], [0.0])
    yield "prune_channels", (pair, pair_masks, pair_repeated, dims, 1.0, [-1, 1], [0.5, 0.0])
    yield "prune_channels", (pair, [], [], dims, 3.0, [1, 1], [0.0, 0.0])
    yield "zero_channels_", ([repeated, matrix], keeps, dims)
    yield "zero_channels_", ([original], keeps[:1], [1])
    yield "prune_channels_", ([matrix], [matrix], [0], 2.0, [2], [0.0])
    yield "prune_channels_", (pair, pair_repeated, dims, 1.0, [-1, 1], [0.5, 0.0])


def flat(result):
    """All tensors of a result, in order."""
    if result is None:
        return []
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


# Torch's own checker multiplies its inputs, which torch cannot do with float8.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
def test_opcheck(layout, dtype, device):
    seen = set()
    for name, arguments in calls(layout, dtype, device):
        operator = getattr(torch.ops.lnprune, name).default
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if dtype == torch.float32 and layout != "contiguous" and name not in seen:
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, arguments, test_utils=checks)
        seen.add(name)
    assert seen == set(NAMES)


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_fake_kernels_answer_what_the_real_ones_do(layout, dtype, device):
    for name, arguments in calls(layout, dtype, device):
        real = flat(getattr(ops, name)(*arguments))
        with FakeTensorMode() as mode:
            fake_arguments = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            fake = flat(getattr(ops, name)(*fake_arguments))
        assert len(fake) == len(real)
        assert (len(real) == 0) == name.endswith("_")
        for imagined, actual in zip(fake, real, strict=True):
            assert imagined.shape == actual.shape, name
            assert imagined.dtype == actual.dtype, name
            assert imagined.stride() == actual.stride(), name
            assert imagined.device == actual.device, name


def test_meta_tensors(device):
    scores = torch.empty(6, 5, 3, 3, device="meta")
    (norms,) = ops.channel_norms([scores], [1], 2.0)
    assert (norms.device.type, norms.shape, norms.dtype) == ("meta", (5,), torch.float64)
    masks, weights = ops.prune_channels([scores], [], [scores], [1], 2.0, [1], [0.0])
    assert masks[0].shape == weights[0].shape == scores.shape


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_no_op_has_a_gradient(layout, device):
    for name, arguments in calls(layout, torch.float32, device):
        leaves = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), arguments
        )
        for result in flat(getattr(ops, name)(*leaves)):
            assert not result.requires_grad


ONES = torch.ones(3, 4)
NORM = torch.ones(3, dtype=torch.float64)
KEEP = torch.ones(3, dtype=torch.bool)

# Every check of the ops: the op, its arguments, what the message says.
ERRORS = {
    "integer": ("channel_norms", ([ONES.int()], [0], 2.0), "real floating-point dtype, got Int"),
    "bool": ("channel_norms", ([ONES.bool()], [0], 2.0), "real floating-point dtype, got Bool"),
    "complex": ("channel_norms", ([ONES.to(torch.complex64)], [0], 2.0), "dtype, got ComplexFloat"),
    "dim_above": ("channel_norms", ([ONES], [2], 2.0), r"a dim in \[-2, 2\), got 2"),
    "dim_below": ("channel_norms", ([ONES], [-3], 2.0), r"a dim in \[-2, 2\), got -3"),
    "no_dims": ("channel_norms", ([torch.tensor(1.0)], [0], 2.0), r"a dim in \[0, 0\), got 0"),
    "no_elements": ("channel_norms", ([torch.ones(3, 0)], [0], 2.0), "a tensor with elements, got none"),
    "no_channels": ("channel_norms", ([torch.ones(0, 3)], [0], 2.0), "a tensor with elements, got none"),
    "second_tensor": ("channel_norms", ([ONES, ONES], [0, 5], 2.0), "got 5"),
    "more_dims": ("channel_norms", ([ONES], [0, 1], 2.0), "one dim per tensor, got 2 for 1"),
    "fewer_dims": ("channel_norms", ([ONES, ONES], [0], 2.0), "one dim per tensor, got 1 for 2"),
    "nan_order": ("channel_norms", ([ONES], [0], math.nan), "a real order, got NaN"),
    "nan_order_pruning": (
        "prune_channels",
        ([ONES], [], [], [0], math.nan, [1], [0.0]),
        "a real order, got NaN",
    ),
    "nan_order_sums": ("channel_sums", ([ONES], [0], math.nan), "a real order, got NaN"),
    "nan_order_roots": ("norms_of_sums", ([NORM], math.nan), "a real order, got NaN"),
    "integer_sums": ("channel_sums", ([ONES.int()], [0], 2.0), "real floating-point dtype, got Int"),
    "sums_dtype": ("norms_of_sums", ([NORM.float()], 2.0), "float64 sums with one dim, got Float with 1"),
    "sums_dims": ("norms_of_sums", ([NORM, NORM.view(3, 1)], 2.0), "got Double with 2"),
    "sums_gaps": ("norms_of_sums", ([NORM.repeat(2)[::2]], 2.0), "got Double with 1 dims, not contiguous"),
    "counts": ("select_channels", ([NORM], [], [1, 1], [0.0]), "got 2 and 1 for 1"),
    "fractions": ("select_channels", ([NORM], [], [1], []), "got 1 and 0 for 1"),
    "counts_pruning": ("prune_channels", ([ONES], [], [], [0], 2.0, [], [0.0]), "got 0 and 1 for 1"),
    "fraction_above": ("select_channels", ([NORM], [], [-1], [1.5]), r"fractions in \[0, 1\], got 1.5"),
    "fraction_below": ("select_channels", ([NORM], [], [-1], [-0.5]), r"fractions in \[0, 1\], got -0.5"),
    "fraction_nan": ("select_channels", ([NORM], [], [-1], [math.nan]), r"fractions in \[0, 1\], got nan"),
    "norms_dtype": ("select_channels", ([NORM.float()], [], [1], [0.0]), "got Float with 1"),
    "norms_dims": ("select_channels", ([NORM.view(3, 1)], [], [1], [0.0]), "got Double with 2"),
    "norms_gaps": ("select_channels", ([NORM.repeat(2)[::2]], [], [1], [0.0]), "contiguous float64 norms"),
    "mask_counts": ("select_channels", ([NORM], [NORM, NORM], [1], [0.0]), "or one per tensor, got 2"),
    "mask_counts_dtype": ("select_channels", ([NORM], [NORM.float()], [1], [0.0]), "got Float with 1"),
    "mask_counts_length": ("select_channels", ([NORM], [NORM[:2]], [1], [0.0]), "each of 3 channels"),
    "keep": ("write_masks", ([KEEP, KEEP], [ONES], [], [], [0]), "each of 1 tensors, got 2"),
    "keep_dtype": ("write_masks", ([KEEP.byte()], [ONES], [], [], [0]), "3 contiguous bool.*got 3 of Byte"),
    "keep_length": ("write_masks", ([KEEP], [ONES], [], [], [1]), "4 contiguous bool.*got 3 of Bool"),
    "keep_dims": ("write_masks", ([KEEP.view(3, 1)], [ONES], [], [], [0]), "contiguous bool keep flags"),
    "keep_gaps": (
        "write_masks",
        ([KEEP.repeat(2)[::2]], [ONES], [], [], [0]),
        "contiguous bool keep flags",
    ),
    "masks": ("write_masks", ([KEEP], [ONES], [ONES, ONES], [], [0]), "no masks or one per tensor, got 2"),
    "mask_shape": (
        "write_masks",
        ([KEEP], [ONES], [ONES[:, :3]], [], [0]),
        "shape and dtype of the scores",
    ),
    "mask_dtype": (
        "write_masks",
        ([KEEP], [ONES], [ONES.double()], [], [0]),
        "shape and dtype of the scores",
    ),
    "mask_pruning": (
        "prune_channels",
        ([ONES], [ONES.half()], [], [0], 2.0, [1], [0.0]),
        "shape and dtype of the scores",
    ),
    "originals": (
        "write_masks",
        ([KEEP], [ONES], [], [ONES, ONES], [0]),
        "originals or one per tensor, got 2",
    ),
    "original_dtype": (
        "write_masks",
        ([KEEP], [ONES], [], [ONES.double()], [0]),
        "shape, strides and dtype",
    ),
    "original_shape": ("write_masks", ([KEEP], [ONES], [], [ONES[:, :3]], [0]), "shape, strides and dtype"),
    "original_strides": (
        "write_masks",
        ([KEEP], [ONES], [], [ONES.T.contiguous().T], [0]),
        "shape, strides and dtype",
    ),
    "original_strides_of_scores": (
        "write_masks",
        ([KEEP], [ONES.T.contiguous().T], [ONES.T.contiguous().T], [ONES.T.contiguous().T], [0]),
        "shape, strides and dtype",
    ),
    "original_pruning": (
        "prune_channels",
        ([ONES], [], [ONES.half()], [0], 2.0, [1], [0.0]),
        "shape, strides and dtype",
    ),
    "keep_zeroing": ("zero_channels_", ([ONES], [], [0]), "each of 1 tensors, got 0"),
    "keep_dtype_zeroing": (
        "zero_channels_",
        ([ONES], [KEEP.byte()], [0]),
        "3 contiguous bool.*got 3 of Byte",
    ),
    "keep_length_zeroing": ("zero_channels_", ([ONES], [KEEP], [1]), "4 contiguous bool.*got 3 of Bool"),
    "dims_zeroing": ("zero_channels_", ([ONES], [KEEP], [0, 0]), "one dim per tensor, got 2 for 1"),
    "integer_zeroing": (
        "zero_channels_",
        ([ONES.int()], [KEEP], [0]),
        "real floating-point dtype, got Int",
    ),
    "gaps_zeroing": ("zero_channels_", ([ONES[:, :3]], [KEEP], [0]), "without gaps or overlaps"),
    "overlaps_zeroing": ("zero_channels_", ([ONES[:, :1].expand(3, 4)], [KEEP], [0]), "gaps or overlaps"),
    "counts_in_place": ("prune_channels_", ([ONES], [ONES], [0], 2.0, [], [0.0]), "got 0 and 1 for 1"),
    "nan_order_in_place": (
        "prune_channels_",
        ([ONES], [ONES], [0], math.nan, [1], [0.0]),
        "order, got NaN",
    ),
    "fewer_weights": ("prune_channels_", ([ONES] * 2, [ONES], [0, 0], 2.0, [1] * 2, [0.0] * 2), "2 for 1"),
    "more_weights": ("prune_channels_", ([ONES], [ONES, ONES], [0], 2.0, [1], [0.0]), "got 1 for 2"),
    "weight_shape": (
        "prune_channels_",
        ([ONES], [ONES[:, :3].contiguous()], [0], 2.0, [1], [0.0]),
        "a weight of the shape of its scores",
    ),
    "weight_gaps": ("prune_channels_", ([ONES], [ONES.repeat(1, 2)[:, ::2]], [0], 2.0, [1], [0.0]), "gaps"),
}


def moved(tensor, device):
    """On a device with its strides. On its way to another one ``to`` closes gaps."""
    storage = tensor.untyped_storage().to(device=torch.device(device))
    there = torch.empty(0, dtype=tensor.dtype, device=device)
    return there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_what_arrived(case, device):
    name, arguments, message = ERRORS[case]
    arguments = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda tensor: moved(tensor, device), arguments
    )
    with pytest.raises(RuntimeError, match=f"lnprune: expected .*{message}"):
        getattr(ops, name)(*arguments)


def test_an_original_of_the_layout_that_the_new_mask_gets_is_taken(device):
    # The same calls as the errors of strides, set right.
    ones, keep = ONES.to(device), KEEP.to(device)
    transposed = ones.T.contiguous().T
    assert ops.write_masks([keep], [transposed], [], [transposed], [0])[1][0].stride() == (1, 3)
    assert ops.write_masks([keep], [transposed], [transposed], [ones], [0])[1][0].stride() == (4, 1)


META_ONES, META_NORM, META_KEEP = (tensor.to("meta") for tensor in (ONES, NORM, KEEP))

# Every list of every op with a tensor without memory in it: first, last, or alone beside other lists.
MIXED = {
    "norms_first": ("channel_norms", ([META_ONES, ONES], [0, 0], 2.0)),
    "norms_last": ("channel_norms", ([ONES, META_ONES], [0, 0], 2.0)),
    "sums": ("channel_sums", ([ONES, META_ONES], [0, 0], 2.0)),
    "roots": ("norms_of_sums", ([META_NORM, NORM], 2.0)),
    "select_first": ("select_channels", ([META_NORM, NORM], [], [1, 1], [0.0, 0.0])),
    "select_last": ("select_channels", ([NORM, META_NORM], [], [1, 1], [0.0, 0.0])),
    "mask_counts": ("select_channels", ([NORM], [META_NORM], [1], [0.0])),
    "keep": ("write_masks", ([META_KEEP], [ONES], [], [], [0])),
    "scores": ("write_masks", ([KEEP], [META_ONES], [], [], [0])),
    "masks": ("write_masks", ([KEEP], [ONES], [META_ONES], [], [0])),
    "originals": ("write_masks", ([KEEP], [ONES], [], [META_ONES], [0])),
    "scores_pruning": ("prune_channels", ([ONES, META_ONES], [], [], [0, 0], 2.0, [1, 1], [0.0, 0.0])),
    "masks_pruning": ("prune_channels", ([ONES], [META_ONES], [], [0], 2.0, [1], [0.0])),
    "originals_pruning": ("prune_channels", ([ONES], [], [META_ONES], [0], 2.0, [1], [0.0])),
    "tensors_zeroing": ("zero_channels_", ([ONES, META_ONES], [KEEP, KEEP], [0, 0])),
    "keep_zeroing": ("zero_channels_", ([ONES], [META_KEEP], [0])),
    "scores_in_place": ("prune_channels_", ([META_ONES], [ONES], [0], 2.0, [1], [0.0])),
    "weights_in_place": (
        "prune_channels_",
        ([ONES] * 2, [ONES, META_ONES], [0] * 2, 2.0, [1] * 2, [0.0] * 2),
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_tensors_with_and_without_memory_in_one_call_are_refused(case, device):
    name, arguments = MIXED[case]
    arguments = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to(device), arguments
    )
    expected = f"lnprune: expected all tensors of a call on devices of one type, got {device} and meta"
    with pytest.raises(RuntimeError, match=expected):
        getattr(ops, name)(*arguments)


def test_fake_tensors_beside_meta_ones_are_refused(device):
    with FakeTensorMode():
        pair = [torch.ones(3, 4, device=device), torch.ones(3, 4, device="meta")]
        with pytest.raises(RuntimeError, match="devices of one type"):
            ops.channel_norms(pair, [0, 0], 2.0)


def test_more_channels_to_prune_than_there_are_prune_all(device):
    (keep,) = ops.select_channels([NORM.to(device)], [], [7], [0.0])
    assert keep.tolist() == [False] * 3


def test_calls_from_several_threads_at_once(device):
    inputs = []
    for number in range(24):
        dtype = cases.NATIVE_DTYPES[number % len(cases.NATIVE_DTYPES)]
        inputs.append((cases.random_values((64 + number, 900), dtype, device), number % 2))

    def prune(item):
        tensor, dim = item
        return flat(ops.prune_channels([tensor], [], [tensor], [dim], 2.0, [20], [0.0])) + flat(
            ops.channel_norms([tensor], [dim], 1.7)
        )

    expected = [prune(item) for item in inputs]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for results, wanted in zip(pool.map(prune, inputs), expected, strict=True):
                for actual, tensor in zip(results, wanted, strict=True):
                    cases.assert_same_bits(actual, tensor)


def test_empty_lists_give_empty_lists(device):
    assert ops.channel_norms([], [], 2.0) == []
    assert ops.channel_sums([], [], 2.0) == []
    assert ops.norms_of_sums([], 2.0) == []
    assert ops.select_channels([], [], [], []) == []
    assert ops.write_masks([], [], [], [], []) == ([], [])
    assert ops.prune_channels([], [], [], [], 2.0, [], []) == ([], [])
    assert ops.zero_channels_([], [], []) is None
    assert ops.prune_channels_([], [], [], 2.0, [], []) is None
