"""scale and element_scale: norms times a number for each channel, elements times one for each input."""

import copy
import math
import re

import pytest
import torch
from expert_models import EXPERTS, HIDDEN, INTERMEDIATE, Decorated
from torch import nn

import lnprune


def network():
    return nn.Sequential(
        nn.Linear(10, 16), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(5, 7, 2), nn.Embedding(9, 8)
    )


NAMES = [f"{i}.weight" for i in range(4)]
OUT = {"0.weight": 0, "1.weight": 0, "2.weight": 1, "3.weight": 1}


def brute_force(weight, dim, n, factors=None, other=None, scale=None):
    wide = weight.detach().double()
    if factors is not None:
        shape = [1] * wide.dim()
        shape[other] = -1
        wide = wide * factors.double().view(shape)
    slices = wide.movedim(dim, 0).flatten(1)
    norms = slices.ne(0).sum(dim=1).double() if n == 0 else torch.linalg.vector_norm(slices, n, dim=1)
    return norms if scale is None else norms * scale.double().abs()


@pytest.mark.parametrize("n", [0, 1, 2, 0.5, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("word", ["out", "in"])
def test_norms_are_those_of_brute_force(word, dtype, n):
    model = network()
    with torch.no_grad():
        model[0].weight[3, 4] = math.nan
        model[1].weight[:, 2] = 0
    factors, scales = {}, {}
    for name in NAMES:
        weight = model.get_parameter(name)
        dim = OUT[name] if word == "out" else 1 - OUT[name]
        factors[name] = torch.randn(weight.shape[1 - dim], dtype=dtype)
        factors[name][1] = 0
        scales[name] = torch.randn(weight.shape[dim], dtype=dtype)
        scales[name][2] = 0
    del factors["3.weight"], scales["2.weight"]
    ranking = lnprune.rank(model, n, word, scale=scales, element_scale=factors)
    for name in NAMES:
        weight = model.get_parameter(name)
        dim = OUT[name] if word == "out" else 1 - OUT[name]
        expected = brute_force(weight, dim, n, factors.get(name), 1 - dim, scales.get(name))
        torch.testing.assert_close(ranking.norms[name], expected, rtol=1e-14, atol=0, equal_nan=True)
    keep = ranking.select(0.5).keep
    for name, flags in keep.items():
        # A scale of zero does not make a channel one that is gone, as zeros of a weight do.
        alive = model.get_parameter(name).detach().movedim(OUT[name] if word == "out" else 1 - OUT[name], 0)
        left = int(alive.flatten(1).ne(0).any(dim=1).sum())
        assert int(flags.sum()) == left - round(0.5 * left)


def test_keys_are_names_or_places():
    model = network()
    vector = torch.rand(10)
    by_name = lnprune.rank(model, 2, "out", element_scale={"0.weight": vector})
    by_place = lnprune.rank(model, 2, "out", element_scale={(model[0], "weight"): vector})
    assert torch.equal(by_name.norms["0.weight"], by_place.norms["0.weight"])
    pairs = [(model[0], "weight")]
    listed = lnprune.rank(
        pairs, 2, 0, scale={"0.weight": torch.arange(16.0)}, element_scale={"0.weight": vector}
    )
    expected = by_name.norms["0.weight"] * torch.arange(16.0).double()
    assert torch.equal(listed.norms["0.weight"], expected)


def test_what_plain_torch_ranks():
    model = nn.Sequential(nn.Linear(6, 5).to(torch.complex64), nn.Linear(6, 5))
    vector, scale = torch.randn(6), torch.rand(5)
    ranking = lnprune.rank(model, 2, 0, element_scale={"0.weight": vector}, scale={"0.weight": scale})
    expected = (model[0].weight.detach().to(torch.complex128) * vector.double()).abs().norm(
        dim=1
    ) * scale.double()
    torch.testing.assert_close(ranking.norms["0.weight"], expected, rtol=1e-13, atol=0)


def test_scores_and_masks():
    model = nn.Sequential(nn.Linear(6, 8))
    scores, vector = torch.rand(8, 6), torch.rand(6)
    ranking = lnprune.rank(model, 1, 0, {"0.weight": scores}, element_scale={"0.weight": vector})
    torch.testing.assert_close(
        ranking.norms["0.weight"], (scores.double() * vector).sum(dim=1), rtol=1e-14, atol=0
    )
    lnprune.ln_structured(model[0], "weight", 3, 2, 0)
    plan = lnprune.rank(model, 2, 0, element_scale={"0.weight": vector}).select(1)
    assert plan.entries[0].kept == 4
    values = (model[0].weight_orig * model[0].weight_mask).double() * vector
    expected = values.norm(dim=1).sort().values[3]
    assert not plan.keep["0.weight"][values.norm(dim=1) == expected].any()


def test_experts_have_one_vector_or_one_each():
    layer = Decorated()
    model = nn.ModuleDict({"experts": layer})
    shared, apart = torch.randn(HIDDEN), torch.randn(EXPERTS, INTERMEDIATE)
    scale = torch.rand(EXPERTS, 2 * INTERMEDIATE)
    one = torch.rand(HIDDEN)
    ranking = lnprune.rank(
        model,
        2,
        "out",
        element_scale={"experts.gate_up_proj": shared, "experts.down_proj": apart},
        scale={"experts.gate_up_proj": scale, "experts.down_proj[2]": one},
    )
    for i in range(EXPERTS):
        expected = brute_force(layer.gate_up_proj[i], 0, 2, shared, 1, scale[i])
        torch.testing.assert_close(
            ranking.norms[f"experts.gate_up_proj[{i}]"], expected, rtol=1e-14, atol=0
        )
        expected = brute_force(layer.down_proj[i], 0, 2, apart[i], 1, one if i == 2 else None)
        torch.testing.assert_close(ranking.norms[f"experts.down_proj[{i}]"], expected, rtol=1e-14, atol=0)


def test_the_width_of_experts_with_vectors():
    layer = Decorated(bias=True)
    model = nn.ModuleDict({"experts": layer})
    inputs, outputs = torch.randn(EXPERTS, HIDDEN), torch.randn(HIDDEN)
    scale = torch.rand(EXPERTS, INTERMEDIATE)
    ranking = lnprune.rank(
        model,
        2,
        "out",
        experts="intermediate",
        element_scale={"experts.gate_up_proj": inputs, "experts.down_proj": outputs},
        scale={"experts": scale},
    )
    for i in range(EXPERTS):
        up = layer.gate_up_proj[i].detach().double() * inputs[i].double()
        down = layer.down_proj[i].detach().double() * outputs.double().unsqueeze(1)
        bias = layer.gate_up_proj_bias[i].detach().double()
        squares = up.square().sum(dim=1) + bias.square()
        squares = squares[:INTERMEDIATE] + squares[INTERMEDIATE:] + down.square().sum(dim=0)
        expected = squares.sqrt() * scale[i].double()
        torch.testing.assert_close(ranking.norms[f"experts[{i}]"], expected, rtol=1e-14, atol=0)


def test_no_product_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for each in made if isinstance(made, list | tuple) else [made]:
                if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in weights:
                    self.most = max(self.most, each.numel())
            return made

    model = nn.Sequential(nn.Linear(300, 400), nn.Conv2d(40, 30, 3))
    vectors = {"0.weight": torch.rand(300), "1.weight": torch.rand(40)}
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    with Largest() as mode:
        lnprune.rank(model, 2, "out", element_scale=vectors)
    assert 400 <= mode.most <= 400 + 30


def test_global_pruning_takes_scales_too():
    model = network()
    other = copy.deepcopy(model)
    given = {"scale": {"0.weight": torch.rand(16)}, "element_scale": {"1.weight": torch.rand(4)}}
    lnprune.rank(model, 2, "out", **given).select(0.4, scope="global").apply(permanent=True)
    lnprune.global_structured(other, 0.4, 2, "out", permanent=True, **given)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        (
            {"scale": {"0.weight": torch.rand(15)}},
            ValueError,
            "0.weight: scale: expected a vector of shape (16,) for shape (16, 10), got (15,)",
        ),
        (
            {"scale": {"9.weight": torch.rand(16)}},
            ValueError,
            "scale: '9.weight' is none of the 4 parameters",
        ),
        ({"scale": [torch.rand(16)]}, TypeError, "scale: expected a mapping from a name to a vector"),
        (
            {"scale": {"0.weight": 2.0}},
            TypeError,
            "0.weight: scale: expected a vector of floating-point numbers, got 2.0",
        ),
        (
            {"scale": {"0.weight": torch.ones(16, dtype=torch.int64)}},
            TypeError,
            "expected a vector of floating-point",
        ),
        (
            {"scale": {"0.weight[0]": torch.rand(16)}},
            ValueError,
            "scale: '0.weight[0]' is none of the 4 parameters",
        ),
        (
            {"element_scale": {"1.weight": torch.rand(6)}},
            ValueError,
            "1.weight: element_scale: expected a vector of shape (4,) for shape (6, 4, 3, 3), got (6,)",
        ),
        (
            {"element_scale": {"9.weight": torch.rand(6)}},
            ValueError,
            "element_scale: '9.weight' is none of the",
        ),
        ({"element_scale": 3}, TypeError, "element_scale: expected a mapping from (module, name)"),
        (
            {"element_scale": {"0.weight": torch.rand(10, device="meta")}},
            ValueError,
            "0.weight: element_scale: expected a vector on cpu, as the weight, got meta",
        ),
    ],
)
def test_bad_vectors_say_what_was_wanted(options, kind, says):
    with pytest.raises(kind, match=re.escape(says)):
        lnprune.rank(network(), 2, "out", **options)


def test_which_dim_is_the_other_has_to_be_known():
    layer = nn.Conv2d(4, 6, 3)
    with pytest.raises(
        ValueError, match="element_scale: expected a matrix, matrices along batch_dim, or a conv"
    ):
        lnprune.rank([(layer, "weight")], 2, 2, element_scale={"0.weight": torch.rand(4)})
