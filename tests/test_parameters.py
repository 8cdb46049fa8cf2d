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
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert names(layer) == [
        *("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"),
    ]
    assert dims(layer, "out") == [0, 0, 0, 0]
    assert dims(layer, "in") == [1, 1, 1, 1]


def test_the_projections_of_attention_are_weights_as_those_of_linear_layers_are():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)
    projections = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert names(attention) == [*projections, "out_proj.weight"]
    assert dims(attention, "out") == [0, 0, 0, 0]
    shapes = [entry.shape for entry in lnprune.rank(attention, 2, "out").select(0).entries]
    assert shapes == [(8, 8), (8, 6), (8, 4), (8, 8)]
    assert names(attention, include=nn.MultiheadAttention) == projections
    assert names(attention, 0, include="bias_k") == ["bias_k"]
    values = torch.randn(3, 1, 8), torch.randn(3, 1, 6), torch.randn(3, 1, 4)
    with torch.no_grad():
        for name in projections:
            getattr(attention, name).zero_()
            assert getattr(attention, name).shape[0] == 8
        flat, _ = attention(*values)
        attention.v_proj_weight[3] = 1
        changed, _ = attention(*values)
    assert not torch.equal(flat, changed)


class Conv1D(nn.Module):
    """As transformers has it: the weight is [inputs, outputs]."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_conv1d_of_transformers_is_known_by_its_name():
    model = nn.Sequential(Conv1D(6, 4), nn.LayerNorm(6))
    assert names(model) == ["0.weight"]
    assert dims(model, "out") == [1]
    assert dims(model, "in") == [0]
    lnprune.rank(model, 2, "out").select(2).apply(permanent=True, bias=True)
    assert int((model[0](torch.randn(5, 4)) == 0).all(dim=0).sum()) == 2


class Projection(nn.Module):
    """A layer of a user's own, with a weight [inputs, outputs] under another name."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 7))
        self.scale = nn.Parameter(torch.randn(7))


def test_dims_can_be_taught():
    model = nn.Sequential(nn.Linear(3, 5), Projection(), nn.Linear(7, 2))
    taught = {Projection: {"out": 1, "in": 0}}
    assert names(model, include=taught) == ["1.kernel"]
    assert dims(model, "out", include=taught) == [1]
    assert dims(model, "in", include=taught) == [0]
    everything = {nn.Linear: None, **taught}
    assert names(model, include=everything) == ["0.weight", "1.kernel", "2.weight"]
    assert dims(model, "out", include=everything) == [0, 1, 0]
    assert dims(model, "out", include={"*.kernel": {"out": -1, "in": -2}}) == [1]
    # What is taught of a known type goes first.
    assert dims(model, "out", include={"0": {"out": 1, "in": 0}, nn.Linear: None}) == [1, 0]
    for bad in ({"out": 0}, {"out": 0, "in": "1"}, 0, {"out": 0, "in": 1, "x": 2}):
        with pytest.raises(ValueError, match=r"^include: expected the dims of 'Projection' as \{'out': 0"):
            lnprune.rank(model, 2, "out", include={Projection: bad})


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
        ({"exclude": []}, ALL),
        ({"include": nn.Conv1d, "exclude": "*.2"}, ["encoder.0.weight"]),
        ({"include": "mix", "dim": 0}, ["mix.weight"]),
        ({"include": "*mix.weight", "dim": 0}, ["mix.weight"]),
        ({"include": ["*mix.weight", "head.?"], "dim": 0}, ["mix.weight", "head.1.weight"]),
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


def test_excluding_one_name_of_a_shared_weight_excludes_the_weight():
    for exclude in ("decode", "embed", "embed.weight", nn.Embedding, ["decode", "embed"]):
        assert names(Tied(), "out", exclude=exclude) == ["middle.weight"]
    assert names(Tied(), "out", include=nn.Linear, exclude="embed") == ["middle.weight"]


def test_including_one_name_of_a_shared_weight_prunes_it_under_all():
    for include in ("decode", ["decode", "middle"], nn.Linear):
        model = Tied()
        plan = lnprune.rank(model, 2, "out", include=include).select(4)
        (values,) = [each for each in plan.to_dict()["parameters"] if each["name"] == "decode.weight"]
        assert values["shared_with"] == ["embed.weight"]
        assert values["dim"] == 0
        plan.apply()
        assert model.decode.weight_mask is model.embed.weight_mask
        tokens = torch.randint(11, (6,))
        before = model.decode(model.middle(model.embed(tokens)))
        lnprune.remove_all(model)
        assert model.decode.weight is model.embed.weight
        assert torch.equal(model.decode(model.middle(model.embed(tokens))), before)


def test_a_parameter_that_a_weight_shares_with_another_type_is_pruned_with_it():
    """Whatever holds it, under its name, along the same dim."""
    model = nn.Sequential(Projection(), nn.Linear(7, 5))
    model[1].weight = model[0].kernel
    (values,) = lnprune.rank(model, 2, "in").select(2).to_dict()["parameters"]
    assert (values["name"], values["shared_with"], values["dim"]) == ("1.weight", ["0.kernel"], 1)


def test_pairs_may_name_one_of_the_places_of_a_shared_weight():
    model = Tied()
    pairs = [(model.embed, "weight")]
    assert names(pairs, 0) == ["0.weight"]


class Wrapper(nn.Module):
    """A user's own, whose child only happens to be called as those of torch's wrappers are."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled": torch.compile,
    "compiled and averaged": lambda model: torch.optim.swa_utils.AveragedModel(torch.compile(model)),
    "compiled layers": lambda model: nn.Sequential(*map(torch.compile, model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_have_the_names_of_bare_ones(wrap, tmp_path):
    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    bare = make()
    wrapped = WRAPPERS[wrap](make())
    assert names(wrapped) == names(bare) == ["0.weight", "2.weight"]
    assert names(wrapped, include="2") == ["2.weight"]
    lnprune.rank(bare, 2, "out").select(1).save(tmp_path / "bare")
    lnprune.rank(wrapped, 2, "out").select(1).save(tmp_path / "wrapped")
    for path in ("bare", "wrapped"):
        for model in (make(), WRAPPERS[wrap](make())):
            plan = lnprune.load_plan(tmp_path / path, model).apply()
            inside = [module for module in model.modules() if type(module) is nn.Linear]
            for module, keep in zip(inside, plan.keep.values(), strict=True):
                assert torch.equal(module.weight_mask[:, 0] != 0, keep)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_plans_with_the_names_of_a_wrapped_model_load(prefix, tmp_path):
    """As files have them that were written by hand, or with names of a state dict."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    path = tmp_path / "plan"
    lnprune.rank(model, 2, "out").select(1).save(path)
    path.write_text(path.read_text().replace('"name": "', f'"name": "{prefix}'))
    lnprune.load_plan(path, model).apply()
    assert lnprune.is_pruned(model[0])
    lnprune.load_plan(path, nn.DataParallel(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))).apply()


def test_a_module_of_a_users_own_that_is_called_module_keeps_its_name(tmp_path):
    model = Wrapper(nn.Linear(4, 6))
    assert names(model) == ["module.weight"]
    lnprune.rank(model, 2, "out").select(1).save(tmp_path / "plan")
    lnprune.load_plan(tmp_path / "plan", model).apply()
    assert lnprune.is_pruned(model.module)


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
            TypeError,
            "0.weight: is parametrized, so that it is no parameter to prune: exclude it, or",
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
    "model without weights": (
        lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(4)),
        {},
        (
            ValueError,
            "Sequential has no weights of the types that are taken by themselves (Linear, convolutions, "
            "Embedding, MultiheadAttention, transformers' Conv1D and experts), and no other parameters of "
            "two dims",
        ),
    ),
    "model of other types": (
        lambda: nn.Sequential(Projection(), nn.LSTM(3, 4), Projection(), nn.LayerNorm(4)),
        {},
        (
            ValueError,
            "Sequential has no weights of the types that are taken by themselves (Linear, convolutions, "
            "Embedding, MultiheadAttention, transformers' Conv1D and experts), but parameters of two "
            "dims or more "
            "in Projection (2), LSTM (2): include them by type or by name, as in include=Projection or "
            "include='0.kernel'",
        ),
    ),
    "empty list": (list, {}, (ValueError, "expected a module or pairs (module, name), got an empty list")),
    "all excluded": (
        Network,
        {"exclude": "*"},
        (ValueError, "exclude: leaves none of the 4 weights of Network to prune"),
    ),
    "all of what was included excluded": (
        Network,
        {"include": "*er.*", "exclude": nn.Conv1d},
        (ValueError, "exclude: leaves none of the 2 weights of Network to prune"),
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
        (TypeError, "exclude: expected name patterns and module types, got a module of type Linear"),
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
        (ValueError, "include: 'LayerNorm' matches nothing among the 4 weights of Network"),
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
        (
            ValueError,
            "mix.weight: dim='out' is known for Linear, convolutions, Embedding, MultiheadAttention, "
            "transformers' Conv1D and experts, got 'weight' of Bilinear: give its dim as a number, or "
            "teach it: include={Bilinear: {'out': 0, 'in': 1}}",
        ),
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
        (TypeError, "parameter 0: expected a pair (module, name), got a module of type Linear"),
    ),
    "parameters in place of pairs": (
        lambda: list(linear().parameters()),
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got a Parameter of shape (3, 4)"),
    ),
    "parameter and module in a pair": (
        lambda: [(linear(), linear().weight)],
        {},
        (
            TypeError,
            "parameter 0: expected a pair (module, name), got (a module of type Linear, a Parameter of",
        ),
    ),
    "list as a pair": (
        lambda: [(linear(), "weight"), [linear(), "weight"]],
        {},
        (TypeError, "parameter 1: expected a pair (module, name), got ["),
    ),
    "pair of three": (
        lambda: [(linear(), "weight", 0)],
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got (a module of type Linear, "),
    ),
    "pair without a module": (
        lambda: [("weight", linear())],
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got ('weight', a module of type Linear)"),
    ),
    "pair with a number": (
        lambda: [(linear(), 0)],
        {},
        (TypeError, "parameter 0: expected a pair (module, name), got (a module of type Linear, "),
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
    with pytest.raises(ValueError, match=r"for both, got 0 and 1: exclude both, or pass dim=0 for both$"):
        lnprune.rank(Tied(), 2, "out")


class Looked(nn.Module):
    """Counts how often a property is computed."""

    looks = 0

    @property
    def weight(self):
        type(self).looks += 1
        return torch.randn(3, 3)


def test_a_property_is_not_computed():
    for call in (lnprune.rank, lnprune.local_structured):
        with pytest.raises(AttributeError, match=r"^0\.weight: expected a parameter of Looked .*property$"):
            call([(Looked(), "weight")], *((2, 0) if call is lnprune.rank else (1, 2, 0)))
    assert Looked.looks == 0
