"""The emulated GPU: bugs seeded into the kernels are caught, and little is moved beyond what must be."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import multiprocessing
import os
import pathlib
import re
import secrets
import tempfile
import types
from collections.abc import Callable
from typing import Any

import cases
import emulated_cuda
import pytest
import torch
from torch import Tensor

from benchmarks import cuda_variants
from benchmarks.predictions import prune_launches, rank_launches

KERNELS = emulated_cuda.ROOT / "csrc" / "cuda"
OPS = torch.ops.lnprune_emulated
# How long the calls on broken kernels may take before they count as calls that never end.
PATIENCE = 120.0
BUILT = "built"
NO_BUG = "no_bug"

# A build with a bug runs in a process of its own, for it may die of what it does.
SEED = secrets.randbits(32)  # of its inputs
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch.utils.cpp_extension"])


@pytest.fixture(scope="module")
def module():
    """The emulation of the kernels as they are."""
    return emulated_cuda.build()


# What the seeded bugs break. Each check calls ops, which run in every scheduling order and raise where
# the orders disagree, and compares their results with what is right. That is computed afterwards: memory
# that an op failed to write must not hold it already.


def check_runs(native: Any) -> None:
    """Norms of runs: teams of several warps, ends within a vector, several chunks."""
    for shape in ((16, 1029), (2, 40_001)):
        values = cases.random_values(shape, torch.float32)
        [norms] = native.channel_norms([values], [0], 1.7)
        [norms_of_unaligned] = native.channel_norms([cases.unaligned(values)], [0], 1.7)
        cases.assert_norms_close(norms, cases.exact_norms(values, 1.7, 0), 1.7, shape)
        cases.assert_same_bits(norms_of_unaligned, norms, "another alignment")


def check_columns(native: Any) -> None:
    """Norms of columns: several strips and chunks, narrow rows with a short one at the end, odd runs."""
    for shape, dtype in (
        ((1400, 66), torch.float64),
        ((1400, 132), torch.float32),
        ((3001, 3), torch.float32),
        ((16, 8, 301), torch.float32),
    ):
        values = cases.random_values(shape, dtype)
        [norms] = native.channel_norms([values], [1], 2.0)
        [norms_of_unaligned] = native.channel_norms([cases.unaligned(values)], [1], 2.0)
        cases.assert_norms_close(norms, cases.exact_norms(values, 2, 1), 2, shape)
        cases.assert_same_bits(norms_of_unaligned, norms, "another alignment")


def check_identical_columns(native: Any) -> None:
    """Equal norms of equal columns, in strips of different widths."""
    columns = cases.random_values((1400, 40), torch.float64)
    values = torch.cat([columns, cases.random_values((1400, 24), torch.float64), columns], dim=1)
    [norms] = native.channel_norms([values], [1], 1.7)
    assert torch.equal(norms[:40], norms[-40:]), "identical columns differ"


def check_two_chunks(native: Any) -> None:
    """Norms of two chunks, time and again: each time one block finds the other at another point."""
    for _ in range(120):
        values = cases.random_values((130, 64), torch.float64)
        [norms] = native.channel_norms([values], [1], 2.0)
        cases.assert_norms_close(norms, cases.exact_norms(values, 2, 1), 2)


def check_roots(native: Any) -> None:
    """Roots of the sums of several tensors, of one block and of more."""
    sums = [cases.random_values((length,), torch.float64).abs() for length in (256, 3, 700)]
    for actual, values in zip(native.norms_of_sums(sums, 2.0), sums, strict=True):
        assert actual.tolist() == [math.sqrt(value) for value in values.tolist()], "other roots"


def check_selection(native: Any) -> None:
    """The choice among more channels than threads, without ties and with ties that come in bursts."""
    norms = [cases.random_values((1500,), torch.float64).abs() for _ in range(8)]
    for values in norms[1:]:
        share = torch.tensor([0.05, 0.95, 0.05]).roll(int(torch.randint(3, ()))).repeat_interleave(500)
        values[torch.rand(1500) < share] = 1.0
    counts = [int(values.lt(1.0).sum() + values.eq(1.0).sum() // 2) for values in norms]
    keep = native.select_channels(norms, [], counts, [0.0] * len(norms))
    for flags, values, count in zip(keep, norms, counts, strict=True):
        assert flags.tolist() == cases.brute_force_keep(values.tolist(), count), "another choice"


def check_large_selection(native: Any) -> None:
    """The choice among channels of several blocks, with few and many on the cut, and with old masks."""
    ties = torch.randint(0, 7, (20_000,)).to(torch.float64)
    spread = cases.random_values((17_000,), torch.float64).abs()
    close = torch.rand(30_000, dtype=torch.float64) * 1e-12 + 1
    close[::5] = 1e300
    norms = [ties, spread, close]
    counts = [9000, 8500, 15_000]
    alive = [torch.rand(len(values)) < 0.9 for values in norms]
    for mask_counts in ([], [flags.to(torch.float64) for flags in alive]):
        keep = native.select_channels(norms, mask_counts, counts, [0.0] * len(norms))
        for flags, values, part, count in zip(keep, norms, alive, counts, strict=True):
            taking_part = part if mask_counts else torch.ones_like(part)
            assert torch.equal(flags, expected_keep(values, taking_part, count)), "another choice"


def expected_keep(norms: Tensor, alive: Tensor, pruned: int) -> Tensor:
    """The choice among the channels that are alive, by torch's stable sort."""
    left = alive.nonzero().flatten()
    ranking = left[torch.sort(norms[left], descending=True, stable=True).indices]
    keep = torch.zeros(len(norms), dtype=torch.bool)
    keep[ranking[: max(0, len(left) - pruned)]] = True
    return keep


def check_pruning(native: Any) -> None:
    """First and repeated masks of a list in one call: one strip and more, one chunk and more, ties."""
    shapes = [(6, 4), (300, 40), (20, 1029), (1400, 132), (33, 8, 301), (2, 40_001)]
    dims = [0, 0, 0, 1, 1, 0]
    tensors = [torch.randint(-1, 2, shape).to(torch.float32) for shape in shapes]
    counts = [tensor.shape[dim] // 2 for tensor, dim in zip(tensors, dims, strict=True)]
    amounts = [0.0] * len(tensors)
    norms = native.channel_norms(tensors, dims, 1.0)
    masks, _ = native.prune_channels(tensors, [], tensors, dims, 1.0, counts, amounts)
    for values, mask, dim, count in zip(norms, masks, dims, counts, strict=True):
        kept = mask.movedim(dim, 0).flatten(1).amax(dim=1) != 0
        assert kept.tolist() == cases.brute_force_keep(values.tolist(), count), "another choice"
    left = [
        (mask.movedim(dim, 0).flatten(1) != 0).sum(dim=1) for mask, dim in zip(masks, dims, strict=True)
    ]
    repeated = native.select_channels(
        norms, [count.to(torch.float64) for count in left], [-1] * len(counts), [0.5] * len(counts)
    )
    again, _ = native.prune_channels(
        tensors, masks, tensors, dims, 1.0, [-1] * len(counts), [0.5] * len(counts)
    )
    for keep, mask, dim in zip(repeated, again, dims, strict=True):
        kept = mask.movedim(dim, 0).flatten(1).amax(dim=1) != 0
        assert torch.equal(kept, keep), "another choice"


def check_selection_of_the_rank_step(native: Any) -> None:
    """The choice among as many channels as the rank step takes, and one more or less, of any norms; with
    old masks of which many channels are dead, or all.
    """
    tensors = [
        torch.stack([norms, torch.zeros_like(norms)], dim=number % 2)
        for channels in range(MOST_CHANNELS_OF_RANK - 1, MOST_CHANNELS_OF_RANK + 2)
        for number, norms in enumerate(norms_to_choose_from(channels))
    ]
    dims = [int(tensor.shape[0] == 2) for tensor in tensors]
    masks = [random_mask(tensor.shape, dim, 0.3) for tensor, dim in zip(tensors, dims, strict=True)]
    all_dead = [torch.zeros_like(tensor) for tensor in tensors]
    for old, count, fraction in (
        ([], 1000, 0.0),
        ([], -1, 0.97),
        (masks, 1000, 0.0),
        (masks, -1, 0.5),
        (all_dead, -1, 0.5),
    ):
        amounts = [count] * len(tensors), [fraction] * len(tensors)
        check_prune(native, tensors, old, dims, math.inf, *amounts)


def norms_to_choose_from(channels: int) -> list[Tensor]:
    """Full of ties, far apart with infinity and NaN among them, close together, all NaN, all equal."""
    far_apart = (100 * torch.randn(channels, dtype=torch.float64)).exp()
    far_apart[torch.rand(channels) < 0.1] = math.inf
    far_apart[torch.rand(channels) < 0.1] = math.nan
    return [
        torch.randint(0, 7, (channels,)).to(torch.float64),
        far_apart,
        torch.rand(channels, dtype=torch.float64) * 1e-12 + 1,
        torch.full((channels,), math.nan, dtype=torch.float64),
        torch.ones(channels, dtype=torch.float64),
    ]


def random_mask(shape: tuple[int, ...], dim: int, alive: float) -> Tensor:
    """In float64: a share of the channels is alive, each by its second element alone."""
    mask = torch.zeros(shape, dtype=torch.float64)
    mask.movedim(dim, 0)[torch.rand(shape[dim]) < alive, 1] = 1
    return mask


def check_prune(
    native: Any,
    tensors: list[Tensor],
    masks: list[Tensor],
    dims: list[int],
    p: float,
    counts: list[int],
    fractions: list[float],
) -> None:
    """A call to prune against norms in extended precision, a sort and torch's products, bit by bit."""
    new_masks, weights = native.prune_channels(tensors, masks, tensors, dims, p, counts, fractions)
    for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        old = masks[i] if masks else None
        alive = (torch.ones_like(tensor) if old is None else old).movedim(dim, 0).flatten(1).any(dim=1)
        pruned = counts[i] if counts[i] >= 0 else round(fractions[i] * int(alive.sum()))
        keep = expected_keep(cases.exact_norms(tensor, p, dim), alive, pruned)
        expected_mask, expected_weight = cases.expected_write(keep, tensor, old, tensor, dim)
        cases.assert_same_bits(new_masks[i], expected_mask, f"mask {i}")
        cases.assert_same_bits(weights[i], expected_weight, f"weight {i}")


def check_writing(native: Any) -> None:
    """Masks and masked weights of several tiles, the last one neither full nor of whole vectors."""
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        for layout in (cases.contiguous, cases.unaligned):
            values = layout(cases.random_values((7, 3001), dtype))
            check_write(native, values)
            for old in (2, 3):  # ones and zeros; these and twos
                check_write(native, values, layout(torch.randint(0, old, (7, 3001)).to(dtype)))


def check_write(native: Any, values: Tensor, old: Tensor | None = None) -> None:
    keep = torch.rand(len(values)) < 0.5
    keep[-1] = True
    [mask], [weight] = native.write_masks([keep], [values], [] if old is None else [old], [values], [0])
    expected_mask, expected_weight = cases.expected_write(keep, values, old, values, 0)
    cases.assert_same_bits(mask, expected_mask, "mask")
    cases.assert_same_bits(weight, expected_weight, "weight")


def check_zeroing(native: Any) -> None:
    """Zeros in place of several tiles and dtypes, in vectors pruned as a whole, in part and not at all."""
    tensors, keeps, dims = [], [], []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2):
        for layout in (cases.contiguous, cases.unaligned):
            for shape, dim in (((9, 3001), 0), ((901, 30), 1)):
                tensors.append(layout(cases.random_values(shape, dtype)))
                keeps.append(cases.random_keep(shape[dim]))
                dims.append(dim)
    before = [cases.bits(tensor) for tensor in tensors]
    native.zero_channels_(tensors, keeps, dims)
    for tensor, held, keep, dim in zip(tensors, before, keeps, dims, strict=True):
        flags = keep.view((-1, 1) if dim == 0 else (1, -1))
        assert torch.equal(cases.bits(tensor), held * flags), "other elements are zero"


def check_long_list(native: Any) -> None:
    """Norms and zeros of more tensors than a launch takes."""
    tensors = [cases.random_values((3, 2 + number % 5), torch.float32) for number in range(420)]
    dims = [0] * len(tensors)
    for norms, values in zip(native.channel_norms(tensors, dims, 1.0), tensors, strict=True):
        cases.assert_norms_close(norms, cases.exact_norms(values, 1, 0), 1)
    keep = torch.tensor([True, False, True])
    native.zero_channels_(tensors, [keep] * len(tensors), dims)
    zeros = [(values == 0).all(dim=1).tolist() for values in tensors]
    assert zeros == [[False, True, False]] * len(tensors), "other elements are zero"


def check_long_list_of_strips(native: Any) -> None:
    """First and repeated masks of more tensors of several strips than a launch ranks with their masks."""
    shapes = [(130, 66) if number % 2 else (2, 1100) for number in range(100)]
    tensors = [torch.randint(-9, 10, shape).to(torch.float32) for shape in shapes]
    dims = [int(shape[0] == 2) for shape in shapes]
    masks = [random_mask(shape, dim, 0.6).float() for shape, dim in zip(shapes, dims, strict=True)]
    amounts = [-1] * len(shapes), [0.5] * len(shapes)
    check_prune(native, tensors, [], dims, 1.0, *amounts)
    check_prune(native, tensors, masks, dims, 1.0, *amounts)


def check_batches(native: Any) -> None:
    """Matrices of several strips and chunks, of rows and of columns, where vectors fit and where not."""
    for shape, dim in (((3, 6, 1029), 1), ((4, 300, 66), 2), ((5, 7, 33), 2), ((2, 3, 4500), 2)):
        values = torch.randint(-9, 10, shape).to(torch.float32)
        channels, batches = shape[dim], [0, shape[0]]
        [norms] = native.channel_norms([values], [dim], 1.0, batches)
        rows = norms.view(shape[0], channels)
        assert torch.equal(rows, values.abs().double().sum(dim=3 - dim)), "other norms"
        keep = torch.tensor([cases.brute_force_keep(row.tolist(), channels // 2) for row in rows])
        amounts = [channels // 2], [0.0], batches
        [mask], _ = native.prune_channels([values], [], [values], [dim], 1.0, *amounts)
        assert torch.equal(mask.amax(dim=3 - dim) != 0, keep), "another choice"
        zeros = values + 100
        native.zero_channels_([zeros], [keep.flatten()], [dim], batches)
        assert torch.equal(zeros.amax(dim=3 - dim) != 0, keep), "other elements are zero"
        assert torch.equal(zeros, (values + 100) * keep.unsqueeze(3 - dim)), "other elements are zero"


def check_scaled(native: Any) -> None:
    """Norms of elements times factors: of runs and columns, of vectors that cross rows, of each matrix."""
    for shape, dim, other, batch in (
        ((6, 1029), 0, 1, []),
        ((300, 66), 1, 0, []),
        ((700, 5), 0, 1, []),
        ((700, 5), 1, 0, []),
        ((12, 40, 3, 3), 0, 1, []),
        ((3, 33, 40), 1, 2, [0, 3]),
        ((3, 33, 40), 2, 1, [0, 3]),
    ):
        values = torch.randint(-9, 10, shape).to(torch.float32)
        matrices = batch[1] if batch else 1
        factors = torch.randint(-9, 10, (matrices, shape[other])).to(torch.float64)
        given = [values], [dim], [factors.flatten()], [other]
        [norms] = native.scaled_norms(*given, 1.0, True, batch)
        along = [1] * len(shape)
        along[other] = -1
        if batch:
            along[0] = matrices
        made = values.double() * factors.view(along)
        kept = {dim, 0} if batch else {dim}
        expected = made.abs().sum(dim=[d for d in range(len(shape)) if d not in kept]).flatten()
        assert torch.equal(norms, expected), "other norms"


def check_traffic(native: Any) -> None:
    """What is moved to rank and to prune a convolution."""
    assert_little_traffic(native.module, LAYOUTS["convolution_3x3_narrow_dim_1"], torch.float32)


def check_traffic_in_place(native: Any) -> None:
    """What is moved to prune a convolution in place."""
    assert_only_zeros_are_written(native.module, LAYOUTS["convolution_3x3_narrow_dim_1"], torch.bfloat16)


CHECKS = [
    check_runs,
    check_columns,
    check_identical_columns,
    check_two_chunks,
    check_roots,
    check_selection,
    check_large_selection,
    check_pruning,
    check_selection_of_the_rank_step,
    check_writing,
    check_zeroing,
    check_long_list,
    check_long_list_of_strips,
    check_batches,
    check_scaled,
    check_traffic,
    check_traffic_in_place,
]


@dataclasses.dataclass(frozen=True)
class Bug:
    """A text of a kernel, what replaces it, and the check that must notice.

    Of the bugs of a kind, the short run has the first.
    """

    kind: str
    kernel: str
    text: str
    replacement: str
    check: Callable[[Any], None]
    says: str = ""
    built_into: tuple[str, ...] = ()  # the kernels that a header with a bug is part of


# The kernels of the rank step that a check runs: a header with a bug is built into these.
OF_FLOAT64, OF_FLOAT32 = ("rank_float64.cu",), ("rank_float32.cu",)
OF_BOTH = (*OF_FLOAT64, *OF_FLOAT32)

MISALIGNED = "misaligned vector"
OTHER_ORDER = "another scheduling order"
SELECTION_TICKET = "  if (!draws_last(ticket, task.selection_strips, shared_last)) return;\n"
START_OF_WRITING = "  if (task.elements <= 0x7fffffffll) {\n    write_tile_of"

BUGS = {
    "column_sums_read_before_a_barrier": Bug(
        "barrier of the rank step",
        "rank_block.h",
        "  __syncthreads();\n#pragma unroll 1\n  for (int c = thread; c < columns; c += kThreads) {\n",
        "#pragma unroll 1\n  for (int c = thread; c < columns; c += kThreads) {\n",
        check_columns,
        built_into=OF_BOTH,
    ),
    "column_groups_read_before_a_barrier": Bug(
        "barrier of the rank step",
        "rank_block.h",
        "    sums[0] = sum;\n  }\n  __syncthreads();\n",
        "    sums[0] = sum;\n  }\n",
        check_columns,
        built_into=OF_BOTH,
    ),
    "column_partials_read_before_a_barrier": Bug(
        "barrier of the rank step",
        "rank_block.h",
        "shared[thread] = sum;\n    __syncthreads();\n",
        "shared[thread] = sum;\n",
        check_columns,
        built_into=OF_BOTH,
    ),
    "team_values_read_before_a_barrier": Bug(
        "barrier of the rank step",
        "rank_block.h",
        "if (threadIdx.x % kWarp == 0) shared[warp] = value;\n    __syncthreads();\n",
        "if (threadIdx.x % kWarp == 0) shared[warp] = value;\n",
        check_runs,
        built_into=OF_FLOAT32,
    ),
    "shifted_slots_read_before_a_barrier": Bug(
        "barrier of the rank step",
        "rank_block.h",
        "- shift) & mask] = partials[s];\n    __syncthreads();\n",
        "- shift) & mask] = partials[s];\n",
        check_runs,
        built_into=OF_FLOAT32,
    ),
    "ticket_drawn_before_a_fence": Bug(
        "fence",
        "rank_block.h",
        "  __threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) {\n    // The last",
        "  __syncthreads();\n  if (threadIdx.x == 0) {\n    // The last",
        check_columns,
        built_into=OF_BOTH,
    ),
    "ticket_drawn_before_a_barrier": Bug(
        "ticket",
        "rank_block.h",
        "  __threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) {\n    // The last",
        "  __threadfence();\n  if (threadIdx.x == 0) {\n    // The last",
        check_two_chunks,
        built_into=OF_FLOAT64,
    ),
    "ticket_drawn_before_the_partials_are_stored": Bug(
        "ticket",
        "rank_block.h",
        "  if (first_of_team) put(task, memory, work, norm, channel, total);\n\n"
        "  if (task.chunks == 1) return true;\n"
        "  unsigned* ticket = work.ticket(task, memory);\n"
        "  if (!draws_last(ticket, task.chunks, shared_last)) return false;\n",
        "  unsigned* ticket = work.ticket(task, memory);\n"
        "  const bool last = task.chunks > 1 && draws_last(ticket, task.chunks, shared_last);\n"
        "  if (first_of_team) put(task, memory, work, norm, channel, total);\n"
        "  if (task.chunks == 1 || !last) return task.chunks == 1;\n",
        check_runs,
        built_into=OF_FLOAT32,
    ),
    "ticket_read_before_a_barrier": Bug(
        "ticket",
        "rank_block.h",
        "  __syncthreads();\n  __threadfence();\n  return *shared_last",
        "  __threadfence();\n  return *shared_last",
        check_columns,
        built_into=OF_BOTH,
    ),
    "selection_ticket_drawn_before_a_fence": Bug(
        "hand-over to the selection",
        "rank_kernels.h",
        SELECTION_TICKET,
        "  if (threadIdx.x == 0) {\n"
        "    const unsigned last = task.selection_strips - 1;\n"
        "    *shared_last = last == 0 || atomicInc(ticket, last) == last;\n"
        "  }\n"
        "  __syncthreads();\n"
        "  if (*shared_last == 0) return;\n",
        check_pruning,
        built_into=OF_FLOAT32,
    ),
    "selection_by_blocks_before_the_last": Bug(
        "hand-over to the selection",
        "rank_kernels.h",
        SELECTION_TICKET,
        "  const bool last = draws_last(ticket, task.selection_strips, shared_last);\n"
        "  if (last && task.selection_strips > 1) return;\n",
        check_pruning,
        built_into=OF_FLOAT32,
    ),
    "selection_before_the_strip_is_added_up": Bug(
        "hand-over to the selection",
        "rank_kernels.h",
        "  if (!finished || task.selection.keep == nullptr) return;\n",
        "  if (task.selection.keep == nullptr) return;\n",
        check_pruning,
        built_into=OF_FLOAT32,
    ),
    "selection_without_a_ticket_of_its_own": Bug(
        "hand-over to the selection",
        "launches.cpp",
        "    if (strips > 1) tickets_ += item.rankings;\n",
        "",
        check_pruning,
    ),
    "selection_by_each_of_tensor_and_mask": Bug(
        "hand-over to the selection",
        "launches.cpp",
        "for (const RankTask* part : parts) strips += part->strips;",
        "strips = 1;",
        check_pruning,
    ),
    "selection_before_the_old_mask_is_counted": Bug(
        "hand-over to the selection",
        "launches.cpp",
        "    if (item.mask_counts != nullptr) parts.push_back(&tasks[steps.scores.size() + i]);\n",
        "",
        check_pruning,
    ),
    "selection_before_an_old_mask_of_the_next_launch_is_counted": Bug(
        "hand-over to the selection",
        "launches.cpp",
        "    if (item.mask_counts != nullptr) parts",
        "    constexpr size_t kTasks = Batch<RankTask>::ManyTasks::kCapacity;\n"
        "    if (item.mask_counts != nullptr && steps.scores.size() + i < kTasks) parts",
        check_long_list_of_strips,
    ),
    "more_channels_than_the_rank_step_holds": Bug(
        "selection of the rank step",
        "launches.cpp",
        " && item.channels <= kMostChannelsOfRank;",
        ";",
        check_selection_of_the_rank_step,
    ),
    "histogram_of_the_rank_step_read_before_a_barrier": Bug(
        "selection of the rank step",
        "select_block.h",
        "      __syncthreads();\n      // Thread 0 has",
        "      // Thread 0 has",
        check_selection_of_the_rank_step,
        built_into=OF_FLOAT64,
    ),
    "bucket_that_reaches_beyond_nan": Bug(
        "selection of the rank step",
        "select_block.h",
        "high = high - low < width ? high : low + width;",
        "high = low + width;",
        check_selection_of_the_rank_step,
        built_into=OF_FLOAT64,
    ),
    "ties_of_the_keys_before_not_counted": Bug(
        "selection of the rank step",
        "select_block.h",
        "        before_row += in_row;\n",
        "",
        check_selection_of_the_rank_step,
        built_into=OF_FLOAT64,
    ),
    "masked_channels_take_part_in_the_rank_step": Bug(
        "selection of the rank step",
        "select_block.h",
        "if (values[k] == 0) keys",
        "if (values[k] < 0) keys",
        check_selection_of_the_rank_step,
        built_into=OF_FLOAT64,
    ),
    "last_element_of_a_run_left_out": Bug(
        "bounds of the rank step",
        "rank_block.h",
        "0, end - last * L, read",
        "0, end - last * L - 1, read",
        check_runs,
        built_into=OF_FLOAT32,
    ),
    "element_before_a_run_added": Bug(
        "bounds of the rank step",
        "rank_block.h",
        "add_elements(norm, run, 1, shift, end, ",
        "add_elements(norm, run, 1, shift - 1, end, ",
        check_runs,
        built_into=OF_FLOAT32,
    ),
    "short_last_row_left_out": Bug(
        "bounds of the rank step",
        "rank_block.h",
        "cut.rows_per_chunk, cut.rows);\n#pragma",
        "cut.rows_per_chunk, full_rows);\n#pragma",
        check_columns,
        built_into=OF_BOTH,
    ),
    "fold_by_the_width_of_the_strip": Bug(
        "order of a sum",
        "rank_block.h",
        "cut.channels_per_strip < kThreads ? cut.channels_per_strip : kThreads;",
        "channels < kThreads ? channels : kThreads;",
        check_identical_columns,
        "identical columns differ",
        built_into=OF_FLOAT64,
    ),
    "blocks_of_roots_counted_from_the_first_tensor": Bug(
        "roots",
        "roots.cu",
        "place.block * kThreads",
        "blockIdx.x * kThreads",
        check_roots,
    ),
    "histogram_read_before_a_barrier": Bug(
        "barrier of the select step",
        "select_block.h",
        "      __syncthreads();\n      // Thread 0 has",
        "      // Thread 0 has",
        check_selection,
        built_into=("topk.cu",),
    ),
    "histogram_cleared_without_a_barrier": Bug(
        "barrier of the select step",
        "select_block.h",
        "threadIdx.x] = 0;\n      __syncthreads();\n",
        "threadIdx.x] = 0;\n",
        check_selection,
        built_into=("topk.cu",),
    ),
    "histogram_not_cleared": Bug(
        "memory not cleared",
        "select_block.h",
        "buckets[b * kCount + threadIdx.x] = 0;",
        "buckets[b * kCount + threadIdx.x] += 0;",
        check_selection,
        built_into=("topk.cu",),
    ),
    "bucket_read_before_a_barrier": Bug(
        "barrier of the select step",
        "select_block.h",
        "shared->above = above;\n      }\n      __syncthreads();\n",
        "shared->above = above;\n      }\n",
        check_selection,
        built_into=("topk.cu",),
    ),
    "warp_sums_overwritten_by_a_faster_warp": Bug(
        "barrier of the select step",
        "select_block.h",
        "    __syncthreads();\n    if (lane == kWarp - 1)",
        "    if (lane == kWarp - 1)",
        check_selection,
        OTHER_ORDER,
        built_into=("topk.cu",),
    ),
    "survivors_read_before_a_barrier": Bug(
        "barrier of the select step",
        "select_block.h",
        "    __syncthreads();\n    const unsigned count",
        "    const unsigned count",
        check_large_selection,
        built_into=("topk.cu",),
    ),
    "flags_of_the_tile_read_last": Bug(
        "tiles of the select step",
        "select_block.h",
        "    if (tiles() > 1) load_tile(tile, keys);\n",
        "",
        check_large_selection,
        built_into=("topk.cu",),
    ),
    "ties_of_earlier_tiles_not_counted": Bug(
        "tiles of the select step",
        "select_block.h",
        "    sum_before(count, &all);\n    return all;\n",
        "    sum_before(count, &all);\n    return 0;\n",
        check_large_selection,
        built_into=("topk.cu",),
    ),
    "masked_channels_take_part": Bug(
        "tiles of the select step",
        "select_block.h",
        "if (values[k] == 0) keys",
        "if (values[k] < 0) keys",
        check_large_selection,
        built_into=("topk.cu",),
    ),
    "last_element_of_a_tensor_not_written": Bug(
        "bounds of the write step",
        "masks.cu",
        "written + thread, end, kThreads);",
        "written + thread, end - 1, kThreads);",
        check_writing,
    ),
    "first_element_after_the_vectors_not_written": Bug(
        "bounds of the write step",
        "masks.cu",
        "written + thread, end, kThreads);",
        "written + thread + 1, end, kThreads);",
        check_writing,
    ),
    "vectors_written_by_their_first_flag": Bug(
        "fast path of the write step",
        "masks.cu",
        "if (pruned[u] == 0 || pruned[u] == kAll) {",
        "if (true) {",
        check_writing,
    ),
    "masks_of_any_value_taken_for_flags": Bug(
        "fast path of the write step",
        "masks.cu",
        "    if (!known) {\n",
        "    if (false) {\n",
        check_writing,
    ),
    "products_read_before_a_barrier": Bug(
        "barrier of the write step",
        "masks.cu",
        "    fill_table(products);\n    __syncthreads();\n",
        "    fill_table(products);\n",
        check_writing,
    ),
    "barrier_for_half_a_warp": Bug(
        "divergence",
        "masks.cu",
        START_OF_WRITING,
        f"  if (threadIdx.x < 16) __syncthreads();\n{START_OF_WRITING}",
        check_writing,
        "divergence",
    ),
    "last_element_of_a_tensor_not_zeroed": Bug(
        "bounds of the zero step",
        "masks.cu",
        "zeroed + thread, end);",
        "zeroed + thread, end - 1);",
        check_zeroing,
        "other elements are zero",
    ),
    "vectors_zeroed_as_a_whole": Bug(
        "bounds of the zero step",
        "masks.cu",
        "if (pruned[u] == (1u << L) - 1) {",
        "if (pruned[u] != 0) {",
        check_zeroing,
        "other elements are zero",
    ),
    "vectors_that_cross_channels_zeroed_by_their_first_flag": Bug(
        "bounds of the zero step",
        "masks.cu",
        "if (flags.inner - flags.within >= kCount) return",
        "if (flags.inner >= kCount) return",
        check_zeroing,
        "other elements are zero",
    ),
    "elements_that_stay_written_again": Bug(
        "traffic",
        "masks.cu",
        "store_if((pruned >> s & 1) != 0, words + i + s * kThreads, Word{0});",
        "if (i + s * kThreads < end)\n"
        "        store(words + i + s * kThreads, pruned >> s & 1 ? Word{0} : words[i + s * kThreads]);",
        check_traffic_in_place,
        "'bytes_written'",
    ),
    "vectors_of_columns_misaligned": Bug(
        "alignment",
        "launches.cpp",
        "task.aligned = is_aligned(task.elements, vector * bytes) && cut.row_elements",
        "task.aligned = true || cut.row_elements",
        check_columns,
        f"{MISALIGNED} load",
    ),
    "strips_that_begin_within_a_vector": Bug(
        "alignment",
        "launches.cpp",
        "(task.strips == 1 || cut.columns_per_strip % vector == 0)",
        "true",
        check_columns,
        f"{MISALIGNED} load",
    ),
    "strips_wider_than_a_block": Bug(
        "cutting", "launches.cpp", " && whole_unit <= kThreads * vector;", ";", check_columns
    ),
    "slots_of_runs_not_shifted_back": Bug(
        "order of a sum",
        "launches.cpp",
        "task.aligned = is_aligned(task.elements, vector * bytes) && (has_one_run",
        "task.aligned = true || (has_one_run",
        check_runs,
        "another alignment",
    ),
    "vectors_of_the_write_step_misaligned": Bug(
        "alignment",
        "launches.cpp",
        "task.vectors = is_aligned(item.mask) && is_aligned(item.original)",
        "task.vectors = true || is_aligned(item.original)",
        check_writing,
        f"{MISALIGNED} load",
    ),
    "vectors_of_the_zero_step_misaligned": Bug(
        "alignment",
        "launches.cpp",
        "task.vectors = is_aligned(item.elements) && (inner",
        "task.vectors = true && (inner",
        check_zeroing,
        f"{MISALIGNED} store",
    ),
    "task_of_the_block_before": Bug(
        "tables",
        "launches.h",
        "(table.first_blocks[middle] <= block ? low : high) = middle;",
        "(table.first_blocks[middle] < block ? low : high) = middle;",
        check_zeroing,
        built_into=("masks.cu",),
    ),
    "last_task_of_a_full_table_left_out": Bug(
        "tables",
        "launches.h",
        "return tasks.size() == ManyTasks::kCapacity;",
        "return false;",
        check_long_list,
        built_into=("launches.cpp",),
    ),
    "vectors_loaded_twice": Bug(
        "traffic",
        "rank_block.h",
        "if (i + u < count) loaded[u] = load_vector",
        "if (i + u < count) load_vector<kVectorBytes<T>>(elements + u * stride);\n"
        "      if (i + u < count) loaded[u] = load_vector",
        check_traffic,
        "'rank', {",
        built_into=OF_FLOAT32,
    ),
    "selection_ticket_of_the_first_matrix": Bug(
        "matrices of a batch",
        "rank_kernels.h",
        "memory.tickets + task.selection_ticket + work.matrix;",
        "memory.tickets + task.selection_ticket;",
        check_batches,
        built_into=OF_FLOAT32,
    ),
    "partials_of_the_first_matrix": Bug(
        "matrices of a batch",
        "rank_block.h",
        "task.first_partial +\n           matrix * task.chunks * task.channels;",
        "task.first_partial;",
        check_batches,
        built_into=OF_FLOAT32,
    ),
    "tickets_of_the_first_matrix": Bug(
        "matrices of a batch",
        "rank_block.h",
        "task.first_ticket + matrix * task.strips + strip;",
        "task.first_ticket + strip;",
        check_batches,
        built_into=OF_FLOAT32,
    ),
    "flags_of_the_first_matrix": Bug(
        "matrices of a batch",
        "masks.cu",
        "keep(task.item.keep + number * task.item.slices.channels) {}",
        "keep(task.item.keep) {}",
        check_batches,
    ),
    "matrices_that_begin_within_a_vector": Bug(
        "alignment",
        "launches.cpp",
        "(slices.batch == 1 || slices.matrix() % vector == 0)",
        "true",
        check_batches,
        f"{MISALIGNED} load",
    ),
    "zeros_of_matrices_that_begin_within_a_vector": Bug(
        "alignment",
        "launches.cpp",
        "  return slices.batch == 1 || slices.matrix() * element_bytes(type) % 16 == 0;\n",
        "  return true;\n",
        check_batches,
        MISALIGNED,
    ),
    "factors_of_the_first_matrix": Bug(
        "factors",
        "rank_kernels.h",
        "task.scaling.factors + work.matrix * task.scaling.matrix,",
        "task.scaling.factors,",
        check_scaled,
        "other norms",
        built_into=OF_FLOAT32,
    ),
    "vectors_that_cross_rows_scaled_by_their_first": Bug(
        "factors",
        "rank_elements.h",
        "if (first + slot >= period) return",
        "if (false) return",
        check_scaled,
        "other norms",
        built_into=OF_FLOAT32,
    ),
    "factors_of_places_for_those_of_their_dim": Bug(
        "factors",
        "rank_elements.h",
        "place.step == 1 ? number : number / place.step",
        "number",
        check_scaled,
        "other norms",
        built_into=OF_FLOAT32,
    ),
    "tickets_not_set_to_zero": Bug(
        "memory not cleared",
        "rank_block.h",
        "atomicInc(ticket, last) == last;",
        "atomicAdd(ticket, 1u) == last;",
        check_columns,
        "tickets that are not zero",
        built_into=OF_BOTH,
    ),
}


def check_failing_sizes(native: Any) -> None:
    """Raises what calls with 777 elements say; those of other sizes between them must be right."""
    messages = []
    for elements in (776, 777, 778, 777, 776):
        values = cases.random_values((elements, 1), torch.float32)
        try:
            [norms] = native.channel_norms([values], [0], 0.0)
            native.select_channels([norms], [], [elements // 2], [0.0])
            check_write(native, values)
        except RuntimeError as error:
            messages.append((elements, str(error)))
    assert [elements for elements, _ in messages] == [777, 777], messages
    raise RuntimeError(messages[-1][1])


# Errors of some sizes only, and what the exceptions say: the line is the one marked in the replacement.
FAILURES = {
    "threads_that_leave_before_a_barrier": Bug(
        "divergence",
        "masks.cu",
        START_OF_WRITING,
        f"  if (task.elements == 777 && threadIdx.x < 16) __syncthreads();  // marked\n{START_OF_WRITING}",
        check_failing_sizes,
        r"emulated launch: divergence: thread 0 of block 0 waits at a barrier \(line {line}\), "
        r"thread 16 of block 0 has finished \(line \d+\)",
    ),
    "threads_at_two_barriers": Bug(
        "divergence",
        "masks.cu",
        START_OF_WRITING,
        "  if (task.elements == 777 && threadIdx.x % 2 == 0) __syncthreads();  // marked\n"
        "  __syncthreads();\n"
        f"{START_OF_WRITING}",
        check_failing_sizes,
        r"emulated launch: divergence: thread 0 of block 0 waits at a barrier \(line {line}\), "
        r"thread 1 of block 0 waits at a barrier \(line {next_line}\)",
    ),
    "lanes_that_miss_a_shuffle": Bug(
        "divergence",
        "select_block.h",
        "    Count participants = 0;\n",
        "  if (item.channels != 777 || threadIdx.x % kWarp != 5)\n"
        "    least = __shfl_xor_sync(kAllLanes, least, 1);  // marked\n"
        "    Count participants = 0;\n",
        check_failing_sizes,
        r"emulated launch: divergence: thread 0 of block 0 waits at a shuffle \(line {line}\), "
        r"thread 5 of block 0 waits at a shuffle \(line \d+\)",
        built_into=("topk.cu",),
    ),
    "misaligned_load": Bug(
        "alignment",
        "masks.cu",
        "originals[u] = load_vector<16>(original + i);",
        "originals[u] = load_vector<16>(original + i + (end == 776 && item.slices.channels == 777));",
        check_failing_sizes,
        r"emulated launch: misaligned vector load: thread \d+ of block 0 runs",
    ),
    "misaligned_store": Bug(
        "alignment",
        "masks.cu",
        "store_vector(static_cast<T*>(item.weight) + i, originals[u]);",
        "store_vector(static_cast<T*>(item.weight) + i + (item.slices.channels == 777), originals[u]);",
        check_failing_sizes,
        r"emulated launch: misaligned vector store: thread \d+ of block 0 runs",
    ),
}


def check_selection_ends(native: Any) -> None:
    """A selection among norms that change meanwhile ends, within its memory. What it keeps is open."""
    for channels in (20_000, 20_001, 30_000):
        for norms in norms_to_choose_from(channels):
            [keep] = OPS.select_channels([norms], [], [channels // 2], [0.0])
            assert keep.shape == (channels,)


# When another stream writes to norms that are loaded several times.
CHANGES = {
    "norms_that_change_from_pass_to_pass": "loads / 20'000 % 2 == 1",
    "norms_that_change_now_and_then": "loads % 5 == 0",
    "norms_that_change_after_the_first_pass": "loads > 20'000",
}
OVERWRITTEN = {
    name: Bug(
        "norms overwritten meanwhile",
        "select_block.h",
        "                                              : load_cached(address);\n",
        f"""                                              : changed(load_cached(address));
  }}

  static double changed(double norm) {{
    static uint64_t loads = 0;
    ++loads;
    return {condition} ? bit_cast<double>(loads * 0x9e3779b97f4a7c15ull) : norm;
""",
        check_selection_ends,
        built_into=("topk.cu",),
    )
    for name, condition in CHANGES.items()
}


# What is timed beside the kernels must be right too. Not those of ops_cuda.cpp, which is no part of the
# emulation, and not the one with fewer fences: here each thread has to make its own stores visible.
VARIANTS = [
    name for name, variant in cuda_variants.VARIANTS.items() if variant.compiled and name != "one_fence"
]


@pytest.fixture(scope="module")
def verdicts(request, module):
    """What the checks say of the bugs whose tests are to run: several at a time, ahead of the tests."""
    tests = [item for item in request.session.items if "verdicts" in item.fixturenames]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        names = [test.callspec.params["name"] for test in tests]
        yield {name: pool.submit(verdict, name) for name in names}
        pool.shutdown(cancel_futures=True)


def verdict(name: str) -> str:
    """What the first check to fail says of kernels with a bug; empty where none fails."""
    with tempfile.TemporaryDirectory() as folder:
        patched = pathlib.Path(folder) / "cuda"
        patched.mkdir()
        for kernel, text in kernels_to_judge(name).items():
            (patched / kernel).write_text(text)
        if name in VARIANTS:
            checks = [check for check in CHECKS if check not in (check_traffic, check_traffic_in_place)]
        else:
            checks = CHECKS if name == NO_BUG else [(BUGS | FAILURES | OVERWRITTEN)[name].check]
        # A race shows in some scheduling orders only: what a check finds nothing of, it runs once more on.
        checks += checks if name in BUGS else []
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=judge, args=(sender, patched, checks, SEED))
        process.start()
        sender.close()
        try:
            outcome = receiver.recv()
            assert outcome == BUILT, outcome
            if not receiver.poll(PATIENCE):
                return f"no end within {PATIENCE} seconds"
            with contextlib.suppress(EOFError):
                return receiver.recv()
            process.join()
            return f"the process died with exit code {process.exitcode}"
        finally:
            process.kill()
            process.join()


def kernels_to_judge(name: str) -> dict[str, str]:
    """By name, the file with the bug and, if it is a header, the kernels that it is part of; where there is
    no bug, all kernels; those that a variant changes.
    """
    kernels = {kernel: (KERNELS / kernel).read_text() for kernel in emulated_cuda.KERNELS}
    if name == NO_BUG:
        return kernels
    if name in VARIANTS:
        texts = cuda_variants.sources(name)
        return {file: text for file, text in texts.items() if file != cuda_variants.OPS}
    bug = (BUGS | FAILURES | OVERWRITTEN)[name]
    original = (KERNELS / bug.kernel).read_text()
    assert original.count(bug.text) == 1, f"the text to replace is not once in {bug.kernel}: {bug.text}"
    # All headers, or those beside the originals would be found first.
    built = {header.name: header.read_text() for header in KERNELS.glob("*.h")}
    built |= {kernel: kernels[kernel] for kernel in bug.built_into}
    return built | {bug.kernel: original.replace(bug.text, bug.replacement)}


def judge(sender: Any, patched: pathlib.Path, checks: list[Callable[[Any], None]], seed: int) -> None:
    """Runs in a process of its own and sends two messages: that the kernels are built, and the verdict."""
    try:
        module = emulated_cuda.build(patched)
    except Exception as error:
        sender.send(f"no build: {error}")
        return
    sender.send(BUILT)
    torch.manual_seed(seed)
    emulated_cuda.manual_seed(seed)
    native = in_every_order(module)
    try:
        for check in checks:
            check(native)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
    else:
        sender.send("")


def in_every_order(module: Any) -> Any:
    """The module, and the ops as they run in every scheduling order."""
    ops = {op: emulated_cuda.in_every_order(module, getattr(OPS, op).default) for op in emulated_cuda.OPS}
    return types.SimpleNamespace(module=module, **ops)


def first_of_each_kind(bugs: dict[str, Bug]) -> list:
    """The names of the bugs, of which the short run has the first of each kind."""
    kinds: dict[str, str] = {}
    for name, bug in bugs.items():
        kinds.setdefault(bug.kind, name)
    return [
        pytest.param(name, marks=[] if kinds[bugs[name].kind] == name else pytest.mark.slow)
        for name in bugs
    ]


@pytest.mark.parametrize("name", first_of_each_kind(BUGS))
def test_seeded_bug_is_caught(name, verdicts):
    found = verdicts[name].result()
    assert found, f"not caught, with torch.manual_seed({SEED})"
    assert BUGS[name].says in found


@pytest.mark.parametrize("name", first_of_each_kind(FAILURES))
def test_failure_names_thread_and_line_and_ends_one_call(name, verdicts):
    bug = FAILURES[name]
    lines = kernels_to_judge(name)[bug.kernel].splitlines()
    line = next((number for number, text in enumerate(lines, 1) if text.endswith("// marked")), 0)
    pattern = bug.says.replace("{line}", str(line)).replace("{next_line}", str(line + 1))
    assert re.search(pattern, verdicts[name].result())


@pytest.mark.parametrize("name", first_of_each_kind(OVERWRITTEN))
def test_norms_that_another_stream_overwrites_end_no_selection(name, verdicts):
    assert verdicts[name].result() == "", f"with torch.manual_seed({SEED})"


@pytest.mark.slow
@pytest.mark.parametrize("name", [NO_BUG])
def test_kernels_without_a_bug_pass(name, verdicts):
    assert verdicts[name].result() == "", f"with torch.manual_seed({SEED})"


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_kernels_passes(name, verdicts):
    assert verdicts[name].result() == "", f"with torch.manual_seed({SEED})"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_optimised_kernels_pass(check, module):
    check(in_every_order(module))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A shape, the dim of its channels, and how its elements lie in memory."""

    shape: tuple[int, ...]
    dim: int
    arrange: Callable[[Tensor], Tensor] = cases.contiguous


LAYOUTS = {
    "linear_dim_0": Layout((512, 512), 0),
    "linear_dim_1": Layout((512, 512), 1),
    "linear_transposed": Layout((512, 512), 0, cases.transposed),
    "convolution_3x3_dim_0": Layout((256, 128, 3, 3), 0),
    "convolution_3x3_dim_1": Layout((256, 128, 3, 3), 1),
    "convolution_3x3_narrow_dim_0": Layout((128, 64, 3, 3), 0),
    "convolution_3x3_narrow_dim_1": Layout((128, 64, 3, 3), 1),
    "convolution_3x3_channels_last_dim_1": Layout((256, 128, 3, 3), 1, cases.channels_last),
    "convolution_1x1_dim_0": Layout((256, 512, 1, 1), 0),
    "convolution_1x1_dim_1": Layout((512, 256, 1, 1), 1),
    "convolution_of_one_dim": Layout((256, 256, 5), 1),
    "convolution_7x7_dim_0": Layout((512, 3, 7, 7), 0),
    "convolution_7x7_dim_1": Layout((512, 3, 7, 7), 1),
    "convolution_depthwise": Layout((20_000, 1, 3, 3), 0),
    "few_long_runs": Layout((4, 64_000), 0),
    "few_long_columns": Layout((64_000, 4), 1),
    "many_short_runs": Layout((64_000, 4), 0),
    "many_short_columns": Layout((4, 64_000), 1),
    "rows_of_runs": Layout((16, 64, 320), 1),
    "rows_of_odd_runs": Layout((16, 64, 301), 1),
    "odd_pitch_dim_0": Layout((128, 2049), 0),
    "odd_pitch_dim_1": Layout((128, 2049), 1),
    "odd_pitch_many_rows_dim_1": Layout((501, 501), 1),
    "unaligned_dim_0": Layout((512, 512), 0, cases.unaligned),
    "unaligned_dim_1": Layout((512, 512), 1, cases.unaligned),
    "unaligned_convolution_dim_0": Layout((256, 128, 3, 3), 0, cases.unaligned),
    "unaligned_convolution_dim_1": Layout((256, 128, 3, 3), 1, cases.unaligned),
}
DTYPES_BY_SIZE = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
# What is moved, as a multiple of the least: bytes, and the 32-byte sectors that hold them.
MOST_BYTES = 1.03
MOST_SECTORS = 1.15


def constant(name: str) -> int:
    """The value of ``constexpr int name`` in launches.h."""
    return int(re.search(rf"constexpr int {name} = (\d+);", (KERNELS / "launches.h").read_text())[1])


MOST_CHANNELS_OF_RANK = constant("kThreads") * constant("kRankKeys")
CHANNELS_PER_SELECT_BLOCK = constant("kSelectThreads") * constant("kSelectKeys")

ONE_BY_ONE = (
    "rows begin within a vector: warps load elements side by side and share sectors with neighbours"
)
ENDS = "runs begin and end within a vector: each element there is a load, and counts as a sector"
NARROW = "strips of eight-byte vectors are 216 or 240 bytes wide and begin and end within a sector"
# Layouts that touch more sectors: the most by bytes of an element, and why. Neighbouring accesses share
# those sectors, so that a cache serves them; the bytes are at their least.
SECTORS_OF_EXCEPTIONS: dict[str, tuple[dict[int, float], str]] = {
    "convolution_3x3_dim_1": ({1: 1.25}, NARROW),
    "convolution_3x3_narrow_dim_1": ({1: 1.25}, NARROW),
    "convolution_of_one_dim": ({1: 1.2}, NARROW),
    "convolution_7x7_dim_0": ({4: 1.35, 2: 2.05, 1: 3.4}, ENDS),
    "convolution_7x7_dim_1": ({8: 1.3, 4: 1.65, 2: 2.8, 1: 4.5}, ONE_BY_ONE),
    "rows_of_odd_runs": ({4: 1.3, 2: 1.5, 1: 2.1}, ONE_BY_ONE),
    "odd_pitch_dim_0": ({1: 1.25}, ENDS),
    "odd_pitch_dim_1": ({4: 1.25, 2: 1.5, 1: 2.0}, ONE_BY_ONE),
    "odd_pitch_many_rows_dim_1": ({4: 1.3, 2: 1.7, 1: 2.45}, ONE_BY_ONE),
    "unaligned_dim_0": ({4: 1.2, 2: 1.45, 1: 1.85}, ENDS),
    "unaligned_dim_1": ({4: 1.3, 2: 1.55, 1: 2.05}, ONE_BY_ONE),
    "unaligned_convolution_dim_0": ({2: 1.35, 1: 1.7}, ENDS),
    "unaligned_convolution_dim_1": ({8: 1.25, 4: 1.5, 2: 2.05, 1: 3.2}, ONE_BY_ONE),
}


def traffic(module: Any, call: Callable[[], Any]) -> dict[str, int]:
    """What a call reads and writes, in bytes."""
    module.set_schedule(0, 0)
    module.start_metering()
    call()
    meter = module.stop_metering()
    sectors = {name: 32 * count for name, count in meter.items() if "sectors" in name}
    return meter | sectors


def assert_little_traffic(
    module: Any, layout: Layout, dtype: torch.dtype, most_sectors: float = MOST_SECTORS
) -> float:
    """Checks what ranking and pruning move. Returns the most sectors read, in multiples of the least."""
    values = layout.arrange(cases.random_values(layout.shape, dtype))
    mask = torch.ones(layout.shape).to(dtype)
    channels = layout.shape[layout.dim]
    elements = values.numel()
    weight = elements * values.element_size()
    dims = [layout.dim]

    def rank() -> None:
        OPS.channel_norms([values], dims, 2.0)

    def prune() -> None:
        OPS.prune_channels([values], [], [values], dims, 2.0, [-1], [0.5])

    def prune_again() -> None:
        OPS.prune_channels([values], [mask], [values.contiguous()], dims, 2.0, [-1], [0.5])

    worst = 0.0
    # Norms take eight bytes per channel, counts of mask elements as many, keep flags one. Norms and counts
    # are read to choose: once by the rank step, several times by a kernel of its own.
    by_rank = channels <= MOST_CHANNELS_OF_RANK
    for call, least_read, results, small, chosen_from in (
        (rank, weight, 0, 8 * channels, 0),
        (prune, 2 * weight, 2 * weight, 9 * channels, 8 * channels),
        (prune_again, 4 * weight, 2 * weight, 17 * channels, 16 * channels),
    ):
        found = traffic(module, call)
        case = (call.__name__, found, weight, channels)
        least = least_read + (chosen_from if by_rank else 0)
        partials = found["bytes_read"] - least
        assert 0 <= partials <= (MOST_BYTES - 1) * least_read, case
        assert found["bytes_written"] == results + small + partials, case
        assert found["launches"] == (1 if call is rank else 2 if by_rank else 3), case
        assert found["sectors_read"] <= most_sectors * least, case
        worst = max(worst, found["sectors_read"] / least)
        if call is not rank:
            assert partials <= (MOST_BYTES - 1) * results, case
            assert found["sectors_written"] <= MOST_SECTORS * (results + small), case
            # One flag per run; where the choice has a kernel of its own, every block of it reads all norms.
            flags = elements // values.stride(layout.dim)
            chosen = 0 if by_rank else chosen_from * math.ceil(channels / CHANNELS_PER_SELECT_BLOCK)
            assert found["cached_sectors"] <= chosen + flags + 0.1 * (least_read + results), case
    return worst


@cases.in_turn(name=LAYOUTS, dtype=DTYPES_BY_SIZE)
def test_little_is_moved_beyond_the_least(name, dtype, module):
    exceptions, reason = SECTORS_OF_EXCEPTIONS.get(name, ({}, ""))
    most = exceptions.get(dtype.itemsize, MOST_SECTORS)
    worst = assert_little_traffic(module, LAYOUTS[name], dtype, most)
    assert most == MOST_SECTORS or worst > MOST_SECTORS, f"no exception any more: {reason}"


# Sectors that pruning in place writes, as a multiple of those with zeros. Where the tensor does not begin
# where sectors do, the accesses of neighbouring warps share them.
MOST_SECTORS_IN_PLACE = 1.5
MOST_SECTORS_IN_PLACE_UNALIGNED = 2.05


def sectors_with_zeros(values: Tensor) -> int:
    """Of a dense tensor, in bytes."""
    in_memory = values.as_strided((values.numel(),), (1,))
    zero = (cases.bits(in_memory) == 0).repeat_interleave(values.element_size())
    before = values.data_ptr() % 32
    zero = torch.nn.functional.pad(zero, (before, -(before + len(zero)) % 32))
    return 32 * int(zero.view(-1, 32).any(dim=1).sum())


def assert_only_zeros_are_written(module: Any, layout: Layout, dtype: torch.dtype) -> None:
    """Checks what zeroing half of the channels moves, and pruning in place."""
    values = layout.arrange(cases.random_values(layout.shape, dtype))
    channels = layout.shape[layout.dim]
    dims = [layout.dim]
    keep = torch.rand(channels) < 0.5
    keep[0], keep[-1] = True, False
    weight = values.numel() * values.element_size()
    runs = values.numel() // values.stride(layout.dim)
    aligned = values.data_ptr() % 32 == 0
    most_sectors = MOST_SECTORS_IN_PLACE if aligned else MOST_SECTORS_IN_PLACE_UNALIGNED

    found = traffic(module, lambda: OPS.zero_channels_([values], [keep], dims))
    case = ("zero", found, weight, channels)
    assert found["bytes_read"] == 0, case
    assert found["bytes_written"] == int((~keep).sum()) * (weight // channels), case
    assert found["sectors_written"] <= most_sectors * sectors_with_zeros(values), case
    # Flags, one per run or less; the rest are tables.
    assert found["cached_sectors"] <= runs + 0.1 * weight, case

    values = layout.arrange(cases.random_values(layout.shape, dtype))
    found = traffic(module, lambda: OPS.prune_channels_([values], [values], dims, 2.0, [-1], [0.5]))
    zeros = int((cases.bits(values) == 0).sum()) * values.element_size()
    case = ("prune", found, weight, zeros)
    assert zeros == round(0.5 * channels) * (weight // channels), case
    norms = 8 * channels if channels <= MOST_CHANNELS_OF_RANK else 0
    partials = found["bytes_read"] - weight - norms
    assert 0 <= partials <= (MOST_BYTES - 1) * weight, case
    # Norms take eight bytes per channel, keep flags one.
    assert found["bytes_written"] == zeros + 9 * channels + partials, case


@cases.in_turn(name=LAYOUTS, dtype=DTYPES_BY_SIZE)
def test_pruning_in_place_reads_flags_and_writes_zeros(name, dtype, module):
    assert_only_zeros_are_written(module, LAYOUTS[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, *cases.NATIVE_DTYPES[5:]], ids=str)
@pytest.mark.parametrize("name", ["linear_dim_1", "convolution_3x3_dim_0"])
def test_little_is_moved_whatever_the_dtype(name, dtype, module):
    assert_little_traffic(module, LAYOUTS[name], dtype)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        (1, torch.float64),
        (2, torch.float32),
        (50, torch.bfloat16),
        (100, torch.float16),
        (300, torch.float8_e5m2),
    ],
)
def test_launches_of_a_list_are_as_predicted(length, dtype, module):
    weights, masks, dims = [], [], []
    for _ in range(length):
        shape = [(12, 20), (300, 5), (6, 4, 3, 3), (3, 90)][int(torch.randint(4, ()))]
        weights.append(cases.random_values(shape, dtype))
        masks.append(torch.ones(shape).to(dtype))
        dims.append(int(torch.randint(2, ())))
    amounts = [-1] * length, [0.5] * length

    def launches(call: Callable[[], Any]) -> int:
        return traffic(module, call)["launches"]

    channels = [weight.shape[dim] for weight, dim in zip(weights, dims, strict=True)]
    assert launches(lambda: OPS.channel_norms(weights, dims, 2.0)) == rank_launches(length)
    sums = OPS.channel_sums(weights, dims, 3.0)
    assert launches(lambda: OPS.channel_sums(weights, dims, 3.0)) == rank_launches(length)
    assert launches(lambda: OPS.norms_of_sums(sums, 3.0)) == 1
    first = launches(lambda: OPS.prune_channels(weights, [], weights, dims, 2.0, *amounts))
    assert first == prune_launches(channels)
    again = launches(lambda: OPS.prune_channels(weights, masks, weights, dims, 2.0, *amounts))
    assert again == prune_launches(channels, repeated=True)
    in_place = launches(lambda: OPS.prune_channels_(weights, weights, dims, 2.0, *amounts))
    assert in_place == prune_launches(channels, in_place=True)
    assert length > 100 or first == in_place == 2


@pytest.mark.parametrize("dtype", DTYPES_BY_SIZE, ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_a_batch_moves_what_its_matrices_move_in_as_many_launches_as_one_of_them(dim, dtype, module):
    shape = (16, 128, 96)
    values, batches = cases.random_values(shape, dtype), [0, shape[0]]
    channels = shape[0] * shape[dim]
    weight = values.numel() * values.element_size()
    rank = traffic(module, lambda: OPS.channel_norms([values], [dim], 2.0, batches))
    assert rank["launches"] == 1
    assert rank["bytes_read"] == weight
    assert rank["bytes_written"] == 8 * channels
    arguments = [dim], 2.0, [-1], [0.5], batches
    prune = traffic(module, lambda: OPS.prune_channels([values], [], [values], *arguments))
    assert prune["launches"] == 2
    assert prune["bytes_read"] == 2 * weight + 8 * channels
    assert prune["bytes_written"] == 2 * weight + 9 * channels
    keep = torch.cat([cases.random_keep(shape[dim]) for _ in range(shape[0])])
    zero = traffic(module, lambda: OPS.zero_channels_([values], [keep], [dim], batches))
    assert zero["launches"] == 1
    assert zero["bytes_read"] == 0
    assert zero["bytes_written"] == int((~keep).sum()) * (weight // channels)


@pytest.mark.parametrize("dtype", DTYPES_BY_SIZE, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_scaled_norms_read_their_tensor_once_and_make_no_product(dim, dtype, module):
    shape = (512, 512)
    values, factors = cases.random_values(shape, dtype), torch.rand(512, dtype=torch.float64)
    weight = values.numel() * values.element_size()
    found = traffic(module, lambda: OPS.scaled_norms([values], [dim], [factors], [1 - dim], 2.0))
    assert found["launches"] == 1
    partials = found["bytes_read"] - weight
    assert 0 <= partials <= (MOST_BYTES - 1) * weight
    assert found["bytes_written"] == 8 * 512 + partials


def test_one_launch_zeroes_all_tensors_whose_elements_are_of_a_size(module):
    tensors = [cases.random_values((6, 50), dtype) for _ in range(3) for dtype in cases.NATIVE_DTYPES]
    keeps = [cases.random_keep(6) for _ in tensors]
    dims = [0] * len(tensors)
    for count, expected in ((1, 1), (2, 2), (4, 3), (len(tensors), 4)):
        arguments = tensors[:count], keeps[:count], dims[:count]
        found = traffic(module, lambda arguments=arguments: OPS.zero_channels_(*arguments))
        assert found["launches"] == expected, count


# --- Several devices ------------------------------------------------------------------------------------


def test_memory_is_taken_on_all_devices_before_one_of_them_writes(module):
    assert module.calls_on(3, -1) == ["takes 0", "takes 1", "takes 2", "runs 0", "runs 1", "runs 2"]
    for full in range(3):
        taken = [f"takes {device}" for device in range(full + 1)]
        assert module.calls_on(3, full) == [*taken, "fails"]
    assert module.calls_on(0, -1) == []
