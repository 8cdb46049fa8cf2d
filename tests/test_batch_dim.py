"""batch_dim: many rankings inside one parameter, as experts and heads, through every call on models."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune.steps.batches import Batch, dim_in_matrix, matrices

EXPERTS, OUT, IN = 6, 12, 8


class Experts(nn.Module):
    """Two weights of all experts, and an ordinary layer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gate = nn.Linear(IN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, OUT, IN, dtype=dtype))
        self.down = nn.Parameter(torch.randn(EXPERTS, IN, OUT, dtype=dtype))

    def forward(self, x):
        hidden = torch.einsum("bi,eoi->beo", x, self.up).relu()
        return torch.einsum("beo,eio,be->bi", hidden, self.down, self.gate(x).softmax(dim=-1))


NAMES = ["up", "down"]


def pairs_of(model):
    return [(model, name) for name in NAMES]


def chosen(weight, amount, n, dim):
    """The flags of each expert by torch's loop over experts, in float64."""
    flags = []
    for expert in weight.detach().double().unbind(0):
        one = nn.Module()
        one.register_parameter("weight", nn.Parameter(expert.clone()))
        stock.ln_structured(one, "weight", amount, n, dim - 1)
        flags.append(one.weight_mask.amax(dim=2 - dim) != 0)
    return torch.stack(flags)


def zeroed(weight, flags, dim):
    return weight.detach() * flags.unsqueeze(3 - dim)


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("n", [1, 2, math.inf, 0.5])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_local_pruning_is_a_loop_over_experts(dim, n, permanent):
    model = Experts()
    before = copy.deepcopy(model)
    keys = list(model.state_dict())
    assert (
        lnprune.local_structured(model, 0.5, n, dim, batch_dim=0, include=NAMES, permanent=permanent)
        is model
    )
    for name in NAMES:
        weight = getattr(before, name)
        expected = zeroed(weight, chosen(weight, 0.5, n, dim % 3), dim % 3)
        assert torch.equal(getattr(model, name), expected)
        if not permanent:
            assert torch.equal(getattr(model, name + "_orig"), weight)
            assert torch.equal(getattr(model, name + "_mask"), (expected != 0).float())
    assert (list(model.state_dict()) == keys) is permanent


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_reference_ranking_the_choice_is_torchs_own(dtype, n):
    for dim, permanent in ((1, False), (2, True)):
        model = Experts(dtype)
        expected = {}
        for name in NAMES:
            experts = []
            for weight in getattr(model, name).detach().unbind(0):
                one = nn.Module()
                one.register_parameter("weight", nn.Parameter(weight.clone()))
                stock.ln_structured(one, "weight", 0.5, n, dim - 1)
                experts.append(one.weight)
            expected[name] = torch.stack(experts)
        with lnprune.reference_ranking():
            lnprune.local_structured(pairs_of(model), 0.5, n, dim, batch_dim=0, permanent=permanent)
        for name in NAMES:
            assert torch.equal(getattr(model, name), expected[name])


def test_ranking_selecting_and_applying():
    model = Experts()
    ranking = lnprune.rank(
        model,
        2,
        {"up": 1, "down": 2, "gate.weight": 0},
        batch_dim={"up": 0, "d*": 0},
        include=["up", "down", "gate"],
    )
    assert len(ranking) == 2 * EXPERTS + 1
    names = [f"up[{i}]" for i in range(EXPERTS)] + [f"down[{i}]" for i in range(EXPERTS)] + ["gate.weight"]
    assert ranking.names == names
    assert list(ranking.norms) == names
    for i in range(EXPERTS):
        torch.testing.assert_close(
            ranking.norms[f"up[{i}]"], model.up[i].double().norm(dim=1), rtol=1e-14, atol=0
        )
        torch.testing.assert_close(
            ranking.norms[f"down[{i}]"], model.down[i].double().norm(dim=0), rtol=1e-14, atol=0
        )
    amounts = {name: i % 5 for i, name in enumerate(names)}
    plan = ranking.select(amounts)
    for name, count in amounts.items():
        norms = ranking.norms[name]
        wanted = torch.ones_like(norms, dtype=torch.bool)
        wanted[norms.argsort()[:count]] = False
        assert torch.equal(plan.keep[name], wanted)
    entry = plan.entries[EXPERTS + 3]
    assert (entry.name, entry.shape, entry.dim, entry.channels, entry.kept) == (
        "down[3]",
        (IN, OUT),
        1,
        OUT,
        OUT - 4,
    )
    assert entry.parameters_removed == 4 * IN
    assert "down[3]" in str(plan)
    kept = 150 - sum(amounts.values())
    assert repr(plan) == f"Plan(13 parameters, {kept} of 150 channels kept)"

    before = copy.deepcopy(model.state_dict())
    plan.apply()
    for i in range(EXPERTS):
        assert torch.equal(model.up_mask[i].amax(dim=1) != 0, plan.keep[f"up[{i}]"])
        assert torch.equal(model.down_mask[i].amax(dim=0) != 0, plan.keep[f"down[{i}]"])
    assert isinstance(next(iter(model._forward_pre_hooks.values())), stock.CustomFromMask)
    assert len(model._forward_pre_hooks) == 2
    plan.undo()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    plan.apply(permanent=True, keep_backup=True)
    for i in range(EXPERTS):
        assert torch.equal(model.up[i], zeroed_rows(before["up"][i], plan.keep[f"up[{i}]"], 0))
        assert torch.equal(model.down[i], zeroed_rows(before["down"][i], plan.keep[f"down[{i}]"], 1))
    again = lnprune.rank(model, 2, 1, batch_dim=0, include="up").select(1)
    for i in range(EXPERTS):
        gone = int((~plan.keep[f"up[{i}]"]).sum())
        assert again.entries[i].kept == OUT - gone - 1
    plan.undo()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def zeroed_rows(weight, keep, dim):
    return weight * keep.view((-1, 1) if dim == 0 else (1, -1))


def test_global_selection_under_constraints_is_exact():
    model = Experts()
    with torch.no_grad():
        model.up *= torch.rand(EXPERTS, 1, 1) * 4
    options = {"min_channels": 2, "multiple_of": 2, "normalize": "size"}
    plan = lnprune.rank(model, 2, 1, batch_dim=0, include=NAMES).select(0.5, scope="global", **options)
    apart = nn.ModuleDict()
    for name in NAMES:
        for i, weight in enumerate(getattr(model, name).detach()):
            apart[f"{name}[{i}]"] = nn.Linear(weight.shape[1], weight.shape[0])
            apart[f"{name}[{i}]"].weight.data = weight.clone()
    expected = lnprune.rank(apart, 2, 0).select(0.5, scope="global", **options)
    for name, keep in plan.keep.items():
        assert torch.equal(keep, expected.keep[f"{name}.weight"])
        assert int(keep.sum()) % 2 == 0
        assert int(keep.sum()) >= 2
    lnprune.global_structured(model, 0.5, 2, 1, batch_dim=0, include=NAMES, permanent=True, **options)
    for name, keep in plan.keep.items():
        attribute, i = name[:-1].split("[")
        assert torch.equal((getattr(model, attribute)[int(i)] != 0).any(dim=1), keep)


@pytest.mark.parametrize("dim", [0, 1])
def test_heads_of_a_flat_weight(dim):
    model = nn.Sequential(nn.Linear(10, 24), nn.Linear(24, 10))
    before = copy.deepcopy(model)
    pairs = [(model[0], "weight"), (model[1], "weight")]
    dims = [dim, 1 - dim]
    ranking = lnprune.rank(pairs, 2, dims, batch_dim=[0, 1], batch_size=4)
    assert ranking.names[3:5] == ["0.weight[3]", "1.weight[0]"]
    plan = ranking.select(2).apply(permanent=True)
    for k in range(2):
        batch = Batch(k, 4)
        weight = before[k].weight.detach()
        parts, along = matrices(weight, batch), dim_in_matrix(weight.shape, dims[k], batch)
        for i, part in enumerate(parts):
            norms = part.double().norm(dim=1 - along)
            torch.testing.assert_close(ranking.norms[f"{k}.weight[{i}]"], norms, rtol=1e-14, atol=0)
            keep = plan.keep[f"{k}.weight[{i}]"]
            assert int(keep.sum()) == len(norms) - 2
            assert torch.equal(matrices(model[k].weight, batch)[i], zeroed_rows(part, keep, along))


def test_biases_of_heads_go_with_their_rows():
    layer = nn.Linear(10, 24)
    plan = lnprune.rank([(layer, "weight")], 2, 0, batch_dim=0, batch_size=4).select(0.5)
    plan.apply(permanent=True, bias=True)
    assert torch.equal(layer.bias != 0, torch.cat(list(plan.keep.values())))
    other = lnprune.rank([(nn.Linear(10, 24), "weight")], 2, 1, batch_dim=0, batch_size=4).select(0.5)
    with pytest.raises(ValueError, match="bias=True needs channels that are outputs"):
        other.apply(bias=True)


def test_the_hook_is_torchs_and_gives_the_same_mask_again_in_a_container():
    model = Experts()
    lnprune.local_structured(model, 0.25, 2, 1, batch_dim=0, include="up")
    first = model.up_mask.clone()
    lnprune.local_structured(model, 0.5, 2, 2, batch_dim=0, include="up")
    hook = next(iter(model._forward_pre_hooks.values()))
    assert type(hook) is stock.PruningContainer
    assert [type(method) for method in hook] == [stock.CustomFromMask] * 2
    assert torch.equal(hook.compute_mask(model.up_orig, first), model.up_mask)
    other = pickle.loads(pickle.dumps(model))
    x = torch.randn(3, IN)
    assert torch.equal(other(x), model(x))
    model(x).sum().backward()
    assert torch.equal(model.up_orig.grad != 0, (model.up_orig.grad != 0) & (model.up_mask != 0))
    stock.remove(model, "up")
    assert torch.equal(model.up, other.up)
    lnprune.remove_all(other)
    assert torch.equal(other.up, model.up)


@pytest.mark.parametrize("amount", [3, 0.4])
@pytest.mark.parametrize("like_torch", [False, True])
def test_repeated_pruning_counts_what_each_expert_has_left(amount, like_torch):
    model = Experts()
    amounts = {f"up[{i}]": i for i in range(EXPERTS)}
    lnprune.local_structured(model, amounts, 2, 1, batch_dim=0, include="up")
    assert [int(mask[:, 0].sum()) for mask in model.up_mask] == [OUT - i for i in range(EXPERTS)]
    apart = []
    for i in range(EXPERTS):
        one = nn.Module()
        one.register_parameter("w", nn.Parameter(model.up_orig[i].detach().clone()))
        stock.ln_structured(one, "w", i, 2, 0)
        stock.ln_structured(one, "w", amount, 2, 0)
        apart.append(one.w_mask)
    if like_torch:
        with lnprune.reference_ranking():
            lnprune.local_structured(model, amount, 2, 1, batch_dim=0, include="up")
    else:
        lnprune.local_structured(model, amount, 2, 1, batch_dim=0, include="up")
    assert torch.equal(model.up_mask, torch.stack(apart))


def test_no_more_is_pruned_again_than_an_expert_has_left():
    model = Experts()
    lnprune.local_structured(
        model, {f"up[{i}]": i for i in range(EXPERTS)}, 2, 1, batch_dim=0, include="up"
    )
    before = model.up_mask.clone()
    with pytest.raises(
        ValueError, match=r"up: amount=8 should be smaller than the number of parameters to"
    ):
        lnprune.local_structured(model, 8, 2, 1, batch_dim=0, include="up")
    assert torch.equal(model.up_mask, before)
    lnprune.local_structured(model, 7, 2, 1, batch_dim=0, include="up")
    assert [int(mask[:, 0].sum()) for mask in model.up_mask] == [OUT - i - 7 for i in range(EXPERTS)]


def test_a_saved_plan_comes_back(tmp_path):
    model = Experts()
    plan = lnprune.rank(model, 2, 2, batch_dim=0, include=[*NAMES]).select(0.3, scope="global")
    path = tmp_path / "plan.json"
    plan.save(path)
    other = copy.deepcopy(model)
    again = lnprune.load_plan(path, other)
    assert again.to_dict() == plan.to_dict()
    assert all(torch.equal(keep, plan.keep[name]) for name, keep in again.keep.items())
    assert again.entries == plan.entries
    plan.apply(permanent=True)
    again.apply(permanent=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not torch.equal(model.up, Experts().up)
    listed = lnprune.rank(pairs_of(Experts()), 2, 2, batch_dim=0).select(0.3)
    listed.save(path)
    other = Experts()
    assert lnprune.load_plan(path, pairs_of(other)).apply().keep.keys() == listed.keep.keys()
    assert torch.equal(other.up_mask[3, 0] != 0, listed.keep["0.up[3]"])


def damaged(tmp_path, change):
    model = Experts()
    path = tmp_path / "plan.json"
    plan = lnprune.rank(model, 2, 2, batch_dim=0, include=NAMES).select(0.3)
    document = plan.to_dict()
    change(document["parameters"][1])
    lnprune.plans.plan_file.write(path, document)
    with pytest.raises(ValueError, match="the plan is damaged") as error:
        lnprune.load_plan(path, model)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda entry: entry["batch"].update(number=6), "a number below it, got 6 and 6"),
        (lambda entry: entry["batch"].update(batch_size=4), "one that divides dim 0"),
        (lambda entry: entry["batch"].update(dim=3), "expected dims of shape"),
        (lambda entry: entry["batch"].update(shape=[6, 12, 9]), r"expected \(12, 9\), that of a matrix"),
        (lambda entry: entry["batch"].pop("dim"), "dim: it is missing"),
        (lambda entry: entry["batch"].update(number=0), r"expected one that ends in '\[0\]'"),
        (lambda entry: entry.update(batch=[0, 6, 1]), "batch: expected dict"),
        (lambda entry: entry["batch"].update(dim=0), "leaves channels along dim 0"),
    ],
)
def test_a_damaged_plan_says_which_field(tmp_path, change, says):
    assert re.search(says, damaged(tmp_path, change))


def test_weights_that_modules_share_have_one_batch():
    model = nn.ModuleList([Experts(), Experts()])
    model[1].up = model[0].up
    pairs = [(model[0], "up"), (model[1], "up")]
    with pytest.raises(
        ValueError, match=r"shares its weight with 0\.up, so expected one batch_dim and one batch_size"
    ):
        lnprune.rank(pairs, 2, 2, batch_dim=[0, 1])


def test_weights_that_modules_share_are_one():
    model = nn.ModuleList([Experts(), Experts()])
    model[1].up = model[0].up
    ranking = lnprune.rank(model, 2, 1, batch_dim=0, include="*.up")
    assert len(ranking) == EXPERTS
    ranking.select(0.5).apply()
    assert model[0].up_mask is model[1].up_mask


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        (
            {"batch_dim": 1},
            ValueError,
            r"up: expected a batch_dim other than the dim of its channels, 1, or batch_size=",
        ),
        ({"batch_dim": 3}, IndexError, r"up: batch_dim 3 is out of range for shape \(6, 12, 8\)"),
        ({"batch_dim": "out"}, TypeError, "up: expected a number as its batch_dim, got 'out'"),
        ({"batch_dim": {"down2": 0}}, ValueError, "batch_dim: 'down2' matches none of the 2 parameters"),
        ({"batch_dim": [0]}, ValueError, "batch_dim: expected one per parameter, 2, got 1"),
        (
            {"batch_dim": 0, "batch_size": 4},
            ValueError,
            "a batch_size that divides the 6 indices along batch_dim=0",
        ),
        ({"batch_dim": 0, "batch_size": 1.5}, TypeError, "expected a number as its batch_size, got 1.5"),
        ({"batch_size": 3}, ValueError, "expected a batch_dim for batch_size=3, got none"),
        (
            {"batch_dim": 1, "batch_size": 12},
            ValueError,
            "a batch_size that leaves several channels along dim 1",
        ),
    ],
)
def test_bad_batches_say_what_was_wanted(options, kind, says):
    model = Experts()
    for call in (lnprune.rank, lambda *a, **k: lnprune.local_structured(a[0], 0.5, *a[1:], **k)):
        with pytest.raises(kind, match=says):
            call(model, 2, 1, include=NAMES, **options)
    assert list(model.state_dict()) == list(Experts().state_dict())


def test_a_batch_dim_for_a_weight_of_two_dims():
    with pytest.raises(ValueError, match="three dims or more for batch_dim=0, or batch_size=") as error:
        lnprune.rank(nn.Sequential(nn.Linear(4, 6)), 2, 1, batch_dim=0)
    assert "0.weight" in str(error.value)
    assert "(6, 4)" in str(error.value)


def test_amounts_are_checked_before_anything_changes():
    model = Experts()
    with pytest.raises(ValueError, match="up"):
        lnprune.local_structured(model, 13, 2, 1, batch_dim=0, include="up")
    with pytest.raises(ValueError, match="amount: expected one for each of 6 parameters"):
        lnprune.local_structured(model, {"up": 1}, 2, 1, batch_dim=0, include="up")
    with pytest.raises(ValueError, match="up"):
        lnprune.local_structured(
            model, {f"up[{i}]": i * 3 for i in range(EXPERTS)}, 2, 1, batch_dim=0, include="up"
        )
    assert list(model.state_dict()) == list(Experts().state_dict())
    assert not model._forward_pre_hooks


def test_scores_masks_and_nan():
    model = Experts()
    scores = torch.rand_like(model.up)
    ranking = lnprune.rank(model, 1, 1, {"up": scores}, batch_dim=0, include="up")
    for i in range(EXPERTS):
        torch.testing.assert_close(
            ranking.norms[f"up[{i}]"], scores[i].double().sum(dim=1), rtol=1e-14, atol=0
        )
    with torch.no_grad():
        model.up[2, 5, 1] = math.nan
        model.up[3, 4] = 0
    ranking = lnprune.rank(model, 2, 1, batch_dim=0, include="up")
    plan = ranking.select(4)
    assert plan.keep["up[2]"][5]
    assert not plan.keep["up[3]"][4]
    assert [entry.kept for entry in plan.entries] == [8, 8, 8, 7, 8, 8]


def test_layouts_that_native_code_does_not_take():
    for permute, batch_dim in (((1, 2, 0), 2), ((1, 0, 2), 1), ((2, 1, 0), 2)):
        weight = torch.randn(EXPERTS, OUT, IN)
        expected = {}
        for permanent in (False, True):
            model = nn.Module()
            model.register_parameter("w", nn.Parameter(weight.permute(permute).contiguous()))
            dim = permute.index(1)
            lnprune.local_structured([(model, "w")], 0.5, 2, dim, batch_dim=batch_dim, permanent=permanent)
            flags = chosen(weight, 0.5, 2, 1)
            expected = zeroed(weight, flags, 1).permute(permute)
            assert torch.equal(model.w, expected)
            plan = lnprune.rank([(model, "w")], 2, dim, batch_dim=batch_dim).select(1)
            plan.apply(permanent=permanent, keep_backup=permanent).undo()
            assert torch.equal(model.w, expected)


def test_zeros_are_kept_through_training():
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(torch.randn(4, IN)).square().sum().backward()
        optimizer.step()
    plan = lnprune.rank(model, 2, 2, batch_dim=0, include=NAMES).select(0.5).apply(permanent=True)
    with plan.keep_zeros(optimizer):
        for _ in range(2):
            model(torch.randn(4, IN)).square().sum().backward()
            optimizer.step()
    for name, keep in plan.keep.items():
        attribute, i = name[:-1].split("[")
        assert torch.equal((getattr(model, attribute)[int(i)] != 0).any(dim=0), keep)


def test_the_plot_has_a_cell_for_each_parameter_and_a_line_for_each_expert(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    model = Experts()
    plan = lnprune.rank(
        model,
        2,
        {"up": 1, "down": 2, "gate.weight": 0},
        batch_dim={"up": 0, "down": 0},
        include=["up", "down", "gate"],
    ).select(0.5)
    plan.plot(tmp_path / "plan.png")
    *cells, bars = drawn[0].axes
    assert sorted(cell.get_title() for cell in cells) == ["down", "gate.weight", "up"]
    for cell in cells:
        lines = 1 if cell.get_title() == "gate.weight" else 2 * EXPERTS
        assert len(cell.lines) == lines
    assert [bar.get_height() for bar in bars.patches] == [0.5] * 3
