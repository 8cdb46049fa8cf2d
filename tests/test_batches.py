"""Batches: of one tensor with many matrices every step gives what it gives of each matrix alone."""

import math

import cases
import pytest
import torch

from lnprune import ops, reference
from lnprune.steps.batches import (
    Batch,
    channels_of,
    dim_in_matrix,
    filled,
    is_outside,
    matrices,
    numbers,
    put,
    shape_of_matrix,
    taken,
)

# Shape, dim, batch, and what the view is.
CASES = {
    "rows": ((6, 24, 17), 1, Batch(0, 6)),
    "columns": ((6, 24, 17), 2, Batch(0, 6)),
    "runs_in_rows": ((3, 4, 5, 130), 2, Batch(0, 3)),
    "long_columns": ((3, 1400, 12), 2, Batch(0, 3)),
    "wide_columns": ((2, 5, 8200), 2, Batch(0, 2)),
    "odd_rows": ((4, 33, 65), 2, Batch(0, 4)),
    "convolutions": ((3, 6, 4, 3, 3), 2, Batch(0, 3)),
    "one_channel": ((5, 8, 1), 2, Batch(0, 5)),
    "one_row": ((5, 1, 8), 2, Batch(0, 5)),
    "one_matrix": ((1, 8, 7), 2, Batch(0, 1)),
    "vectors": ((5, 12), 1, Batch(0, 5)),
    "heads": ((24, 10), 0, Batch(0, 4)),
    "heads_of_columns": ((24, 10), 1, Batch(0, 4)),
    "heads_inside": ((10, 24), 1, Batch(1, 4)),
    "many": ((200, 3, 4), 2, Batch(0, 200)),
    "batch_beside_channels": ((5, 3, 8), 2, Batch(1, 3)),
    "many_channels": ((2, 2, 4500), 2, Batch(0, 2)),
}
# Layouts that native code does not take: the batch lies within the channels, or between what they span.
OTHERS = {
    "batch_inside": ((7, 6, 5), 0, Batch(1, 6)),
    "batch_between": ((3, 4, 5, 6), 3, Batch(1, 4)),
    "heads_of_other_channels": ((10, 24), 0, Batch(1, 4)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float8_e4m3fn]


def parts(tensor, batch):
    """Each matrix as a tensor of its own, of two dims or more."""
    found = matrices(tensor, batch)
    return [(part if part.dim() > 1 else part.unsqueeze(-1)).contiguous() for part in found]


def alone(tensor, dim, batch):
    """Each matrix with the dim of its channels."""
    return [(part, dim_in_matrix(tensor.shape, dim, batch)) for part in parts(tensor, batch)]


def flags_for(shape, dim, batch):
    return torch.cat([cases.random_keep(channels_of(shape, dim, batch)) for _ in range(batch.size)])


@pytest.mark.parametrize("device", cases.DEVICES)
@cases.in_turn(name=CASES, dtype=DTYPES)
def test_norms_are_those_of_each_matrix(name, dtype, device):
    shape, dim, batch = CASES[name]
    values = cases.random_values(shape, dtype, device)
    for n in cases.NORM_KINDS:
        [norms] = ops.channel_norms([values], [dim], float(n), numbers([batch]))
        expected = torch.cat(
            [cases.exact_norms(part, n, along) for part, along in alone(values, dim, batch)]
        )
        cases.assert_norms_close(norms, expected, n, name)
        [unaligned] = ops.channel_norms([cases.unaligned(values)], [dim], float(n), numbers([batch]))
        cases.assert_same_bits(unaligned, norms, "another alignment")
    [sums] = ops.channel_sums([values], [dim], 2.0, numbers([batch]))
    cases.assert_norms_close(sums.sqrt(), cases.wide(norms_of(values, dim, batch)), 2, name)


def norms_of(values, dim, batch):
    return ops.channel_norms([values], [dim], 2.0, numbers([batch]))[0]


def test_equal_matrices_have_equal_norms():
    for shape in ((40, 66), (1400, 6), (17, 301)):
        matrix = cases.random_values(shape, torch.float32)
        values = torch.stack([matrix, cases.random_values(shape, torch.float32), matrix])
        for dim in (1, 2):
            norms = ops.channel_norms([values], [dim], 1.7, [0, 3])[0].view(3, -1)
            assert torch.equal(norms[0], norms[2])
            assert not torch.equal(norms[0], norms[1])


@pytest.mark.parametrize("device", cases.DEVICES)
@cases.in_turn(name=CASES, dtype=DTYPES)
def test_masks_and_zeros_are_those_of_each_matrix(name, dtype, device):
    shape, dim, batch = CASES[name]
    values = cases.special_values(shape, dtype, device)
    keep = flags_for(shape, dim, batch).to(device)
    rows = keep.view(batch.size, -1)
    [mask], [weight] = ops.write_masks([keep], [values], [], [values], [dim], numbers([batch]))
    [again], [twice] = ops.write_masks([keep], [values], [values], [values], [dim], numbers([batch]))
    zeros = values.clone()
    ops.zero_channels_([zeros], [keep], [dim], numbers([batch]))
    made = [parts(each, batch) for each in (mask, weight, again, twice, zeros)]
    for i, (part, along) in enumerate(alone(values, dim, batch)):
        expected = cases.expected_write(rows[i], part, None, part, along)
        expected += cases.expected_write(rows[i], part, part, part, along)
        for results, wanted in zip(made[:4], expected, strict=True):
            cases.assert_same_bits(results[i], wanted, (name, i))
        ops.zero_channels_([part], [rows[i]], [along])
        cases.assert_same_bits(made[4][i], part, (name, i))
    assert torch.equal(reference.write_mask(keep, values.float(), None, dim, batch), mask.float())


@pytest.mark.parametrize("device", cases.DEVICES)
@cases.in_turn(name=CASES, dtype=DTYPES)
def test_pruning_is_that_of_each_matrix(name, dtype, device):
    shape, dim, batch = CASES[name]
    # Few values, so that channels tie.
    values = torch.randint(-1, 2, shape, device=device).to(dtype)
    channels = channels_of(shape, dim, batch)
    count, along = channels // 2, numbers([batch])
    [mask], [weight] = ops.prune_channels([values], [], [values], [dim], 1.0, [count], [0.0], along)
    [again], _ = ops.prune_channels([values], [mask], [], [dim], 1.0, [-1], [0.4], along)
    written = values.clone()
    ops.prune_channels_([values], [written], [dim], 1.0, [count], [0.0], along)
    made = [parts(each, batch) for each in (mask, weight, again, written)]
    for i, (part, at) in enumerate(alone(values, dim, batch)):
        [first], [product] = ops.prune_channels([part], [], [part], [at], 1.0, [count], [0.0])
        [second], _ = ops.prune_channels([part], [first], [], [at], 1.0, [-1], [0.4])
        ops.prune_channels_([part], [part], [at], 1.0, [count], [0.0])
        for results, wanted in zip(made, (first, product, second, part), strict=True):
            cases.assert_same_bits(results[i], wanted, (name, i))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_a_list_of_tensors_with_batches_and_without(device):
    shapes = [shape for shape, _, _ in CASES.values()]
    dims = [dim for _, dim, _ in CASES.values()]
    batches = [batch if i % 3 else None for i, (_, _, batch) in enumerate(CASES.values())]
    tensors = [cases.random_values(shape, torch.float32, device) for shape in shapes]
    counts = [
        channels_of(shape, dim, batch) // 2 for shape, dim, batch in zip(shapes, dims, batches, strict=True)
    ]
    amounts = counts, [0.0] * len(counts)
    masks, _ = ops.prune_channels(tensors, [], [], dims, 2.0, *amounts, numbers(batches))
    for i, mask in enumerate(masks):
        [one], _ = ops.prune_channels(
            [tensors[i]],
            [],
            [],
            dims[i : i + 1],
            2.0,
            counts[i : i + 1],
            [0.0],
            numbers(batches[i : i + 1]),
        )
        assert torch.equal(mask, one)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_rankings_of_one_tensor_have_amounts_of_their_own(device):
    norms = torch.randint(0, 9, (7, 40), dtype=torch.float64)
    norms[2, 5], norms[3] = math.nan, 1.0
    counts = [3, 3, 40, 0, 3, 39, -1]
    shares = [0.0] * 6 + [0.25]
    for alive in (None, torch.randint(0, 2, (7, 40), dtype=torch.float64)):
        masks = [] if alive is None else [alive.flatten().to(device)]
        [keep] = ops.select_channels([norms.flatten().to(device)], masks, counts, shares, [7])
        for i, flags in enumerate(keep.view(7, 40).cpu()):
            left = torch.ones(40, dtype=torch.bool) if alive is None else alive[i] != 0
            pruned = counts[i] if counts[i] >= 0 else round(0.25 * int(left.sum()))
            wanted = torch.zeros(40, dtype=torch.bool)
            wanted[left] = torch.tensor(
                cases.brute_force_keep(norms[i][left].tolist(), min(pruned, int(left.sum())))
            )
            assert torch.equal(flags, wanted)


def test_which_layouts_native_code_takes():
    for shape, dim, batch in CASES.values():
        assert is_outside(torch.randn(shape), dim, batch)
    for shape, dim, batch in OTHERS.values():
        values = torch.randn(shape)
        assert not is_outside(values, dim, batch)
        with pytest.raises(RuntimeError, match="outside of all other dims"):
            ops.channel_norms([values], [dim], 2.0, numbers([batch]))
    assert not is_outside(torch.randn(4, 6, 8).transpose(0, 2), 1, Batch(0, 8))
    assert is_outside(torch.randn(4, 6, 8).transpose(1, 2), 1, Batch(0, 4))
    assert not is_outside(torch.randn(4, 6, 1).expand(4, 6, 8), 1, Batch(0, 4))


@pytest.mark.parametrize("name", OTHERS)
def test_plain_torch_takes_any_layout(name):
    shape, dim, batch = OTHERS[name]
    values = torch.randn(shape)
    norms = reference.channel_norms(values, 3, dim, batch)
    sums = reference.channel_sums(values, 3, dim, batch)
    keep = flags_for(shape, dim, batch)
    mask = reference.write_mask(keep, values, None, dim, batch)
    rows = keep.view(batch.size, -1)
    found = zip(
        alone(values, dim, batch), norms.view(batch.size, -1), parts(mask, batch), rows, strict=True
    )
    for (part, along), each, written, flags in found:
        assert torch.equal(each, reference.channel_norms(part, 3, along))
        assert torch.equal(written, cases.expected_write(flags, part, None, None, along)[0])
    cases.assert_norms_close(sums.pow(1 / 3), norms, 3)


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_slices_of_channels_are_copied_put_back_and_filled(name):
    shape, dim, batch = (CASES | OTHERS)[name]
    values = torch.randn(shape)
    keep = flags_for(shape, dim, batch)
    channels = (~keep).nonzero().flatten()
    kept = taken(values, dim, batch, channels)
    changed = values.clone()
    filled(changed, dim, batch, channels, 0)
    assert torch.equal(changed, values * reference.write_mask(keep, values, None, dim, batch))
    assert torch.equal(taken(changed, dim, batch, channels), torch.zeros_like(kept))
    put(changed, dim, batch, channels, kept)
    assert torch.equal(changed, values)
    assert (
        tuple(parts(values, batch)[0].shape)
        == (*shape_of_matrix(shape, batch), 1)[: max(2, len(shape_of_matrix(shape, batch)))]
    )


def test_bad_batches():
    values = torch.randn(4, 6)
    for batches, says in (
        ([0], "no batches or a dim and a count per tensor, got 1 numbers for 1"),
        ([2, 2], r"expected a batch dim in \[-2, 2\), got 2"),
        ([0, 3], "expected a batch that divides the 4 indices of its dim, got 3"),
        ([0, 0], "expected a batch that divides the 4 indices of its dim, got 0"),
    ):
        with pytest.raises(RuntimeError, match=says):
            ops.channel_norms([values], [1], 2.0, batches)
    keep = torch.ones(6, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="expected 24 contiguous bool keep flags, got 6"):
        ops.zero_channels_([values], [keep], [1], [0, 4])
    norms = torch.ones(6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="rankings of equal length, 4 of them, got 6 norms"):
        ops.select_channels([norms], [], [1] * 4, [0.0] * 4, [4])
    with pytest.raises(RuntimeError, match="one count and one fraction"):
        ops.select_channels([norms], [], [1], [0.0], [3])
    with pytest.raises(RuntimeError, match="no numbers of rankings or one per tensor, got 2"):
        ops.select_channels([norms], [], [1] * 6, [0.0] * 6, [3, 3])


@pytest.mark.cpu
def test_fake_tensors_have_the_shapes_of_batches():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for shape, dim, batch in CASES.values():
            channels = batch.size * channels_of(shape, dim, batch)
            [norms] = ops.channel_norms([torch.empty(shape)], [dim], 2.0, numbers([batch]))
            assert norms.shape == (channels,)


@pytest.mark.cpu
@pytest.mark.parametrize("dim", [1, 2])
def test_large_batches_in_pieces_are_pruned_as_their_matrices(dim):
    """More bytes than are ranked before the first of them is written, beside tensors without a batch."""
    tensors = [
        cases.random_values(shape, torch.float32) for shape in ((21, 300, 257), (40, 50), (3, 700, 900))
    ]
    dims, batches = [dim, 0, dim], [Batch(0, 21), None, Batch(0, 3)]
    counts = [t.shape[d] // 3 for t, d in zip(tensors, dims, strict=True)]
    amounts = counts, [0.0] * 3, numbers(batches)
    masks, _ = ops.prune_channels(tensors, [], tensors, dims, 2.0, *amounts)
    again, _ = ops.prune_channels(tensors, masks, [], dims, 1.0, [-1] * 3, [0.4] * 3, numbers(batches))
    zeros = [tensor.clone() for tensor in tensors]
    ops.prune_channels_(tensors, zeros, dims, 2.0, *amounts)
    in_place = [tensor.clone() for tensor in tensors]
    ops.prune_channels_(in_place, in_place, dims, 2.0, *amounts)
    for i, tensor in enumerate(tensors):
        assert torch.equal(zeros[i], tensor * masks[i])
        assert torch.equal(in_place[i], zeros[i])
        for k, part in enumerate(tensor if batches[i] else [tensor]):
            along = dims[i] - (1 if batches[i] else 0)
            [mask], _ = ops.prune_channels([part], [], [], [along], 2.0, counts[i : i + 1], [0.0])
            [second], _ = ops.prune_channels([part], [mask], [], [along], 1.0, [-1], [0.4])
            assert torch.equal(masks[i][k] if batches[i] else masks[i], mask)
            assert torch.equal(again[i][k] if batches[i] else again[i], second)
