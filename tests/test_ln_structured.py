"""ln_structured against torch.nn.utils.prune.ln_structured, corner by corner, first and repeated."""

import contextlib
import copy
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from module_state import (
    DEVICES,
    ORDER_OF_NONE,
    Snapshot,
    assert_optimal,
    assert_same_outcome,
    assert_same_state,
    assert_unchanged,
    bits,
    exact_norms,
    kept_channels,
)
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as stock

import lnprune

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore"),
]

INFINITY = float("inf")
LARGE = (512, 520)


def parameter_module(*shape, dtype=torch.float32, device="cpu"):
    """A bare module whose parameter `weight` is random."""
    module = nn.Module()
    module.register_parameter("before", nn.Parameter(torch.randn(2)))
    module.weight = nn.Parameter(torch.randn(*shape).to(device=device, dtype=dtype))
    module.register_parameter("after", nn.Parameter(torch.randn(2)))
    return module


def prune_call(amount, n, dim, name="weight", importance_scores=None):
    return lambda library, module: library.ln_structured(
        module, name, amount, n, dim, importance_scores=importance_scores
    )


FIRST_STEPS = {
    "first": lambda module: None,
    "repeated": lambda module: stock.identity(module, "weight"),
}


@pytest.fixture(params=list(FIRST_STEPS))
def prepare(request):
    """Turns a factory of modules into one of modules that are fresh, or pruned before."""
    step = FIRST_STEPS[request.param]

    def prepared(make):
        def build():
            module = make()
            step(module)
            return module

        return build

    return prepared


def linear(device="cpu"):
    return nn.Linear(6, 4, device=device)


# What is accepted.


@pytest.mark.parametrize(
    "amount",
    [
        *[0, 1, 3, 4, 0.0, 0.1, 0.125, 0.375, 0.5, 0.625, 1.0, True, False],
        *[Fraction(1, 2), Fraction(3, 8), np.float64(0.5), np.float32(0.3), np.float16(0.5)],
        *[np.int64(2), np.int8(1), np.uint8(4)],
    ],
    ids=lambda amount: f"{type(amount).__name__}-{amount}",
)
def test_amounts(device, prepare, amount):
    make = prepare(lambda: linear(device))
    with lnprune.reference_ranking():
        assert_same_outcome(make, prune_call(amount, 2, 0))
    pruned = round(float(amount) * 4) if not isinstance(amount, int | np.integer) else int(amount)
    actual, _ = assert_same_outcome(make, prune_call(amount, 2, 0), skipped_bits=("weight", "weight_mask"))
    assert_optimal(kept_channels(actual.weight_mask, 0), exact_norms(actual.weight_orig, 2, 0), pruned)


@pytest.mark.parametrize(
    ("amount", "pruned"), [(0.125, 0), (0.375, 2), (0.625, 2), (0.875, 4), (Fraction(3, 8), 2)]
)
def test_rounding_is_half_to_even(device, prepare, amount, pruned):
    module = prepare(lambda: linear(device))()
    lnprune.ln_structured(module, "weight", amount, 2, 0)
    assert int((~kept_channels(module.weight_mask, 0)).sum()) == pruned


ORDERS = [
    *[*ORDER_OF_NONE, True, False, 0, 1, 2, 3, -1, -2, 0.5, 1.5, 2.0, 2.5, -0.5, 10, INFINITY, -INFINITY],
    *[torch.tensor(2.0), torch.tensor(3), np.float64(2), np.float32(1), np.int64(2)],
]


@pytest.mark.parametrize("n", ORDERS, ids=lambda n: f"{type(n).__name__}-{n}")
def test_orders(device, prepare, n):
    make = prepare(lambda: linear(device))
    with lnprune.reference_ranking():
        assert_same_outcome(make, prune_call(0.5, n, 0))
        assert_same_outcome(make, prune_call(2, n, 1))
    actual, _ = assert_same_outcome(make, prune_call(0.5, n, 0), skipped_bits=("weight", "weight_mask"))
    assert_optimal(kept_channels(actual.weight_mask, 0), exact_norms(actual.weight_orig, n, 0), 2)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4, True, False, np.int64(1)])
def test_dims(device, prepare, dim):
    make = prepare(lambda: nn.Conv2d(4, 6, 3, device=device))
    with lnprune.reference_ranking():
        assert_same_outcome(make, prune_call(1, 2, dim))
    actual, _ = assert_same_outcome(make, prune_call(1, 1, dim), skipped_bits=("weight", "weight_mask"))
    index = int(dim)
    assert_optimal(kept_channels(actual.weight_mask, index), exact_norms(actual.weight_orig, 1, index), 1)


def test_frobenius_is_the_2_norm(device, prepare):
    """Torch takes 'fro' for matrices only; here it is 2 for every shape."""
    make = prepare(lambda: linear(device))
    with lnprune.reference_ranking():
        assert_same_outcome(make, prune_call(0.5, "fro", 0))
    torch.manual_seed(1)
    module = prepare(lambda: nn.Conv2d(4, 6, 3, device=device))()
    torch.manual_seed(1)
    other = prepare(lambda: nn.Conv2d(4, 6, 3, device=device))()
    lnprune.ln_structured(module, "weight", 0.5, "fro", 0)
    lnprune.ln_structured(other, "weight", 0.5, 2, 0)
    assert torch.equal(module.weight_mask, other.weight_mask)
    assert 0 < int(module.weight_mask.sum()) < module.weight_mask.numel()


def test_nuclear_norm_where_slices_are_matrices(device, prepare):
    make = prepare(lambda: nn.Conv1d(4, 6, 3, device=device))
    with lnprune.reference_ranking():
        assert_same_outcome(make, prune_call(0.5, "nuc", 0))
    actual, _ = assert_same_outcome(make, prune_call(0.5, "nuc", 0), skipped_bits=("weight", "weight_mask"))
    norms = torch.linalg.matrix_norm(actual.weight_orig.detach().double(), "nuc")
    assert_optimal(kept_channels(actual.weight_mask, 0), norms, 3)


# What is refused.


@pytest.mark.parametrize("dim", ["out", "in"])
def test_words_for_dims_are_those_of_other_calls(device, dim):
    module = linear(device)
    before = Snapshot(module)
    for call in (
        lambda: lnprune.ln_structured(module, "weight", 1, 2, dim),
        lambda: lnprune.LnStructured.apply(module, "weight", 1, 2, dim),
        lambda: lnprune.channel_norms(module.weight, 2, dim),
        lambda: lnprune.channel_mask(module.weight, 1, 2, dim),
    ):
        with pytest.raises(TypeError, match=f"^dim='{dim}' is a word of rank, local_structured and"):
            call()
        assert_unchanged(module, before)


BAD_CALLS = {
    "amount is a string": ("1", 2, 0),
    "amount is a tensor": (torch.tensor(0.5), 2, 0),
    "amount is None": (None, 2, 0),
    "amount is complex": (1j, 2, 0),
    "amount above 1": (1.1, 2, 0),
    "amount negative": (-1, 2, 0),
    "amount a negative float": (-0.5, 2, 0),
    "amount is NaN": (float("nan"), 2, 0),
    "amount more than the channels": (5, 2, 0),
    "amount more than the channels, numpy": (np.int64(5), 2, 0),
    "dim too large": (1, 2, 2),
    "dim below the range": (1, 2, -3),
    "dim a float": (1, 2, 1.0),
    "dim None": (1, 2, None),
    "dim a string": (1, 2, "0"),
    "n a string": (1, "two", 0),
    "n complex": (1, 2j, 0),
    "n a list": (1, [2], 0),
    "n a vector": (1, torch.tensor([1.0, 2.0]), 0),
    "n a Fraction": (1, Fraction(1, 2), 0),
    "n beyond float": (1, 10**400, 0),
    "bad n and nothing to prune": (0, "two", 0),
    "complex n and nothing to prune": (0.0, 2j, 0),
}


@pytest.mark.parametrize("ranking", ["torch", "exact"])
@pytest.mark.parametrize("arguments", list(BAD_CALLS.values()), ids=list(BAD_CALLS))
def test_bad_arguments(device, prepare, arguments, ranking):
    make = prepare(lambda: linear(device))
    call = prune_call(*arguments)
    if ranking == "exact":
        assert_same_outcome(make, call, raises=True)
        return
    with lnprune.reference_ranking():
        assert_same_outcome(make, call, raises=True)


class Container(stock.PruningContainer):
    """A user's own, which combines masks its own way."""


@pytest.mark.parametrize("ranking", [contextlib.nullcontext, lnprune.reference_ranking])
def test_nuclear_norms_of_what_are_no_matrices_are_refused(device, prepare, ranking):
    """With one message, where versions of torch raise different ones, or prune by another norm."""

    def patched(module):
        with lnprune.patch():
            stock.ln_structured(module, "weight", 1, "nuc", 0)

    def with_a_container(module):
        hooks = module._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if isinstance(hook, stock.BasePruningMethod):
                hooks[key] = Container(hook)
        lnprune.ln_structured(module, "weight", 1, "nuc", 0)

    calls = [
        lambda module: lnprune.ln_structured(module, "weight", 1, "nuc", 0),
        lambda module: lnprune.ln_structured(module, "weight", 0, "nuc", 0),
        lambda module: lnprune.local_structured(module, 1, "nuc", 0),
        lambda module: lnprune.local_structured(module, 1, "nuc", 0, permanent=True),
        lambda module: lnprune.channel_norms(module.weight.detach(), "nuc", 0),
        lambda module: lnprune.channel_mask(module.weight.detach(), 1, "nuc", 0),
        patched,
        with_a_container,
    ]
    for make in (lambda: linear(device), lambda: nn.Conv2d(4, 6, 3, device=device)):
        module = prepare(make)()
        for call in calls:
            before = Snapshot(module) if call is not with_a_container else None
            with ranking(), pytest.raises(RuntimeError, match=r"n='nuc' is a norm of matrices: .* shape"):
                call(module)
            if before is not None:
                assert_unchanged(module, before)


def test_no_order_is_the_2_norm(device, prepare):
    modules = []
    for n in (None, 2):
        torch.manual_seed(1)
        modules.append(lnprune.ln_structured(prepare(lambda: linear(device))(), "weight", 2, n, 0))
    assert torch.equal(modules[0].weight_mask, modules[1].weight_mask)


def test_one_dim(device):
    """A first call is refused; a repeated one, as in torch, takes the vector for a single channel."""
    call = prune_call(1, 2, 0, name="bias")
    assert_same_outcome(lambda: linear(device), call, raises=True)
    actual, _ = assert_same_outcome(lambda: stock.identity(linear(device), "bias"), call)
    assert not actual.bias_mask.any()


@pytest.mark.parametrize("name", ["missing", "weight.data", "", None, 3])
def test_no_such_name(device, name):
    assert_same_outcome(lambda: linear(device), prune_call(1, 2, 0, name=name), raises=True)


def test_a_buffer_or_an_attribute(device):
    def with_buffer():
        module = nn.Module()
        module.register_buffer("weight", torch.randn(4, 4, device=device))
        return module

    def with_attribute():
        module = nn.Module()
        module.weight = torch.randn(4, 4, device=device)
        return module

    for make in (with_buffer, with_attribute):
        assert_same_outcome(make, prune_call(1, 2, 0), raises=True)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrized_weight_is_refused_without_being_computed(kind, device):
    """Torch computes it, which moves the power iteration of spectral norm, and raises this error."""
    module = getattr(parametrizations, kind)(linear(device))
    with pytest.raises(TypeError):
        stock.ln_structured(copy.deepcopy(module), "weight", 1, 2, 0)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    calls = [
        lambda: lnprune.ln_structured(module, "weight", 1, 2, 0),
        lambda: lnprune.rank(module, 2, 0),
        lambda: lnprune.rank([(module, "weight")], 2, 0),
        lambda: lnprune.local_structured(module, 1, 2, "out"),
        lambda: lnprune.global_structured(module, 1, 2, "out", permanent=True),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"weight: is parametrized.* exclude it"):
            call()
        state = module.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(state[key], value) for key, value in before.items())


def test_an_uninitialised_parameter(device):
    module = nn.LazyLinear(4, device=device)
    held = dict(module._parameters)
    with pytest.raises(ValueError, match="Attempted to use an uninitialized parameter"):
        lnprune.ln_structured(module, "weight", 1, 2, 0)
    assert list(module._parameters.items()) == list(held.items())


def test_a_parameter_that_is_none(device):
    def make():
        module = nn.Module()
        module.register_parameter("weight", None)
        return module

    assert_same_outcome(make, prune_call(1, 2, 0), raises=True)


def test_names_that_are_taken(device):
    """A buffer `weight_mask` is overwritten, an attribute is not, nor is anything named `weight_orig`."""

    def make_with(kind, name):
        def make():
            module = linear(device)
            value = torch.zeros(3, device=device)
            if kind == "buffer":
                module.register_buffer(name, value, persistent=False)
            elif kind == "parameter":
                module.register_parameter(name, nn.Parameter(value))
            else:
                setattr(module, name, value)
            return module

        return make

    with lnprune.reference_ranking():
        assert_same_outcome(make_with("buffer", "weight_mask"), prune_call(1, 2, 0))
    assert_same_outcome(make_with("attribute", "weight_mask"), prune_call(1, 2, 0), raises=True)
    assert_same_outcome(make_with("parameter", "weight_mask"), prune_call(1, 2, 0), raises=True)
    assert_same_outcome(make_with("attribute", "weight_orig"), prune_call(1, 2, 0), raises=True)
    assert_same_outcome(make_with("buffer", "weight_orig"), prune_call(1, 2, 0), raises=True)


def test_two_pruning_hooks(device):
    def make():
        module = linear(device)
        for _ in range(2):
            hook = stock.L1Unstructured(1)
            hook._tensor_name = "weight"
            module.register_forward_pre_hook(hook)
        return module

    assert_same_outcome(make, prune_call(1, 2, 0), raises=True)
    assert_same_outcome(make, prune_call(1.5, 2, 0), raises=True)


def test_other_hooks_stay_where_they_are(device):
    def make():
        module = linear(device)
        module.register_forward_pre_hook(print)
        stock.l1_unstructured(module, "bias", 1)
        stock.l1_unstructured(module, "weight", 1)
        module.register_forward_pre_hook(repr)
        return module

    with lnprune.reference_ranking():
        actual, _ = assert_same_outcome(make, prune_call(1, 2, 0))
    hooks = list(actual._forward_pre_hooks.values())
    assert hooks[0] is print
    assert [type(hook) for hook in hooks[1:]] == [stock.L1Unstructured, type(repr), stock.PruningContainer]


# What is scored.


@pytest.mark.parametrize("shape", [(4, 5), (6, 4), (24,), (4, 6, 1), (1, 6)])
def test_scores_of_another_shape(device, prepare, shape):
    scores = torch.randn(shape, device=device)
    call = prune_call(1, 2, 0, importance_scores=scores)
    assert_same_outcome(prepare(lambda: linear(device)), call, raises=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_scores_or_weights_that_have_no_norm(device, prepare, dtype):
    scores = torch.randn(4, 6, device=device).to(dtype)
    make = prepare(lambda: linear(device))
    assert_same_outcome(make, prune_call(1, 2, 0, importance_scores=scores), raises=True)
    with lnprune.reference_ranking():
        assert_same_outcome(make, prune_call(1, 2, 0, importance_scores=scores), raises=True)

    def integer_weight():
        module = nn.Module()
        module.weight = nn.Parameter(torch.ones(4, 6, dtype=dtype, device=device), requires_grad=False)
        return module

    assert_same_outcome(prepare(integer_weight), prune_call(1, 2, 0), raises=True)


SCORES = {
    "same dtype": lambda shape: torch.randn(shape),
    "float64": lambda shape: torch.randn(shape, dtype=torch.float64),
    "bfloat16": lambda shape: torch.randn(shape).bfloat16(),
    "requires grad": lambda shape: torch.randn(shape, requires_grad=True),
    "transposed": lambda shape: torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]),
    "expanded": lambda shape: torch.randn(shape[0], *[1] * (len(shape) - 1)).expand(shape),
    "with gaps": lambda shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "channels_last": lambda shape: (
        torch.randn(shape).to(memory_format=torch.channels_last) if len(shape) == 4 else torch.rand(shape)
    ),
}


@pytest.mark.parametrize("shape", [(4, 6), (8, 4, 3, 3), LARGE, (32, 64, 12, 12)], ids=str)
@pytest.mark.parametrize("make_scores", list(SCORES.values()), ids=list(SCORES))
def test_importance_scores(device, prepare, make_scores, shape):
    make = prepare(lambda: parameter_module(*shape, device=device))
    scores = make_scores(shape).to(device)
    before = bits(scores)
    for dim in (0, 1):
        call = prune_call(0.5, 2, dim, importance_scores=scores)
        with lnprune.reference_ranking():
            assert_same_outcome(make, call)
        actual, _ = assert_same_outcome(make, call, skipped_bits=("weight", "weight_mask"))
        keep = kept_channels(actual.weight_mask, dim)
        assert_optimal(keep, exact_norms(scores, 2, dim), shape[dim] // 2)
        product = actual.weight_mask.to(torch.float32) * actual.weight_orig
        assert torch.equal(bits(actual.weight), bits(product))
    assert torch.equal(bits(scores), before)


# What is installed.


MODULES = {
    "Linear": (lambda: nn.Linear(10, 7), "weight"),
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3), "weight"),
    "Conv2d": (lambda: nn.Conv2d(6, 8, 3), "weight"),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), "weight"),
    "Conv2d groups": (lambda: nn.Conv2d(8, 8, 3, groups=8), "weight"),
    "Conv2d pointwise": (lambda: nn.Conv2d(8, 6, 1), "weight"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 5, (3, 2)), "weight"),
    "Embedding": (lambda: nn.Embedding(12, 5, padding_idx=0), "weight"),
    "LSTM": (lambda: nn.LSTM(5, 6, num_layers=2), "weight_ih_l0"),
    "LSTM hidden": (lambda: nn.LSTM(5, 6, bidirectional=True), "weight_hh_l0_reverse"),
    "GRU": (lambda: nn.GRU(5, 6), "weight_hh_l0"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight"),
    "Bilinear": (lambda: nn.Bilinear(4, 5, 6), "weight"),
    "one channel": (lambda: parameter_module(1, 9), "weight"),
    "one element each": (lambda: parameter_module(9, 1), "weight"),
    "five dims": (lambda: parameter_module(3, 1, 5, 2, 7), "weight"),
    "large": (lambda: parameter_module(*LARGE), "weight"),
    "large convolution": (lambda: nn.Conv2d(128, 240, 3), "weight"),
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("make", "name"), list(MODULES.values()), ids=list(MODULES))
def test_modules(device, make, name, dtype):
    def build():
        return make().to(device=device, dtype=dtype)

    for dim in (0, 1, -1):
        for n in (2, 1, INFINITY):
            with lnprune.reference_ranking():
                actual, expected = assert_same_outcome(build, prune_call(0.4, n, dim, name=name))
            stock.remove(actual, name)
            stock.remove(expected, name)
            assert_same_state(actual, expected)
    skipped = (name, name + "_mask", "_flat_weights[0]", "_flat_weights[5]", "_flat_weights[1]")
    actual, _ = assert_same_outcome(build, prune_call(0.4, 2, 0, name=name), skipped_bits=skipped)
    original, mask = getattr(actual, name + "_orig"), getattr(actual, name + "_mask")
    keep = kept_channels(mask, 0)
    assert_optimal(keep, exact_norms(original, 2, 0), round(0.4 * original.shape[0]))
    ones = torch.ones_like(original, requires_grad=False)
    assert torch.equal(bits(mask), bits(ones * keep.reshape(-1, *[1] * (original.dim() - 1))))
    assert torch.equal(bits(getattr(actual, name)), bits(mask * original))


def test_state_after_a_first_call(device):
    module = linear(device)
    weight = module.weight
    assert lnprune.ln_structured(module, "weight", 0.5, 2, 0) is module
    assert list(module.state_dict()) == ["bias", "weight_orig", "weight_mask"]
    assert module.weight_orig is weight
    assert type(module.weight) is torch.Tensor
    assert type(module.weight.grad_fn).__name__ == "MulBackward0"
    assert module.__dict__["weight"] is module.weight
    assert not module.weight_mask.requires_grad
    (hook,) = module._forward_pre_hooks.values()
    assert type(hook) is stock.LnStructured
    assert hook.__dict__ == {"amount": 0.5, "n": 2, "dim": 0, "_tensor_name": "weight"}


def test_the_forward_hook_renews_the_weight(device):
    module = linear(device)
    lnprune.ln_structured(module, "weight", 2, 2, 0)
    with torch.no_grad():
        module.weight_orig += 1
    module(torch.zeros(1, 6, device=device))
    assert torch.equal(module.weight, module.weight_mask * module.weight_orig)


def test_lstm_keeps_its_flat_weights(device):
    module = nn.LSTM(5, 6, device=device)
    lnprune.ln_structured(module, "weight_ih_l0", 0.5, 2, 0)
    assert module._flat_weights[0] is module.weight_ih_l0
    lnprune.ln_structured(module, "weight_ih_l0", 0.5, 2, 0)
    assert module._flat_weights[0] is module.weight_ih_l0
    output, _ = module(torch.randn(3, 2, 5, device=device))
    output.sum().backward()
    assert module.weight_ih_l0_orig.grad is not None


def permuted(shape, order):
    """A tensor of a shape whose memory order is another."""
    inverse = [order.index(d) for d in range(len(order))]
    return torch.randn([shape[d] for d in order]).permute(inverse)


LAYOUTS = {
    "channels_last": lambda: torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last),
    "channels_last large": lambda: torch.randn(128, 240, 3, 3).to(memory_format=torch.channels_last),
    "channels_last pointwise": lambda: torch.randn(8, 6, 1, 1).to(memory_format=torch.channels_last),
    "channels_last pointwise large": lambda: torch.randn(512, 520, 1, 1).to(
        memory_format=torch.channels_last
    ),
    "channels_last depthwise": lambda: torch.randn(8, 1, 3, 3).to(memory_format=torch.channels_last),
    "channels_last depthwise large": lambda: torch.randn(32768, 1, 3, 3).to(
        memory_format=torch.channels_last
    ),
    "channels_last_3d": lambda: torch.randn(5, 4, 2, 3, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(6, 8).t(),
    "transposed large": lambda: torch.randn(520, 512).t(),
    "transposed row": lambda: torch.randn(6, 1).t(),
    "transposed row large": lambda: torch.randn(1 << 18, 1).t(),
    "permuted": lambda: permuted((4, 5, 6), (1, 2, 0)),
    "permuted large": lambda: permuted((64, 70, 66), (2, 0, 1)),
    "expanded": lambda: torch.randn(4, 1).expand(4, 6),
    "expanded large": lambda: torch.randn(512, 1).expand(512, 520),
    "with gaps": lambda: torch.randn(4, 12)[:, ::2],
    "with gaps large": lambda: torch.randn(512, 1040)[:, ::2],
    "with gaps, transposed": lambda: torch.randn(12, 8)[::2].t(),
    "with gaps, transposed, large": lambda: torch.randn(1040, 515)[::2, 3:].t(),
    "rows of a block large": lambda: torch.randn(1024, 520)[::2],
    "an offset": lambda: torch.randn(4 * 6 + 3)[3:].view(4, 6),
    "an offset large": lambda: torch.randn(512 * 520 + 3)[3:].view(512, 520),
}


@pytest.mark.parametrize("make_weight", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_layouts(device, prepare, make_weight):
    def make():
        module = nn.Module()
        module.weight = nn.Parameter(make_weight().to(device))
        return module

    for dim in (0, 1):
        with lnprune.reference_ranking():
            actual, expected = assert_same_outcome(prepare(make), prune_call(0.5, 2, dim))
        for module in (actual, expected):
            stock.remove(module, "weight")
        assert_same_state(actual, expected)
        actual, _ = assert_same_outcome(
            prepare(make), prune_call(0.5, 2, dim), skipped_bits=("weight", "weight_mask")
        )
        keep = kept_channels(actual.weight_mask, dim)
        pruned = round(0.5 * actual.weight.shape[dim])
        assert_optimal(keep, exact_norms(actual.weight_orig, 2, dim), pruned)
        assert torch.equal(bits(actual.weight), bits(actual.weight_mask * actual.weight_orig))


@pytest.mark.parametrize("kind", ["negated view", "conjugate part"])
@pytest.mark.parametrize("shape", [(6, 4), LARGE], ids=str)
def test_weights_with_the_negative_bit(device, kind, shape):
    def make():
        module = nn.Module()
        complex_values = torch.randn(*shape, dtype=torch.complex64, device=device)
        weight = complex_values.conj().imag if kind == "conjugate part" else complex_values.real._neg_view()
        assert weight.is_neg()
        module.weight = nn.Parameter(weight)
        return module

    with lnprune.reference_ranking():
        assert_same_outcome(make, prune_call(0.5, 2, 0))


@pytest.mark.parametrize("shape", [(4, 6), LARGE], ids=str)
@pytest.mark.parametrize("amount", [0, 0.5, 1.0])
def test_special_values(device, prepare, shape, amount):
    """Minus zero, NaN and infinity in kept and pruned channels: every bit is torch's."""

    def make():
        module = parameter_module(*shape, device=device)
        with torch.no_grad():
            weight = module.weight
            weight[0, 0], weight[0, 1] = float("nan"), INFINITY
            weight[1] = torch.full_like(weight[1], -0.0)
            weight[2, :3] = torch.tensor([INFINITY, -INFINITY, -0.0])
            weight[3, 0] = torch.finfo(torch.float32).tiny / 4
        return module

    for n in (2, 0, -INFINITY, INFINITY):
        with lnprune.reference_ranking():
            assert_same_outcome(prepare(make), prune_call(amount, n, 0))


def test_nan_ranks_highest(device, prepare):
    for n in (1, 2, 3, 0.5, -1, INFINITY, -INFINITY):
        module = linear(device)
        with torch.no_grad():
            module.weight[2, 3] = float("nan")
            module.weight[1, 0] = INFINITY
        module = prepare(lambda module=module: module)()
        lnprune.ln_structured(module, "weight", 3, n, 0)
        assert kept_channels(module.weight_mask, 0).tolist() == [False, False, True, False]
        assert module.weight[1, 0].isnan()  # 0 * inf
        assert module.weight[2, 3].isnan()


def test_ties_go_to_the_lower_index(device, prepare):
    def make():
        module = nn.Module()
        module.weight = nn.Parameter(torch.ones(7, 4, device=device))
        return module

    module = prepare(make)()
    lnprune.ln_structured(module, "weight", 3, 2, 0)
    assert kept_channels(module.weight_mask, 0).tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 3, INFINITY, -INFINITY, -1])
def test_empty_weights(device, shape, n):
    raises = n in (INFINITY, -INFINITY, -1) and shape != (0, 4)
    make = lambda: parameter_module(*shape, device=device)  # noqa: E731
    for amount in (0, 0.5, 1.0):
        with lnprune.reference_ranking():
            assert_same_outcome(make, prune_call(amount, n, 0), raises=raises)
        skipped = ("weight", "weight_mask")
        actual, _ = assert_same_outcome(make, prune_call(amount, n, 0), raises=raises, skipped_bits=skipped)
        if not raises:
            assert actual.weight_mask.shape == shape


@pytest.mark.parametrize("shape", [(4, 6), LARGE], ids=str)
def test_without_gradients(device, prepare, shape):
    """Under no_grad and for frozen parameters the weight does not require grad."""

    def frozen():
        return parameter_module(*shape, device=device).requires_grad_(False)

    with lnprune.reference_ranking():
        actual, _ = assert_same_outcome(prepare(frozen), prune_call(0.5, 2, 0))
    assert actual.weight.requires_grad is False
    assert actual.weight.grad_fn is None
    make = prepare(lambda: parameter_module(*shape, device=device))
    with torch.no_grad(), lnprune.reference_ranking():
        actual, _ = assert_same_outcome(make, prune_call(0.5, 2, 0))
    assert actual.weight.requires_grad is False
    with torch.inference_mode(), lnprune.reference_ranking():
        actual, _ = assert_same_outcome(make, prune_call(0.5, 2, 0))
    assert actual.weight.is_inference()


LARGE_WEIGHTS = {
    "contiguous": lambda: torch.randn(*LARGE),
    "transposed": lambda: torch.randn(*LARGE[::-1]).t(),
    "channels_last": lambda: torch.randn(128, 240, 3, 3).to(memory_format=torch.channels_last),
    "float64": lambda: torch.randn(*LARGE, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(1024, 1024).bfloat16(),
}


@pytest.mark.parametrize("make_weight", list(LARGE_WEIGHTS.values()), ids=list(LARGE_WEIGHTS))
@pytest.mark.parametrize("times", [1, 2])
def test_gradients_of_large_weights(device, make_weight, times):
    module = nn.Module()
    module.weight = nn.Parameter(make_weight().to(device))
    for _ in range(times):
        lnprune.ln_structured(module, "weight", 0.5, 2, 0)
    weight, original, mask = module.weight, module.weight_orig, module.weight_mask
    assert type(weight.grad_fn).__name__ == "MulBackward0"
    assert weight.is_leaf is False
    product = mask * original
    assert weight.stride() == product.stride()
    assert torch.equal(bits(weight), bits(product))

    (weight * weight).sum().backward()
    (expected,) = torch.autograd.grad((product * product).sum(), original)
    assert torch.equal(original.grad, expected)
    assert original.grad.abs().sum() > 0
    assert mask.grad is None


def test_double_backward_through_a_large_weight(device):
    module = parameter_module(*LARGE, dtype=torch.float64, device=device)
    lnprune.ln_structured(module, "weight", 0.5, 2, 0)
    original, mask = module.weight_orig, module.weight_mask
    (gradient,) = torch.autograd.grad((module.weight**3).sum(), original, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), original)
    torch.testing.assert_close(second, 6 * mask * original.detach())


def test_a_large_weight_is_its_own_tensor(device, prepare):
    """Training steps on the original must not write through to the weight, nor the other way round."""
    module = prepare(lambda: parameter_module(*LARGE, device=device))()
    original = bits(module._parameters.get("weight", module.weight))
    lnprune.ln_structured(module, "weight", 0.5, 2, 0)
    with torch.no_grad():
        module.weight.fill_(3)
    assert torch.equal(bits(module.weight_orig), original)
    assert set(module.weight_mask.unique().tolist()) == {0.0, 1.0}


def test_a_large_weight_under_other_modes(device):
    """Dispatch modes and saved-tensor hooks of the caller see a large weight as torch makes it."""
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    module = parameter_module(*LARGE, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lnprune.ln_structured(module, "weight", 0.5, 2, 0)
    assert packed == [torch.Size(LARGE)]  # the mask
    module.weight.sum().backward()
    assert torch.equal(module.weight_orig.grad, module.weight_mask)


def test_deepcopy_of_a_pruned_module_fails_as_in_torch(device):
    module = lnprune.ln_structured(linear(device), "weight", 1, 2, 0)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(module)


# Every choice of torch.

amounts = st.one_of(st.integers(0, 3), st.floats(0, 1), st.sampled_from([0.25, 0.5, 0.75]))


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    values = draw(st.sampled_from(["random", "ties", "zeros", "nan"]))
    return (
        shape,
        tuple(order),
        values,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([0, 1, 2, 3, 0.5, -1, INFINITY, -INFINITY, *ORDER_OF_NONE])),
        draw(st.integers(-len(shape), len(shape) - 1)),
        draw(st.lists(amounts, min_size=1, max_size=3)),
        draw(st.integers(0, 2**31)),
    )


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_torch_choice_bit_for_bit(device, case):
    shape, order, values, dtype, n, dim, steps, seed = case
    torch.manual_seed(seed)

    def make():
        weight = permuted(shape, order)
        if values == "ties":
            weight = weight.sign()
        elif values == "zeros":
            weight = weight * (torch.rand(weight.shape) < 0.3)
        elif values == "nan":
            weight = torch.where(torch.rand(weight.shape) < 0.1, float("nan"), weight)
        module = nn.Module()
        module.weight = nn.Parameter(weight.to(device=device, dtype=dtype))
        return module

    def call(library, module):
        for amount in steps:
            alive = int(kept_channels(getattr(module, "weight_mask", module.weight), dim).sum())
            possible = min(amount, alive) if type(amount) is int else amount
            library.ln_structured(module, "weight", possible, n, dim)

    with warnings.catch_warnings(), lnprune.reference_ranking():
        warnings.simplefilter("ignore")
        assert_same_outcome(make, call)
