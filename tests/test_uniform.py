"""Layers of a kind keep equal numbers of channels, and the choice is the best of all such choices."""

import itertools
import json
import random
import re

import pytest
import torch
from torch import nn

import lnprune
from lnprune.plans.kinds import kinds_of
from tests.test_ranking import (
    CASES,
    add_up,
    blocks_of_layer,
    counts_of_layer,
    flags_of,
    infeasible_layer,
    nearest,
    order_of,
    random_amount,
    random_constraints,
    random_model,
    select,
    wanted_of,
)


class BruteForce:
    """All counts of kept blocks of each kind that meet the constraints, and the best for an amount."""

    def __init__(self, model, kinds, of, normalize, min_channels, multiple_of, group_size):
        self.model, self.group_size = model, group_size
        constraints = min_channels, multiple_of, group_size
        self.costs = [size if of == "parameters" else 1 for size in model.sizes]
        self.members = {}
        for layer, kind in enumerate(kinds):
            if model.left(layer, group_size):
                self.members.setdefault(kind, []).append(layer)
        self.blocks = {
            layer: blocks_of_layer(model, layer, normalize, multiple_of, group_size)
            for layer in itertools.chain(*self.members.values())
        }
        self.counts = {
            kind: sorted(
                set.intersection(*(set(counts_of_layer(model, layer, *constraints)) for layer in layers))
            )
            for kind, layers in self.members.items()
        }

    def units(self):
        """What stays or goes together, by rank: the kind, and which of its counts it makes."""
        found = []
        for number, (kind, layers) in enumerate(self.members.items()):
            length = len(self.blocks[layers[0]][0].channels) if self.blocks[layers[0]] else 1
            for count in self.counts[kind][1:]:
                position = count // length - 1
                scores = [self.blocks[layer][position].score for layer in layers]
                found.append(((*order_of(add_up(scores) / len(layers)), number, position), kind, count))
        return [(kind, count) for _, kind, count in sorted(found)]

    def total(self, counts):
        return add_up(
            [0, *(counts[kind] * self.costs[i] for kind, layers in self.members.items() for i in layers)]
        )

    def flags(self, counts):
        return flags_of(
            self.model,
            [
                block
                for kind, layers in self.members.items()
                for layer in layers
                for block in self.blocks[layer]
                if (block.position + 1) * len(block.channels) <= counts[kind]
            ],
        )

    def left(self):
        return [self.model.left(layer, self.group_size) for layer in range(len(self.costs))]

    def expected_global(self, amount):
        counts = {kind: fewest for kind, (fewest, *_) in self.counts.items()}
        choices = [dict(counts)]
        for kind, count in self.units():
            counts[kind] = count
            choices.append(dict(counts))
        everything = add_up([0, *(left * cost for left, cost in zip(self.left(), self.costs, strict=True))])
        total = nearest([self.total(each) for each in choices], wanted_of(amount, everything))
        return self.flags(next(each for each in choices if self.total(each) == total))

    def expected_local(self, amounts):
        """``amounts`` are those of kinds."""
        counts = {}
        for kind, layers in self.members.items():
            wanted = add_up([wanted_of(amounts[kind], self.left()[i] * self.costs[i]) for i in layers])
            cost = add_up([self.costs[i] for i in layers])
            counts[kind] = nearest([count * cost for count in self.counts[kind]], wanted) // cost
        return self.flags(counts)


def random_kinds(chance, model):
    """A value for ``uniform``, and the kinds of the layers that it means."""
    channels = [len(norms) for norms in model.norms]
    if chance.random() < 0.3:
        return "kind", channels
    words = [chance.choice(["a", "b", None]) for _ in channels]
    kinds = [i if word is None else f"{word}{channels[i]}" for i, word in enumerate(words)]
    uniform = {f"{i}.weight": kind for i, kind in enumerate(kinds) if isinstance(kind, str)}
    return uniform, kinds


def cases(of):
    """Small models with layers of a kind among them, and what is asked for."""
    chance = random.Random(torch.initial_seed())
    for _ in range(CASES):
        constraints = random_constraints(chance)
        group_size = constraints["group_size"]
        model = random_model(chance, group_size, most_layers=4, most_groups=5 if group_size == 1 else 3)
        if chance.random() < 0.7:  # layers as long as the first
            for layer in range(1, len(model.norms)):
                length = len(model.norms[0])
                model.norms[layer] = (model.norms[layer] * length + model.norms[0])[:length]
                model.alive[layer] = (model.alive[layer] * length + model.alive[0])[:length]
                if any(
                    len(set(model.alive[layer][i : i + group_size])) > 1
                    for i in range(0, length, group_size)
                ):
                    model.alive[layer] = [True] * length
        uniform, kinds = random_kinds(chance, model)
        if infeasible_layer(model, **constraints) is None:
            yield chance, model, uniform, kinds, {"of": of, **constraints}


@pytest.mark.parametrize("normalize", ["size", "layer", "none"])
@pytest.mark.parametrize("of", ["channels", "parameters"])
def test_a_global_selection_is_the_best_of_all(of, normalize):
    for _, model, uniform, kinds, options in cases(of):
        ranking = model.rank()
        brute_force = BruteForce(model, kinds, normalize=normalize, **options)
        options |= {"scope": "global", "normalize": normalize, "uniform": uniform}
        channels = sum(brute_force.left())
        amounts = range(channels + 1) if of == "channels" else [channels // 2, channels]
        for amount in [*amounts, 0.0, 0.25, 0.5, 0.75, 1.0]:
            expected = brute_force.expected_global(amount)
            assert select(model, ranking, amount, **options) == expected, (model, options, amount)


@pytest.mark.parametrize("of", ["channels", "parameters"])
def test_a_local_selection_is_the_best_of_each_kind(of):
    for chance, model, uniform, kinds, options in cases(of):
        ranking = model.rank()
        brute_force = BruteForce(model, kinds, normalize="none", **options)
        for _ in range(4):
            fewest = {}
            for kind, left in zip(kinds, brute_force.left(), strict=True):
                fewest[kind] = min(left, fewest.get(kind, left))
            amounts = {kind: random_amount(chance, left) for kind, left in fewest.items()}
            by_name = {f"{layer}.weight": amounts[kind] for layer, kind in enumerate(kinds)}
            expected = brute_force.expected_local(amounts)
            actual = select(model, ranking, by_name, uniform=uniform, **options)
            assert actual == expected, (model, options, amounts)


def test_kinds_are_of_the_same_name_and_length():
    names = [
        "encoder.layer.0.dense.weight",
        "encoder.layer.11.dense.weight",
        "encoder.layer.2.dense.weight",
        "encoder.layer.3.dense2.weight",
        "h.1.c_attn.weight [0]",
        "h.2.c_attn.weight [13]",
        "experts.weight[3]",
        "experts.weight[14]",
        "0.weight@0",
        "12.weight@1",
    ]
    channels = [8, 8, 4, 8, 4, 4, 2, 2, 6, 6]
    assert kinds_of("kind", names, channels) == [0, 0, 1, 2, 3, 3, 4, 4, 5, 5]
    mapping = {"*.layer.[01]*": "a", "*dense2.weight": "a", "h.2.c_attn.weight [13]": "b"}
    assert kinds_of(mapping, names, channels) == [0, 0, 1, 0, 2, 3, 4, 5, 6, 7]
    assert kinds_of({}, names[:2], channels[:2]) == [0, 1]
    assert kinds_of(None, names, channels) is None


def layers():
    torch.manual_seed(torch.initial_seed() % 2**32)
    return nn.ModuleDict(
        {
            "first": nn.ModuleList(nn.Linear(6, 8) for _ in range(3)),
            "second": nn.ModuleList(nn.Linear(5, 8) for _ in range(2)),
            "last": nn.Linear(8, 12),
        }
    )


def test_what_is_wrong_is_said():
    ranking = lnprune.rank(layers(), 2, 0)
    for uniform, error, message in [
        ("layer", ValueError, "uniform: expected None, 'kind' or a mapping to kinds, got 'layer'"),
        (True, ValueError, "uniform: expected None, 'kind' or a mapping to kinds, got True"),
        (
            {"first.*": 3},
            TypeError,
            "uniform: expected a mapping from names or patterns to words .* got 'first",
        ),
        ({"third.*": "a"}, ValueError, "uniform: 'third.*' fits none of the 6 names"),
        (
            {"*.weight": "a"},
            ValueError,
            "uniform: expected as many channels in all layers of the kind 'a', got 8 in first.0.weight and "
            "12 in last.weight",
        ),
    ]:
        with pytest.raises(error, match=message):
            ranking.select(0.5, uniform=uniform)
    amounts = dict.fromkeys(ranking.names, 0.5)
    amounts["first.2.weight"] = 4
    message = "amount: expected one for first.0.weight and first.2.weight, .* got 0.5 and 4"
    with pytest.raises(ValueError, match=message):
        ranking.select(amounts, uniform="kind")


def test_a_plan_keeps_what_was_uniform(tmp_path):
    model = layers()
    for uniform in ("kind", {"first": "a", "first.*": "a", "second.*": "a"}):
        if isinstance(uniform, dict):
            del uniform["first"]
        plan = lnprune.rank(model, 2, 0).select(0.4, "global", uniform=uniform)
        kept = {entry.name: entry.kept for entry in plan.entries}
        assert len({kept[name] for name in kept if name.startswith("first")}) == 1
        assert len({kept[name] for name in kept if not name.startswith("last")}) <= (
            2 if uniform == "kind" else 1
        )
        assert plan.selection["uniform"] == uniform
        assert "smallest kept" not in str(plan)
        plan.save(tmp_path / "plan.json")
        again = lnprune.load_plan(tmp_path / "plan.json", model)
        assert again.selection == plan.selection
        assert again.to_dict() == plan.to_dict()
    saved = json.loads((tmp_path / "plan.json").read_text())
    for damaged in ("layer", 3, {"first.*": 1}):
        saved["selection"]["uniform"] = damaged
        (tmp_path / "plan.json").write_text(json.dumps(saved))
        with pytest.raises(ValueError, match=re.escape("the plan is damaged: selection.uniform")):
            lnprune.load_plan(tmp_path / "plan.json", model)


def test_other_calls_hand_it_on():
    model = layers()
    expected = lnprune.rank(model, 2, 0).select(0.4, "global", uniform="kind").keep
    lnprune.global_structured(model, 0.4, 2, 0, uniform="kind")
    for name, flags in expected.items():
        path, _, attribute = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(path), attribute + "_mask")[:, 0].bool(), flags)
    blocks = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    blocks[4].weight.data *= 100  # read by the second alone: it keeps all that it may
    inputs = torch.randn(2, 6)
    apart = lnprune.compact(blocks, inputs, 0.5, 2, scope="global")
    assert apart[0].out_features != apart[2].out_features
    small = lnprune.compact(blocks, inputs, 0.5, 2, scope="global", uniform="kind")
    assert small[0].out_features == small[2].out_features == 3
