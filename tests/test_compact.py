"""Pruned channels leave the model: what is left computes the same, and all else is as it was."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune.removal import cutting
from lnprune.removal.cutting import copied, without
from lnprune.removal.verification import of_another_batch_size
from tests.small_models import CASES, Net
from tests.test_coupled_plans import assert_computes_the_same, joined
from tests.test_coupling import (
    Growing,
    assert_same_state,
    coupled,
    first,
    randomised,
    residual,
    state,
    tensors_of,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(joined().double().eval())


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def zeroed_by_hand(model, plan, coupling, only_reads=False):
    """The four zeros, written one channel at a time; or only those where channels are read."""
    zeroed = copied(model, tensors_of(model), lambda _, tensor: tensor)
    tensors = dict([*zeroed.named_parameters(), *zeroed.named_buffers()])
    with torch.no_grad():
        for group in coupling.groups:
            keep = plan.keep[group.name]
            members = [member for member in group.members if member.is_input or not only_reads]
            for member in members:
                for i, channel in zip(member.slices.tolist(), member.channels.tolist(), strict=True):
                    if not keep[channel] and not member.name.endswith("running_var"):
                        tensors[member.name].select(member.dim, i).zero_()
    return zeroed


OFFERED = [name for name, case in CASES.items() if case.channels]


@pytest.mark.parametrize("name", OFFERED)
def test_small_models_compute_what_zeros_compute_and_load_bit_for_bit(name, tmp_path):
    model, inputs, coupling = coupled(CASES[name], check=True)
    before = state(model)
    plan = coupling.rank(2).select(0.5)
    small = plan.compact()
    assert_same_state(before, state(model))
    with torch.no_grad():
        got, want = first(small(*inputs)), first(zeroed_by_hand(model, plan, coupling)(*inputs))
        if not torch.isfinite(want).all():  # 0 / 0, as in a norm of weights
            want = first(zeroed_by_hand(model, plan, coupling, only_reads=True)(*inputs))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))
    gone = sum(int((~keep).sum()) for keep in plan.keep.values())
    assert gone
    sizes = [sum(each.numel() for each in made.parameters()) for made in (model, small)]
    assert sizes[1] < sizes[0]
    plan.save(tmp_path / "plan.json")
    torch.manual_seed(1)
    fresh = CASES[name].make().double().eval()
    before = state(fresh)
    again = lnprune.load_compact(tmp_path / "plan.json", fresh, small.state_dict())
    assert_same_state(before, state(fresh))
    assert repr(again) == repr(small)
    with torch.no_grad():
        assert torch.equal(first(again(*inputs)), got)


@pytest.mark.parametrize("options", [{}, {"scope": "global", "multiple_of": 2}, {"scope": "global"}])
@pytest.mark.parametrize("amount", [0.3, 0.5])
@pytest.mark.parametrize("inplace", [False, True])
def test_all_that_goes_is_gone(model, inputs, options, amount, inplace):
    coupling = lnprune.couple(model, inputs)
    plan = coupling.rank(2).select(amount, **options)
    zeroed = zeroed_by_hand(model, plan, coupling)
    small = plan.compact(inplace=inplace)
    assert (small is model) == inplace
    assert_computes_the_same(zeroed, small, inputs)
    kept = {name: int(keep.sum()) for name, keep in plan.keep.items()}
    assert small.a.out_channels == small.n.num_features == small.b.in_channels == kept["a.weight"]
    assert small.c.in_channels == small.d.in_channels == kept["a.weight"] + kept["b.weight"]
    assert small.o.in_features == 4 * kept["c.weight"]
    assert not lnprune.is_pruned(small)


def test_in_place_what_stays_is_the_same_object(model, inputs):
    parameters, modules = dict(model.named_parameters()), list(model.modules())
    plan = lnprune.couple(model, inputs, include="a").rank(2).select(0.5)
    plan.compact(inplace=True)
    assert list(model.modules()) == modules
    assert {name for name, held in model.named_parameters() if held is parameters[name]} == {
        "b.bias",
        "c.bias",
        "o.weight",
        "o.bias",
    }
    with pytest.raises(ValueError, match=r"a.weight: expected shape \(8, 3, 3, 3\), got \(4, 3, 3, 3\)"):
        plan.compact()
    with pytest.raises(RuntimeError, match="expected shape"):
        plan.apply()


@pytest.mark.parametrize("inplace", [False, True])
def test_everything_else_is_as_before(inputs, inplace):
    torch.manual_seed(0)
    model = joined().to(memory_format=torch.channels_last).train()
    model.n.eval()
    model.a.weight.requires_grad_(False)
    model.c.bias.note = "kept"
    called = []
    model.c.register_forward_hook(lambda module, args, output: called.append(type(module)))
    model.register_buffer("transient", torch.ones(2), persistent=False)
    plan = lnprune.couple(model, inputs.float()).rank(1).select(0.5)
    called.clear()
    small = plan.compact(inplace=inplace)
    called.clear()
    assert small.c.bias.note == "kept"
    assert small.training
    assert not small.n.training
    assert small.o.training
    assert [name for name, held in small.named_parameters() if not held.requires_grad] == ["a.weight"]
    assert small.a.weight.shape == (4, 3, 3, 3)
    assert small.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.a.weight.is_contiguous()
    assert {held.dtype for held in small.parameters()} == {torch.float32}
    assert "transient" not in small.state_dict()
    small(inputs.float()).sum().backward()
    assert called == [nn.Conv2d]
    assert small.c.weight.grad is not None
    if not inplace:
        assert model.c.weight.grad is None


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = embedding.weight
    net = Net(lambda net, x: net.o(net.e(x) + net.b(net.e(x))), e=embedding, b=nn.Linear(8, 8), o=head)
    net = randomised(net.double().eval())
    inputs = torch.arange(10)
    coupling = lnprune.couple(net, inputs)
    plan = coupling.rank(2).select(0.5)
    zeroed = zeroed_by_hand(net, plan, coupling)
    for inplace in (False, True):
        small = plan.compact(inplace=inplace)
        assert small.e.weight is small.o.weight
        assert small.e.weight.shape == (10, 4)
        assert (small.e.embedding_dim, small.o.in_features) == (4, 4)
        assert_computes_the_same(zeroed, small, inputs)


def train(model, inputs, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_masks_while_training_then_removal(model, inputs, inplace):
    coupling = lnprune.couple(model, inputs)
    plan = coupling.rank(2).select(0.5).apply()
    train(model.train(), inputs).eval()
    with torch.no_grad():
        want = model(inputs)
    before = state(model)
    small = plan.compact(inplace=inplace)
    if not inplace:
        assert_same_state(before, state(model))
        assert lnprune.is_pruned(model)
    assert not lnprune.is_pruned(small)
    assert set(small.state_dict()) == set(joined().state_dict())
    assert small.a.weight.shape == (4, 3, 3, 3)
    assert (small.a.out_channels, small.c.in_channels, small.n.num_features) == (4, 7, 4)
    with torch.no_grad():
        torch.testing.assert_close(small(inputs), want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))
    train(small.train(), inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_what_fails_in_the_middle_of_inplace_changes_nothing(model, inputs, monkeypatch, masked):
    plan = lnprune.couple(model, inputs).rank(2).select(0.5)
    if masked:
        plan.apply()
    before, sizes_change = state(model), cutting._Sizes.change
    shapes = []

    def failing(self, small):
        sizes_change(self, small)
        if small is model:
            shapes.append(small.a.weight.shape)
            raise RuntimeError("in the middle")

    monkeypatch.setattr(cutting._Sizes, "change", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        plan.compact(inplace=True)
    assert shapes == [(4, 3, 3, 3)], "all was changed by then"
    assert_same_state(before, state(model))
    assert (model.a.out_channels, model.c.in_channels) == (8, 14)
    assert lnprune.is_pruned(model) == masked


def test_zeros_in_place_then_removal(model, inputs):
    plan = lnprune.couple(model, inputs).rank(2).select(0.5).apply(permanent=True)
    assert_computes_the_same(model, plan.compact(), inputs)


def test_masks_of_others_stay(model, inputs):
    plan = lnprune.couple(model, inputs).rank(2).select(0.5)
    generator = torch.Generator().manual_seed(2)
    stock.custom_from_mask(model.o, "weight", torch.rand(5, 32, generator=generator) > 0.3)
    stock.identity(model.o, "bias")
    wanted = copy.deepcopy(lnprune.renew_masked(model))
    lnprune.remove_all(wanted)
    for inplace in (False, True):
        small = plan.compact(inplace=inplace)
        assert lnprune.is_pruned(small.o)
        assert small.o.weight_mask.shape == small.o.weight_orig.shape == (5, 16)
        assert 0 < int(small.o.weight_mask.sum()) < 80
        assert "bias_mask" in small.o._buffers
        zeroed = zeroed_by_hand(wanted, plan, lnprune.couple(wanted, inputs))
        assert_computes_the_same(zeroed, small, inputs)


def test_a_second_round_on_what_is_left(model, inputs):
    small = lnprune.compact(model, inputs, amount=0.5, n=2)
    smaller = lnprune.compact(small, inputs, amount=0.5, n=2)
    assert (small.a.out_channels, smaller.a.out_channels) == (4, 2)


def test_what_verification_finds(inputs):
    def forward(net, x):
        x = net.a(x)
        return net.o(net.b(x.relu()).relu()).mean((2, 3)) + x.shape[1]

    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 6, 1), "o": nn.Conv2d(6, 2, 1)}
    net = randomised(Net(forward, **layers).double().eval())
    plan = lnprune.couple(net, inputs, check=False).rank(2).select(0.5)
    before = state(net)
    for inplace in (False, True):
        message = (
            r"differ, by \S+ of the largest, .*example inputs.* groups `a.weight`\. The model is as it was"
        )
        with pytest.raises(RuntimeError, match=message):
            plan.compact(inplace=inplace)
        assert_same_state(before, state(net))
    assert plan.compact(verify=False).a.out_channels == 4


def test_verification_sees_behind_weights_of_zeros(inputs):
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 8, 1), "o": nn.Conv2d(8, 2, 1)}
    net = Net(lambda net, x: net.o(net.a(x) * x.new_tensor(net.a.weight.shape[0])), **layers).double()
    nn.init.zeros_(net.o.weight)
    plan = lnprune.couple(net, inputs, check=False).rank(2).select(0.5)
    with pytest.raises(RuntimeError, match="with random parameters, on example inputs"):
        plan.compact()


def test_verification_runs_another_batch_size(inputs):
    def forward(net, x):
        wrong = x.shape[0] == 3 and net.a.out_channels < 8
        return net.o(net.a(x)) + wrong

    torch.manual_seed(0)
    net = Net(forward, a=nn.Conv2d(3, 8, 1), o=nn.Conv2d(8, 2, 1)).double()
    plan = lnprune.couple(net, inputs, check=False).rank(2).select(0.5)
    with pytest.raises(RuntimeError, match="its own parameters, on random ones of another batch size"):
        plan.compact()


def test_verification_runs_the_model_that_is_returned(model, inputs, monkeypatch):
    def damaged(*arguments):
        small = without(*arguments)
        small.o.weight.data[0, 0] += 1
        return small

    monkeypatch.setattr("lnprune.removal.removed.without", damaged)
    plan = lnprune.couple(model, inputs).rank(2).select(0.5)
    with pytest.raises(RuntimeError, match="with its own parameters, on example inputs"):
        plan.compact()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_gives_no_numbers_is_said_to(model, inputs, inplace):
    plan = lnprune.couple(model, inputs).rank(2).select(0.5)
    model.o.bias.data[1] = torch.inf
    before = state(model)
    with pytest.raises(
        RuntimeError, match="with its own parameters the model gives numbers that are not finite"
    ):
        plan.compact(inplace=inplace)
    assert_same_state(before, state(model))
    model.float()  # no longer of the dtype of the inputs, and not in float64 either
    with pytest.raises(RuntimeError, match=r"^nothing to compare with: .* The model is as it was"):
        plan.compact(inplace=inplace)
    assert plan.compact(verify=False, inplace=inplace).a.out_channels == 4


def test_a_model_whose_rounding_grows_is_verified():
    torch.manual_seed(0)
    model = Growing("sines").double()
    model.blocks = model.blocks[:10]
    for _, _, layer in model.blocks:
        layer.weight.data.mul_(1.5)
    given = torch.randn(16, 12, dtype=torch.float64)
    small = lnprune.compact(model, given, 0.3, 2)
    assert small(given).shape == (16, 3)


def test_a_model_of_one_batch_size_is_verified_on_that(inputs):
    def forward(net, x):
        if x.shape[0] != 2:
            raise ValueError("only two")
        return net.o(net.a(x))

    torch.manual_seed(0)
    net = Net(forward, a=nn.Conv2d(3, 8, 1), o=nn.Conv2d(8, 2, 1)).double()
    assert lnprune.compact(net, inputs, 0.5, 2).a.out_channels == 4


def test_inputs_of_another_batch_size():
    ids, flags = torch.tensor([[5, 7, 9], [1, 2, 3]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    real = torch.randn(2, 1000) * 3 + 10
    (more, wide), kwargs = of_another_batch_size(((ids, real), {"mask": flags, "scale": torch.tensor(2.0)}))
    assert more.shape == (3, 3)
    assert set(more.unique().tolist()) <= {1, 2, 3, 5, 7, 9}
    assert torch.equal(kwargs["mask"], flags[[0, 1, 0]])
    assert kwargs["scale"] == 2
    assert wide.shape == (3, 1000)
    assert abs(float(wide.mean()) - 10) < 0.5
    assert abs(float(wide.std()) - 3) < 0.3


def test_a_model_in_half_precision_stays_in_it(inputs):
    torch.manual_seed(0)
    model = joined().bfloat16().eval()
    small = lnprune.compact(model, inputs.bfloat16(), 0.5, 2)
    assert {held.dtype for held in small.parameters()} == {torch.bfloat16}
    assert small(inputs.bfloat16()).dtype == torch.bfloat16


def test_what_compact_refuses(model, inputs, tmp_path):
    before = state(model)
    coupling = lnprune.couple(model, inputs)
    with pytest.raises(ValueError, match=r"b.weight: expected a channel that stays, got none of 6"):
        coupling.rank(2).select({"a.weight": 0, "b.weight": 1.0, "c.weight": 0}, min_channels=0).compact()
    with pytest.raises(RuntimeError, match="got one of single weights"):
        lnprune.rank(model, n=2, dim="out").select(0.5).compact()
    plan = coupling.rank(2).select(0.5)
    with pytest.raises(TypeError, match="verify: expected True or False, got 1"):
        plan.compact(verify=1)
    with pytest.raises(TypeError, match="inplace: expected True or False"):
        lnprune.compact(model, inputs, 0.5, 2, inplace="yes")
    plan.save(tmp_path / "plan.json")
    loaded = lnprune.load_plan(tmp_path / "plan.json", model)
    with pytest.raises(ValueError, match="a plan from a file has no example inputs"):
        loaded.compact()
    assert_same_state(before, state(model))


def test_a_plan_from_a_file_compacts(model, inputs, tmp_path):
    plan = lnprune.couple(model, inputs).rank(2).select(0.5)
    plan.save(tmp_path / "plan.json")
    loaded = lnprune.load_plan(tmp_path / "plan.json", model)
    want = plan.compact().state_dict()
    for got in (loaded.compact(example_inputs=inputs), loaded.compact(verify=False)):
        assert got.state_dict().keys() == want.keys()
        assert all(torch.equal(got.state_dict()[name], held) for name, held in want.items())


@pytest.mark.parametrize("amount", [0, 0.0])
def test_nothing_goes(model, inputs, amount):
    small = lnprune.compact(model, inputs, amount, 2)
    before, after = state(model), state(small)
    assert before.pop("identities") != after["identities"]
    assert_same_state(before, after)


def test_a_small_model_is_saved_whole(inputs):
    torch.manual_seed(0)
    model = residual().double().eval()
    given = torch.randn(2, 3, dtype=torch.float64)
    small = lnprune.compact(model, given, 0.5, 2)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    whole = io.BytesIO()
    torch.save(model.state_dict(), whole)
    assert file.tell() < whole.tell()
    assert re.search(r"Linear\(in_features=\d", repr(small))


class _Caching(nn.Module):
    """Two layers, with a cache of what a weight gives, as attention biases have: part of a graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale, self.cache = nn.Parameter(torch.rand(3)), {}

    def forward(self, x):
        if "scale" not in self.cache:
            self.cache["scale"] = self.scale.exp()
        return self.second(self.first(x).relu()) * self.cache["scale"]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_caches_part_of_a_graph(inplace):
    net, x = _Caching().eval(), torch.randn(2, 4)
    net(x)
    cached = net.cache["scale"]
    assert cached.grad_fn is not None
    plan = lnprune.couple(net, x).rank(2).select(0.5)
    plan.apply(permanent=True, keep_backup=True)
    want = net(x)
    plan.undo()
    small = plan.compact(inplace=inplace)
    assert small.first.weight.shape == (4, 4)
    assert net.cache["scale"] is cached
    torch.testing.assert_close(small(x), want)
