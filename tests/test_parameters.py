"""Which parameters of a model a call is about: types, names, dims, shared weights, and what is refused."""

import types

import pytest
import torch
from module_state import Snapshot, assert_unchanged
from torch import nn
from torch.nn.utils import prune as stock

import lnprune

# A module of every type, an input for it, and the dims of its outputs and inputs in the weight.
TYPES = {
    "Linear": (lambda: nn.Linear(5, 7, bias=False), (2, 5), 0, 1),
    "Conv1d": (lambda: nn.Conv1d(5, 7, 3, bias=False), (2, 5, 9), 0, 1),
    "Conv2d": (lambda: nn.Conv2d(5, 7, (3, 2), bias=False), (2, 5, 9, 8), 0, 1),
    "Conv3d": (lambda: nn.Conv3d(5, 7, (3, 2, 1), bias=False), (2, 5, 4, 4, 3), 0, 1),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(5, 7, 3, bias=False), (2, 5, 4), 1, 0),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(5, 7, (3, 2), bias=False), (2, 5, 4, 3), 1, 0),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(5, 7, 2, bias=False), (2, 5, 3, 2, 2), 1, 0),
}


class Network(nn.Module):
    """Weights of several types at several depths, and modules whose weights nobody asked for."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.encoder = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 8, 1))
        self.mix = nn.Bilinear(3, 4, 5)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 10), nn.PReLU())


ALL = ["embed.weight", "encoder.0.weight", "encoder.2.weight", "head.1.weight"]


def names(parameters, dim="out", **choice):
    return lnprune.rank(parameters, 2, dim, **choice).names


def dims(parameters, dim, **choice):
    """The dim of each parameter, by the count of norms and by the plan alike."""
    ranking = lnprune.rank(parameters, 2, dim, **choice)
    entries = ranking.select(0).entries
    for entry, norms in zip(entries, ranking.norms.values(), strict=True):
        assert entry.channels == entry.shape[entry.dim] == norms.numel()
    return [entry.dim for entry in entries]


@pytest.mark.parametrize("kind", TYPES)
def test_the_channels_of_out_are_what_a_module_returns_and_those_of_in_what_it_reads(kind):
    make, shape, out_dim, in_dim = TYPES[kind]
    module, values = make(), torch.randn(shape)
    assert dims(module, "out") == [out_dim]
    assert dims(module, "in") == [in_dim]
    before = module(values)
    assert module.weight.shape[out_dim] == before.shape[1]
    with torch.no_grad():
        module.weight.index_fill_(out_dim, torch.tensor([3]), 0.0)
    after = module(values)
    others = [c for c in range(7) if c != 3]
    assert not after[:, 3].any()
    assert torch.allclose(after[:, others], before[:, others], atol=1e-6)

    module = make()
    with torch.no_grad():
        module.weight.index_fill_(in_dim, torch.tensor([2]), 0.0)
    changed = values.clone()
    changed[:, 2] += 1
    assert torch.allclose(module(changed), module(values), atol=1e-6)


def test_the_outputs_of_an_embedding_are_its_features_and_its_inputs_the_tokens():
    module = nn.Embedding(11, 4)
    assert dims(module, "out") == [1]
    assert dims(module, "in") == [0]


def test_grouped_convolutions_have_the_channels_of_their_weights():
    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 8, 3, groups=2))
    shapes = [tuple(norms.shape) for norms in lnprune.rank(model, 2, "out").norms.values()]
    assert shapes == [(8,), (4,)]
    shapes = [tuple(norms.shape) for norms in lnprune.rank(model, 2, "in").norms.values()]
    assert shapes == [(3,), (6,)]


def test_a_module_stands_for_the_weights_of_its_supported_types():
    assert names(Network()) == ALL
    assert dims(Network(), "out") == [1, 0, 0, 0]
    assert names(Network().encoder) == ["0.weight", "2.weight"]
    assert names(nn.Linear(3, 2)) == ["weight"]
    assert names(nn.Sequential(nn.ReLU(), nn.LayerNorm(4))) == []
    assert names(nn.TransformerEncoderLayer(8, 2, 16), dim=0) == [
        *("self_attn.out_proj.weight", "linear1.weight", "linear2.weight"),
    ]


def test_subclasses_count_as_their_base():
    class Scaled(nn.ConvTranspose2d):
        pass

    assert names(nn.Sequential(Scaled(2, 3, 3))) == ["0.weight"]
    assert dims(nn.Sequential(Scaled(2, 3, 3)), "out") == [1]


def test_a_module_at_two_places_is_ranked_once():
    block = nn.Linear(4, 4)
    assert names(nn.Sequential(block, nn.ReLU(), block)) == ["0.weight"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"include": "head.*"}, ["head.1.weight"]),
        ({"include": "head.1"}, ["head.1.weight"]),
        ({"include": "head.1.weight"}, ["head.1.weight"]),
        ({"include": "encoder.?"}, ["encoder.0.weight", "encoder.2.weight"]),
        ({"include": "encoder.[!0]"}, ["encoder.2.weight"]),
        ({"include": ["head.1", "embed"]}, ["embed.weight", "head.1.weight"]),
        ({"include": nn.Conv1d}, ["encoder.0.weight", "encoder.2.weight"]),
        ({"include": (nn.Conv1d, nn.Linear)}, ALL[1:]),
        ({"include": (nn.Embedding, "head.*")}, ["embed.weight", "head.1.weight"]),
        pytest.param(
            {"include": iter(["embed", nn.Linear])}, ["embed.weight", "head.1.weight"], id="iterator"
        ),
        ({"include": []}, ALL),
        ({"exclude": "encoder.*"}, ["embed.weight", "head.1.weight"]),
        ({"exclude": nn.Embedding}, ALL[1:]),
        ({"exclude": ["embed", "head.1.weight"]}, ALL[1:3]),
        ({"exclude": "*"}, []),
        ({"exclude": nn.Module}, []),
        ({"exclude": []}, ALL),
        ({"include": nn.Conv1d, "exclude": "*.2"}, ["encoder.0.weight"]),
        ({"include": "*er.*", "exclude": nn.Conv1d}, []),
        ({"include": nn.Bilinear, "dim": 0}, ["mix.weight"]),
        ({"include": [nn.Bilinear, nn.Linear], "dim": 0}, ["mix.weight", "head.1.weight"]),
    ],
    ids=str,
)
def test_include_and_exclude(choice, expected):
    assert names(Network(), **choice) == expected


def test_patterns_tell_capital_letters_apart():
    model = nn.ModuleDict({"Head": nn.Linear(3, 2), "head": nn.Linear(3, 2)})
    assert names(model, include="head") == ["head.weight"]


def test_pairs_are_called_by_their_place_and_kept_in_order():
    first, second = nn.Linear(4, 3), nn.Bilinear(3, 4, 5)
    pairs = [(second, "weight"), (first, "weight")]
    assert names(pairs, 0) == ["0.weight", "1.weight"]
    ranking = lnprune.rank(iter(pairs), 2, 0)
    assert [norms.numel() for norms in ranking.norms.values()] == [5, 3]
    assert names(tuple(pairs), 0) == ["0.weight", "1.weight"]
    assert names([], 0) == []


def test_pairs_name_any_parameter():
    attention = nn.MultiheadAttention(8, 2)
    assert names([(attention, "in_proj_weight"), (attention.out_proj, "weight")], 0) == [
        *("0.in_proj_weight", "1.weight"),
    ]
    cell = nn.LSTM(3, 4)
    assert names([(cell, "weight_ih_l0"), (cell, "weight_hh_l0")], 0) == [
        *("0.weight_ih_l0", "1.weight_hh_l0"),
    ]


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        ("out", [1, 0, 0, 0]),
        ("in", [0, 1, 1, 1]),
        (0, [0, 0, 0, 0]),
        (1, [1, 1, 1, 1]),
        (-1, [1, 2, 2, 1]),
        (-2, [0, 1, 1, 0]),
        ([0, 1, 2, 0], [0, 1, 2, 0]),
        ((1, -1, -3, -2), [1, 2, 0, 0]),
        (["in", "out", 2, "in"], [0, 0, 2, 1]),
        (dict(zip(ALL, ["out", 1, 2, "in"], strict=True)), [1, 1, 2, 1]),
        (dict(zip(reversed(ALL), [1, 2, 1, 0], strict=True)), [0, 1, 2, 1]),
        (types.MappingProxyType(dict.fromkeys(ALL, "in")), [0, 1, 1, 1]),
        (torch.tensor(1), [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_dims(dim, expected):
    assert dims(Network(), dim) == expected


def test_dims_are_those_of_the_chosen_parameters_alone():
    assert dims(Network(), [1, 0], include=nn.Conv1d) == [1, 0]
    assert dims(Network(), {"embed.weight": 0}, include="embed") == [0]
    pairs = [(nn.Linear(3, 2), "weight"), (nn.Conv1d(2, 2, 2), "weight")]
    assert dims(pairs, {"1.weight": 2, "0.weight": 1}) == [1, 2]


class Tied(nn.Module):
    """A decoder with the weight of the embedding, where "out" is another dim."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.middle = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 11)
        self.decode.weight = self.embed.weight


def test_a_shared_weight_is_ranked_once_under_its_first_name():
    model = Tied()
    ranking = lnprune.rank(model, 2, 0)
    assert ranking.names == ["embed.weight", "middle.weight"]
    assert list(ranking.norms) == list(ranking.select(0.5).keep) == ranking.names
    shared = [values["shared_with"] for values in ranking.select(0.5).to_dict()["parameters"]]
    assert shared == [["decode.weight"], []]
    pairs = [(model.decode, "weight"), (model.middle, "weight"), (model.embed, "weight")]
    assert names(pairs, 1) == ["0.weight", "1.weight"]


def test_a_shared_weight_takes_dims_that_name_the_same_one():
    model = Tied()
    assert dims(model, [0, 1, -2]) == [0, 1]
    assert dims(model, {"embed.weight": "in", "middle.weight": 1, "decode.weight": "out"}) == [0, 1]
    assert names(model, "out", exclude="decode") == ["embed.weight", "middle.weight"]


def test_views_of_one_memory_are_weights_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert names(model) == ["0.weight", "1.weight"]


def test_pruned_modules_that_share_their_original_count_as_one_where_they_share_the_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for module in model:
        stock.ln_structured(module, "weight", 0.5, 2, 0)
    assert names(model) == ["0.weight", "1.weight"]
    model[1].weight_mask = model[0].weight_mask
    assert names(model) == ["0.weight"]
    # One dim for both is asked for here too.
    with pytest.raises(ValueError, match=r"^1\.weight: shares its weight with 0\.weight"):
        lnprune.rank(model, 2, [0, 1])


def test_a_pruned_weight_is_called_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 2, 1))
    stock.ln_structured(model[1], "weight", 0.5, 2, 0)
    assert names(model) == ["0.weight", "1.weight"]
    assert names([(model[1], "weight")], 0) == ["0.weight"]


def linear():
    return nn.Linear(4, 3)


def pruned():
    return stock.ln_structured(linear(), "weight", 1, 2, 0)


def twice(module):
    return [(module, "weight"), (module, "weight")]


REFUSED = {
    "unknown name": (
        lambda: [(linear(), "weight"), (linear(), "kernel")],
        {},
        (AttributeError, "1.kernel: expected a parameter of Linear (weight, bias), got 'kernel'"),
    ),
    "unknown name of a pruned module": (
        lambda: [(pruned(), "kernel")],
        {},
        (AttributeError, "0.kernel: expected a parameter of Linear (bias, weight), got 'kernel'"),
    ),
    "mask of a pruned parameter": (
        lambda: [(pruned(), "weight_mask")],
        {},
        (AttributeError, "0.weight_mask: expected a parameter of Linear (bias, weight), got 'weight_mask'"),
    ),
    "buffer": (
        lambda: [(nn.BatchNorm1d(4), "running_mean")],
        {},
        (AttributeError, "0.running_mean: expected a parameter of BatchNorm1d (weight, bias), got"),
    ),
    "method": (
        lambda: [(linear(), "forward")],
        {},
        (
            AttributeError,
            "0.forward: expected a parameter of Linear (weight, bias), got 'forward', which is",
        ),
    ),
    "parameter that is None": (
        lambda: [(nn.Linear(3, 4, bias=False), "bias")],
        {},
        (AttributeError, "0.bias: expected a parameter of Linear (weight), got 'bias', which is None"),
    ),
    "module without parameters": (
        lambda: [(nn.ReLU(), "weight")],
        {},
        (AttributeError, "0.weight: expected a parameter of ReLU (it has none), got 'weight'"),
    ),
    "parametrised module": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(linear())),
        {},
        (
            AttributeError,
            "0.weight: expected a parameter of ParametrizedLinear (bias), got 'weight', which",
        ),
    ),
    "original that another tool made": (
        lambda: nn.Sequential(nn.utils.spectral_norm(linear())),
        {},
        (
            AttributeError,
            "0.weight: expected a parameter of Linear (bias, weight_orig), got 'weight', which",
        ),
    ),
    "parameter twice": (
        lambda: twice(linear()),
        {},
        (
            ValueError,
            "1.weight: expected every parameter once, got 'weight' of the same Linear as 0.weight",
        ),
    ),
    "pruned parameter twice": (
        lambda: twice(pruned()),
        {},
        (
            ValueError,
            "1.weight: expected every parameter once, got 'weight' of the same Linear as 0.weight",
        ),
    ),
    "included pattern that matches nothing": (
        Network,
        {"include": ["head.*", "decoder.*"]},
        (
            ValueError,
            "include: 'decoder.*' matches nothing among the 4 weights of Network (embed.weight, "
            "encoder.0.weight, encoder.2.weight, ...)",
        ),
    ),
    "excluded pattern that matches nothing": (
        Network,
        {"exclude": "Head.*"},
        (ValueError, "exclude: 'Head.*' matches nothing among the 4 weights of Network"),
    ),
    "pattern that matches none of those included": (
        Network,
        {"include": nn.Linear, "exclude": "embed"},
        (ValueError, "exclude: 'embed' matches nothing among the 1 weights of Network (head.1.weight)"),
    ),
    "included type that matches nothing": (
        Network,
        {"include": nn.Conv3d},
        (ValueError, "include: 'Conv3d' matches nothing among the 4 weights of Network"),
    ),
    "pattern for a model without weights": (
        nn.ReLU,
        {"include": "*"},
        (ValueError, "include: '*' matches nothing among the 0 weights of ReLU (none)"),
    ),
    "included number": (
        Network,
        {"include": [nn.Linear, 3]},
        (TypeError, "include: expected name patterns and module types, got 3"),
    ),
    "excluded number": (
        Network,
        {"exclude": 3},
        (TypeError, "exclude: expected name patterns and module types, got 3"),
    ),
    "excluded module": (
        Network,
        {"exclude": [nn.Linear(3, 2)]},
        (TypeError, "exclude: expected name patterns and module types, got Linear("),
    ),
    "include with a list": (
        lambda: [(linear(), "weight")],
        {"include": "*"},
        (TypeError, "include and exclude choose among the weights of a module, got a list"),
    ),
    "exclude with a list": (
        lambda: [(linear(), "weight")],
        {"exclude": nn.Linear},
        (TypeError, "include and exclude choose among the weights of a module, got a list"),
    ),
    "lazy module": (
        lambda: nn.Sequential(linear(), nn.LazyConv2d(4, 3)),
        {},
        (ValueError, "1.weight: expected a parameter with a shape, got one not initialised yet"),
    ),
    "parameter of one dim": (
        lambda: [(linear(), "weight"), (linear(), "bias")],
        {},
        (ValueError, "1.bias: structured pruning needs two dims or more, got shape (3,)"),
    ),
    "included type with weights of one dim": (
        Network,
        {"include": nn.LayerNorm},
        (ValueError, "head.0.weight: structured pruning needs two dims or more, got shape (8,)"),
    ),
    "dim out of range": (
        lambda: nn.Sequential(nn.Conv1d(4, 3, 2), linear()),
        {"dim": 2},
        (IndexError, "1.weight: dim 2 is out of range for shape (3, 4)"),
    ),
    "negative dim out of range": (
        linear,
        {"dim": -3},
        (IndexError, "weight: dim -3 is out of range for shape (3, 4)"),
    ),
    "unknown word": (
        Network,
        {"dim": "output"},
        (ValueError, "dim: expected a number, 'out' or 'in', got"),
    ),
    "unknown word in a list": (
        lambda: nn.Sequential(linear(), linear()),
        {"dim": ["out", "output"]},
        (ValueError, "1.weight: expected a number, 'out' or 'in' as its dim, got 'output'"),
    ),
    "unknown word by name": (
        lambda: nn.Sequential(linear()),
        {"dim": {"0.weight": "0"}},
        (ValueError, "0.weight: expected a number, 'out' or 'in' as its dim, got '0'"),
    ),
    "word for a module of another type": (
        Network,
        {"include": [nn.Linear, nn.Bilinear], "dim": "out"},
        (ValueError, "mix.weight: dim='out' is known for Linear, convolutions and Embedding, got Bilinear"),
    ),
    "no dim": (
        linear,
        {"dim": None},
        (TypeError, "weight: expected a number, 'out' or 'in' as its dim, got"),
    ),
    "fraction as a dim": (
        linear,
        {"dim": 1.0},
        (TypeError, "weight: expected a number, 'out' or 'in' as its dim, got 1.0"),
    ),
    "too few dims": (Network, {"dim": [0, 1]}, (ValueError, "dim: expected one per parameter, 4, got 2")),
    "too many dims": (linear, {"dim": [0, 1]}, (ValueError, "dim: expected one per parameter, 1, got 2")),
    "dim for an unknown name": (
        linear,
        {"dim": {"weight": 0, "bias": 0}},
        (ValueError, "dim: expected one for each of 1 parameters, got one for 'bias'"),
    ),
    "no dim for a name": (
        lambda: nn.Sequential(linear(), linear()),
        {"dim": {"0.weight": 0}},
        (ValueError, "dim: expected one for each of 2 parameters, got none for '1.weight'"),
    ),
    "shared weight with two dims": (
        Tied,
        {"dim": "out"},
        (
            ValueError,
            "decode.weight: shares its weight with embed.weight, so expected one dim for both, got 0",
        ),
    ),
    "modules in place of pairs": (
        lambda: [linear()],
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got Linear("),
    ),
    "list as a pair": (
        lambda: [(linear(), "weight"), [linear(), "weight"]],
        {},
        (TypeError, "parameter 1: expected a pair (module, name), got ["),
    ),
    "pair of three": (
        lambda: [(linear(), "weight", 0)],
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got (Linear("),
    ),
    "pair without a module": (
        lambda: [("weight", linear())],
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got ('weight', Linear("),
    ),
    "pair with a number": (
        lambda: [(linear(), 0)],
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got (Linear("),
    ),
    "word in place of parameters": (
        lambda: "weight",
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got 'w'"),
    ),
    "nothing": (lambda: None, {}, (TypeError, "expected a module or pairs (module, name), got NoneType")),
    "number": (lambda: 7, {}, (TypeError, "expected a module or pairs (module, name), got int")),
}


def modules_of(parameters):
    """All modules that the argument holds, at any depth."""
    if isinstance(parameters, nn.Module):
        return list(parameters.modules())
    if isinstance(parameters, list | tuple):
        return [module for entry in parameters for module in modules_of(entry)]
    return []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_in_a_sentence(case):
    make, arguments, (kind, message) = REFUSED[case]
    parameters = make()
    modules = modules_of(parameters)
    snapshots = [Snapshot(module) for module in modules]
    with pytest.raises(kind) as caught:
        lnprune.rank(parameters, **{"n": 2, "dim": 0, **arguments})
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    for module, snapshot in zip(modules, snapshots, strict=True):
        assert_unchanged(module, snapshot)


def test_both_dims_of_a_shared_weight_are_in_the_message():
    with pytest.raises(ValueError, match=r"for both, got 0 and 1: exclude one, or give the dims$"):
        lnprune.rank(Tied(), 2, "out")
