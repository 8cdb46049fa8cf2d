"""Experts of known layouts: found by themselves, ranked by their dims or by their intermediate channels."""

import copy
import math

import pytest
import torch
from expert_models import EXPERTS, HIDDEN, INTERMEDIATE, LAYOUTS, Dbrx, Decorated, experts_of, slices_of
from torch import nn

import lnprune


def model_with(layer):
    return nn.ModuleDict({"router": nn.Linear(HIDDEN, EXPERTS), "experts": layer})


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("word", ["out", "in"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_found_ranked_and_pruned(name, word, permanent):
    layer = LAYOUTS[name][0]()
    model = model_with(layer)
    before = {key: each.clone() for key, each in experts_of(name, layer).items()}
    ranking = lnprune.rank(model, 2, word)
    names = [f"experts.{key}[{i}]" for key in before for i in range(EXPERTS)]
    assert ranking.names == ["router.weight", *names]
    along = 0 if word == "out" else 1
    for key, weight in before.items():
        for i in range(EXPERTS):
            norms = weight[i].double().norm(dim=1 - along)
            torch.testing.assert_close(ranking.norms[f"experts.{key}[{i}]"], norms, rtol=1e-14, atol=0)
    plan = ranking.select(0.3, scope="global").apply(permanent=permanent)
    if name == "jetmoe" or permanent:
        lnprune.remove_all(model)
    else:
        lnprune.remove_all(model)
    for key, weight in experts_of(name, layer).items():
        for i in range(EXPERTS):
            keep = plan.keep[f"experts.{key}[{i}]"]
            flags = keep.unsqueeze(1 - along)
            assert torch.equal(weight[i], before[key][i] * flags)
            assert 0 < int(keep.sum()) < len(keep) + 1


@pytest.mark.parametrize("n", [2, 1, 0.5, math.inf, -math.inf, 0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_width_of_experts_is_ranked_by_all_that_makes_a_channel(name, n):
    layer = LAYOUTS[name][0]()
    with torch.no_grad():
        for each in slices_of(name, layer, 1, 3):
            each.zero_()
        slices_of(name, layer, 2, 4)[-1].fill_(math.nan)
    model = model_with(layer)
    before = copy.deepcopy(layer)
    ranking = lnprune.rank(model, n, "out", experts="intermediate")
    assert ranking.names == ["router.weight", *(f"experts[{i}]" for i in range(EXPERTS))]
    for i in range(EXPERTS):
        norms = ranking.norms[f"experts[{i}]"]
        for channel in range(INTERMEDIATE):
            values = torch.cat([each.flatten() for each in slices_of(name, before, i, channel)]).double()
            expected = torch.linalg.vector_norm(values, n) if n != 0 else values.ne(0).sum().double()
            torch.testing.assert_close(norms[channel], expected, rtol=1e-14, atol=0, equal_nan=True)
    plan = ranking.select(dict.fromkeys(ranking.names, 0.3))
    assert n == -math.inf or not plan.keep["experts[1]"][3]
    plan.apply(permanent=True)
    for i in range(EXPERTS):
        for channel in range(INTERMEDIATE):
            pairs = zip(
                slices_of(name, layer, i, channel), slices_of(name, before, i, channel), strict=True
            )
            for now, then in pairs:
                if plan.keep[f"experts[{i}]"][channel]:
                    torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
                else:
                    assert not now.any()
    for key, value in before.named_parameters():
        if key in ("bias", "down_proj_bias"):
            assert torch.equal(value, layer.get_parameter(key))


@pytest.mark.parametrize("name", LAYOUTS)
def test_pruned_channels_have_no_part_in_what_experts_compute(name):
    model = model_with(LAYOUTS[name][0]()).double()
    layer, x = model["experts"], torch.randn(5, HIDDEN, dtype=torch.float64)
    plan = lnprune.rank(model, 2, "out", experts="intermediate", exclude="router").select(0.4)
    before = layer(x)
    plan.apply()
    masked = layer(x)
    assert not torch.allclose(masked, before)
    plan.undo()
    assert torch.equal(layer(x), before)
    gone = [
        (i, c) for i in range(EXPERTS) for c in (~plan.keep[f"experts[{i}]"]).nonzero().flatten().tolist()
    ]
    with torch.no_grad():
        for i, c in gone:
            slices_of(name, layer, i, c)[0].mul_(1.7)  # what reads, or makes, a channel that is gone
    plan.apply(permanent=True)
    torch.testing.assert_close(layer(x), masked, rtol=1e-12, atol=1e-12)


def test_a_saved_plan_of_the_width_of_experts_comes_back(tmp_path):
    model = model_with(LAYOUTS["gpt_oss"][0]())
    other = copy.deepcopy(model)
    plan = lnprune.rank(model, 2, "out", experts="intermediate").select(
        0.3, scope="global", of="parameters"
    )
    plan.save(tmp_path / "plan.json")
    again = lnprune.load_plan(tmp_path / "plan.json", other)
    assert again.to_dict() == plan.to_dict()
    assert all(torch.equal(keep, plan.keep[key]) for key, keep in again.keep.items())
    plan.apply(permanent=True)
    again.apply(permanent=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for each in (plan, again):
        with pytest.raises(RuntimeError, match="compact needs a plan that says what reads the channels"):
            each.compact()
    removed = sum(entry.parameters_removed for entry in plan.entries)
    zeros = sum(int((each == 0).sum()) for each in model.parameters())
    assert removed == zeros
    total = sum(each.numel() for each in model.parameters() if each.dim() > 1) - EXPERTS * HIDDEN
    assert abs(removed - 0.3 * total) <= 3 * HIDDEN + 2


def test_constraints_hold_for_each_expert():
    model = model_with(Decorated())
    with torch.no_grad():
        model["experts"].gate_up_proj *= torch.rand(EXPERTS, 1, 1) * 9
    ranking = lnprune.rank(model, 2, "out", experts="intermediate", exclude="router")
    plan = ranking.select(0.5, scope="global", multiple_of=3, min_channels=3)
    kept = [entry.kept for entry in plan.entries]
    assert all(count % 3 == 0 and count >= 3 for count in kept)
    assert len(set(kept)) > 1
    assert "experts[3]" in str(plan)


def test_whole_experts_are_the_channels_of_dim_0():
    model = model_with(Decorated())
    ranking = lnprune.rank(model, 2, 0)
    assert ranking.names == ["router.weight", "experts.gate_up_proj", "experts.down_proj"]
    assert ranking.norms["experts.down_proj"].shape == (EXPERTS,)


def test_what_is_said_goes_before_what_is_known():
    model = model_with(Decorated())
    ranking = lnprune.rank(model, 2, "in", batch_dim={"experts.down_proj": None})
    assert ranking.norms["experts.down_proj"].shape == (INTERMEDIATE,)
    assert ranking.norms["experts.gate_up_proj[0]"].shape == (HIDDEN,)
    pairs = [(model["experts"], "down_proj")]
    assert lnprune.rank(pairs, 2, "out").names == [f"0.down_proj[{i}]" for i in range(EXPERTS)]


def test_what_is_not_certain_is_left_out_and_said():
    model = nn.ModuleDict(
        {
            "known": Decorated(),
            "packed": Decorated(),
            "other": nn.ParameterDict({"w": torch.randn(4, 6, 5)}),
            "unlike": Decorated(),
            "no_halves": Decorated(said=False),
        }
    )
    packed = model["packed"]
    packed.gate_up_proj = nn.Parameter(torch.zeros(4, 20, 6, dtype=torch.uint8), requires_grad=False)
    model["unlike"].down_proj = nn.Parameter(torch.randn(4, 6, 9))
    ranking = lnprune.rank(model, 2, "out")
    assert {name.split("[")[0] for name in ranking.names} == {
        *("known.gate_up_proj", "known.down_proj", "no_halves.gate_up_proj", "no_halves.down_proj")
    }
    lines = str(ranking).splitlines()
    assert lines[0] == repr(ranking)
    assert [line.split(": ")[1] for line in lines[1:]] == [
        "packed.gate_up_proj",
        "packed.down_proj",
        "other.w",
        "unlike.gate_up_proj",
        "unlike.down_proj",
    ]
    assert "is packed or scaled, uint8: convert the model to rank it" in lines[1]
    assert lines[3].endswith(
        "shape (4, 6, 5): include='other.w' takes it, with its dim and, for experts, batch_dim"
    )
    assert str(lnprune.rank(model, 2, "out", include="known.*")) == repr(
        lnprune.rank(model, 2, "out", include="known.*")
    )
    width = lnprune.rank(model, 2, "out", experts="intermediate")
    assert [name for name in width.names if "_proj" not in name] == [f"known[{i}]" for i in range(EXPERTS)]
    assert "no_halves: whether gate and up are halves of gate_up_proj or take turns is not known" in str(
        width
    )
    model["no_halves"].is_concatenated = True
    width = lnprune.rank(model, 2, "out", experts="intermediate")
    assert "no_halves[2]" in width.names


def test_experts_without_a_gate_and_without_words_are_not_certain():
    layer = Decorated(gate=False, said=False)
    with pytest.raises(ValueError, match="has no weights of the types"):
        lnprune.rank(nn.Sequential(layer), 2, "out")


def test_experts_that_modules_share():
    model = nn.ModuleList([Decorated(bias=True), Decorated(bias=True)])
    for name, each in model[0].named_parameters():
        setattr(model[1], name, each)
    ranking = lnprune.rank(model, 2, "out", experts="intermediate")
    assert ranking.names == [f"0[{i}]" for i in range(EXPERTS)]
    plan = ranking.select(0.5).apply()
    assert model[0].gate_up_proj_mask is model[1].gate_up_proj_mask
    assert model[0].gate_up_proj_bias_mask is model[1].gate_up_proj_bias_mask
    plan.undo()
    model[1].down_proj = nn.Parameter(torch.randn_like(model[0].down_proj))
    with pytest.raises(ValueError, match="1: shares some of its weights with other experts"):
        lnprune.rank(model, 2, "out", experts="intermediate")


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"experts": "width"}, ValueError, "experts: expected 'intermediate' or None, got 'width'"),
        (
            {"experts": "intermediate", "exclude": "*.down_proj"},
            ValueError,
            r"experts\.down_proj: expected all weights of experts or none",
        ),
        ({"experts": "intermediate", "include": "router"}, ValueError, "has no known layers of experts"),
    ],
)
def test_bad_requests_for_experts(options, kind, says):
    with pytest.raises(kind, match=says):
        lnprune.rank(model_with(Decorated()), 2, "out", **options)


def test_experts_of_a_list():
    with pytest.raises(TypeError, match="looks for layers of experts in a model, got a list"):
        lnprune.rank([(Decorated(), "down_proj")], 2, "out", experts="intermediate")


def test_masks_of_weights_that_a_parent_reads_are_refused():
    from expert_models import Named

    class Parent(nn.Module, metaclass=Named, of="transformers.models.dbrx.modeling_dbrx.DbrxExperts"):
        def __init__(self):
            super().__init__()
            self.mlp = Dbrx()

        def forward(self, x):
            return self.mlp(x)

    plan = lnprune.rank(Parent(), 2, "out").select(0.5)
    with pytest.raises(ValueError, match="Parent reads this weight itself, not"):
        plan.apply()
    plan.apply(permanent=True)
