"""The CPU's tasks: enough for every thread that starts, and the same bits for any number of threads."""

import cases
import pytest
import torch

from lnprune import _C, ops

# The [outer, channels, inner] of a number of elements, in every layout.
LAYOUTS = {
    "columns": lambda elements: (elements // 4096, 4096, 1),
    "one column": lambda elements: (elements, 1, 1),
    "narrow rows": lambda elements: (elements // 5, 5, 1),
    "rows of 300": lambda elements: (elements // 300, 300, 1),
    "few rows": lambda elements: (3, elements // 3, 1),
    "convolution": lambda elements: (elements // (256 * 9), 256, 9),
    "narrow convolution": lambda elements: (elements // 27, 3, 9),
    "longest columns": lambda elements: (elements // (128 * 63), 128, 63),
    "short runs": lambda elements: (1, elements // 64, 64),
    "runs": lambda elements: (1, elements // 1024, 1024),
    "rows of runs": lambda elements: (64, elements // 64 // 128, 128),
}
# A thread starts for so many elements.
STARTS = {"rank": 65536, "write": 32768, "zero": 32768}
MEGABYTES_4 = 4 << 20


@pytest.mark.parametrize("element_bytes", [8, 4, 2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_tasks_for_every_thread_that_starts(layout, element_bytes):
    for size in (MEGABYTES_4, 16 * MEGABYTES_4, 100 * MEGABYTES_4):
        elements = size // element_bytes
        outer, channels, inner = LAYOUTS[layout](elements)
        for threads in range(1, 257):
            counts = _C.task_counts(outer, channels, inner, threads)
            for step, tasks in counts.items():
                started = min(threads, outer * channels * inner // STARTS[step])
                assert tasks >= 4 * started, (size, threads, step)


@pytest.mark.parametrize("channels", [1, 4])
def test_few_long_runs_have_a_task_for_every_thread_that_starts(channels):
    # A lane adds every 32nd of 65,536 elements in their order: what one task does.
    for elements in (MEGABYTES_4 // 8, 25 * MEGABYTES_4):
        for threads in range(1, 257):
            tasks = _C.task_counts(1, channels, elements // channels, threads)["rank"]
            assert tasks >= min(threads, elements // STARTS["rank"])


def test_small_tensors_are_one_task_for_any_number_of_threads():
    for threads in (1, 256):
        counts = _C.task_counts(1, 8, 8, threads)
        assert counts == {"rank": 1, "write": 1, "zero": 1}


@pytest.mark.parametrize("threads", [2, 7, 64])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((90_001, 5), 1), ((70_001, 300), 1), ((3000, 1999), 1), ((3000, 40, 3, 3), 1), ((1999, 3000), 0)],
    ids=str,
)
def test_the_number_of_threads_changes_no_bit(shape, dim, threads):
    weight = torch.randn(shape)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            made = [ops.channel_norms([weight], [dim], p)[0] for p in (2, 0.5, float("-inf"))]
            masks, weights = ops.prune_channels(
                [weight], [], [weight], [dim], 2.0, [shape[dim] // 2], [0.0]
            )
            again, _ = ops.prune_channels(weights, masks, [], [dim], 1.0, [-1], [0.3])
            found.append([*made, *masks, *weights, *again])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        cases.assert_same_bits(one, other)


def a_list():
    """Weights of 1.2 MB, of several parts of a list, and one that is larger than a part."""
    weights = [torch.randn(600, 500) for _ in range(40)]
    weights.insert(7, torch.randn(3000, 500))
    return weights, [i % 2 for i in range(len(weights))]


def shares(count):
    return [-1] * count, [0.4] * count


def test_a_list_in_parts_is_pruned_as_its_tensors_one_by_one():
    weights, dims = a_list()
    masks, pruned = ops.prune_channels(weights, [], weights, dims, 2.0, *shares(len(weights)))
    again, twice = ops.prune_channels(pruned, masks, weights, dims, 1.0, *shares(len(weights)))
    for i, weight in enumerate(weights):
        [mask], [product] = ops.prune_channels([weight], [], [weight], [dims[i]], 2.0, *shares(1))
        cases.assert_same_bits(masks[i], mask, i)
        cases.assert_same_bits(pruned[i], product, i)
        [mask], [product] = ops.prune_channels([product], [mask], [weight], [dims[i]], 1.0, *shares(1))
        cases.assert_same_bits(again[i], mask, i)
        cases.assert_same_bits(twice[i], product, i)


def test_a_list_in_parts_is_pruned_in_place_as_its_tensors_one_by_one():
    weights, dims = a_list()
    expected = [weight.clone() for weight in weights]
    ops.prune_channels_(weights, weights, dims, 2.0, *shares(len(weights)))
    for i, weight in enumerate(expected):
        ops.prune_channels_([weight], [weight], [dims[i]], 2.0, *shares(1))
        cases.assert_same_bits(weights[i], weight, i)


@pytest.mark.parametrize("shared", ["scores of another", "same weight twice", "overlapping views"])
def test_all_of_a_list_is_ranked_before_what_it_ranks_is_zeroed(shared):
    weights, dims = a_list()
    dims[-1] = 1 - dims[0]
    if shared == "same weight twice":
        weights[-1] = weights[0]
    elif shared == "overlapping views":
        base = torch.randn(900, 500)
        weights[0], weights[-1] = base[:600], base[300:]
    before = [weight.clone() for weight in weights]
    order = list(range(len(weights)))
    if shared == "scores of another":
        order[0], order[-1] = order[-1], order[0]
    scores = [weights[i] for i in order]
    masks, _ = ops.prune_channels([before[i] for i in order], [], [], dims, 2.0, *shares(len(weights)))
    ops.prune_channels_(scores, weights, dims, 2.0, *shares(len(weights)))
    for i in (0, len(weights) - 1):
        pruned = masks[i] == 0
        assert pruned.any()
        assert not weights[i][pruned].any(), i
