"""The select step: which channels stay, against a stable sort in plain Python."""

import fractions
import math

import cases
import hypothesis
import numpy
import pytest
import torch
from hypothesis import strategies

import lnprune
from lnprune import ops

pytestmark = pytest.mark.parametrize("device", cases.DEVICES)

EXAMPLES = hypothesis.settings(deadline=None, max_examples=150)
FEW_VALUES = [0.0, 1.0, 2.0, 3.5, math.inf, math.nan]
ANY_SIGN = [*FEW_VALUES, -0.0, -1.0, -2.5, -math.inf, 5e-324, -5e-324, -math.nan]


def as_norms(values, device):
    return torch.tensor(values, dtype=torch.float64, device=device)


def select(values, count, device, mask_counts=None, fraction=0.0):
    """Keep flags as a list of bools."""
    counts = [] if mask_counts is None else [as_norms(mask_counts, device)]
    (keep,) = ops.select_channels([as_norms(values, device)], counts, [count], [fraction])
    assert keep.dtype == torch.bool
    return keep.tolist()


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("n", cases.NORMS)
def test_every_kept_norm_is_at_least_every_pruned_one(n, dtype, device):
    tensor = cases.random_values((41, 23), dtype, device)
    for dim in (0, 1):
        channels = tensor.shape[dim]
        norms = lnprune.channel_norms(tensor, n, dim)
        for amount in (1, channels // 2, channels - 1):
            keep = lnprune.channel_mask(tensor, amount, n, dim)
            assert keep.shape == (channels,)
            assert keep.dtype == torch.bool
            assert int((~keep).sum()) == amount
            assert norms[keep].min() >= norms[~keep].max()
            assert keep.tolist() == cases.brute_force_keep(norms.tolist(), amount)


@pytest.mark.parametrize("seed", range(3))
def test_float64_norms_decide_where_the_dtypes_own_norms_tie(seed, device):
    # In bfloat16 these norms round to a dozen values or so.
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(300, 256, generator=generator).to(torch.bfloat16).to(device)
    exact = cases.reference_norms(tensor, 2, 0)
    keep = lnprune.channel_mask(tensor, 0.5, 2, 0)
    assert len(set(torch.norm(tensor, p=2, dim=1).tolist())) < 100
    assert exact[keep].min() >= exact[~keep].max() * (1 - cases.TOLERANCE)


@pytest.mark.parametrize("channels", [1, 2, 3, 17, 300])
def test_ties_go_to_the_lower_index(channels, device):
    tensor = torch.ones(channels, 5, device=device)
    for pruned in {0, 1, channels // 2, channels - 1, channels} & set(range(channels + 1)):
        expected = [True] * (channels - pruned) + [False] * pruned
        assert lnprune.channel_mask(tensor, pruned, 2, 0).tolist() == expected
        assert lnprune.channel_mask(tensor.T.contiguous(), pruned, 2, 1).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 3, 1.7, cases.INFINITY, -cases.INFINITY])
def test_nan_is_kept_first(n, device):
    tensor = torch.tensor([[5.0, 5.0], [1.0, math.nan], [math.inf, 1.0], [-math.nan, 0.0], [math.inf, 9.0]])
    tensor = tensor.to(device)
    assert lnprune.channel_mask(tensor, 3, n, 0).tolist() == [False, True, False, True, False]
    assert lnprune.channel_mask(tensor, 4, n, 0).tolist() == [False, True, False, False, False]


def test_zero_norms_are_pruned_first_whatever_their_sign(device):
    values = [-0.0, 3.0, 0.0, 1.0, -0.0]
    assert select(values, 1, device) == [True, True, True, True, False]
    assert select(values, 2, device) == [True, True, False, True, False]
    assert select(values, 3, device) == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("amount", "channels", "pruned"),
    [
        (0, 4, 0),
        (0.0, 4, 0),
        (1, 4, 1),
        (4, 4, 4),
        (1.0, 4, 4),
        (0.5, 1, 0),
        (0.5, 3, 2),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.25, 2, 0),
        (0.25, 6, 2),
        (0.25, 10, 2),
        (0.3, 10, 3),
        (0.999, 10, 10),
        (True, 4, 1),
        (False, 4, 0),
        (fractions.Fraction(1, 2), 5, 2),
        (fractions.Fraction(1, 2), 7, 4),
        (fractions.Fraction(2, 3), 6, 4),
        (numpy.float64(0.5), 5, 2),
        (numpy.float32(0.5), 7, 4),
        (numpy.int64(3), 7, 3),
        (numpy.int32(0), 7, 0),
    ],
)
def test_amounts(amount, channels, pruned, device):
    tensor = cases.random_values((channels, 6), torch.float32, device)
    norms = lnprune.channel_norms(tensor, 2, 0).tolist()
    assert lnprune.channel_mask(tensor, amount, 2, 0).tolist() == cases.brute_force_keep(norms, pruned)


@pytest.mark.parametrize(
    ("amount", "error"),
    [
        (5, ValueError),
        (-1, ValueError),
        (1.1, ValueError),
        (-0.1, ValueError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_amounts_that_are_refused(amount, error, device):
    with pytest.raises(error):
        lnprune.channel_mask(torch.ones(4, 4, device=device), amount, 2, 0)


@EXAMPLES
@hypothesis.given(data=strategies.data())
def test_any_norms_are_cut_as_a_stable_sort_cuts_them(data, device):
    pool = data.draw(strategies.lists(strategies.sampled_from(ANY_SIGN), min_size=1, max_size=6))
    values = data.draw(strategies.lists(strategies.sampled_from(pool), min_size=1, max_size=60))
    pruned = data.draw(strategies.integers(0, len(values)))
    assert select(values, pruned, device) == cases.brute_force_keep(values, pruned)


@EXAMPLES
@hypothesis.given(
    values=strategies.lists(strategies.floats(), min_size=1, max_size=40), share=strategies.floats(0, 1)
)
def test_any_floats_and_any_fraction(values, share, device):
    pruned = round(share * len(values))
    assert select(values, -1, device, fraction=share) == cases.brute_force_keep(values, pruned)


@EXAMPLES
@hypothesis.given(data=strategies.data())
def test_channel_mask_with_few_distinct_norms(data, device):
    entries = data.draw(strategies.lists(strategies.sampled_from(FEW_VALUES), min_size=1, max_size=50))
    amount = data.draw(
        strategies.one_of(strategies.integers(0, len(entries)), strategies.floats(0, 1, width=32))
    )
    n = data.draw(strategies.sampled_from([1, 2, cases.INFINITY, -cases.INFINITY]))
    tensor = torch.tensor(entries, device=device).repeat(3, 1)
    pruned = round(amount * len(entries)) if isinstance(amount, float) else amount
    expected = cases.brute_force_keep(entries, pruned)
    assert lnprune.channel_mask(tensor, amount, n, 1).tolist() == expected
    assert lnprune.channel_mask(tensor.T.contiguous(), amount, n, 0).tolist() == expected


def participants_keep(values, mask_counts, pruned):
    """The brute-force choice among the channels with a mask count."""
    alive = [c for c, count in enumerate(mask_counts) if count != 0]
    kept = cases.brute_force_keep([values[c] for c in alive], min(pruned, len(alive)))
    chosen = {c for c, keep in zip(alive, kept, strict=True) if keep}
    return [c in chosen for c in range(len(values))]


@EXAMPLES
@hypothesis.given(data=strategies.data())
def test_only_channels_with_a_mask_take_part(data, device):
    values = data.draw(strategies.lists(strategies.sampled_from(FEW_VALUES), min_size=1, max_size=40))
    length = len(values)
    mask_counts = data.draw(
        strategies.lists(strategies.sampled_from([0.0, 1.0, 9.0]), min_size=length, max_size=length)
    )
    alive = sum(count != 0 for count in mask_counts)
    if data.draw(strategies.booleans()):
        share = data.draw(strategies.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0]))
        keep = select(values, -1, device, mask_counts, share)
        assert keep == participants_keep(values, mask_counts, round(share * alive))
    else:
        count = data.draw(strategies.integers(0, length + 2))
        assert select(values, count, device, mask_counts) == participants_keep(values, mask_counts, count)


@pytest.mark.parametrize(("alive", "pruned"), [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4), (9, 4)])
def test_a_fraction_of_those_that_take_part_rounds_half_to_even(alive, pruned, device):
    mask_counts = [1.0, 0.0] * alive
    keep = select([float(v) for v in range(2 * alive)], -1, device, mask_counts, 0.5)
    assert keep == [c % 2 == 0 and c // 2 >= pruned for c in range(2 * alive)]


def test_a_pruned_channel_with_the_largest_norm_stays_pruned(device):
    keep = select([math.nan, 1.0, math.inf, 2.0], 1, device, [0.0, 4.0, 0.0, 4.0])
    assert keep == [False, False, False, True]


def test_lists_are_cut_one_by_one(device):
    norms = [as_norms(torch.randint(0, 9, (length,)).tolist(), device) for length in (1, 7, 300, 20_000, 3)]
    counts = [0, 3, -1, 9_999, -1]
    shares = [0.0, 0.9, 0.5, 0.0, 1.0]
    together = ops.select_channels(norms, [], counts, shares)
    for norm, keep, count, share in zip(norms, together, counts, shares, strict=True):
        pruned = count if count >= 0 else round(share * norm.numel())
        assert keep.tolist() == cases.brute_force_keep(norm.tolist(), pruned)


@pytest.mark.parametrize("channels", [4096, 100_003])
def test_many_channels_with_many_ties(channels, device):
    values = torch.randint(0, 50, (channels,), dtype=torch.float64).to(device)
    for pruned in (1, channels // 3, channels - 1):
        (keep,) = ops.select_channels([values], [], [pruned], [0.0])
        assert keep.tolist() == cases.brute_force_keep(values.tolist(), pruned)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 300.0])
def test_many_channels_at_any_distance_from_one_another(scale, device):
    """Norms 10 ** (scale * x): from all alike to all over the range, with outliers, signs, ties and NaN."""
    values = 10.0 ** (scale * (2 * torch.rand(5000, dtype=torch.float64) - 1))
    values[torch.randint(0, 5000, (700,))] = values[7].clone()
    values[torch.randint(0, 5000, (40,))] = torch.tensor(ANY_SIGN, dtype=torch.float64).repeat(4)[:40]
    for pruned in (1, 12, 2000, 2500, 4310, 4999):
        (keep,) = ops.select_channels([values.to(device)], [], [pruned], [0.0])
        assert keep.tolist() == cases.brute_force_keep(values.tolist(), pruned)


def test_a_million_channels(device):
    tensor = torch.randint(-30, 30, (1_000_000, 2), dtype=torch.float32).to(device)
    keep = lnprune.channel_mask(tensor, 0.375, 1, 0)
    norms = tensor.double().abs().sum(1)
    ranking = torch.sort(norms, descending=True, stable=True).indices
    expected = torch.zeros_like(keep)
    expected[ranking[:625_000]] = True
    assert torch.equal(keep, expected)
