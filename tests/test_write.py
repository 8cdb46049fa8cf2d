"""The write step: masks and masked weights, bit for bit what torch multiplies."""

import math

import cases
import pytest
import torch

from lnprune import ops

pytestmark = pytest.mark.parametrize("device", cases.DEVICES)


def old_mask(kind, scores, dtype):
    """A mask so far: of zeros and ones, by element or by channel, or of any values."""
    shape = scores.shape
    if kind == "ones":
        return torch.ones_like(scores, memory_format=torch.contiguous_format)
    if kind == "zeros_and_ones":
        return torch.randint(0, 2, shape).to(dtype).to(scores.device)
    if kind == "soft":
        return (torch.rand(shape, dtype=torch.float64) * 2).to(dtype).to(scores.device)
    if kind == "negative":
        choices = torch.tensor([-1.0, -0.0, 0.0, 1.0], dtype=torch.float64)
        return choices[torch.randint(4, shape)].to(dtype).to(scores.device)
    return cases.special_values(shape, dtype, scores.device)


MASK_KINDS = ["ones", "zeros_and_ones", "soft", "negative", "special"]


def assert_written(keep, scores, mask, original, dim, case=""):
    """Writes, compares with torch's products and returns the mask and the weight."""
    masks, weights = ops.write_masks(
        [keep], [scores], [] if mask is None else [mask], [] if original is None else [original], [dim]
    )
    if mask is not None:
        mask = mask.contiguous()
    expected_mask, expected_weight = cases.expected_write(keep, scores, mask, original, dim)
    layout = torch.zeros_like(scores if mask is None else mask)
    assert masks[0].stride() == layout.stride(), case
    cases.assert_same_bits(masks[0], expected_mask, case)
    if original is None:
        assert weights == []
        return masks[0], None
    assert weights[0].stride() == layout.stride(), case
    cases.assert_same_bits(weights[0], expected_weight, case)
    return masks[0], weights[0]


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.WRITE_PATHS)
def test_first_masks_and_weights(path, dtype, device):
    shape, dim = cases.WRITE_PATHS[path]
    scores = cases.special_values(shape, dtype, device)
    keep = cases.random_keep(shape[dim], device)
    mask, weight = assert_written(keep, scores, None, scores, dim)
    assert_written(keep, scores, None, None, dim)
    assert_written(keep, scores, None, scores, dim - len(shape))
    assert mask.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(
    "path", ["columns", "columns_of_blocks", "runs", "rows_of_runs", "runs_beyond_a_block"]
)
def test_repeated_masks_and_weights(path, kind, dtype, device):
    shape, dim = cases.WRITE_PATHS[path]
    scores = cases.special_values(shape, dtype, device)
    mask = old_mask(kind, scores, dtype)
    keep = cases.random_keep(shape[dim], device)
    assert_written(keep, scores, mask, scores, dim)
    assert_written(keep, scores, mask, None, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", cases.WRITE_PATHS)
def test_repeated_masks_on_every_path(path, dtype, device):
    shape, dim = cases.WRITE_PATHS[path]
    scores = cases.special_values(shape, dtype, device)
    mask = old_mask("zeros_and_ones", scores, dtype)
    assert_written(cases.random_keep(shape[dim], device), scores, mask, scores, dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [40, 64, 600])
def test_one_soft_element_among_zeros_and_ones(length, dtype, device):
    # A block of zeros and ones may go a faster way, which one other value anywhere must prevent.
    for position in {0, 1, length // 2, length - 1}:
        for value in (0.5, -1.0, -0.0, math.nan, math.inf, 2.0):
            scores = cases.special_values((3, length), dtype, device)
            mask = torch.ones_like(scores)
            mask[1, position] = value
            keep = torch.tensor([False, True, True], device=device)
            assert_written(keep, scores, mask, scores, 0, (position, value))
            assert_written(
                torch.ones(length, dtype=torch.bool, device=device),
                scores,
                mask,
                scores,
                1,
                (position, value),
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_every_pattern_of_sixteen_bits(keep, dtype, device):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    flags = torch.tensor([keep], device=device)
    assert_written(flags, patterns.view(1, -1), None, patterns.view(1, -1), 0)
    for value in (1.0, 0.0, -0.0, 0.37, -3.0):
        mask = torch.full_like(patterns, value).view(1, -1)
        assert_written(flags, patterns.view(1, -1), mask, patterns.view(1, -1), 0, value)


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES[4:], ids=str)
def test_every_product_of_eight_bits(dtype, device):
    patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).to(device)
    mask = patterns.view(torch.uint8).repeat_interleave(256).view(dtype).view(256, 256)
    original = patterns.view(torch.uint8).repeat(256).view(dtype).view(256, 256)
    keep = torch.ones(256, dtype=torch.bool, device=device)
    for dim in (0, 1):
        assert_written(keep, original, mask, original, dim)
        assert_written(~keep, original, mask, original, dim)


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (30, 70), (1, 6, 1, 4, 1)])
def test_every_layout(shape, layout, dtype, device):
    scores = cases.LAYOUTS[layout](cases.special_values(shape, dtype, device))
    # The original has the layout of the mask: that of the scores, or where they have gaps a dense one.
    original = torch.empty_like(scores).copy_(cases.special_values(shape, dtype, device))
    mask = cases.LAYOUTS[layout](old_mask("soft", scores, dtype))
    for dim in range(len(shape)):
        keep = cases.random_keep(shape[dim], device)
        assert_written(keep, scores, None, original, dim, dim)
        assert_written(keep, scores, mask, original.contiguous(), dim, dim)


@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
def test_an_original_of_the_very_layout_of_dense_scores(layout, device):
    scores = cases.LAYOUTS[layout](cases.special_values((6, 5, 3, 3), torch.float32, device))
    for dim in range(4):
        assert_written(cases.random_keep(scores.shape[dim], device), scores, None, scores, dim, dim)


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_and_lists_change_nothing(count, with_masks, device):
    tensors, masks, keeps, dims = [], [], [], []
    for number, (shape, dim) in enumerate(cases.WRITE_PATHS.values()):
        dtype = cases.NATIVE_DTYPES[number % len(cases.NATIVE_DTYPES)]
        tensors.append(cases.special_values(shape, dtype, device))
        masks.append(old_mask("soft", tensors[-1], dtype))
        keeps.append(cases.random_keep(shape[dim], device))
        dims.append(dim)
    if not with_masks:
        masks = []
    with cases.threads(count):
        new_masks, weights = ops.write_masks(keeps, tensors, masks, tensors, dims)
    assert len(new_masks) == len(weights) == len(tensors)
    for i, tensor in enumerate(tensors):
        mask = masks[i] if with_masks else None
        expected_mask, expected_weight = cases.expected_write(keeps[i], tensor, mask, tensor, dims[i])
        cases.assert_same_bits(new_masks[i], expected_mask, i)
        cases.assert_same_bits(weights[i], expected_weight, i)


def assert_pruned(tensors, masks, originals, dims, p, counts, shares):
    """``prune_channels`` against its three steps."""
    norms = ops.channel_norms(tensors, dims, p)
    mask_counts = ops.channel_norms(masks, dims, 0.0) if masks else []
    keeps = ops.select_channels(norms, mask_counts, counts, shares)
    expected_masks, expected_weights = ops.write_masks(keeps, tensors, masks, originals, dims)
    new_masks, weights = ops.prune_channels(tensors, masks, originals, dims, p, counts, shares)
    assert len(new_masks) == len(tensors)
    assert len(weights) == len(originals)
    for actual, expected in zip([*new_masks, *weights], [*expected_masks, *expected_weights], strict=True):
        cases.assert_same_bits(actual, expected)
        assert actual.stride() == expected.stride()
    return keeps


@cases.in_turn(dtype=cases.NATIVE_DTYPES, p=[0.0, 1.0, 2.0, 3.0, 1.7, math.inf, -math.inf])
def test_pruning_is_its_three_steps(p, dtype, device):
    paths = ["columns", "columns_of_blocks", "runs", "rows_of_runs", "dims_of_size_one", "one_channel"]
    tensors = [cases.random_values(cases.WRITE_PATHS[path][0], dtype, device) for path in paths]
    dims = [cases.WRITE_PATHS[path][1] for path in paths]
    counts = [5, -1, 3, -1, 0, 1]
    shares = [0.0, 0.5, 0.0, 0.3, 0.0, 0.0]
    keeps = assert_pruned(tensors, [], tensors, dims, p, counts, shares)
    pruned = [int((~keep).sum()) for keep in keeps]
    assert pruned == [5, 6, 3, round(0.3 * 5), 0, 1]
    assert_pruned(tensors, [], [], dims, p, counts, shares)
    masks = ops.write_masks(keeps, tensors, [], [], dims)[0]
    keeps = assert_pruned(tensors, masks, tensors, dims, p, counts, shares)
    assert [int((~keep).sum()) for keep in keeps] == [10, 9, 6, 3, 0, 1]
    assert_pruned(tensors, masks, [], dims, p, counts, shares)


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
def test_masks_are_counted_beside_norms_of_every_order(dtype, device):
    scores = cases.random_values((9, 7), dtype, device)
    mask = old_mask("ones", scores, dtype)
    mask[3] = 0
    for p in cases.NORM_KINDS:
        for dim, count in ((0, 2), (1, 3)):
            (keep,) = assert_pruned([scores], [mask], [scores], [dim], float(p), [count], [0.0])
            assert int((~keep).sum()) == count + (dim == 0)


def test_pruning_keeps_a_channel_of_one_soft_mask_element_alive(device):
    scores = torch.tensor([[9.0, 9.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], device=device)
    mask = torch.tensor([[0.0, -0.0], [0.0, 1e-40], [1.0, 1.0], [math.nan, 0.0]], device=device)
    (new_mask,), (weight,) = ops.prune_channels([scores], [mask], [scores], [0], 2.0, [-1], [1 / 3])
    keep = torch.tensor([False, False, True, True], device=device)
    expected_mask, expected_weight = cases.expected_write(keep, scores, mask, scores, 0)
    cases.assert_same_bits(new_mask, expected_mask)
    cases.assert_same_bits(weight, expected_weight)


@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
@pytest.mark.parametrize("with_masks", [False, True])
def test_outputs_share_no_memory_with_inputs_or_each_other(with_masks, layout, device):
    scores = cases.LAYOUTS[layout](cases.random_values((6, 5, 3, 3), torch.float32, device))
    masks = [torch.ones(6, 5, 3, 3, device=device)] if with_masks else []
    original = torch.empty_like(masks[0] if with_masks else scores).copy_(scores)
    inputs = [scores, original, *masks]
    before = [tensor.clone() for tensor in inputs]
    keep = torch.ones(6, dtype=torch.bool, device=device)
    for pruned in (0, 3):
        outputs = ops.write_masks([keep], [scores], masks, [original], [0])
        more = ops.prune_channels([scores], masks, [original], [0], 2.0, [pruned], [0.0])
        tensors = [*inputs, *outputs[0], *outputs[1], *more[0], *more[1]]
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert len(storages) == len(tensors)
    for tensor, expected in zip(inputs, before, strict=True):
        cases.assert_same_bits(tensor, expected)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
def test_more_than_the_caches_hold(dtype, device):
    # Together 16 MB and more of masks and weights, which the CPU stores past its caches: in the second
    # round to memory that was used before. One is so large that it gets huge pages.
    large = (1 << 23) // torch.empty((), dtype=dtype).element_size()
    paths = [*cases.WRITE_PATHS.values(), ((large // 1000 + 1, 1000), 0), ((large // 999 + 1, 999), 1)]
    scores = [cases.special_values(shape, dtype, device) for shape, _ in paths]
    masks = [old_mask("negative", score, dtype) for score in scores]
    dims = [dim for _, dim in paths]
    keep = [cases.random_keep(shape[dim], device) for shape, dim in paths]
    expected = [cases.expected_write(*one) for one in zip(keep, scores, masks, scores, dims, strict=True)]
    for _ in range(2):
        written = ops.write_masks(keep, scores, masks, scores, dims)
        for mask, weight, (expected_mask, expected_weight) in zip(*written, expected, strict=True):
            cases.assert_same_bits(mask, expected_mask)
            cases.assert_same_bits(weight, expected_weight)
        del written, mask, weight


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(130, 70), (40, 1100), (700, 90), (9, 40, 3, 3), (30, 8200)], ids=str)
def test_one_element_keeps_a_channel_alive(shape, dim, dtype, device):
    # Anywhere in it, NaN too; zeros of either sign do not.
    mask = torch.zeros(shape)
    mask[torch.rand(shape) < 0.5] = -0.0
    alive = cases.random_keep(shape[dim], "cpu")
    for channel in alive.nonzero().flatten().tolist():
        elements = mask.select(dim, channel)
        place = torch.unravel_index(torch.randint(elements.numel(), ()), elements.shape)
        elements[place] = [1.0, -0.5, math.nan][channel % 3]
    mask = mask.to(dtype).to(device)
    scores = cases.special_values(shape, dtype, device)
    assert torch.equal(ops.channel_norms([mask], [dim], 0.0)[0].cpu() != 0, alive)
    assert_pruned([scores], [mask], [scores], [dim], 2.0, [-1], [0.5])
