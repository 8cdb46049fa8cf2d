"""Experts that are sharded over ranks, by expert or within each: what the whole model does."""

import copy
import math

import pytest
import torch
from ranks import raised_by, ranks
from sharded_models import make_mesh, same_bits, sharded
from torch import nn

import lnprune

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")

# As in sharded_models.LAYOUTS.
LAYOUTS = {
    "experts": ([-1], ["S0"]),
    "rows": ([-1], ["S1"]),
    "columns": ([-1], ["S2"]),
    "replicated": ([-1], ["R"]),
    "experts and columns": ([2, -1], ["S0", "S2"]),
    "experts twice": ([2, -1], ["S0", "S0"]),
    "replicas of experts": ([2, -1], ["R", "S0"]),
}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 6, 7))
        self.down = nn.Parameter(torch.randn(5, 7, 6))
        self.heads = nn.Parameter(torch.randn(8, 3))


def shard(model, mesh, placements):
    model.up, model.down = (
        nn.Parameter(sharded(each, mesh, placements)) for each in (model.up, model.down)
    )
    if "S2" not in placements:
        model.heads = nn.Parameter(sharded(model.heads, mesh, placements))
    return model


CALL = {
    "batch_dim": {"up": 0, "down": 0, "heads": 0},
    "batch_size": {"heads": 4},
    "include": ["up", "down", "heads"],
}


def does_what_the_whole_model_does(layout):
    sizes, placements = LAYOUTS[layout]
    mesh = make_mesh(sizes)
    model = Experts()
    with torch.no_grad():
        model.up[4, 0, 1] = math.nan
        model.down[2, :, 3] = 0
    for dims in ({"up": 1, "down": 2, "heads": 0}, {"up": 2, "down": 1, "heads": 0}):
        for n in (2, 1, math.inf):
            expected_model = copy.deepcopy(model)
            got_model = shard(copy.deepcopy(model), mesh, placements)
            expected = lnprune.rank(expected_model, n, dims, **CALL)
            got = lnprune.rank(got_model, n, dims, **CALL)
            assert got.names == expected.names
            for name, norms in expected.norms.items():
                torch.testing.assert_close(got.norms[name], norms, rtol=1e-14, atol=0, equal_nan=True)
            wanted = expected.select(0.4, scope="global").apply(permanent=True)
            plan = got.select(0.4, scope="global").apply(permanent=True, keep_backup=True)
            for name, flags in wanted.keep.items():
                assert torch.equal(plan.keep[name], flags)
            assert same_bits(expected_model.parameters(), got_model.parameters())
            plan.undo()
            assert same_bits(model.parameters(), got_model.parameters())
            plan.apply()
            masked = copy.deepcopy(model)
            lnprune.rank(masked, n, dims, **CALL).select(0.4, scope="global").apply()
            assert same_bits(masked.buffers(), got_model.buffers())
            assert same_bits([masked.up, masked.heads], [got_model.up, got_model.heads])
            lnprune.remove_all(got_model)
            lnprune.remove_all(masked)
            assert same_bits(masked.parameters(), got_model.parameters())

        amounts = {name: i % 2 for i, name in enumerate(expected.names)}
        for permanent in (True, False):
            expected = lnprune.local_structured(
                copy.deepcopy(model), amounts, 2, dims, permanent=permanent, **CALL
            )
            got = shard(copy.deepcopy(model), mesh, placements)
            lnprune.local_structured(got, amounts, 2, dims, permanent=permanent, **CALL)
            assert same_bits(expected.parameters(), got.parameters())
            assert same_bits(expected.buffers(), got.buffers())
            if not permanent:
                lnprune.local_structured(expected, 1, 2, dims, **CALL)
                lnprune.local_structured(got, 1, 2, dims, **CALL)
                assert same_bits(expected.buffers(), got.buffers())


def keeps_zeros_and_refuses_parts_of_matrices():
    mesh = make_mesh([-1])
    model = shard(Experts(), mesh, ["S0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = sum(each.square().sum() for each in model.parameters())
    loss.backward()
    optimizer.step()
    plan = (
        lnprune.rank(model, 2, {"up": 1, "down": 2, "heads": 0}, **CALL).select(0.5).apply(permanent=True)
    )
    with plan.keep_zeros(optimizer):
        optimizer.step()
    for name, keep in plan.keep.items():
        attribute, i = name[:-1].split("[")
        whole = getattr(model, attribute).full_tensor()
        if attribute == "heads":
            whole = whole.view(4, 2, 3)
        kept = (whole[int(i)] != 0).any(dim=0 if attribute == "down" else 1)
        assert torch.equal(kept, keep)
    said = raised_by(lambda: lnprune.rank([(model, "heads")], 2, 1, batch_dim=0, batch_size=4))
    assert said.startswith("ValueError: 0.heads: expected a dim of 4 matrices that is not sharded"), said


@pytest.mark.parametrize(
    "count", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "layout",
    [name if name == "experts" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_the_same_experts_channels_as_unsharded(layout, count):
    if len(LAYOUTS[layout][0]) == 2 and count % 2:
        pytest.skip("a mesh of two dims has an even number of ranks")
    ranks(count).run(does_what_the_whole_model_does, layout)


def test_zeros_of_sharded_experts_stay():
    ranks(2).run(keeps_zeros_and_refuses_parts_of_matrices)
