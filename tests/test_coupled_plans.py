"""Plans of coupled channels: joint norms, exact counts, the four zeros and the way back, files."""

import itertools
import json

import pytest
import torch
from torch import nn

import lnprune
from lnprune.removal.cutting import cuts_of, settings_for, without
from tests.small_models import CASES, Net
from tests.test_coupling import assert_same_state, randomised, residual, state, tensors_of


def joined():
    """Channels put side by side, flattened, normed, fused: slices of parts of weights."""

    def forward(net, x):
        x = net.n(net.a(x)).relu()
        x = torch.cat([x, net.b(x).sigmoid()], 1)
        x = net.c(x) + net.d(x)
        return net.o(torch.nn.functional.max_pool2d(x, 4).flatten(1))

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 3, padding=1),
        n=nn.BatchNorm2d(8),
        b=nn.Conv2d(8, 6, 1),
        c=nn.Conv2d(14, 8, 1),
        d=nn.Conv2d(14, 8, 1, bias=False),
        o=nn.Linear(32, 5),
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(joined().double().eval())


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def small_model(model, coupling, plan):
    """The model without the channels of a plan."""
    cuts, gone = [], []
    for group, keep in zip(coupling.groups, plan.keep.values(), strict=True):
        cuts += cuts_of(group, ~keep)
        gone.append(int((~keep).sum()))
    return without(model, tensors_of(model), cuts, settings_for(model, coupling.groups, gone))


def assert_computes_the_same(model, small, inputs):
    with torch.no_grad():
        want, got = small(inputs), model(inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("n", [0, 1, 2, 3, -1, float("inf"), float("-inf"), "fro"])
@pytest.mark.parametrize("members", ["all", "producers"])
def test_joint_norms_are_those_of_all_slices_together(model, inputs, n, members):
    coupling = lnprune.couple(model, inputs)
    norms = coupling.rank(n, members=members).norms
    tensors = tensors_of(model)
    assert [group.channels for group in coupling.groups] == [8, 6, 8]
    for group in coupling.groups:
        for channel in range(group.channels):
            elements = []
            for member in group.members:
                if tensors[member.name].dim() > 1 and (members == "all" or not member.is_input):
                    slices = member.slices[member.channels == channel]
                    elements.append(tensors[member.name].index_select(member.dim, slices).flatten())
            want = torch.linalg.vector_norm(torch.cat(elements), 2 if n == "fro" else n)
            torch.testing.assert_close(norms[group.name][channel], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("options", [{"scope": "local"}, {"scope": "global", "multiple_of": 2}])
def test_a_plan_computes_what_the_model_without_the_channels_computes(model, inputs, permanent, options):
    coupling = lnprune.couple(model, inputs)
    plan = coupling.rank(2).select(0.5, **options)
    small, before = small_model(model, coupling, plan), state(model)
    plan.apply(permanent=permanent, keep_backup=permanent)
    assert_computes_the_same(model, small, inputs)
    channels = ~plan.keep["a.weight"]
    for tensor in (model.a.bias, model.n.weight, model.n.bias, model.b.weight[:, channels]):
        pruned = tensor[channels] if tensor.dim() == 1 else tensor
        assert (pruned == 0).all()
    assert (model.c.weight[:, :8][:, channels] == 0).all()
    plan.undo()
    assert_same_state(before, state(model))


@pytest.mark.parametrize(
    "name", ["depthwise", "grouped", "pixel shuffle", "gated", "attention", "cat", "lstm"]
)
def test_other_couplings_compute_the_same_with_zeros(name):
    torch.manual_seed(0)
    case = CASES[name]
    model = randomised(case.make().double().eval())
    inputs = torch.randn(case.shape, dtype=torch.float64)
    coupling = lnprune.couple(model, inputs)
    plan = coupling.rank(2).select(0.5)
    small = small_model(model, coupling, plan)
    plan.apply(permanent=True)
    assert_computes_the_same(model, small, inputs)


def test_weights_are_masked_along_two_dims():
    torch.manual_seed(0)
    model = randomised(residual().double().eval())
    inputs = torch.randn(2, 3, dtype=torch.float64)
    coupling = lnprune.couple(model, inputs)
    plan = coupling.rank(1).select(0.5).apply()
    outputs, stream = plan.keep["b.weight"], plan.keep["a.weight"]
    assert torch.equal(model.b.weight_mask.bool(), outputs[:, None] & stream[None])
    again = coupling.rank(1).select(0.5)
    assert [entry.kept for entry in again.entries] == [2, 1, 1], "of the channels that are left"
    plan.undo()
    assert not lnprune.is_pruned(model)


@pytest.mark.parametrize(
    "options", [{}, {"multiple_of": 2}, {"min_channels": 3}, {"normalize": "layer", "group_size": 2}]
)
@pytest.mark.parametrize("amount", [0.0, 0.2, 0.5, 0.8, 1.0, 100])
def test_parameters_are_counted_exactly_and_once(model, inputs, amount, options):
    coupling = lnprune.couple(model, inputs)
    ranking = coupling.rank(2)
    counted = [
        p for name, p in model.named_parameters() if name != "o.bias"
    ]  # which no group has slices of
    whole = sum(parameter.numel() for parameter in counted)
    plan = ranking.select(amount, scope="global", of="parameters", **options)
    small = small_model(model, coupling, plan)
    left = sum(parameter.numel() for parameter in small.parameters()) - model.o.bias.numel()
    assert sum(entry.parameters_removed for entry in plan.entries) == whole - left
    wanted = whole - (round(amount * whole) if isinstance(amount, float) else amount)
    # Of all that a selection of channels can leave, none is nearer.
    channels = sum(group.channels for group in coupling.groups)
    reachable = set()
    for count in range(channels + 1):
        other = ranking.select(count, scope="global", **options)
        reachable.add(whole - sum(entry.parameters_removed for entry in other.entries))
    assert abs(left - wanted) == min(abs(each - wanted) for each in reachable)
    assert f"{whole:,}" in str(plan)


def test_a_plan_saves_and_loads_by_names(model, inputs, tmp_path):
    coupling = lnprune.couple(model, inputs)
    plan = coupling.rank(2).select(0.5, scope="global")
    small = small_model(model, coupling, plan)
    plan.save(tmp_path / "plan.json")
    for permanent in (False, True):
        other = joined().double().eval()
        other.load_state_dict(model.state_dict())
        loaded = lnprune.load_plan(tmp_path / "plan.json", other)
        assert loaded.to_dict() == plan.to_dict()
        loaded.apply(permanent=permanent)
        assert_computes_the_same(other, small, inputs)
    different = joined()
    different.b = nn.Conv2d(8, 7, 1)
    with pytest.raises(
        ValueError, match=r"b.weight: the plan is for shape \(6, 8, 1, 1\), Net has \(7, 8, 1, 1\)"
    ):
        lnprune.load_plan(tmp_path / "plan.json", different)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda members: members[0].update(pruned=[99]),
            "parameters\\[0\\].members.pruned: expected indices of 8 slices",
        ),
        (lambda members: members[0].update(dim=9), "parameters\\[0\\].members.dim: expected one of shape"),
        (lambda members: members[0].pop("name"), "parameters\\[0\\].members.name: it is missing"),
        (lambda members: members[0].update(part=[0, 1]), "parameters\\[0\\].members.part: expected one of"),
        (lambda members: members.append(3), "members: expected a list of dict, got 3 in it"),
    ],
)
def test_a_damaged_plan_says_where(model, inputs, tmp_path, change, message):
    lnprune.couple(model, inputs).rank(2).select(0.5).save(tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text())
    change(saved["parameters"][0]["members"])
    (tmp_path / "plan.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        lnprune.load_plan(tmp_path / "plan.json", model)


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = embedding.weight
    net = Net(lambda net, x: net.o(net.e(x) + net.b(net.e(x))), e=embedding, b=nn.Linear(8, 8), o=head)
    net = randomised(net.double().eval())
    inputs = torch.arange(10)
    coupling = lnprune.couple(net, inputs)
    plan = coupling.rank(2).select(0.5)
    small = small_model(net, coupling, plan)
    plan.apply()
    assert_computes_the_same(net, small, inputs)
    assert net.e.weight_orig is net.o.weight_orig


def test_what_ranking_and_applying_refuse(model, inputs):
    coupling = lnprune.couple(model, inputs)
    with pytest.raises(ValueError, match="members: expected 'all' or 'producers', got 'consumers'"):
        coupling.rank(2, members="consumers")
    with lnprune.reference_ranking(), pytest.raises(RuntimeError, match="torch has no ranking of coupled"):
        coupling.rank(2)
    plan = coupling.rank(2).select(0.5)
    with pytest.raises(ValueError, match="bias: the biases of coupled channels go with them"):
        plan.apply(bias=True)
    model.b.weight = nn.Parameter(torch.randn(7, 8, 1, 1))
    before = state(model)
    with pytest.raises(RuntimeError, match=r"b.weight: expected shape \(6, 8, 1, 1\), as it was ranked"):
        plan.apply()
    assert_same_state(before, state(model))
    nothing = lnprune.couple(nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(ValueError, match="there are no groups of channels to rank"):
        nothing.rank(2)


def test_ties_go_to_the_lower_index():
    model = residual()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    coupling = lnprune.couple(model, torch.randn(2, 3))
    plan = coupling.rank(2).select(0.5)
    for group, keep in itertools.zip_longest(coupling.groups, plan.keep.values()):
        assert keep.tolist() == [True] * (group.channels // 2) + [False] * (group.channels // 2)
