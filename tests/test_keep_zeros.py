"""keep_zeros: zeros that were written in place stay zeros, whatever the optimizer does."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import lnprune

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),
    "loops": lambda parameters: torch.optim.Adam(parameters, lr=0.05, foreach=False),
}


def model_and_data():
    """A small classifier, with biases."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    return model, torch.randn(64, 8), torch.randint(3, (64,))


def train(model, optimizer, inputs, targets, steps):
    """The losses of so many steps."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def zeros_of(model):
    """How many channels of each weight are zeros."""
    return [int((layer.weight == 0).all(dim=1).sum()) for layer in model if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_as_with_masks(kind):
    model, inputs, targets = model_and_data()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, inputs, targets, 3)  # momentum of before
    masked, loose = copy.deepcopy(model), copy.deepcopy(model)
    others = []
    for each in (masked, loose):
        others.append(OPTIMIZERS[kind](each.parameters()))
        others[-1].load_state_dict(copy.deepcopy(optimizer.state_dict()))

    plan = lnprune.rank(model, 2, "out").select(0.5).apply(permanent=True, bias=True)
    plan.keep_zeros(optimizer)
    lnprune.rank(masked, 2, "out").select(0.5).apply(bias=True)
    lnprune.rank(loose, 2, "out").select(0.5).apply(permanent=True, bias=True)

    losses = train(model, optimizer, inputs, targets, 4)
    assert losses == train(masked, others[0], inputs, targets, 4)
    train(loose, others[1], inputs, targets, 4)
    assert zeros_of(model) == [8, 6, 2]
    assert sum(zeros_of(loose)) < 16, "without it, momentum moves them"
    for layer, other in zip(model, lnprune.remove_all(masked), strict=True):
        for parameter, expected in zip(layer.parameters(), other.parameters(), strict=True):
            assert torch.equal(parameter, expected)


def test_it_ends_with_its_handle_and_with_undo():
    model, inputs, targets = model_and_data()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, inputs, targets, 2)
    plan = lnprune.rank(model, 2, "out").select(0.5).apply(permanent=True, keep_backup=True)
    with plan.keep_zeros(optimizer):
        train(model, optimizer, inputs, targets, 2)
        assert zeros_of(model) == [8, 6, 2]
    train(model, optimizer, inputs, targets, 1)
    assert sum(zeros_of(model)) < 16

    model, inputs, targets = model_and_data()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    plan = lnprune.rank(model, 2, "out").select(0.5).apply(permanent=True, keep_backup=True)
    plan.keep_zeros(optimizer)
    train(model, optimizer, inputs, targets, 2)
    assert zeros_of(model) == [8, 6, 2]
    plan.undo()
    train(model, optimizer, inputs, targets, 1)
    assert zeros_of(model) == [0, 0, 0]


def test_parameters_are_looked_up_after_each_step():
    model, inputs, targets = model_and_data()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    train(model, optimizer, inputs, targets, 2)
    lnprune.rank(model, 2, "out").select(0.5).apply(permanent=True).keep_zeros(optimizer)
    model.double()
    inputs = inputs.double()
    optimizer.state.clear()
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)
    train(model, optimizer, inputs, targets, 1)
    assert zeros_of(model) == [8, 6, 2]


def test_shared_weights_and_both_dims():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), nn.Linear(6, 6), shared)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    plan = lnprune.rank(model, 2, "out").select(0.5)
    first = plan.apply(permanent=True).keep_zeros(optimizer)
    lnprune.rank(model, 2, "in").select(0.5).apply(permanent=True).keep_zeros(optimizer)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    for weight in (model[0].weight, model[2].weight):
        assert int((weight == 0).all(dim=0).sum()) == int((weight == 0).all(dim=1).sum()) == 3
    first.remove()
    optimizer.step()
    assert int((model[0].weight == 0).all(dim=0).sum()) == 3


def test_coupled_channels_stay_gone():
    model, inputs, targets = model_and_data()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, inputs, targets, 2)
    plan = lnprune.couple(model, inputs[:2]).rank(2).select(0.5).apply(permanent=True)
    plan.keep_zeros(optimizer)
    train(model, optimizer, inputs, targets, 3)
    expected = model(inputs)
    torch.testing.assert_close(plan.compact()(inputs), expected)


def test_dtypes_that_native_code_does_not_take():
    layer = nn.Linear(6, 4, dtype=torch.complex64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(3, 6, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()
    lnprune.rank([(layer, "weight")], 2, 0).select(2).apply(permanent=True).keep_zeros(optimizer)
    version = layer.weight._version
    optimizer.step()
    assert int((layer.weight == 0).all(dim=1).sum()) == 2
    assert layer.weight._version >= version + 2, "autograd sees both writes"


def test_nothing_is_held_of_a_model_that_goes():
    model, inputs, targets = model_and_data()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    plan = lnprune.rank(model, 2, "out").select(0.5).apply(permanent=True)
    plan.keep_zeros(optimizer)
    train(model, optimizer, inputs, targets, 1)
    copied = copy.deepcopy(model)
    assert not any("lnprune" in str(type(value)) for value in vars(copied).values())
    gone = weakref.ref(model)
    del model, optimizer, plan
    gc.collect()
    assert gone() is None


def test_what_it_is_not_for():
    model, inputs, targets = model_and_data()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    plan = lnprune.rank(model, 2, "out").select(0.5)
    with pytest.raises(RuntimeError, match="is not applied"):
        plan.keep_zeros(optimizer)
    plan.apply()
    with pytest.raises(RuntimeError, match="zeros without masks"):
        plan.keep_zeros(optimizer)
    plan.undo().apply(permanent=True)
    with pytest.raises(TypeError, match=r"expected a torch\.optim.Optimizer, got a module"):
        plan.keep_zeros(model)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1)
    with pytest.raises(ValueError, match="steps the pruned parameters"):
        plan.keep_zeros(other)
    handle = plan.keep_zeros(optimizer)
    lnprune.ln_structured(model[2], "weight", 0.5, 2, 0)
    with pytest.raises(RuntimeError, match=r"2\.weight: expected a parameter without a mask"):
        train(model, optimizer, inputs, targets, 1)
    handle.remove()
    train(model, optimizer, inputs, targets, 1)
