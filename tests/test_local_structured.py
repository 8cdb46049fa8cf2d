"""local_structured against a loop of ln_structured, and with permanent=True against the loop and remove."""

import contextlib
import math

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from module_state import DEVICES, ModelSnapshot, assert_same_state, bits, kept_channels, twins
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune import ops

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore"),
]

INFINITY = math.inf
# The dims of outputs and inputs, written down a second time.
OUTPUT_DIMS = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
    nn.Embedding: 1,
}


def bare(weight, requires_grad=True):
    """A module with this weight between two others."""
    module = nn.Module()
    module.register_parameter("before", nn.Parameter(torch.randn(2)))
    module.weight = nn.Parameter(weight, requires_grad=requires_grad)
    module.register_parameter("after", nn.Parameter(torch.randn(2)))
    return module


def bare_model(*weights):
    return nn.ModuleList([bare(weight, weight.element_size() > 1) for weight in weights])


def every_kind(device="cpu"):
    """Every type of module that a model is asked for, and others between them."""
    return nn.Sequential(
        nn.Linear(8, 6, device=device),
        nn.ReLU(),
        nn.Sequential(nn.Conv1d(4, 8, 3, device=device), nn.BatchNorm1d(8, device=device)),
        nn.Conv2d(6, 8, 3, groups=2, device=device),
        nn.Conv3d(3, 5, 2, bias=False, device=device),
        nn.ConvTranspose1d(4, 6, 3, device=device),
        nn.ConvTranspose2d(6, 4, 3, groups=2, device=device),
        nn.ConvTranspose3d(3, 4, 2, device=device),
        nn.Embedding(20, 8, device=device),
        nn.LSTM(6, 4, device=device),
        nn.Linear(6, 10, bias=False, device=device),
    )


def small(device="cpu"):
    return nn.Sequential(
        nn.Linear(10, 8, device=device), nn.Linear(8, 12, device=device), nn.Linear(12, 8, device=device)
    )


def large(device="cpu"):
    """Weights that are written together with their masks, with a small layer among the large ones."""
    return nn.Sequential(
        nn.Linear(520, 512, device=device),
        nn.Linear(512, 8, device=device),
        nn.Linear(260, 512, device=device),
    )


SIZES = {"small": small, "large": large}


def listed(model, attribute="weight"):
    return [(module, attribute) for module in model.modules() if attribute in dict(names_of(module))]


def names_of(module):
    """The parameters of a module itself under the names that they have without pruning."""
    return [(key.removesuffix("_orig"), value) for key, value in module._parameters.items()]


def entries(model, pairs):
    """Name, module and attribute of each parameter, as local_structured is to find them."""
    if pairs is not None:
        return [(f"{i}.{attribute}", module, attribute) for i, (module, attribute) in enumerate(pairs)]
    return [
        (f"{path}.weight", module, "weight")
        for path, module in model.named_modules()
        if type(module) in OUTPUT_DIMS
    ]


def loop(model, amount, n, dim, pairs=None, importance_scores=None, remove=False):
    """What local_structured has to do, one ln_structured after the other."""
    for i, (name, module, attribute) in enumerate(entries(model, pairs)):
        along = dim[i] if isinstance(dim, list) else dim[name] if isinstance(dim, dict) else dim
        if isinstance(along, str):
            output = OUTPUT_DIMS[type(module)]
            along = output if along == "out" else 1 - output
        chosen = amount[name] if isinstance(amount, dict) else amount
        scores = None if importance_scores is None else importance_scores.get(name)
        lnprune.ln_structured(module, attribute, chosen, n, along, importance_scores=scores)
        if remove:
            stock.remove(module, attribute)


def call(model, amount, n, dim, pairs=None, **options):
    return lnprune.local_structured(model if pairs is None else pairs, amount, n, dim, **options)


def assert_equals_loop(make, *rounds, find_pairs=None):
    """Both leave one state, after each round; returns the two models."""
    actual, expected = twins(make)
    for options in rounds:
        for model, prune in ((actual, call), (expected, loop)):
            pairs = None if find_pairs is None else find_pairs(model)
            prune(model, pairs=pairs, **options)
        assert_same_state(actual, expected)
    assert lnprune.is_pruned(actual)
    return actual, expected


ROUNDS = [
    {"amount": 0.25, "n": 2, "dim": "out"},
    {"amount": 1, "n": 1, "dim": "in"},
    {"amount": 0.5, "n": INFINITY, "dim": "out"},
    {"amount": 0, "n": 3, "dim": "in"},
]


@pytest.mark.parametrize("ranking", ["exact", "torch"])
@pytest.mark.parametrize("kind", ["every kind", *SIZES])
def test_rounds(device, kind, ranking):
    make = {"every kind": every_kind, **SIZES}[kind]
    # nn.Conv2d with groups has 3 channels along "in": one int round leaves enough of them.
    with lnprune.reference_ranking() if ranking == "torch" else contextlib.nullcontext():
        actual, _ = assert_equals_loop(lambda: make(device), *ROUNDS)
    pruned = [module for module in actual.modules() if type(module) in OUTPUT_DIMS]
    for module in pruned:
        container, *_ = module._forward_pre_hooks.values()
        assert [(hook.amount, hook.n) for hook in container] == [(r["amount"], r["n"]) for r in ROUNDS]
        assert type(container) is stock.PruningContainer
        assert {type(hook) for hook in container} == {stock.LnStructured}
    assert len(pruned) == (9 if kind == "every kind" else 3)


@pytest.mark.parametrize("make", list(SIZES.values()), ids=list(SIZES))
def test_int_and_float_amounts_by_name(device, make):
    amounts = [
        {"0.weight": 3, "1.weight": 0.5, "2.weight": 0},
        {"0.weight": 0.5, "1.weight": 2, "2.weight": 1.0},
    ]
    assert_equals_loop(
        lambda: make(device),
        *({"amount": amount, "n": 2, "dim": 0} for amount in amounts),
        {"amount": dict(reversed(amounts[1].items())) | {"2.weight": 0}, "n": 2, "dim": 1},
    )


@pytest.mark.parametrize("amount", [0, 8, 0.0, 1.0, True], ids=repr)
def test_nothing_and_everything(device, amount):
    make = lambda: nn.Sequential(nn.Linear(6, 8, device=device), nn.Linear(8, 8, device=device))  # noqa: E731
    actual, _ = assert_equals_loop(make, {"amount": amount, "n": 2, "dim": 0})
    ones = {0: 8, 8: 0, 1: 7}[amount if isinstance(amount, int) else int(amount * 8)]
    assert [int(kept_channels(module.weight_mask, 0).sum()) for module in actual] == [ones, ones]


@pytest.mark.parametrize("n", [None, True, 0, 1, 2, 3, 0.5, 1.7, -1, INFINITY, -INFINITY, "fro"], ids=repr)
def test_every_order(device, n):
    for make in SIZES.values():
        step = {"amount": 0.5, "n": n, "dim": "out"}
        assert_equals_loop(lambda make=make: make(device), step, {**step, "dim": "in"})


def test_an_order_that_native_code_does_not_take(device):
    make = lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 4, 3)).to(device)  # noqa: E731
    assert_equals_loop(make, *[{"amount": 0.3, "n": "nuc", "dim": "out"}] * 2)


def test_dims_of_each(device):
    make = lambda: small(device)  # noqa: E731
    by_name = {"0.weight": 1, "1.weight": 0, "2.weight": "in"}
    for dim in (0, 1, [0, 1, "in"], by_name):
        assert_equals_loop(make, {"amount": 0.5, "n": 2, "dim": dim})


def test_hooks_hold_a_negative_dim_as_it_was_given(device):
    actual, expected = twins(lambda: small(device))
    for amount in (0.5, 1):
        call(actual, amount, 2, -1)
        loop(expected, amount, 2, -1)
    assert_same_state(actual, expected)


def mixed_weights(device, shape=(12, 10)):
    """Weights of every dtype, two of each, the second without a gradient."""
    found = []
    for dtype in (*cases.NATIVE_DTYPES, torch.complex64, torch.complex128):
        found += [torch.randn(shape).to(device=device, dtype=dtype) for _ in range(2)]
    return found


@pytest.mark.parametrize("shape", [(12, 10), (300, 260)], ids=["small", "large"])
def test_mixed_dtypes(device, shape):
    rounds = [{"amount": amount, "n": 2, "dim": dim} for amount, dim in ((0.25, 0), (2, 1))]
    actual, _ = assert_equals_loop(
        lambda: bare_model(*mixed_weights(device, shape)), *rounds, find_pairs=listed
    )
    assert {module.weight_mask.dtype for module in actual} == {
        *cases.NATIVE_DTYPES,
        torch.complex64,
        torch.complex128,
    }


@pytest.mark.parametrize("shape", [(6, 8, 3, 3), (96, 90, 3, 3)], ids=["small", "large"])
def test_mixed_layouts(device, shape):
    def make():
        weights = [layout(cases.random_values(shape, torch.float32)) for layout in cases.LAYOUTS.values()]
        weights.append(torch.randn(shape).to(memory_format=torch.channels_last))
        return bare_model(*(weight.to(device) for weight in weights))

    for dim in (0, 1):
        rounds = [{"amount": 0.5, "n": 2, "dim": dim}, {"amount": 0.5, "n": 1, "dim": 1 - dim}]
        assert_equals_loop(make, *rounds, find_pairs=listed)


def test_special_values(device):
    """NaN, infinities, both zeros: every bit is the loop's, but for the payload of a NaN in a weight."""
    for shape in ((12, 10), (300, 260)):
        make = lambda shape=shape: bare_model(  # noqa: E731
            *(cases.special_values(shape, dtype, device) for dtype in cases.NATIVE_DTYPES)
        )
        for n in (2, 0, INFINITY):
            actual, expected = twins(make)
            for dim in (0, 1):
                call(actual, 0.5, n, dim, listed(actual))
                loop(expected, 0.5, n, dim, listed(expected))
                assert_same_state(actual, expected, skipped_bits=("weight",))
                for left, right in zip(actual, expected, strict=True):
                    cases.assert_same_bits(left.weight.detach(), right.weight.detach())


def test_empty_weights(device):
    make = lambda: bare_model(torch.empty(0, 4), torch.randn(4, 3), torch.empty(4, 0)).to(device)  # noqa: E731
    assert_equals_loop(make, *[{"amount": 0.5, "n": 2, "dim": 0}] * 2, find_pairs=listed)


def lstm_pairs(model):
    return [(module, name) for module in model for name in ("weight_hh_l0", "weight_ih_l0", "weight_ih_l1")]


@pytest.mark.parametrize("size", [4, 200])
def test_recurrent_weights_by_pairs(device, size):
    make = lambda: nn.ModuleList([nn.LSTM(6, size, 2), nn.GRU(size, 5, 2)]).to(device)  # noqa: E731
    rounds = [{"amount": amount, "n": 2, "dim": 0} for amount in (0.25, 3)]
    actual, _ = assert_equals_loop(make, *rounds, find_pairs=lstm_pairs)
    for module in actual:
        flat = [getattr(module, name) for name in module._flat_weights_names]
        assert all(a is b for a, b in zip(module._flat_weights, flat, strict=True))
    output, _ = actual[0](torch.randn(3, 2, 6, device=device))
    output.sum().backward()
    assert actual[0].weight_ih_l0_orig.grad is not None


def test_several_parameters_of_one_module(device):
    def make():
        module = bare(torch.randn(6, 4, device=device))
        module.second = nn.Parameter(torch.randn(8, 6, device=device))
        return nn.ModuleList([module])

    find = lambda model: [(model[0], "second"), (model[0], "weight")]  # noqa: E731
    assert_equals_loop(make, *[{"amount": 0.5, "n": 2, "dim": dim} for dim in (0, 1)], find_pairs=find)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("make", list(SIZES.values()), ids=list(SIZES))
def test_importance_scores(device, make, dtype):
    """By name and by (module, name), in other dtypes and layouts, for some of the weights."""
    actual, expected = twins(lambda: make(device))
    for dim in (0, 1):
        for key in (1, 2):
            shape = actual[key].weight.shape
            scores = [
                torch.randn(shape, device=device).to(dtype),
                torch.randn(shape[::-1], device=device).t(),
            ]
            keys = [f"{key}.weight", "0.weight"]
            other = torch.randn(actual[0].weight.shape, device=device)
            for score in scores:
                call(
                    actual, 0.2, 2, dim, importance_scores={(actual[key], "weight"): score, keys[1]: other}
                )
                loop(expected, 0.2, 2, dim, importance_scores={keys[0]: score, keys[1]: other})
                assert_same_state(actual, expected)


def test_meta_and_real_modules(device):
    def make():
        layers = [nn.Linear(8, 6, device=where) for where in ("meta", device, "meta", device)]
        return nn.Sequential(*layers, nn.Conv2d(4, 6, 3, device="meta"))

    actual, _ = assert_equals_loop(make, ROUNDS[0])
    assert [module.weight_mask.is_meta for module in actual] == [True, False, True, False, True]


@pytest.mark.parametrize("make", list(SIZES.values()), ids=list(SIZES))
def test_without_gradients(device, make):
    frozen = lambda: make(device).requires_grad_(False)  # noqa: E731
    actual, _ = assert_equals_loop(frozen, *ROUNDS[:2])
    assert not any(module.weight.requires_grad for module in actual)
    with torch.no_grad():
        actual, _ = assert_equals_loop(lambda: make(device), *ROUNDS[:2])
    assert not any(module.weight.requires_grad for module in actual)

    def partly_frozen():
        model = make(device)
        model[1].requires_grad_(False)
        return model

    actual, _ = assert_equals_loop(partly_frozen, *ROUNDS[:2])
    assert [module.weight.requires_grad for module in actual] == [True, False, True]
    with torch.inference_mode():
        actual, _ = assert_equals_loop(lambda: make(device), *ROUNDS[:2])
        assert actual[0].weight.is_inference()


class Own(lnprune.LnStructured):
    """A user's own method."""


@pytest.mark.parametrize("masked", [False, True])
def test_masks_are_refused_inside_inference_mode(device, masked):
    """They would be inference tensors, and training would raise."""
    model = nn.Sequential(nn.Linear(6, 4, device=device), nn.Linear(4, 4, device=device))
    if masked:
        lnprune.local_structured(model, 1, 2, "out")
    plan = lnprune.rank(model, 2, "out").select(1)
    snapshot = ModelSnapshot(model)

    def patched():
        with lnprune.patch():
            stock.ln_structured(model[0], "weight", 1, 2, 0)

    calls = [
        lambda: lnprune.ln_structured(model[0], "weight", 1, 2, 0),
        lambda: lnprune.LnStructured.apply(model[0], "weight", 1, 2, 0),
        lambda: Own.apply(model[0], "weight", 1, 2, 0),
        patched,
        lambda: lnprune.local_structured(model, 1, 2, "out"),
        lambda: lnprune.global_structured(model, 1, 2, "out"),
        lambda: plan.apply(),
        lambda: plan.apply(bias=True),
    ]
    for call in calls:
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch\.inference_mode\(\)"):
            call()
        snapshot.assert_unchanged()
    with torch.inference_mode():  # ranks as outside
        plan = lnprune.rank(model, 2, "out").select(1)
    plan.apply(bias=True)
    for _ in range(2):
        model(torch.randn(3, 6, device=device)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_pruned_for_good_inside_inference_mode_can_be_written_later(device, masked, dtype):
    model = nn.Sequential(nn.Linear(6, 4, device=device), nn.Linear(4, 4, device=device))
    model[0].weight = nn.Parameter(torch.randn(4, 6, device=device).to(dtype), requires_grad=False)
    for prune_in_place in (
        lambda: lnprune.local_structured(model, 1, 2, "out", permanent=True),
        lambda: lnprune.rank(model, 2, "out").select(1).apply(permanent=True),
        lambda: lnprune.remove_all(model),
    ):
        if masked:
            lnprune.local_structured(model, 1, 2, "out")
        with torch.inference_mode():
            prune_in_place()
        assert not any(parameter.is_inference() for parameter in model.parameters())
        assert not lnprune.is_pruned(model)
        with torch.no_grad():
            model[1].weight += 1
            model[0].weight.copy_(model[0].weight.clone())
        torch.nn.init.normal_(model[1].weight)


@pytest.mark.parametrize("make", list(SIZES.values()), ids=list(SIZES))
def test_on_top_of_torchs_methods(device, make):
    def prepared():
        model = make(device)
        stock.l1_unstructured(model[0], "weight", 0.5)
        stock.random_structured(model[1], "weight", 1, 0)
        stock.custom_from_mask(model[2], "weight", torch.rand_like(model[2].weight) - 0.5)
        stock.l1_unstructured(model[1], "bias", 2)
        model[0].register_forward_pre_hook(lambda *_: None)
        return model

    assert_equals_loop(prepared, *ROUNDS)


def test_masked_and_unmasked_in_one_call(device):
    for make in SIZES.values():

        def prepared(make=make):
            model = make(device)
            lnprune.ln_structured(model[1], "weight", 0.25, 2, 1)
            return model

        assert_equals_loop(prepared, *ROUNDS[:3])


def test_include_and_exclude(device):
    actual, expected = twins(lambda: every_kind(device))
    lnprune.local_structured(actual, 0.25, 2, "out", include=["0", nn.Conv2d, "10"], exclude="10")
    for module in (expected[0], expected[3]):
        lnprune.ln_structured(module, "weight", 0.25, 2, 0)
    assert_same_state(actual, expected)


def shared(make, device):
    model = make(device)
    model.append(nn.Linear(*reversed(model[0].weight.shape), device=device))
    model[-1].weight = model[0].weight
    return model


@pytest.mark.parametrize("make", list(SIZES.values()), ids=list(SIZES))
def test_shared_weights(device, make):
    """They stay shared, the mask too; each module's own state is the loop's."""
    actual, expected = twins(lambda: shared(make, device))
    for amount, dim in ((0.25, 0), (3, 1), (0.5, 0)):
        call(actual, amount, 2, dim)
        # A loop prunes the second place from the weight as the first one left it: the same channels.
        loop(expected, amount, 2, dim)
        for left, right in zip(actual, expected, strict=True):
            assert_same_state(left, right)
        assert list(actual.state_dict()) == list(expected.state_dict())
        assert actual[0].weight_orig is actual[-1].weight_orig
        assert actual[0].weight_mask is actual[-1].weight_mask
        assert actual[0].weight is not actual[-1].weight
    (actual[0].weight.sum() + 2 * actual[-1].weight.sum()).backward()
    assert torch.equal(actual[0].weight_orig.grad, 3 * actual[0].weight_mask)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_models(device, data):
    seed = data.draw(st.integers(0, 2**31))
    shapes = data.draw(
        st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=5),
        label="shapes",
    )
    kinds = []
    for shape in shapes:
        layout = data.draw(st.sampled_from(list(cases.LAYOUTS)))
        # Torch multiplies no single element of float8, repeated or not.
        single = layout == "expanded" or math.prod(shape) == 1
        kinds.append((data.draw(st.sampled_from(cases.NATIVE_DTYPES[: 4 if single else None])), layout))
    rounds = [
        {
            "amount": data.draw(st.one_of(st.floats(0, 1), st.sampled_from([0, 1.0, 0.5]))),
            "n": data.draw(st.sampled_from([0, 1, 2, 3, 0.5, INFINITY, -INFINITY])),
            "dim": [data.draw(st.integers(0, len(shape) - 1)) for shape in shapes],
        }
        for _ in range(data.draw(st.integers(1, 3)))
    ]

    def make():
        torch.manual_seed(seed)
        return bare_model(
            *(
                cases.LAYOUTS[layout](cases.random_values(tuple(shape), dtype, device))
                for shape, (dtype, layout) in zip(shapes, kinds, strict=True)
            )
        )

    assert_equals_loop(make, *rounds, find_pairs=listed)


def test_training_equals_the_loops(device):
    for make in (small, lambda device: nn.Sequential(nn.Linear(260, 256), nn.Linear(256, 130)).to(device)):
        actual, expected = twins(lambda make=make: make(device))
        inputs = torch.randn(4, actual[0].in_features, device=device)
        optimizers = [
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (actual, expected)
        ]
        before = bits(actual[0].weight)
        for amount in (0.25, 0.3):
            call(actual, amount, 2, "out")
            loop(expected, amount, 2, "out")
            for _ in range(2):
                for model, optimizer in zip((actual, expected), optimizers, strict=True):
                    optimizer.zero_grad()
                    model(inputs).square().sum().backward()
                    optimizer.step()
            assert_same_state(actual, expected)
        assert not torch.equal(bits(actual[0].weight_orig), before)


# How often native code is called.


def count_calls(monkeypatch):
    """The number of tensors in every call of an op that has any, and of weights written with the masks."""
    calls = []
    for name in ("channel_norms", "select_channels", "write_masks", "prune_channels", "zero_channels_"):
        count_one(monkeypatch, calls, name)
    count_one(monkeypatch, calls, "prune_channels_")
    return calls


def count_one(monkeypatch, calls, name):
    original = getattr(ops, name)

    def counting(tensors, *arguments):
        if tensors:
            fused = len(arguments[1]) if name == "prune_channels" else 0
            calls.append((name, len(tensors), fused))
        return original(tensors, *arguments)

    monkeypatch.setattr(ops, name, counting)


def test_one_native_call_for_a_model(device, monkeypatch):
    calls = count_calls(monkeypatch)
    for make, fused in ((small, 0 if device == "cpu" else 3), (large, 3)):
        model = make(device)
        for _ in range(2):  # masked parameters too
            calls.clear()
            call(model, 0.25, 2, "out")
            assert calls == [("prune_channels", 3, fused)]
        permanent = make(device)
        calls.clear()
        call(permanent, 0.25, 2, "out", permanent=True)
        assert calls == [("prune_channels_", 3, 0)]


# Permanent.


def storage_of(parameter):
    return id(parameter), parameter.data_ptr(), parameter.stride()


def assert_permanent_equals_loop(make, *rounds, find_pairs=None, in_place=True):
    """The values of the loop and remove, as plain parameters again; ``in_place``: in the same memory."""
    actual, expected = twins(make)
    find_pairs = find_pairs or listed
    keys = sorted(key.replace("weight_orig", "weight") for key, _ in actual.named_parameters())
    # By the name without pruning, since masked parameters are called otherwise.
    before = [(m, name, storage_of(p), p._version) for m in actual.modules() for name, p in names_of(m)]
    pruned = {(id(module), name) for module, name in find_pairs(actual)}
    for options in rounds:
        call(actual, pairs=find_pairs(actual), permanent=True, **options)
        loop(expected, pairs=find_pairs(expected), remove=True, **options)
    assert sorted(actual.state_dict()) == sorted(expected.state_dict()) == keys
    assert not lnprune.is_pruned(actual)
    assert not list(actual.buffers())
    for module, name, (identity, pointer, strides), version in before:
        parameter = module._parameters[name]
        assert id(parameter) == identity
        assert getattr(module, name) is parameter
        if in_place:
            assert (parameter.data_ptr(), parameter.stride()) == (pointer, strides)
            assert (parameter._version > version) is ((id(module), name) in pruned)
    state = expected.state_dict()
    for key, value in actual.state_dict().items():
        assert value.dtype is state[key].dtype
        assert torch.equal(
            cases.wide(value) if not value.is_complex() else value, wide_or_complex(state[key])
        )
    return actual


def wide_or_complex(tensor):
    return tensor if tensor.is_complex() else cases.wide(tensor)


@pytest.mark.parametrize("amount", [0, 0.0, 0.25, 2, 1.0], ids=repr)
@pytest.mark.parametrize("make", list(SIZES.values()), ids=list(SIZES))
def test_permanent(device, make, amount):
    rounds = [{"amount": amount, "n": 2, "dim": dim} for dim in (0, 1)]
    order = [key for key, _ in make(device).named_parameters()]
    actual = assert_permanent_equals_loop(lambda: make(device), *rounds)
    assert [key for key, _ in actual.named_parameters()] == order
    zeros = [int((module.weight == 0).all(dim=1).sum()) for module in actual]
    rows = [module.weight.shape[0] for module in actual]
    expected = [amount if type(amount) is int else round(amount * count) for count in rows]
    assert zeros == expected
    for module in actual:  # +0.0 and never -0.0
        assert not module.weight[module.weight == 0].signbit().any()


def test_permanent_of_every_kind(device):
    actual, expected = twins(lambda: every_kind(device))
    call(actual, 0.5, 1, "out", permanent=True)
    loop(expected, 0.5, 1, "out", remove=True)
    for key, value in actual.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])
    assert not lnprune.is_pruned(actual)


@pytest.mark.parametrize("shape", [(12, 10), (300, 260)], ids=["small", "large"])
def test_permanent_of_mixed_dtypes(device, shape):
    rounds = [{"amount": amount, "n": 2, "dim": dim} for amount, dim in ((0.25, 0), (2, 1))]
    make = lambda: bare_model(*mixed_weights(device, shape))  # noqa: E731
    assert_permanent_equals_loop(make, *rounds, find_pairs=listed, in_place=False)
    native = lambda: bare_model(*mixed_weights(device, shape)[: 2 * len(cases.NATIVE_DTYPES)])  # noqa: E731
    assert_permanent_equals_loop(native, *rounds, find_pairs=listed)


def test_permanent_of_mixed_layouts(device):
    def make_of(layouts):
        return lambda: bare_model(
            *(
                cases.LAYOUTS[name](cases.random_values((6, 8, 3, 3), torch.float32, device))
                for name in layouts
            )
        )

    for dim in (0, 1):
        options = {"amount": 0.5, "n": 2, "dim": dim}
        assert_permanent_equals_loop(make_of(cases.DENSE_LAYOUTS), options)
        # Weights with overlaps or gaps take other memory, as by torch's remove.
        assert_permanent_equals_loop(make_of(cases.LAYOUTS), options, in_place=False)


def test_permanent_zeros_whatever_was_there(device):
    """Where the loop's mask times infinity gives NaN, and times a negative number -0.0."""
    for dtype in cases.NATIVE_DTYPES:
        weight = cases.special_values((12, 10), dtype, device)
        model = bare_model(weight.clone())
        pairs = listed(model)
        scores = torch.arange(12.0, device=device)[:, None].expand(12, 10)
        call(model, 5, 2, 0, pairs, importance_scores={pairs[0]: scores}, permanent=True)
        assert not bits(model[0].weight[:5]).any()
        assert torch.equal(bits(model[0].weight[5:]), bits(weight[5:]))
        call(model, 1.0, 2, 1, pairs, permanent=True)
        assert not bits(model[0].weight).any()


@pytest.mark.parametrize("make", list(SIZES.values()), ids=list(SIZES))
def test_permanent_of_masked_parameters(device, make):
    """All masked, or some: masks go, with what they pruned."""
    for masked in ((0, 1, 2), (1,)):

        def prepared(masked=masked):
            model = make(device)
            for index in masked:
                lnprune.ln_structured(model[index], "weight", 0.25, 2, 1)
            return model

        actual = assert_permanent_equals_loop(
            prepared, {"amount": 0.5, "n": 2, "dim": 0}, {"amount": 1, "n": 1, "dim": 1}
        )
        assert int((actual[1].weight == 0).all(dim=0).sum()) >= 1


def test_permanent_with_torchs_ranking(device):
    with lnprune.reference_ranking():
        assert_permanent_equals_loop(lambda: small(device), {"amount": 0.5, "n": 2, "dim": 0})
    make = lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 4, 3)).to(device)  # noqa: E731
    assert_permanent_equals_loop(make, {"amount": 0.5, "n": "nuc", "dim": 0})


def test_permanent_scores_by_name(device):
    actual, expected = twins(lambda: small(device))
    amount = {"0.weight": 2, "1.weight": 0.25, "2.weight": 0}
    scores = {"1.weight": torch.randn(12, 8, device=device)}
    call(actual, amount, 2, "out", importance_scores=scores, permanent=True)
    loop(expected, amount, 2, "out", importance_scores=scores, remove=True)
    for key, value in actual.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])
    assert int((actual[1].weight == 0).all(dim=1).sum()) == 3


def test_permanent_of_shared_weights(device):
    for masked in (False, True):
        actual, expected = twins(lambda: shared(small, device))
        if masked:
            for model in (actual, expected):
                call(model, 0.25, 2, 0)
        call(actual, 0.5, 2, 1, permanent=True)
        loop(expected, 0.5, 2, 1)
        for module in expected:
            stock.remove(module, "weight")
        assert actual[0].weight is actual[-1].weight
        assert not lnprune.is_pruned(actual)
        for key, value in actual.state_dict().items():
            assert torch.equal(value, expected.state_dict()[key])


def test_permanent_of_recurrent_weights(device):
    for masked in (False, True):
        actual, expected = twins(lambda: nn.ModuleList([nn.LSTM(6, 4, 2)]).to(device))
        if masked:
            for model in (actual, expected):
                lnprune.ln_structured(model[0], "weight_hh_l0", 0.25, 2, 1)
        call(actual, 0.25, 2, 0, lstm_pairs(actual), permanent=True)
        loop(expected, 0.25, 2, 0, lstm_pairs(expected), remove=True)
        lstm = actual[0]
        assert [id(weight) for weight in lstm._flat_weights] == [
            id(lstm._parameters[name]) for name in lstm._flat_weights_names
        ]
        inputs = torch.randn(3, 2, 6, device=device)
        assert torch.equal(lstm(inputs)[0], expected[0](inputs)[0])


def test_permanent_on_meta(device):
    model = nn.Sequential(nn.Linear(8, 6, device="meta"), nn.Linear(6, 4, device=device))
    call(model, 0.5, 2, "out", permanent=True)
    assert list(model.state_dict()) == ["0.bias", "0.weight", "1.weight", "1.bias"]
    assert model[0].weight.is_meta
    assert int((model[1].weight == 0).all(dim=1).sum()) == 2


def test_autograd_sees_a_permanent_change(device):
    """A graph that saved the weight before must not go backward through the changed one."""
    model = small(device)
    inputs = torch.randn(3, 10, device=device, requires_grad=True)
    output = model(inputs).sum()
    call(model, 0.5, 2, "out", permanent=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_permanent_along_dims_from_the_end(device, dtype):
    model = nn.Sequential(nn.Linear(4, 3, dtype=dtype, device=device))
    weight = model[0].weight.detach().clone()
    lnprune.local_structured([(model[0], "weight")], 0.5, 2, -1, permanent=True)
    kept = lnprune.channel_mask(weight, 0.5, 2, 1)
    assert torch.equal(model[0].weight, weight * kept)
