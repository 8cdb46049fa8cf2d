"""rank() and Ranking.select(): norms, and the choice against brute force from its definition."""

import copy
import dataclasses
import fractions
import functools
import itertools
import math
import random

import cases
import hypothesis
import numpy
import pytest
import torch
from hypothesis import strategies
from module_state import Snapshot, assert_unchanged, bits
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune import ops
from lnprune.plans.ranking import Ranking

ORDERS = [0, 1, 2, math.inf, -math.inf, 3, 0.5, -1]
on_every_device = pytest.mark.parametrize("device", cases.DEVICES)
EXAMPLES = hypothesis.settings(deadline=None, max_examples=120)
CASES = 250  # of brute force


class Small(nn.Module):
    """Weights of several shapes, one of them pruned in two channels."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.embed = nn.Embedding(9, 6, device=device)
        self.conv = nn.Conv2d(6, 5, 3, device=device)
        self.up = nn.ConvTranspose1d(5, 7, 2, device=device)
        self.head = nn.Linear(7, 8, device=device)


DIMS = {"embed.weight": 1, "conv.weight": 0, "up.weight": 1, "head.weight": 0}


def weights_of(model):
    return {name: getattr(model, name.partition(".")[0]).weight for name in DIMS}


def prune_channels(module, channels, dim=0):
    """A mask on the weight that prunes these channels, by torch."""
    mask = torch.ones_like(module.weight, requires_grad=False)
    mask.index_fill_(dim, torch.tensor(channels, dtype=torch.int64, device=mask.device), 0)
    return stock.custom_from_mask(module, "weight", mask)


def assert_norms(ranking, tensors, n):
    assert list(ranking.norms) == ranking.names == list(tensors)
    for name, tensor in tensors.items():
        norms = ranking.norms[name]
        assert norms.device == tensor.device
        assert not norms.requires_grad
        cases.assert_same_bits(norms, lnprune.channel_norms(tensor.detach(), n, DIMS[name]))


# ---------------------------------------------------------------------------------------------- rank


@on_every_device
@pytest.mark.parametrize("n", [*ORDERS, "fro", None])
def test_norms_are_those_of_channel_norms(n, device):
    model = Small(device)
    snapshots = [(module, Snapshot(module)) for module in model.modules()]
    ranking = lnprune.rank(model, n, "out")
    assert_norms(ranking, weights_of(model), n)
    order = 2 if n in ("fro", None) else n
    for name, tensor in weights_of(model).items():
        exact = cases.reference_norms(tensor, order, DIMS[name])
        cases.assert_norms_close(ranking.norms[name], exact, order, tolerance=1e-12)
    for module, snapshot in snapshots:
        assert_unchanged(module, snapshot)


@on_every_device
def test_nuclear_norms_are_those_of_slices_that_are_matrices(device):
    module = nn.Conv1d(4, 5, 3, device=device)
    norms = lnprune.rank(module, "nuc", 0).norms["weight"]
    expected = torch.linalg.svdvals(module.weight.detach().double()).sum(dim=1)
    assert torch.allclose(norms, expected, rtol=1e-12)
    model = nn.Sequential(module, nn.Conv2d(4, 5, 3, device=device))
    with pytest.raises(RuntimeError, match=r"^1\.weight: "):
        lnprune.rank(model, "nuc", 0)


@on_every_device
@pytest.mark.parametrize("dtype", [*cases.NATIVE_DTYPES, torch.complex64, torch.complex128], ids=str)
def test_every_dtype(dtype, device):
    values = torch.randn(6, 5)
    if dtype.is_complex:
        values = torch.complex(values, torch.randn(6, 5))
    module, other = nn.Module(), nn.Linear(5, 4, device=device)
    module.weight = nn.Parameter(values.to(dtype).to(device), requires_grad=False)
    norms = lnprune.rank([(module, "weight"), (other, "weight")], 2, 0).norms
    wide = module.weight.to(torch.complex128 if dtype.is_complex else torch.float64)
    assert norms["0.weight"].dtype == torch.float64
    assert torch.allclose(norms["0.weight"], wide.abs().square().sum(1).sqrt(), rtol=1e-12)
    plan = lnprune.rank([(module, "weight"), (other, "weight")], 2, 0).select(0.5, scope="global")
    assert sum(entry.kept for entry in plan.entries) == 5


@on_every_device
def test_layouts_do_not_matter(device):
    for layout in cases.LAYOUTS.values():
        module = nn.Module()
        module.weight = nn.Parameter(layout(torch.randn(6, 4, 3, 2, device=device)))
        norms = lnprune.rank([(module, "weight")], 1, 1).norms["0.weight"]
        assert torch.allclose(norms, module.weight.detach().double().abs().sum(dim=(0, 2, 3)), rtol=1e-12)


@on_every_device
def test_importance_scores_stand_for_their_parameters(device):
    model = Small(device)
    scores = {name: torch.randn_like(weight) for name, weight in weights_of(model).items()}
    by_name = lnprune.rank(model, 1, "out", scores)
    assert_norms(by_name, scores, 1)
    by_place = lnprune.rank(model, 1, "out", {(model.up, "weight"): scores["up.weight"]})
    assert_norms(by_place, {**weights_of(model), "up.weight": scores["up.weight"]}, 1)
    both = {(model.up, "weight"): scores["up.weight"], "head.weight": scores["head.weight"]}
    expected = {**weights_of(model), "up.weight": scores["up.weight"], "head.weight": scores["head.weight"]}
    assert_norms(lnprune.rank(model, 1, "out", both), expected, 1)
    assert_norms(lnprune.rank(model, 1, "out", {}), weights_of(model), 1)
    listed = lnprune.rank([(model.head, "weight")], 1, 0, {"0.weight": scores["head.weight"]})
    cases.assert_same_bits(listed.norms["0.weight"], by_name.norms["head.weight"])
    # The choice follows the scores.
    for name, flags in by_name.select(2).keep.items():
        assert flags.tolist() == cases.brute_force_keep(by_name.norms[name].tolist(), 2)


def test_importance_scores_may_have_another_dtype():
    module = nn.Linear(4, 3)
    scores = torch.randn(3, 4, dtype=torch.float16, requires_grad=True)
    norms = lnprune.rank(module, 2, 0, {"weight": scores}).norms["weight"]
    cases.assert_same_bits(norms, lnprune.channel_norms(scores.detach(), 2, 0))
    assert not norms.requires_grad


def test_importance_scores_of_a_shared_weight_by_any_of_its_places():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    scores = torch.randn(4, 4)
    for place in ("0.weight", (model[0], "weight"), (model[1], "weight")):
        norms = lnprune.rank(model, 2, 0, {place: scores}).norms
        assert list(norms) == ["0.weight"]
        cases.assert_same_bits(norms["0.weight"], lnprune.channel_norms(scores, 2, 0))


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ({"bias": torch.ones(3, 4)}, ValueError, r"^importance_scores: 'bias' is none of the 1 parameters"),
        ({"weight": torch.ones(4, 3)}, ValueError, r"^weight: .* shape \(3, 4\), got \(4, 3\)"),
        ({"weight": torch.ones(3)}, ValueError, r"^weight: .* shape \(3, 4\), got \(3,\)"),
        ({"weight": [1.0]}, TypeError, r"^weight: expected a tensor of importance_scores, got list"),
        (torch.ones(3, 4), TypeError, r"^importance_scores: expected a mapping .*got Tensor"),
        ([torch.ones(3, 4)], TypeError, r"^importance_scores: expected a mapping .*got list"),
    ],
    ids=str,
)
def test_importance_scores_that_are_refused(scores, error, message):
    with pytest.raises(error, match=message):
        lnprune.rank(nn.Linear(4, 3), 2, 0, scores)


@on_every_device
@pytest.mark.parametrize("n", ORDERS)
def test_channels_pruned_before_take_no_part(n, device):
    """Their norms, whatever they are, are among neither those that stay nor those that are counted."""
    model = nn.Sequential(nn.Linear(3, 6, device=device), nn.Linear(3, 4, device=device))
    with torch.no_grad():
        model[0].weight[4] = math.nan  # a mask times NaN is NaN, which would rank first
        model[0].weight[1] = 1e6
    prune_channels(model[0], [4, 1])
    ranking = lnprune.rank(model, n, 0)
    masked = ranking.norms["0.weight"]
    cases.assert_same_bits(masked, lnprune.channel_norms(model[0].weight.detach(), n, 0))
    alive = [0, 2, 3, 5]
    chosen = cases.brute_force_keep(masked[alive].tolist(), 2)
    expected = [c in alive and chosen[alive.index(c)] for c in range(6)]
    for amount in (2, 0.5, fractions.Fraction(1, 2)):
        plan = ranking.select(amount)
        assert plan.keep["0.weight"].tolist() == expected
        assert [entry.kept for entry in plan.entries] == [2, 2]
    everything = ranking.select(0, scope="global")
    assert everything.keep["0.weight"].tolist() == [c in alive for c in range(6)]
    assert sum(entry.kept for entry in ranking.select(0.25, scope="global").entries) == 6
    with pytest.raises(ValueError, match=r"^0\.weight: amount=5 is more than the 4 channels that are left"):
        ranking.select(5)


def test_importance_scores_of_a_pruned_parameter():
    module = prune_channels(nn.Linear(3, 4), [0])
    scores = torch.tensor([9.0, 1, 3, 2]).view(4, 1).repeat(1, 3)
    ranking = lnprune.rank(module, 2, 0, {"weight": scores})
    assert ranking.select(1).keep["weight"].tolist() == [False, False, True, True]


RENEWALS = {
    "load_state_dict": lambda layer, values: layer.load_state_dict(
        {**layer.state_dict(), "weight_orig": values}
    ),
    "optimizer": lambda layer, values: layer.weight_orig.data.copy_(values),
    "a mask": lambda layer, values: (
        layer.weight_orig.data.copy_(values),
        layer.weight_mask.copy_(torch.ones_like(layer.weight_mask)),
    ),
}


@on_every_device
@pytest.mark.parametrize("change", RENEWALS)
def test_a_masked_weight_is_measured_as_it_is_now(change, device):
    """Its attribute is what the last forward left, until the next one."""
    layer = nn.Linear(4, 8, device=device)
    lnprune.ln_structured(layer, "weight", 0.25, 2, 0)
    values = torch.randperm(8, device=device).float().view(8, 1).expand(8, 4) + 1
    RENEWALS[change](layer, values)
    attribute = layer.weight
    before = bits(attribute)
    expected = layer.weight_mask.detach() * values
    for parameters in ([(layer, "weight")], layer):
        ranking = lnprune.rank(parameters, 1, 0)
        (norms,) = ranking.norms.values()
        assert norms.tolist() == expected.abs().sum(dim=1).tolist()
        (keep,) = ranking.select(2).keep.values()
        left = int((expected != 0).any(dim=1).sum())
        assert keep.tolist() == (norms > norms.sort(descending=True).values[left - 2]).tolist()
    assert layer.weight is attribute
    assert torch.equal(bits(attribute), before)
    plan_of_all = lnprune.rank(layer, 1, 0, {"weight": torch.ones(8, 4, device=device)}).select(0)
    assert torch.equal(plan_of_all.keep["weight"], (expected != 0).any(dim=1).cpu())
    lnprune.global_structured(layer, 2, 1, 0)
    assert torch.equal(layer.weight_mask[:, 0].cpu() != 0, keep)


ZEROING = {
    "by hand": lambda module, channels: module.weight.data.index_fill_(0, torch.tensor(channels), -0.0),
    "by a mask that is removed": lambda module, channels: nn.utils.prune.remove(
        prune_channels(module, channels), "weight"
    ),
    "behind a mask": lambda module, channels: prune_channels(
        module, channels[:1]
    ).weight_orig.data.index_fill_(0, torch.tensor(channels[1:]), 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("n", [*ORDERS, 2.5, 40, -2, 1e-300, "fro"], ids=str)
@pytest.mark.parametrize("zeroing", ZEROING)
def test_channels_of_zeros_are_gone(zeroing, n, dtype):
    """Whoever zeroed them; and no others, however small their elements are, and whatever their norm is."""
    module = nn.Linear(4, 8, bias=False)
    module.weight = nn.Parameter(torch.randn(8, 4, dtype=dtype))
    finfo = torch.finfo(dtype)
    with torch.no_grad():
        module.weight[3] = 0
        module.weight[3, 1] = max(finfo.smallest_normal, 1e-300)  # of norm 0 for negative and large orders
        module.weight[5, 2] = 0
    ZEROING[zeroing](module, [6, 1])
    left = [0, 2, 3, 4, 5, 7]
    for scores in (None, {"weight": torch.randn(8, 4)}, {"weight": torch.zeros(8, 4)}):
        ranking = lnprune.rank(module, n, 0, scores)
        for scope in ("local", "global"):
            assert kept_of(ranking.select(0, scope=scope, normalize="none")) == [left]
            (kept,) = kept_of(ranking.select(0.5, scope=scope, normalize="none"))
            assert len(kept) == 3
            assert set(kept) <= set(left)
        with pytest.raises(ValueError, match="7"):
            ranking.select(7)
        if zeroing != "behind a mask":  # a group that is not all zeros stays as it is
            assert kept_of(ranking.select(0, group_size=2)) == [list(range(8))]


@on_every_device
@pytest.mark.parametrize("scope", ["local", "global"])
def test_rounds_in_place_leave_what_rounds_of_masks_leave(scope, device):
    """A half of what is left each time, and each parameter counted once."""
    models = [nn.Sequential(nn.Linear(32, 64, device=device), nn.Linear(64, 64, device=device))]
    models.append(copy.deepcopy(models[0]))
    removed = [[], []]
    for left in (64, 32, 16):
        for model, permanent, counted in zip(models, (False, True), removed, strict=True):
            plan = lnprune.rank(model, 2, "out").select(0.5, scope=scope)
            assert sum(entry.kept for entry in plan.entries) == left
            counted.append([entry.parameters_removed for entry in plan.entries])
            plan.apply(permanent=permanent)
    assert removed[0] == removed[1]
    assert sum(map(sum, removed[0])) + sum(entry.kept * entry.shape[1] for entry in plan.entries) == (
        64 * 32 + 64 * 64
    )
    lnprune.remove_all(models[0])
    for masked, in_place in zip(*models, strict=True):
        assert torch.equal(masked.weight, in_place.weight)


def test_unstructured_masks_prune_no_channel_but_those_they_empty():
    module = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 9, 9, 9], [3, 3, 3, 3], [5, 5, 0, 0]]))
    mask = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    stock.custom_from_mask(module, "weight", mask)
    ranking = lnprune.rank(module, 1, 0)
    assert ranking.norms["weight"].tolist() == [1.0, 0.0, 5.0]
    assert ranking.select(1).keep["weight"].tolist() == [False, False, True]


@pytest.fixture
def native_calls(monkeypatch):
    """The devices and the counts of tensors of the calls to the native norms."""
    calls = []
    original = ops.channel_norms

    def counted(tensors, dims, p, batches=()):
        calls.append((tensors[0].device.type, len(tensors)))
        return original(tensors, dims, p, batches)

    monkeypatch.setattr(ops, "channel_norms", counted)
    return calls


@on_every_device
def test_one_native_call_measures_all(device, native_calls):
    model = Small(device)
    ranking = lnprune.rank(model, 2, "out")
    assert native_calls == [(device, 4)]
    for scope in ("local", "global"):
        for amount in (0.1, 0.5, 3):
            ranking.select(amount, scope=scope)
    assert native_calls == [(device, 4)], "a selection reads no weights"


def test_one_native_call_counts_all_masks(native_calls):
    model = Small()
    prune_channels(model.conv, [0])
    prune_channels(model.head, [1])
    lnprune.rank(model, 2, "out")
    assert native_calls == [("cpu", 4), ("cpu", 2)]


def test_what_is_not_native_stays_out_of_the_native_call(native_calls):
    complex_one = nn.Module()
    complex_one.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    model = Small()
    places = [(model.conv, "weight"), (complex_one, "weight"), (model.head, "weight")]
    lnprune.rank(places, 2, 0)
    assert native_calls == [("cpu", 2)]
    lnprune.rank([(nn.Conv1d(3, 4, 2), "weight")], "nuc", 0)
    assert native_calls == [("cpu", 2), ("cpu", 1)]  # which channels are zeros, no norm of matrices says


@pytest.mark.skipif("cuda" not in cases.DEVICES, reason="needs a GPU")
def test_one_native_call_for_each_device(native_calls):
    model = Small()
    model.up.cuda()
    model.head.cuda()
    ranking = lnprune.rank(model, 2, "out")
    assert sorted(native_calls) == [("cpu", 2), ("cuda", 2)]
    assert_norms(ranking, weights_of(model), 2)
    expected = lnprune.rank(model.cpu(), 2, "out").select(0.5, scope="global")
    for name, flags in ranking.select(0.5, scope="global").keep.items():
        assert torch.equal(flags, expected.keep[name])


def test_a_selection_reads_no_weights():
    model = Small()
    ranking = lnprune.rank(model, 2, "out")
    before = ranking.select(0.5, scope="global", min_channels=2).keep
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)
    fresh = ranking.select(0.5, scope="global", min_channels=2).keep
    for name, flags in ranking.select(0.25, scope="global").keep.items():
        assert flags.shape == before[name].shape
    assert all(torch.equal(fresh[name], before[name]) for name in before)


def test_selections_do_not_disturb_one_another():
    model = Small()
    ranking = lnprune.rank(model, 2, "out")
    choices = [
        {"amount": amount, "scope": scope, "of": of, "normalize": normalize, "multiple_of": multiple}
        for amount in (0.25, 0.5, 7)
        for scope in ("local", "global")
        for of in ("channels", "parameters")
        for normalize in ("size", "layer", "none")
        for multiple in (1, 2)
        if not (amount == 7 and scope == "local" and of == "channels")
    ]
    random.Random(torch.initial_seed()).shuffle(choices)
    kept = [ranking.select(**choice).keep for choice in choices]
    for choice, keep in zip(choices, kept, strict=True):
        fresh = lnprune.rank(model, 2, "out").select(**choice)
        assert all(torch.equal(fresh.keep[name], keep[name]) for name in keep), choice


def test_meta_parameters_have_norms_without_values():
    model = Small("meta")
    ranking = lnprune.rank(model, 2, "out")
    assert [tuple(norms.shape) for norms in ranking.norms.values()] == [(6,), (5,), (7,), (8,)]
    assert all(norms.is_meta and norms.dtype == torch.float64 for norms in ranking.norms.values())
    for scope in ("local", "global"):
        with pytest.raises(ValueError, match=r"^embed\.weight: is on the device meta"):
            ranking.select(0.5, scope=scope)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3, device="meta"))
    with pytest.raises(ValueError, match=r"^1\.weight: is on the device meta"):
        lnprune.rank(model, 2, 0).select(0.5)


def test_inside_reference_ranking_there_is_no_rank():
    module = nn.Linear(3, 2)
    snapshot = Snapshot(module)
    ranking = lnprune.rank(module, 2, 0)
    with lnprune.reference_ranking():
        with pytest.raises(RuntimeError, match=r"^rank orders .*reference_ranking\(\)"):
            lnprune.rank(module, 2, 0)
        assert ranking.select(1).entries[0].kept == 1
    assert_unchanged(module, snapshot)


@pytest.mark.parametrize("n", ["bad", "2", math.nan, 2j, [2], 1e-320])
def test_orders_that_are_none(n):
    try:
        expected = stock._compute_norm(torch.ones(2, 2, dtype=torch.float64), n, 0)
    except (RuntimeError, TypeError, ValueError) as error:
        with pytest.raises(type(error), match=r"^0\.weight: "):
            lnprune.rank(nn.Sequential(nn.Linear(2, 2)), n, 0)
    else:  # torch takes some that mean nothing
        module = nn.Linear(2, 2)
        nn.init.ones_(module.weight)
        assert torch.equal(lnprune.rank(module, n, 0).norms["weight"].isnan(), expected.isnan())


def test_what_a_ranking_says_of_itself():
    ranking = lnprune.rank(Small(), math.inf, "out")
    assert repr(ranking) == "Ranking(4 parameters, 26 channels, n=inf)"
    assert len(ranking) == 4
    assert ranking.n == math.inf
    assert ranking.names == list(DIMS)
    assert repr(Ranking([], "fro", [])) == "Ranking(0 parameters, 0 channels, n='fro')"


# ------------------------------------------------------------------------------- select: brute force


@dataclasses.dataclass
class Model:
    """Layers with given norms: of each channel its norm, and whether no mask has emptied it."""

    n: float
    norms: list[list[float]]
    alive: list[list[bool]]
    sizes: list[int]  # elements of a channel

    def groups_left(self, layer, group_size):
        """The first channels of the groups that are not gone: neither emptied by a mask nor all zeros."""
        norms, alive = self.norms[layer], self.alive[layer]
        return [
            start
            for start in range(0, len(norms), group_size)
            if alive[start] and any(norm != 0 for norm in norms[start : start + group_size])
        ]

    def left(self, layer, group_size):
        """How many channels of a layer take part."""
        return len(self.groups_left(layer, group_size)) * group_size

    def rank(self):
        pairs = []
        for norms, alive, size in zip(self.norms, self.alive, self.sizes, strict=True):
            module = nn.Module()
            values = torch.zeros(len(norms), size, dtype=torch.float64)
            for row, norm in zip(values, norms, strict=True):
                if self.n == 0:
                    row[: int(norm)] = -7.0
                elif self.n == -math.inf:
                    row[:] = norm
                else:
                    row[size // 2] = -norm
            module.weight = nn.Parameter(values)
            if not all(alive):
                prune_channels(module, [c for c, left in enumerate(alive) if not left])
            pairs.append((module, "weight"))
        ranking = lnprune.rank(pairs, self.n, 0)
        for measured, norms, alive in zip(ranking.norms.values(), self.norms, self.alive, strict=True):
            taking_part = torch.tensor(alive, dtype=torch.bool)
            expected = torch.tensor(norms, dtype=torch.float64)[taking_part]
            assert torch.equal(measured[taking_part].nan_to_num(-1.0), expected.nan_to_num(-1.0))
        return ranking


@dataclasses.dataclass
class Block:
    """Channels that stay or go together, and what they are ranked by."""

    layer: int
    position: int  # in the ranking of its layer
    channels: list[int]
    score: float

    def key(self):
        """NaN first, then larger, then the earlier parameter, then the lower index."""
        return *order_of(self.score), self.layer, self.position


def order_of(score):
    return (0, 0.0) if math.isnan(score) else (1, -score)


def add_up(values):
    """The plain sum: Python's own compensates for rounding from 3.12 on."""
    return functools.reduce(lambda a, b: a + b, values)


def norm_of_all(norms, n):
    """The norm of the elements of adjacent channels together, which is exact for small integers."""
    if len(norms) == 1:
        return norms[0]
    if any(math.isnan(norm) for norm in norms):
        return math.nan
    if n in (0, 1):
        return add_up(norms)
    if n == 2:
        return math.sqrt(add_up([norm * norm for norm in norms]))
    return max(norms) if n > 0 else min(norms)


def blocks_of_layer(model, layer, normalize, multiple_of, group_size):
    """The blocks of a layer by rank, and the channels left over."""
    norms = model.norms[layer]
    groups = [
        (start, norm_of_all(norms[start : start + group_size], model.n))
        for start in model.groups_left(layer, group_size)
    ]
    divisor = 1.0
    finite = [norm for _, norm in groups if math.isfinite(norm)]
    if normalize == "layer" and finite and add_up(finite) > 0:
        divisor = add_up(finite) / len(finite)
    if normalize == "size":
        elements = model.sizes[layer] * group_size
        divisor = {0: elements, 1: elements, 2: elements**0.5}.get(model.n, 1.0)
    groups.sort(key=lambda group: (*order_of(group[1]), group[0]))
    length = next(k for k in itertools.count(1) if k * group_size % multiple_of == 0)
    blocks = []
    for position, start in enumerate(range(0, len(groups) - length + 1, length)):
        members = groups[start : start + length]
        channels = [first + c for first, _ in members for c in range(group_size)]
        blocks.append(Block(layer, position, channels, add_up([norm / divisor for _, norm in members])))
    return blocks


def counts_of_layer(model, layer, min_channels, multiple_of, group_size):
    """All counts of kept channels that meet the constraints."""
    left = model.left(layer, group_size)
    return [
        count
        for count in range(left + 1)
        if count % multiple_of == 0 and count % group_size == 0 and (count >= min_channels or left == 0)
    ]


def nearest(counts, wanted):
    """The nearest, the larger of two that are equally near."""
    return min(counts, key=lambda count: (abs(count - wanted), -count))


def wanted_of(amount, total):
    return total - (round(amount * total) if isinstance(amount, float) else amount)


def flags_of(model, blocks):
    flags = [[False] * len(norms) for norms in model.norms]
    for block in blocks:
        for channel in block.channels:
            flags[block.layer][channel] = True
    return flags


def expected_local(model, amounts, of, min_channels, multiple_of, group_size):
    kept = []
    for layer, amount in enumerate(amounts):
        cost = model.sizes[layer] if of == "parameters" else 1
        wanted = wanted_of(amount, model.left(layer, group_size) * cost)
        counts = counts_of_layer(model, layer, min_channels, multiple_of, group_size)
        count = nearest([count * cost for count in counts], wanted) // cost
        for block in blocks_of_layer(model, layer, "none", multiple_of, group_size):
            if (block.position + 1) * len(block.channels) <= count:
                kept.append(block)
    return flags_of(model, kept)


class BruteForce:
    """All vectors of kept counts that meet the constraints of the layers, and the best for an amount."""

    def __init__(self, model, of, normalize, min_channels, multiple_of, group_size):
        layers = range(len(model.norms))
        self.model, self.group_size = model, group_size
        self.costs = [model.sizes[layer] if of == "parameters" else 1 for layer in layers]
        blocks = [blocks_of_layer(model, layer, normalize, multiple_of, group_size) for layer in layers]
        self.ranking = sorted(itertools.chain(*blocks), key=Block.key)
        counts = [counts_of_layer(model, layer, min_channels, multiple_of, group_size) for layer in layers]
        self.vectors = []
        for vector in itertools.product(*counts):
            kept = [
                rank
                for rank, block in enumerate(self.ranking)
                if (block.position + 1) * len(block.channels) <= vector[block.layer]
            ]
            self.vectors.append((self.total(vector), kept))
        if of == "parameters":
            # Those that keep, beyond what must stay, nothing that ranks after something they prune.
            fewest = min((kept for _, kept in self.vectors), key=len)
            self.vectors = [
                (total, kept)
                for total, kept in self.vectors
                if not (free := set(kept) - set(fewest)) or set(range(max(free))) <= set(kept)
            ]

    def total(self, vector):
        return add_up([0, *(count * cost for count, cost in zip(vector, self.costs, strict=True))])

    def left(self):
        layers = range(len(self.model.norms))
        return self.total([self.model.left(layer, self.group_size) for layer in layers])

    def expected(self, amount):
        total = nearest([total for total, _ in self.vectors], wanted_of(amount, self.left()))
        best = min(kept for other, kept in self.vectors if other == total)
        return flags_of(self.model, [self.ranking[rank] for rank in best])


def random_model(chance, group_size, most_layers=3, most_groups=6):
    """A small model with few distinct norms, so that most of them tie."""
    n = chance.choice([0, 1, 2, 2, math.inf, -math.inf])
    values = [0.0, 1.0, 2.0, 4.0] if n == 0 else [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, math.inf, math.nan]
    pool = chance.choices(values, k=chance.randint(1, 5))
    norms, alive, sizes = [], [], []
    for _ in range(max(chance.randint(1, most_layers), chance.randint(1, most_layers))):
        groups = max(chance.randint(0, most_groups), chance.randint(0, most_groups))
        norms.append(chance.choices(pool, k=groups * group_size))
        # At n = 0 a norm of 4 needs four elements. Squares have exact roots: layers tie when divided.
        sizes.append(chance.choice([4, 9, 16] if n == 0 else [1, 4, 9]))
        share = chance.choice([0.0, 0.0, 0.0, 0.2, 0.4, 1.0])
        flags = [chance.random() >= share for _ in range(groups)]
        alive.append([flag for flag in flags for _ in range(group_size)])
    return Model(n, norms, alive, sizes)


def infeasible_layer(model, min_channels, multiple_of, group_size):
    """The first layer without a count that meets its constraints, or None."""
    for layer in range(len(model.norms)):
        if not counts_of_layer(model, layer, min_channels, multiple_of, group_size):
            return layer
    return None


def random_constraints(chance):
    return {
        "min_channels": chance.randint(0, 3),
        "multiple_of": chance.choice([1, 1, 2, 3]),
        "group_size": chance.choice([1, 1, 2, 3]),
    }


def random_amount(chance, total):
    return chance.choice([chance.randint(0, total), chance.choice([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0])])


def select(model, ranking, amount, **options):
    keep = ranking.select(amount, **options).keep
    assert list(keep) == [f"{layer}.weight" for layer in range(len(model.norms))]
    return [flags.tolist() for flags in keep.values()]


@pytest.mark.parametrize("normalize", ["size", "layer", "none"])
@pytest.mark.parametrize("of", ["channels", "parameters"])
def test_a_global_selection_is_the_best_of_all(of, normalize):
    chance = random.Random(torch.initial_seed())
    for _ in range(CASES):
        constraints = random_constraints(chance)
        group_size = constraints["group_size"]
        model = random_model(chance, group_size, most_groups=6 if group_size == 1 else 3)
        options = {"scope": "global", "of": of, "normalize": normalize, **constraints}
        ranking = model.rank()
        if not assert_refused(model, ranking, options):
            brute_force = BruteForce(model, of, normalize, **constraints)
            left = brute_force.left()
            amounts = range(left + 1) if of == "channels" else chance.choices(range(left + 1), k=6)
            for amount in [*amounts, 0.0, 0.25, 0.5, 0.75, 1.0]:
                actual = select(model, ranking, amount, **options)
                assert actual == brute_force.expected(amount), (model, options, amount)


def assert_refused(model, ranking, options):
    """Whether the constraints cannot hold, which an error then says; fails if none does."""
    constraints = {key: options[key] for key in ("min_channels", "multiple_of", "group_size")}
    layer = infeasible_layer(model, **constraints)
    if layer is None:
        return False
    left = model.left(layer, constraints["group_size"])
    message = rf"^{layer}\.weight has {left} channels.* cannot be met"
    with pytest.raises(ValueError, match=message) as caught:
        ranking.select(0.5, **options)
    for option, number in constraints.items():
        assert number <= 1 or f"{option}={number}" in str(caught.value)
    return True


@pytest.mark.parametrize("of", ["channels", "parameters"])
def test_a_local_selection_is_the_best_of_each_layer(of):
    chance = random.Random(torch.initial_seed())
    for _ in range(CASES):
        constraints = random_constraints(chance)
        group_size = constraints["group_size"]
        model = random_model(chance, group_size, most_groups=8 if group_size == 1 else 4)
        options = {"of": of, **constraints}
        ranking = model.rank()
        if assert_refused(model, ranking, options):
            continue
        # There is nothing to compare between layers, so nothing to divide by.
        options["normalize"] = chance.choice(["size", "layer", "none"])
        for _ in range(4):
            amounts = [
                random_amount(chance, model.left(layer, group_size) * (size if of == "parameters" else 1))
                for layer, size in enumerate(model.sizes)
            ]
            by_name = dict(reversed([(f"{layer}.weight", amount) for layer, amount in enumerate(amounts)]))
            expected = expected_local(model, amounts, of, **constraints)
            assert select(model, ranking, by_name, **options) == expected, (model, options, amounts)
        for share in (0.0, 0.3, 0.5, 1.0):
            expected = expected_local(model, [share] * len(amounts), of, **constraints)
            assert select(model, ranking, share, **options) == expected, (model, options, share)


# ------------------------------------------------------------------------------ select: invariants


@strategies.composite
def networks(draw):
    """Larger models of Gaussian weights, and the orders that round."""
    n = draw(strategies.sampled_from([*ORDERS, 2.5, "fro"]))
    shapes = strategies.tuples(
        strategies.integers(1, 12), strategies.integers(1, 6), strategies.integers(1, 3)
    )
    model = nn.Sequential()
    generator = torch.Generator().manual_seed(draw(strategies.integers(0, 2**32)))
    for _ in range(draw(strategies.integers(1, 6))):
        twelfths, inputs, kernel = draw(shapes)
        module = nn.Conv1d(inputs, 12 * twelfths, kernel)
        module.weight.data.normal_(0, draw(strategies.sampled_from([0.1, 1.0, 30.0])), generator=generator)
        if draw(strategies.booleans()):  # ties
            module.weight.data[::3] = module.weight.data[:1].clone()
        if draw(strategies.booleans()):
            prune_channels(module, list(range(12 * draw(strategies.integers(0, twelfths)))))
        model.append(module)
    return model, n


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(data=strategies.data())
def test_constraints_and_totals_hold_whatever_is_asked_for(data):
    model, n = data.draw(networks())
    ranking = lnprune.rank(model, n, 0)
    left = []
    for module in model:
        mask = getattr(module, "weight_mask", torch.ones_like(module.weight))
        left.append(mask.flatten(1).any(dim=1))
    counts = [int(flags.sum()) for flags in left]
    options = {
        "min_channels": data.draw(strategies.integers(0, 12)),
        "multiple_of": data.draw(strategies.sampled_from([1, 2, 4, 6, 12])),
        "group_size": data.draw(strategies.sampled_from([1, 1, 2, 3, 4, 12])),
    }
    normalize = data.draw(strategies.sampled_from(["size", "layer", "none"]))
    amount = data.draw(strategies.one_of(strategies.integers(0, sum(counts)), strategies.floats(0, 1)))
    plan = ranking.select(amount, scope="global", normalize=normalize, **options)
    step = math.lcm(options["multiple_of"], options["group_size"])
    fewest = sum(-(-options["min_channels"] // step) * step for count in counts if count)
    most = sum(count // step * step for count in counts)
    kept = [entry.kept for entry in plan.entries]
    assert sum(kept) == nearest(range(fewest, most + 1, step), wanted_of(amount, sum(counts)))
    for entry, flags, alive, count in zip(plan.entries, plan.keep.values(), left, counts, strict=True):
        assert entry.kept == int(flags.sum())
        assert entry.kept % options["multiple_of"] == 0
        assert entry.kept >= options["min_channels"] or count == 0
        assert not (flags & ~alive).any()
        groups = flags.view(-1, options["group_size"])
        assert torch.equal(groups.any(dim=1), groups.all(dim=1))
        assert entry.margin is None or entry.margin >= 0
    if options["group_size"] == 1:
        # What is kept of a layer is the beginning of its own ranking: what a local selection keeps.
        local = ranking.select(
            {e.name: count - e.kept for e, count in zip(plan.entries, counts, strict=True)}, min_channels=0
        )
        for name, flags in plan.keep.items():
            assert torch.equal(flags, local.keep[name])


@EXAMPLES
@hypothesis.given(data=strategies.data())
def test_an_unconstrained_global_selection_is_a_stable_sort(data):
    model, n = data.draw(networks())
    ranking = lnprune.rank(model, n, 0)
    alive = torch.cat([getattr(m, "weight_mask", m.weight.detach() * 0 + 1)[:, 0, 0] != 0 for m in model])
    norms = torch.cat(list(ranking.norms.values()))
    amount = data.draw(strategies.integers(0, int(alive.sum())))
    plan = ranking.select(amount, scope="global", normalize="none", min_channels=0)
    chosen = iter(cases.brute_force_keep(norms[alive].tolist(), amount))
    expected = [bool(flag) and next(chosen) for flag in alive]
    assert torch.cat(list(plan.keep.values())).tolist() == expected


@EXAMPLES
@hypothesis.given(data=strategies.data())
def test_an_unconstrained_local_selection_is_that_of_channel_mask(data):
    model, n = data.draw(networks())
    model = nn.Sequential(*[nn.utils.prune.remove(m, "weight") if stock.is_pruned(m) else m for m in model])
    fewest = min(int(m.weight.flatten(1).any(dim=1).sum()) for m in model)
    amount = data.draw(strategies.one_of(strategies.integers(0, fewest), strategies.floats(0, 1)))
    keep = lnprune.rank(model, n, 0).select(amount, min_channels=0).keep
    for module, flags in zip(model, keep.values(), strict=True):
        alive = module.weight.detach().flatten(1).any(dim=1)
        assert not flags[~alive].any()
        assert torch.equal(flags[alive], lnprune.channel_mask(module.weight[alive], amount, n, 0))


# ---------------------------------------------------------------------------- select: by example


def layers(*norms, size=1, n=1):
    """A ranking of layers with these norms."""
    model = Model(n, [list(map(float, layer)) for layer in norms], [], [size] * len(norms))
    model.alive = [[True] * len(layer) for layer in norms]
    return model.rank()


def kept_of(plan):
    return [[c for c, flag in enumerate(flags.tolist()) if flag] for flags in plan.keep.values()]


def test_ties_go_to_the_earlier_parameter_and_then_to_the_lower_index():
    ranking = layers([2, 1, 2], [2, 2, 1])
    expected = [[0], [0, 2], [0, 2], [0, 2], [0, 1, 2], [0, 1, 2]], [[], [], [0], [0, 1], [0, 1], [0, 1, 2]]
    for count, kept in enumerate(zip(*expected, strict=True), 1):
        plan = ranking.select(6 - count, scope="global", min_channels=0)
        assert kept_of(plan) == list(kept)


def test_nan_ranks_first_and_then_infinity():
    ranking = layers([9, math.inf, 1], [math.nan, 3, 8])
    kept = [kept_of(ranking.select(6 - count, scope="global", min_channels=0)) for count in range(1, 5)]
    assert kept == [[[], [0]], [[1], [0]], [[0, 1], [0]], [[0, 1], [0, 2]]]


def test_every_layer_keeps_one_channel_unless_told_otherwise():
    ranking = layers([5, 6, 7], [1, 2, 3])
    assert kept_of(ranking.select(3, scope="global")) == [[1, 2], [2]]
    assert kept_of(ranking.select(3, scope="global", min_channels=0)) == [[0, 1, 2], []]
    assert kept_of(ranking.select(1.0, scope="global")) == [[2], [2]]
    assert kept_of(ranking.select(1.0)) == [[2], [2]]
    assert kept_of(ranking.select(6, scope="global", min_channels=0)) == [[], []]
    assert kept_of(ranking.select(1.0, min_channels=0)) == [[], []]
    assert kept_of(ranking.select(3, min_channels=2)) == [[1, 2], [1, 2]]


def test_of_two_totals_that_are_equally_near_more_is_kept():
    ranking = layers([6, 5, 4, 3, 2, 1])
    assert [len(kept_of(ranking.select(k, multiple_of=2))[0]) for k in range(7)] == [6, 6, 4, 4, 2, 2, 2]
    assert [len(kept_of(ranking.select(k, scope="global", multiple_of=2))[0]) for k in range(7)] == [
        *(6, 6, 4, 4, 2, 2, 2),
    ]
    assert [len(kept_of(ranking.select(k, multiple_of=3, min_channels=0))[0]) for k in range(7)] == [
        *(6, 6, 3, 3, 3, 0, 0),
    ]


def test_blocks_are_ranked_by_the_sum_of_their_norms():
    # 5 + 4 are more than 6 + 2: the first layer's best block goes before the second's.
    ranking = layers([5, 4, 0.5], [6, 2, 1])
    kept = kept_of(ranking.select(4, scope="global", multiple_of=2, min_channels=0))
    assert kept == [[0, 1], []]
    assert kept_of(ranking.select(5, scope="global", min_channels=0)) == [[], [0]]


def test_a_remainder_goes_where_a_multiple_is_asked_for():
    ranking = layers([1, 5, 2, 4, 3], [1, 2, 3])
    assert kept_of(ranking.select(0, multiple_of=2)) == [[1, 2, 3, 4], [1, 2]]
    assert kept_of(ranking.select(0, scope="global", multiple_of=2)) == [[1, 2, 3, 4], [1, 2]]


def test_groups_stay_together_and_rank_by_the_norm_of_all_their_elements():
    ranking = layers([3, 4, 0, 6, 5, 5], n=2)
    assert kept_of(ranking.select(4, group_size=2)) == [[4, 5]]
    assert kept_of(ranking.select(2, group_size=2)) == [[2, 3, 4, 5]]
    assert kept_of(layers([3, 4, 0, 6, 5, 5], n=1).select(2, group_size=2)) == [[0, 1, 4, 5]]
    assert kept_of(layers([3, 4, 0, 6, 5, 5], n=math.inf).select(4, group_size=2)) == [[2, 3]]
    assert kept_of(layers([3, 4, 0, 6, 5, 5], n=math.inf).select(3, group_size=3)) == [[3, 4, 5]]
    assert kept_of(layers([3, 4, 0, 6, 5, 5], n=-math.inf).select(2, group_size=2)) == [[0, 1, 4, 5]]


@pytest.mark.parametrize("n", [*ORDERS, 2.5, "fro"])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_norm_of_a_group_is_that_of_its_elements(n, zeros):
    module = nn.Conv2d(3, 12, 2)
    if zeros:
        module.weight.data[torch.rand_like(module.weight) < 0.3] = 0.0
    ranking = lnprune.rank(module, n, 0)
    joined = lnprune.channel_norms(module.weight.detach().reshape(4, -1), n, 0)
    ordered = torch.sort(joined, descending=True).values
    for kept in range(1, 5):
        plan = ranking.select(12 - 3 * kept, group_size=3)
        (entry,) = plan.entries
        assert entry.kept == 3 * kept
        assert entry.norm_at_cut == pytest.approx(float(ordered[kept - 1]), rel=1e-12)
        if not zeros:  # rounding does not decide
            groups = plan.keep["weight"].view(4, 3)[:, 0].tolist()
            assert groups == cases.brute_force_keep(joined.tolist(), 4 - kept)


@pytest.mark.parametrize("n", [*ORDERS, 2.5, "fro"])
@pytest.mark.parametrize("group_size", [1, 2])
def test_layers_of_one_distribution_compare_whatever_their_sizes(n, group_size):
    """Divided by their size to the power 1/n, constant slices of all sizes have one norm."""
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Linear(7, 4), nn.Conv1d(64, 4, 1))
    for i, module in enumerate(model):
        # By far more than rounding, and less than the sizes make.
        nn.init.constant_(module.weight, 0.5 * 1.01**i)
    ranking = lnprune.rank(model, n, 0)
    plan = ranking.select(4, scope="global", min_channels=0, group_size=group_size)
    if n in (0, math.inf, -math.inf) or group_size == 1:
        expected = [4, 4, 0] if n == 0 else [0, 4, 4]
        assert [entry.kept for entry in plan.entries] == expected
    plan = ranking.select(8, scope="global", min_channels=0, group_size=group_size)
    assert [entry.kept for entry in plan.entries] == ([4, 0, 0] if n == 0 else [0, 0, 4])


def test_normalize_by_layer_divides_by_the_mean_of_the_finite_norms():
    ranking = layers([10, 30, math.inf, math.nan], [1, 2, 3, 2])
    # 0.5 and 1.5, against 0.5, 1, 1.5 and 1; the infinite norm and NaN go first.
    kept = [
        kept_of(ranking.select(8 - count, scope="global", normalize="layer", min_channels=0))
        for count in range(9)
    ]
    assert kept == [
        *([[], []], [[3], []], [[2, 3], []], [[1, 2, 3], []], [[1, 2, 3], [2]], [[1, 2, 3], [1, 2]]),
        *([[1, 2, 3], [1, 2, 3]], [[0, 1, 2, 3], [1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ]
    plan = ranking.select(3, scope="global", normalize="none", min_channels=0)
    assert kept_of(plan) == [[0, 1, 2, 3], [2]]


def test_layers_of_zeros_are_gone():
    for normalize in ("size", "layer", "none"):
        ranking = layers([0, 0, 0], [1e-300, 1e-300])
        assert kept_of(ranking.select(0, scope="global", normalize=normalize)) == [[], [0, 1]]
        assert kept_of(ranking.select(0.5, scope="global", normalize=normalize)) == [[], [0]]


def test_norms_that_division_makes_equal_keep_their_order_in_a_layer():
    """Neighbours among the floats are one number when divided by 5, but the larger one stays."""
    norms = [1.75 + k * 2.0**-52 for k in range(64)]
    assert len({norm / 5 for norm in norms}) < len(set(norms)) == 64
    for n, size in ((1, 5), (1, 7), (2, 3), (2, 10)):
        ranking = layers(norms, norms[::-1], size=size, n=n)
        for multiple_of in (1, 2):
            for normalize in ("size", "layer"):
                for pruned in range(0, 128, 6):
                    options = {"normalize": normalize, "multiple_of": multiple_of, "min_channels": 0}
                    first, second = kept_of(ranking.select(pruned, scope="global", **options))
                    assert first == list(range(64 - len(first), 64))
                    assert second == list(range(len(second)))
    tiny = layers([5e-324, 1e-323], size=100)
    assert kept_of(tiny.select(1, scope="global")) == [[1]]


def test_orders_so_small_that_sizes_overflow_still_select():
    model = nn.Sequential(nn.Linear(40, 4), nn.Linear(50, 4))
    for n in (0.005, -0.005):
        plan = lnprune.rank(model, n, 0).select(0.5, scope="global")
        assert sum(entry.kept for entry in plan.entries) == 4
    # 50 ** -200 is 0, but the norms are not, nor does the norm of zeros rank first.
    module = nn.Linear(50, 4, dtype=torch.float64)
    module.weight.data[:] = torch.tensor([0.0, 1e300, 0.0, 1e290]).view(4, 1)
    ranking = lnprune.rank(module, -0.005, 0)
    assert (ranking.norms["weight"] > 0).tolist() == [False, True, False, True]
    assert kept_of(ranking.select(1, scope="global")) == [[1]]
    assert kept_of(ranking.select(0, scope="global")) == [[1, 3]]


def test_parameters_are_counted_where_they_are_asked_for():
    pairs = [(nn.Linear(2, 4), "weight"), (nn.Linear(5, 4), "weight")]
    for row, values in zip(range(2), ([8.0, 6, 4, 2], [7.0, 5, 3, 1]), strict=True):
        pairs[row][0].weight.data.copy_(torch.tensor(values).view(4, 1).expand_as(pairs[row][0].weight))
    ranking = lnprune.rank(pairs, math.inf, 0)
    options = {"scope": "global", "of": "parameters", "min_channels": 0}
    # Totals of the ranking's beginnings: 0, 2, 7, 9, 14, 16, 21, 23, 28.
    for pruned, kept in [
        *(
            (0, (4, 4)),
            (2, (4, 4)),
            (3, (4, 3)),
            (5, (4, 3)),
            (6, (4, 3)),
            (7, (3, 3)),
            (9, (3, 3)),
            (10, (3, 2)),
        ),
        *(
            (12, (3, 2)),
            (13, (3, 2)),
            (14, (2, 2)),
            (23, (1, 1)),
            (24, (1, 0)),
            (26, (1, 0)),
            (27, (1, 0)),
            (28, (0, 0)),
        ),
    ]:
        plan = ranking.select(pruned, **options)
        assert tuple(entry.kept for entry in plan.entries) == kept, pruned
    assert [entry.kept for entry in ranking.select(0.5, **options).entries] == [2, 2]
    assert [entry.kept for entry in ranking.select(8, of="parameters", min_channels=0).entries] == [0, 2]
    assert [entry.kept for entry in ranking.select(0.5, of="parameters").entries] == [2, 2]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("amount", "channels", "kept"),
    [
        (0, 5, 5),
        (1, 5, 4),
        (5, 5, 0),
        (0.0, 5, 5),
        (1.0, 5, 0),
        (0.5, 1, 1),
        (0.5, 3, 1),
        (0.5, 5, 3),
        (0.5, 7, 3),
        (0.25, 2, 2),
        (0.25, 6, 4),
        (0.25, 10, 8),
        (0.999, 10, 0),
        (-0.0, 3, 3),
        (numpy.float32(0.5), 7, 3),
        (numpy.float64(0.5), 5, 3),
        (numpy.int64(3), 7, 4),
        (fractions.Fraction(1, 2), 5, 3),
        (fractions.Fraction(2, 3), 6, 2),
    ],
)
def test_amounts(amount, channels, kept, scope):
    ranking = layers(range(1, channels + 1))
    plan = ranking.select(amount, scope=scope, min_channels=0)
    assert kept_of(plan) == [list(range(channels - kept, channels))]


@pytest.mark.parametrize("of", ["channels", "parameters"])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("amount", "error"),
    [
        (-1, ValueError),
        (1000, ValueError),
        (1.0001, ValueError),
        (-0.0001, ValueError),
        (2.0, ValueError),
        (math.inf, ValueError),
        (math.nan, ValueError),
        ("0.5", TypeError),
        (None, TypeError),
        ([0.5, 0.5], TypeError),
        (torch.tensor(0.5), TypeError),
        (0.5j, TypeError),
        (True, TypeError),
        (False, TypeError),
    ],
    ids=str,
)
def test_amounts_that_are_refused(amount, error, scope, of):
    ranking = layers([1, 2, 3], [4, 5, 6], size=2)
    with pytest.raises(error) as caught:
        ranking.select(amount, scope=scope, of=of)
    assert type(caught.value) is error
    if scope == "local":
        assert str(caught.value).startswith("0.weight: ")
    assert "\n" not in str(caught.value)


def test_an_amount_beyond_what_is_there_is_refused_with_the_numbers():
    ranking = layers([1, 2, 3], [4, 5], size=4)
    for amount, options, total in (
        (6, {"scope": "global"}, 5),
        (21, {"scope": "global", "of": "parameters"}, 20),
        (3, {}, 2),
        (9, {"of": "parameters"}, 8),
    ):
        what = options.get("of", "channels")
        message = rf"amount={amount} is more than the {total} {what} that are left to prune$"
        with pytest.raises(ValueError, match=message) as caught:
            ranking.select(amount, **options)
        assert str(caught.value).startswith("1.weight: ") == ("scope" not in options)
        assert ranking.select(amount - 1, min_channels=0, **options).entries[-1].kept <= 1


def test_amounts_by_name():
    ranking = layers([1, 2, 3, 4], [5, 6], [7, 8, 9])
    plan = ranking.select({"2.weight": 0.4, "0.weight": 3, "1.weight": 0})
    assert kept_of(plan) == [[3], [0, 1], [1, 2]]
    with pytest.raises(
        ValueError, match=r"^amount: expected one for each of 3 .*got none for '1\.weight'$"
    ):
        ranking.select({"2.weight": 0.4, "0.weight": 3})
    with pytest.raises(ValueError, match=r"^amount: expected one for each of 3 .*got one for '3\.weight'$"):
        ranking.select({"3.weight": 1, "2.weight": 0.4, "0.weight": 3, "1.weight": 0})
    with pytest.raises(ValueError, match=r"^1\.weight: amount=3 is more than the 2 channels"):
        ranking.select({"2.weight": 0.4, "0.weight": 3, "1.weight": 3})
    with pytest.raises(TypeError, match=r"^1\.weight: Invalid type for amount: x"):
        ranking.select({"2.weight": 0.4, "0.weight": 3, "1.weight": "x"})
    with pytest.raises(TypeError, match=r"^amount: expected one number for scope='global', got one per"):
        ranking.select(dict.fromkeys(ranking.names, 0.5), scope="global")


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("normalize", ["size", "layer", "none"])
@pytest.mark.parametrize("of", ["channels", "parameters"])
def test_nothing_to_select_from(of, normalize, scope):
    options = {"scope": scope, "normalize": normalize, "of": of, "multiple_of": 3, "group_size": 2}
    for amount in (0, 0.5, 1.0, {}):
        if amount == {} and scope == "global":
            continue
        plan = Ranking([], 2, []).select(amount, **options)
        assert len(plan) == 0
        assert plan.keep == {}
        assert plan.entries == []
    if scope == "global":
        with pytest.raises(ValueError, match="amount=1 "):
            Ranking([], 2, []).select(1, **options)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("normalize", ["size", "layer", "none"])
@pytest.mark.parametrize("of", ["channels", "parameters"])
def test_layers_without_channels_need_none(of, normalize, scope):
    options = {"scope": scope, "normalize": normalize, "of": of, "min_channels": 2, "multiple_of": 2}
    norms = [[], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0], []]
    alive = [[], [True] * 4, [False] * 2, []]
    ranking = Model(1, norms, alive, [3, 2, 3, 1]).rank()
    for group_size in (1, 2):
        for amount in (0, 0.5, 1.0):
            plan = ranking.select(amount, group_size=group_size, **options)
            kept = 4 if amount == 0 else 2
            assert [entry.kept for entry in plan.entries] == [0, kept, 0, 0]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min_channels": 5},
            r"^1\.weight has 4 channels: min_channels=5 cannot be met; lower it or exclude the layer$",
        ),
        (
            {"multiple_of": 8},
            r"^0\.weight has 7 channels left: multiple_of=8 cannot be met; lower it or exclude the layer$",
        ),
        (
            {"min_channels": 5, "multiple_of": 4},
            r"^0\.weight has 7 channels left: min_channels=5 and multiple_of=4 cannot be met together; "
            "lower one of them or exclude the layer$",
        ),
        (
            {"group_size": 3},
            r"^0\.weight: its 8 channels are no whole number of groups of 3 \(group_size\)$",
        ),
        ({"group_size": 4}, r"^0\.weight: expected earlier pruning to leave all or none of a group of 4 "),
        ({"group_size": 2}, r"^0\.weight: expected .* of a group of 2 channels \(group_size\), it left 1$"),
    ],
    ids=str,
)
def test_constraints_that_cannot_hold(options, message, scope):
    norms = [[1.0] * 8, [1.0] * 4]
    alive = [[True] * 5 + [False] + [True] * 2, [True] * 4]
    ranking = Model(1, norms, alive, [1, 1]).rank()
    for _ in range(2):  # nothing of the first attempt stays
        with pytest.raises(ValueError, match=message):
            ranking.select(0.5, scope=scope, **options)
    assert [entry.kept for entry in ranking.select(0, scope=scope).entries] == [7, 4]


def test_groups_and_multiples_that_meet_in_no_count():
    with pytest.raises(ValueError, match=r"^0\.weight has 6 channels: multiple_of=4 and group_size=6 "):
        layers([1] * 6).select(0.5, multiple_of=4, group_size=6)
    assert kept_of(layers([1] * 6).select(0.5, multiple_of=4, group_size=6, min_channels=0)) == [[]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "layer"}, ValueError, "^scope: expected 'local' or 'global', got 'layer'$"),
        ({"scope": None}, ValueError, "^scope: expected 'local' or 'global', got None$"),
        ({"of": "weights"}, ValueError, "^of: expected 'channels' or 'parameters', got 'weights'$"),
        (
            {"normalize": "mean"},
            ValueError,
            "^normalize: expected 'size' or 'layer' or 'none', got 'mean'$",
        ),
        ({"normalize": None}, ValueError, "^normalize: expected .*got None$"),
        ({"min_channels": -1}, ValueError, "^min_channels: expected 0 or more, got -1$"),
        ({"multiple_of": 0}, ValueError, "^multiple_of: expected 1 or more, got 0$"),
        ({"group_size": 0}, ValueError, "^group_size: expected 1 or more, got 0$"),
        ({"group_size": -2}, ValueError, "^group_size: expected 1 or more, got -2$"),
        ({"min_channels": 0.1}, TypeError, r"^min_channels: expected an int, got 0\.1$"),
        ({"multiple_of": "8"}, TypeError, "^multiple_of: expected an int, got '8'$"),
        ({"group_size": True}, TypeError, "^group_size: expected an int, got True$"),
        ({"group_size": None}, TypeError, "^group_size: expected an int, got None$"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        layers([1, 2]).select(0.5, **options)


def test_norms_without_an_order_select_where_they_need_none():
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(2, 6, 3))
    ranking = lnprune.rank(model, "nuc", 0)
    norms = torch.cat(list(ranking.norms.values()))
    plan = ranking.select(5, scope="global", normalize="none")
    assert torch.cat(list(plan.keep.values())).tolist() == cases.brute_force_keep(norms.tolist(), 5)
    assert sum(entry.kept for entry in ranking.select(5, scope="global", normalize="layer").entries) == 7
    assert [entry.kept for entry in ranking.select(2, normalize="size").entries] == [4, 4]
    with pytest.raises(ValueError, match=r"^normalize='size' needs a norm whose order is a number"):
        ranking.select(5, scope="global")
    with pytest.raises(ValueError, match=r"^group_size=2 needs a norm of vectors, whose order is a number"):
        ranking.select(2, group_size=2)


@pytest.mark.parametrize("option", ["min_channels", "multiple_of", "group_size"])
def test_numbers_of_channels_that_no_layer_has(option):
    ranking = lnprune.rank(nn.Linear(8, 8), 2, 0)
    for number in (2**31, 2**70):
        with pytest.raises(ValueError, match=f"^{option}: expected less than 2147483648, got {number}$"):
            ranking.select(0.5, **{option: number})


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("of", ["channels", "parameters"])
def test_a_multiple_that_no_layer_has_keeps_nothing(scope, of):
    """Where that is allowed; whatever the multiple is, the selection stays small."""
    plan = lnprune.rank(nn.Linear(8, 8), 2, 0).select(
        0.5, scope=scope, of=of, min_channels=0, multiple_of=2**31 - 1
    )
    assert [entry.kept for entry in plan.entries] == [0]


class Unusual(ValueError):
    """An exception that is not made from a message alone."""

    def __init__(self, code, reason):
        super().__init__(reason)
        self.code = code


def test_errors_of_any_kind_get_the_parameters_name(monkeypatch):
    def fail(*_):
        raise Unusual(7, "on purpose")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for module, function, call in (
        ("steps.norms", "reference.channel_norms", lambda: lnprune.rank(model, "nuc", 0)),
        ("steps.masks", "pruned_count", lambda: lnprune.local_structured(model, 1, 2, 0)),
        (
            "steps.in_place",
            "pruned_count",
            lambda: lnprune.local_structured(model, 1, 2, 0, permanent=True),
        ),
        ("plans.selection", "kept_of", lambda: lnprune.rank(model, 2, 0).select(1)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"lnprune.{module}.{function}", fail)
            with pytest.raises(Unusual, match=r"^0\.weight: on purpose$") as caught:
                call()
        assert caught.value.code == 7
