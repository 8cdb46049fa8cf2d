"""Every kernel of the CUDA library once, on small tensors, results checked: what compute-sanitizer runs."""

from __future__ import annotations

import sys

import cases
import torch
from torch import Tensor

from lnprune import ops

# Beyond the small shapes: strips, chunks and folds of several blocks, and rows that vectors cannot take.
SHAPES = [
    *cases.SMALL_SHAPES.values(),
    (9, 8200),
    (1100, 65),
    (1400, 66),
    (3, 950, 3, 3),
    (4, 2, 2, 16_500),
]


def tensors_of(offset: int, layout: str) -> tuple[list[Tensor], list[int]]:
    """One tensor of every shape, of the native dtypes in turn, with the dims of their channels in turn."""
    tensors, dims = [], []
    for number, shape in enumerate(SHAPES, offset):
        dtype = cases.NATIVE_DTYPES[number % len(cases.NATIVE_DTYPES)]
        tensors.append(cases.LAYOUTS[layout](cases.random_values(shape, dtype)))
        dims.append((number + offset) % len(shape))
    return tensors, dims


def moved(tensors: list[Tensor], layout: str, device: str) -> list[Tensor]:
    """The tensors on another device, with their layout there."""
    return [cases.LAYOUTS[layout](tensor.contiguous().to(device)) for tensor in tensors]


def assert_all_same_bits(actual: list[Tensor], expected: list[Tensor], case: object) -> None:
    for number, (tensor, wanted) in enumerate(zip(actual, expected, strict=True)):
        cases.assert_same_bits(tensor.cpu(), wanted, (case, number))


def prune(offset: int, layout: str, device: str) -> None:
    """First and repeated masks and weights of a list, in all three steps at once."""
    tensors, dims = tensors_of(offset, layout)
    amounts = [-1] * len(tensors), [0.4] * len(tensors)
    here = moved(tensors, layout, device)
    expected = ops.prune_channels(tensors, [], tensors, dims, 2.0, *amounts)
    actual = ops.prune_channels(here, [], here, dims, 2.0, *amounts)
    for results, wanted in zip(actual, expected, strict=True):
        assert_all_same_bits(results, wanted, ("first", offset, layout))
    # A repeated mask is contiguous, and its original with it.
    masks = [mask.contiguous() for mask in expected[0]]
    originals = [tensor.contiguous() for tensor in tensors]
    expected = ops.prune_channels(tensors, masks, originals, dims, 2.0, *amounts)
    masks, originals = ([t.to(device) for t in part] for part in (masks, originals))
    actual = ops.prune_channels(here, masks, originals, dims, 2.0, *amounts)
    for results, wanted in zip(actual, expected, strict=True):
        assert_all_same_bits(results, wanted, ("repeated", offset, layout))


def rank(offset: int, n: float, device: str) -> None:
    """The norms of one order, of every dtype."""
    tensors, dims = tensors_of(offset, "contiguous")
    actual = ops.channel_norms(moved(tensors, "contiguous", device), dims, float(n))
    for norms, wanted in zip(actual, ops.channel_norms(tensors, dims, float(n)), strict=True):
        cases.assert_norms_close(norms.cpu(), wanted, n)


def select(device: str) -> None:
    """Rankings with ties on the cut, outliers, NaN and channels that take no part."""
    ties = torch.randint(0, 5, (3000,), dtype=torch.float64)
    spread = 10.0 ** (300 * (2 * torch.rand(3000, dtype=torch.float64) - 1))
    spread[::100] = cases.NAN
    norms = [ties, spread, torch.zeros(1, dtype=torch.float64)]
    mask_counts = [torch.randint(0, 2, norm.shape).to(torch.float64) for norm in norms]
    counts, fractions = [1000, -1, 0], [0.0, 0.3, 0.0]
    for others in ([], mask_counts):
        expected = ops.select_channels(norms, others, counts, fractions)
        actual = ops.select_channels(
            [norm.to(device) for norm in norms], [count.to(device) for count in others], counts, fractions
        )
        for keep, wanted in zip(actual, expected, strict=True):
            assert torch.equal(keep.cpu(), wanted)


def write(device: str) -> None:
    """Masks alone."""
    tensors, dims = tensors_of(0, "contiguous")
    keeps = [torch.rand(t.shape[dim]) < 0.5 for t, dim in zip(tensors, dims, strict=True)]
    expected, _ = ops.write_masks(keeps, tensors, [], [], dims)
    here = moved(tensors, "contiguous", device)
    actual, _ = ops.write_masks([keep.to(device) for keep in keeps], here, [], [], dims)
    assert_all_same_bits(actual, expected, "masks alone")


def zero(offset: int, layout: str, device: str) -> None:
    """Pruned channels of a list become zero in place, by given flags and in all three steps at once."""
    tensors, dims = tensors_of(offset, layout)
    scores, _ = tensors_of(offset, layout)
    keeps = [cases.random_keep(t.shape[dim]) for t, dim in zip(tensors, dims, strict=True)]
    amounts = [-1] * len(tensors), [0.4] * len(tensors)
    here, scores_here = (moved(part, layout, device) for part in (tensors, scores))
    ops.zero_channels_(here, [keep.to(device) for keep in keeps], dims)
    ops.zero_channels_(tensors, keeps, dims)
    assert_all_same_bits(here, tensors, ("zeros", offset, layout))
    ops.prune_channels_(scores_here, here, dims, 2.0, *amounts)
    ops.prune_channels_(scores, tensors, dims, 2.0, *amounts)
    assert_all_same_bits(here, tensors, ("in place", offset, layout))


def run(device: str) -> None:
    """Runs the list on a device; what the CPU gives is right."""
    for offset in range(len(cases.NATIVE_DTYPES)):
        prune(offset, "contiguous", device)
        zero(offset, "contiguous", device)
    for layout in ("unaligned", "transposed", "channels_last"):
        prune(1, layout, device)
        zero(1, layout, device)
    for n in cases.NORMS:
        for offset in (0, 3):
            rank(offset, n, device)
    select(device)
    write(device)


if __name__ == "__main__":
    if not torch.cuda.is_available() or not ops.has_cuda():
        sys.exit(f"needs a CUDA device and the CUDA library ({ops.build_info()['cuda']})")
    torch.manual_seed(0)
    run("cuda")
    torch.cuda.synchronize()
    print("every kernel ran, every result is right")
