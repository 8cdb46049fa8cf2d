"""Repeated pruning: on top of every method of torch, several times, in both rankings."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from module_state import (
    DEVICES,
    ORDER_OF_NONE,
    assert_optimal,
    assert_same_outcome,
    assert_same_state,
    bits,
    exact_norms,
    kept_channels,
)
from torch import nn
from torch.nn.utils import prune as stock

import lnprune

pytestmark = pytest.mark.parametrize("device", DEVICES)

INFINITY = float("inf")
SKIPPED = ("weight", "weight_mask")


def soft_mask(module):
    """Weights between 0 and 1 and beyond, with zero channels, minus zero and a negative channel."""
    mask = torch.rand(module.weight.shape, device=module.weight.device) + 0.5
    mask[1] = 0
    mask[:, 2] = 0
    mask[0] *= -1
    mask[2, 0] = -0.0
    return mask


BEFORE = {
    "identity": lambda module: stock.identity(module, "weight"),
    "l1_unstructured": lambda module: stock.l1_unstructured(module, "weight", 0.6),
    "random_unstructured": lambda module: stock.random_unstructured(module, "weight", 0.7),
    "random_structured": lambda module: stock.random_structured(module, "weight", 0.4, 0),
    "random_structured other dim": lambda module: stock.random_structured(module, "weight", 0.25, 1),
    "ln_structured": lambda module: stock.ln_structured(module, "weight", 0.2, 1, 0),
    "soft mask": lambda module: stock.custom_from_mask(module, "weight", soft_mask(module)),
    "bool mask": lambda module: stock.custom_from_mask(module, "weight", module.weight > 0),
    "zero mask": lambda module: stock.custom_from_mask(module, "weight", torch.zeros_like(module.weight)),
    "container": lambda module: stock.identity(stock.random_structured(module, "weight", 0.2, 0), "weight"),
}
SHAPES = {
    "linear": lambda: torch.randn(10, 8),
    "convolution": lambda: torch.randn(8, 6, 3, 3),
    "channels_last": lambda: torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last),
    "pointwise channels_last": lambda: torch.randn(8, 6, 1, 1).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(8, 10).t(),
    "large": lambda: torch.randn(512, 520),
    "large transposed": lambda: torch.randn(520, 512).t(),
    "large pointwise channels_last": lambda: torch.randn(512, 520, 1, 1).to(
        memory_format=torch.channels_last
    ),
}


# Torch's unstructured methods take contiguous weights only.
PAIRS = [
    pytest.param(BEFORE[first], make_weight, id=f"{first}-{shape}")
    for first in BEFORE
    for shape, make_weight in SHAPES.items()
    if "unstructured" not in first or make_weight().is_contiguous()
]


def module_with(make_weight, device, dtype=torch.float32):
    module = nn.Module()
    module.weight = nn.Parameter(make_weight().to(device=device, dtype=dtype))
    return module


def prepared(make_weight, first, device, dtype=torch.float32):
    def make():
        module = module_with(make_weight, device, dtype)
        first(module)
        return module

    return make


@pytest.mark.parametrize(("first", "make_weight"), PAIRS)
def test_torch_choice_bit_for_bit(device, first, make_weight):
    def call(library, module):
        for amount, n, dim in ((0.3, 2, 0), (0.0, 1, 1), (0.5, INFINITY, 1)):
            library.ln_structured(module, "weight", amount, n, dim)

    with lnprune.reference_ranking():
        actual, expected = assert_same_outcome(prepared(make_weight, first, device), call)
    for module in (actual, expected):
        stock.remove(module, "weight")
    assert_same_state(actual, expected)


@pytest.mark.parametrize(("first", "make_weight"), PAIRS)
def test_exact_choice(device, first, make_weight):
    """The choice is optimal among the channels that are left; all else is torch's."""
    for amount, n, dim in ((0.3, 2, 0), (0.5, 1, -1)):

        def call(library, module, amount=amount, n=n, dim=dim):
            library.ln_structured(module, "weight", amount, n, dim)

        old = {}

        def make(old=old):
            module = prepared(make_weight, first, device)()
            old["mask"], old["weight"] = module.weight_mask, module.weight
            return module

        actual, _ = assert_same_outcome(make, call, skipped_bits=SKIPPED)
        taking_part = kept_channels(old["mask"], dim)
        keep = kept_channels(actual.weight_mask, dim)
        pruned = round(amount * int(taking_part.sum()))
        assert_optimal(keep, exact_norms(old["weight"], n, dim), pruned, taking_part)
        flags = keep.unflatten(
            0, [-1 if d == dim % old["mask"].dim() else 1 for d in range(old["mask"].dim())]
        )
        new_mask = old["mask"] * flags.to(old["mask"].dtype)
        assert torch.equal(bits(actual.weight_mask), bits(new_mask))
        assert torch.equal(bits(actual.weight), bits(actual.weight_mask * actual.weight_orig))


AMOUNTS = [0, 1, 3, 0.0, 0.5, 1.0, 0.125, True, Fraction(1, 2), Fraction(1, 6)]
AMOUNTS += [np.float64(0.3), np.float32(0.7), np.int64(2)]


@pytest.mark.parametrize("amount", AMOUNTS, ids=lambda amount: f"{type(amount).__name__}-{amount}")
def test_amounts_are_shares_of_what_is_left(device, amount):
    make = prepared(SHAPES["linear"], lambda module: stock.ln_structured(module, "weight", 4, 2, 0), device)

    def call(library, module):
        library.ln_structured(module, "weight", amount, 2, 0)

    with lnprune.reference_ranking():
        assert_same_outcome(make, call)
    actual, _ = assert_same_outcome(make, call, skipped_bits=SKIPPED)
    whole = isinstance(amount, int | np.integer)
    pruned = int(amount) if whole else round(float(amount) * 6)
    assert int(kept_channels(actual.weight_mask, 0).sum()) == 6 - pruned


@pytest.mark.parametrize("amount", [7, np.int64(7), 100])
def test_more_than_what_is_left(device, amount):
    make = prepared(SHAPES["linear"], lambda module: stock.ln_structured(module, "weight", 4, 2, 0), device)

    def call(library, module):
        library.ln_structured(module, "weight", amount, 2, 0)

    assert_same_outcome(make, call, raises=True)
    with lnprune.reference_ranking():
        assert_same_outcome(make, call, raises=True)


def test_a_nan_amount_raises_as_in_torch(device):
    for prune in (stock.ln_structured, lnprune.ln_structured):
        module = stock.identity(nn.Linear(6, 4, device=device), "weight")
        with pytest.raises(ValueError, match=r"^cannot convert float NaN to integer$"):
            prune(module, "weight", float("nan"), 2, 0)


class KeepsEverything(stock.PruningContainer):
    """A container that combines masks its own way."""

    def compute_mask(self, t, default_mask):
        return torch.full_like(default_mask, 0.5)


def test_a_container_of_the_user_decides_on_the_mask(device):
    module = stock.identity(nn.Linear(6, 4, device=device), "weight")
    (key, hook), *_ = module._forward_pre_hooks.items()
    module._forward_pre_hooks[key] = KeepsEverything(hook)
    lnprune.ln_structured(module, "weight", 2, 2, 0)
    assert torch.equal(module.weight_mask, torch.full((4, 6), 0.5, device=device))
    assert torch.equal(module.weight, 0.5 * module.weight_orig)


def test_float_amounts_round_as_python_does(device):
    for alive in range(1, 13):
        for amount in (0.1, 0.15, 0.25, 0.3, 0.35, 0.5, 0.7, 0.75, 0.95):
            module = module_with(lambda: torch.randn(12, 3), device)
            stock.ln_structured(module, "weight", 12 - alive, 2, 0)
            lnprune.ln_structured(module, "weight", amount, 2, 0)
            left = int(kept_channels(module.weight_mask, 0).sum())
            assert left == alive - round(amount * alive), (amount, alive)


def test_scores_are_the_masked_weight(device):
    """A channel with a large original but a small masked weight goes first."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([[9.0, 1.0], [2.0, 2.0], [3.0, 3.0]], device=device))
    mask = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]], device=device)
    stock.custom_from_mask(module, "weight", mask)
    lnprune.ln_structured(module, "weight", 1, 2, 0)
    assert kept_channels(module.weight_mask, 0).tolist() == [False, True, True]
    assert module.weight_mask.tolist() == [[0, 0], [1, 1], [1, 1]]


def test_scores_are_the_weight_of_the_last_forward(device):
    """As in torch, a changed original counts only after a forward, which renews the weight."""
    module = lnprune.identity(nn.Linear(2, 3, device=device), "weight")
    with torch.no_grad():
        module.weight_orig.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    module(torch.zeros(1, 2, device=device))
    with torch.no_grad():
        module.weight_orig.copy_(module.weight_orig.flip(0))
    lnprune.ln_structured(module, "weight", 1, 2, 0)
    assert kept_channels(module.weight_mask, 0).tolist() == [False, True, True]
    assert module.weight.tolist() == [[0, 0], [2, 2], [1, 1]]


def test_container_contents_and_order(device):
    module = nn.Linear(8, 8, device=device)
    stock.l1_unstructured(module, "weight", 3)
    (first,) = module._forward_pre_hooks.values()
    lnprune.ln_structured(module, "weight", 1, 2, 0)
    (container,) = module._forward_pre_hooks.values()
    lnprune.ln_structured(module, "weight", 0.5, INFINITY, 1)
    (same,) = module._forward_pre_hooks.values()
    assert same is container
    assert type(container) is stock.PruningContainer
    assert container[0] is first
    assert [type(method) for method in container] == [
        stock.L1Unstructured,
        stock.LnStructured,
        stock.LnStructured,
    ]
    assert container[1].__dict__ == {"amount": 1, "n": 2, "dim": 0, "_tensor_name": "weight"}
    assert container[2].__dict__ == {"amount": 0.5, "n": INFINITY, "dim": 1, "_tensor_name": "weight"}
    lnprune.remove(module, "weight")
    assert not lnprune.is_pruned(module)
    assert list(module.state_dict()) == ["bias", "weight"]


def test_repeated_calls_leave_the_old_mask_alone(device):
    for make_weight in (SHAPES["linear"], SHAPES["large"]):
        module = lnprune.ln_structured(module_with(make_weight, device), "weight", 2, 2, 0)
        old_mask, old_weight = module.weight_mask, module.weight
        before = bits(old_mask), bits(old_weight)
        lnprune.ln_structured(module, "weight", 2, 2, 0)
        assert module.weight_mask is not old_mask
        assert torch.equal(bits(old_mask), before[0])
        assert torch.equal(bits(old_weight), before[1])
        assert int((~kept_channels(module.weight_mask, 0)).sum()) == 4


def test_torch_goes_on_where_lnprune_stopped(device):
    def mixed(order):
        def call(library, module):
            chosen = {"torch": stock, "ours": library}
            for who in order:
                chosen[who].ln_structured(module, "weight", 0.3, 2, 0)
            stock.l1_unstructured(module, "weight", 0.1)
            stock.random_structured(module, "weight", 1, 1)

        return call

    for order in (("torch", "ours"), ("ours", "torch"), ("ours", "torch", "ours", "torch")):
        with lnprune.reference_ranking():
            assert_same_outcome(lambda: module_with(SHAPES["linear"], device), mixed(order))


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make_weight", [SHAPES["linear"], SHAPES["large"]], ids=["small", "large"])
def test_masks_and_scores_of_other_dtypes(device, make_weight, mask_dtype):
    """The mask takes the dtype of what was scored last; the weight keeps its own."""

    def call(library, module):
        shape = module.weight.shape
        scores = torch.randn(shape, device=device)
        library.ln_structured(module, "weight", 0.2, 2, 0, importance_scores=scores.to(mask_dtype))
        library.ln_structured(module, "weight", 0.2, 2, 0)
        library.ln_structured(module, "weight", 0.2, 1, 1, importance_scores=scores.to(mask_dtype))
        library.ln_structured(module, "weight", 0.2, 1, 1, importance_scores=scores.t().contiguous().t())
        library.ln_structured(module, "weight", 0.2, 1, 1, importance_scores=scores.to(mask_dtype))

    with lnprune.reference_ranking():
        assert_same_outcome(lambda: module_with(make_weight, device), call)
    actual, _ = assert_same_outcome(lambda: module_with(make_weight, device), call, skipped_bits=SKIPPED)
    assert actual.weight_mask.dtype is mask_dtype
    assert actual.weight.dtype is torch.float32
    product = actual.weight_mask.to(torch.float32) * actual.weight_orig
    assert torch.equal(bits(actual.weight), bits(product))


@pytest.mark.parametrize("make_weight", [SHAPES["linear"], SHAPES["large"]], ids=["small", "large"])
def test_masks_with_nan_and_infinity(device, make_weight):
    """Not finite mask values stay in kept channels and turn to NaN in pruned ones, as in torch."""

    def first(module):
        mask = torch.ones_like(module.weight)
        mask[0, 0], mask[1, 1], mask[2, 2] = float("nan"), INFINITY, -INFINITY
        stock.custom_from_mask(module, "weight", mask.detach())

    def call(library, module):
        scores = torch.arange(module.weight.shape[0], 0.0, -1, device=device)[:, None].expand_as(
            module.weight
        )
        library.ln_structured(module, "weight", 0.9, 2, 0, importance_scores=scores)
        library.ln_structured(module, "weight", 0.9, 2, 0, importance_scores=-scores.flip(0))

    for ranking in (True, False):
        if ranking:
            with lnprune.reference_ranking():
                assert_same_outcome(prepared(make_weight, first, device), call)
        else:
            assert_same_outcome(prepared(make_weight, first, device), call)


def test_cancelling_masks(device):
    """A channel whose mask sums to zero without being zero takes no part in torch's ranking."""

    def first(module):
        mask = torch.ones_like(module.weight).detach()
        mask[3, ::2] = -1
        stock.custom_from_mask(module, "weight", mask)

    def call(library, module):
        library.ln_structured(module, "weight", 0.5, 2, 0)

    with lnprune.reference_ranking():
        assert_same_outcome(prepared(SHAPES["linear"], first, device), call)


def test_gradients_after_repeated_pruning(device):
    for make_weight in (SHAPES["linear"], SHAPES["large"], SHAPES["large transposed"]):
        module = module_with(make_weight, device)
        for dim in (0, 1, 0):
            lnprune.ln_structured(module, "weight", 0.25, 2, dim)
        (module.weight * 2).sum().backward()
        assert torch.equal(module.weight_orig.grad, 2 * module.weight_mask)


def test_remove_then_prune_again(device):
    for make_weight in (SHAPES["linear"], SHAPES["large"]):

        def call(library, module):
            for _ in range(2):
                library.ln_structured(module, "weight", 0.25, 2, 0)
                library.ln_structured(module, "weight", 0.25, 2, 1)
                library.remove(module, "weight")
            library.ln_structured(module, "weight", 0.25, 2, 1)

        with lnprune.reference_ranking():
            assert_same_outcome(lambda make_weight=make_weight: module_with(make_weight, device), call)


def test_bad_dims_and_orders_raise_as_in_torch(device):
    make = prepared(SHAPES["linear"], BEFORE["ln_structured"], device)
    for n, dim in ((2, 2), (2, -3), (2, 1.5), (2, None), ("two", 0), (2j, 1)):

        def call(library, module, n=n, dim=dim):
            library.ln_structured(module, "weight", 1, n, dim)

        assert_same_outcome(make, call, raises=True)
        with lnprune.reference_ranking():
            assert_same_outcome(make, call, raises=True)


steps = st.lists(
    st.tuples(
        st.sampled_from([*BEFORE, "ours", "ours", "ours", "ours"]),
        st.sampled_from([0, 1, 0.2, 0.5, 0.75, Fraction(1, 3), np.float32(0.4)]),
        st.sampled_from([0, 1, 2, 3, 0.5, -1, INFINITY, -INFINITY, *ORDER_OF_NONE]),
        st.integers(-2, 1),
        st.booleans(),
    ),
    min_size=2,
    max_size=4,
)


dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def random_module(device, dtype, ties):
    module = module_with(SHAPES["linear"], device, dtype)
    if ties:
        module.weight.data.sign_()
    return module


def take_step(library, module, step):
    method, amount, n, dim, with_scores = step
    if method != "ours":
        BEFORE[method](module)
        return
    scores = torch.randn_like(module.weight.detach()) if with_scores else None
    if type(amount) is int and hasattr(module, "weight_mask"):
        amount = min(amount, int(kept_channels(module.weight_mask, dim).sum()))
    library.ln_structured(module, "weight", amount, n, dim, importance_scores=scores)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps, dtype=dtypes, ties=st.booleans())
def test_any_sequence_in_torch_ranking(device, steps, dtype, ties):
    def call(library, module):
        for step in steps:
            take_step(library, module, step)

    with lnprune.reference_ranking():
        assert_same_outcome(lambda: random_module(device, dtype, ties), call)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps, dtype=dtypes, ties=st.booleans())
def test_any_sequence_in_exact_ranking(device, steps, dtype, ties):
    """Where the choices differ from torch's, all that follows does: so what must hold of any choice."""
    module = random_module(device, dtype, ties)
    for step in steps:
        before = getattr(module, "weight_mask", torch.ones_like(module.weight.detach())).clone()
        alive = kept_channels(before, step[3])
        take_step(lnprune, module, step)
        mask = module.weight_mask
        assert bool(((mask == 0) | (before != 0)).all())
        assert torch.equal(module.weight, mask.to(dtype) * module.weight_orig)
        if step[0] == "ours":
            kept = kept_channels(mask, step[3])
            amount = step[1]
            count = int(alive.sum())
            pruned = min(amount, count) if type(amount) is int else round(amount * count)
            assert int(kept.sum()) == count - pruned
            assert torch.equal(mask, before.to(mask.dtype) * mask.ne(0).to(mask.dtype))
    assert stock.is_pruned(module)
    stock.remove(module, "weight")
    assert "weight" in dict(module.named_parameters())
