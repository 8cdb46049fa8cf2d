"""Coupled channels ranked by more than weights: scores, and factors of norms and of elements."""

import pytest
import torch

import lnprune
from tests.test_coupled_plans import inputs, joined, model, tensors_of  # noqa: F401 (fixtures)


@pytest.fixture
def coupling(model, inputs):  # noqa: F811
    return lnprune.couple(model, inputs)


def expected(model, coupling, members, n, of):  # noqa: F811
    """The norms of groups whose elements are those of ``of``, by name, in place of the model's."""
    tensors = tensors_of(model)
    found = {}
    for group in coupling.groups:
        norms = []
        for channel in range(group.channels):
            elements = []
            for member in group.members:
                if tensors[member.name].dim() > 1 and (members == "all" or not member.is_input):
                    slices = member.slices[member.channels == channel]
                    elements.append(of(member).index_select(member.dim, slices).flatten())
            norms.append(torch.linalg.vector_norm(torch.cat(elements), n))
        found[group.name] = torch.stack(norms)
    return found


def assert_norms(ranking, want):
    assert ranking.norms.keys() == want.keys()
    for name, norms in ranking.norms.items():
        torch.testing.assert_close(norms, want[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [0, 1, 2, float("inf")])
@pytest.mark.parametrize("members", ["all", "producers"])
def test_scores_stand_for_weights(model, coupling, members, n):  # noqa: F811
    scores = {name: torch.randn_like(tensor) for name, tensor in model.named_parameters()}
    scores["c.weight"][:, 3] = 0
    some = dict(scores)
    del some["a.weight"]
    tensors = {**tensors_of(model), **some}
    want = expected(model, coupling, members, n, lambda member: tensors[member.name])
    assert_norms(coupling.rank(n, members, some), want)
    places = {(model.get_submodule(key.split(".")[0]), key.split(".")[1]): some[key] for key in some}
    assert_norms(coupling.rank(n, members, importance_scores=places), want)


def test_channels_of_zero_scores_are_not_gone(model, coupling):  # noqa: F811
    scores = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    kept = [entry.kept for entry in coupling.rank(2, importance_scores=scores).select(0.5).entries]
    assert kept == [4, 3, 4]


def test_a_scale_multiplies_norms(model, coupling):  # noqa: F811
    first = coupling.groups[0].name
    factors = torch.randn(8)
    want = {name: norms.clone() for name, norms in coupling.rank(2).norms.items()}
    want[first] *= factors.abs().double()
    assert_norms(coupling.rank(2, scale={first: factors}), want)


def test_an_element_scale_multiplies_elements(model, coupling):  # noqa: F811
    # c makes channels along dim 0 and reads others along dim 1.
    factors = {"a.weight": torch.rand(3), "c.weight": torch.rand(14), "d.weight": torch.rand(14)}

    def of(member):
        tensor = tensors_of(model)[member.name]
        return tensor * factors[member.name].view(1, -1, 1, 1) if member.name in factors else tensor

    want = expected(model, coupling, "producers", 2, of)
    assert_norms(coupling.rank(2, "producers", element_scale=factors), want)
    with pytest.raises(
        ValueError, match=r"c.weight: element_scale: expected a weight with .* along 0 and 1"
    ):
        coupling.rank(2, element_scale=factors)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"importance_scores": {"e.weight": torch.ones(2, 2)}},
            ValueError,
            "importance_scores: 'e.weight' is",
        ),
        (
            {"importance_scores": {"a.weight": torch.ones(2, 2)}},
            ValueError,
            "a.weight: expected importance_sc",
        ),
        ({"importance_scores": [1]}, TypeError, "importance_scores: expected a mapping"),
        ({"scale": {"e.weight": torch.ones(2)}}, ValueError, "scale: 'e.weight' is none of the 3"),
        (
            {"scale": {"a.weight": torch.ones(2)}},
            ValueError,
            r"a.weight: scale: expected a vector of shape \(8,",
        ),
        (
            {"element_scale": {"o.weight": torch.ones(2)}},
            ValueError,
            "element_scale: 'o.weight' is none of",
        ),
        (
            {"element_scale": {"a.weight": torch.ones(2)}},
            ValueError,
            r"a.weight: element_scale: .* shape \(3,",
        ),
        ({"element_scale": 3}, TypeError, "element_scale: expected a mapping"),
    ],
)
def test_what_is_wrong_is_said(coupling, options, kind, message):
    with pytest.raises(kind, match=message):
        coupling.rank(2, "producers", **options)
