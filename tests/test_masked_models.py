"""load_masked and renew_masked: masked models from state dicts, and copies of them."""

import copy
import warnings

import pytest
import torch
from module_state import DEVICES, ModelSnapshot
from torch import nn
from torch.nn.utils import prune as stock
from torch.optim.swa_utils import AveragedModel

import lnprune

pytestmark = pytest.mark.parametrize("device", DEVICES)


class Network(nn.Module):
    """Weights of several types, one of them shared."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.cell = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        return self.head(self.cell(x)[0])


def masked(device):
    """Masks of several methods, on one parameter two, on a bias and on a shared weight too."""
    model = Network().to(device)
    lnprune.local_structured(model, 0.4, 2, 0)
    stock.l1_unstructured(model.conv, "weight", 0.3)
    stock.random_unstructured(model.conv, "bias", 2)
    lnprune.ln_structured(model.cell, "weight_hh_l0", 3, 1, 1)
    return model


def tokens(device):
    return torch.randint(9, (3, 5), device=device)


def step(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


def test_a_masked_state_dict_loads_into_a_fresh_model(device):
    model, fresh = masked(device), Network().to(device)
    step(model, tokens(device))
    parameters = {id(parameter) for parameter in fresh.parameters()}
    state = model.state_dict()
    with pytest.raises(RuntimeError):
        copy.deepcopy(fresh).load_state_dict(state)
    result = lnprune.load_masked(fresh, state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    loaded = fresh.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert {id(parameter) for parameter in fresh.parameters()} == parameters
    for module in (fresh.embed, fresh.conv, fresh.cell, fresh.head):
        for hook in module._forward_pre_hooks.values():
            assert type(hook) is stock.CustomFromMask
            assert hook.mask is getattr(module, f"{hook._tensor_name}_mask")
    assert fresh.head.weight_orig is fresh.embed.weight_orig
    assert fresh.head.weight_mask is fresh.embed.weight_mask
    # The attributes are those of now, before any forward, and with gradients.
    stock_weight = model.conv.weight_mask * model.conv.weight_orig
    assert torch.equal(fresh.conv.weight, stock_weight)
    assert fresh.conv.weight.requires_grad
    model.eval(), fresh.eval()
    inputs = tokens(device)
    assert torch.equal(fresh(inputs), model(inputs))
    # Training, further pruning and removing go on as they would in the other.
    for each in (model, fresh):
        each.train()
        step(each, inputs)
        lnprune.global_structured(each, 3, 2, 0)
        lnprune.remove_all(each)
    torch.testing.assert_close(dict(fresh.state_dict()), dict(model.state_dict()))


def test_a_state_dict_of_a_plan_with_biases(device):
    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)).to(device)

    model, fresh = make(), make()
    lnprune.rank(model, 2, "out").select(0.5).apply(bias=True)
    lnprune.load_masked(fresh, model.state_dict())
    inputs = torch.randn(3, 4, device=device)
    assert torch.equal(fresh(inputs), model(inputs))


def test_a_model_that_has_some_of_the_masks(device):
    model, other = masked(device), Network().to(device)
    stock.identity(other.conv, "weight")
    lnprune.load_masked(other, model.state_dict())
    assert torch.equal(other.conv.weight_mask, model.conv.weight_mask)
    assert type(next(iter(other.conv._forward_pre_hooks.values()))) is stock.Identity
    lnprune.load_masked(other, model.state_dict())  # and one that has all
    plain = Network().to(device)
    lnprune.load_masked(plain, Network().state_dict())  # and none
    assert not lnprune.is_pruned(plain)


def test_shared_weights_with_masks_of_their_own(device):
    def make():
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(device)
        model[1].weight = model[0].weight
        return model

    model, fresh = make(), make()
    for module, amount in zip(model, (1, 2), strict=True):
        stock.ln_structured(module, "weight", amount, 2, 0)
    lnprune.load_masked(fresh, model.state_dict())
    assert fresh[0].weight_orig is fresh[1].weight_orig
    for actual, expected in zip(fresh, model, strict=True):
        assert torch.equal(actual.weight_mask, expected.weight_mask)


def test_a_module_at_two_paths(device):
    def make():
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.ReLU(), layer).to(device)

    model, fresh = make(), make()
    lnprune.local_structured(model, 1, 2, "out")
    lnprune.load_masked(fresh, model.state_dict())
    assert len(fresh[0]._forward_pre_hooks) == 1
    inputs = torch.randn(2, 4, device=device)
    assert torch.equal(fresh(inputs), model(inputs))


BAD_STATES = {
    "a key is missing": lambda state: state.pop("head.bias"),
    "a mask is missing": lambda state: state.pop("conv.weight_mask"),
    "an original is missing": lambda state: state.pop("conv.weight_orig"),
    "a key too many": lambda state: state.update(other=torch.ones(1)),
    "masks of no parameter": lambda state: state.update(x_orig=torch.ones(1), x_mask=torch.ones(1)),
    "masks of a buffer": lambda state: state.update(
        {"norm.running_mean_orig": torch.ones(8), "norm.running_mean_mask": torch.ones(8)}
    ),
    "another shape": lambda state: state.update({"head.bias": torch.ones(4)}),
    "a mask of another shape": lambda state: state.update({"cell.weight_hh_l0_mask": torch.ones(2, 2)}),
    "a mask that is no tensor": lambda state: state.update({"cell.weight_hh_l0_mask": None}),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_dict_that_does_not_fit_changes_nothing(device, case):
    """The last keys too, which torch reports when it has loaded all others."""
    state = masked(device).state_dict()
    BAD_STATES[case](state)
    model = Network().to(device)
    stock.identity(model.norm, "weight")
    snapshot = ModelSnapshot(model)
    with pytest.raises(RuntimeError):
        lnprune.load_masked(model, state)
    snapshot.assert_unchanged()


def test_not_strict(device):
    state = masked(device).state_dict()
    del state["head.bias"]
    state["other"] = torch.ones(1)
    model = Network().to(device)
    result = lnprune.load_masked(model, state, strict=False)
    assert "head.bias" in result.missing_keys
    assert result.unexpected_keys == ["other"]
    assert lnprune.is_pruned(model)


def test_what_is_no_state_dict(device):
    model = Network().to(device)
    snapshot = ModelSnapshot(model)
    with pytest.raises(TypeError, match=r"^state_dict: expected a mapping .*, got a module of"):
        lnprune.load_masked(model, masked(device))
    state = masked(device).state_dict()
    with pytest.raises(TypeError, match=r"^strict: expected True or False, got 'yes'$"):
        lnprune.load_masked(model, state, strict="yes")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch\.inference_mode"):
        lnprune.load_masked(model, state)
    snapshot.assert_unchanged()


# Copies.


def test_a_masked_model_cannot_be_copied_until_it_is_renewed(device):
    model = masked(device)
    inputs = tokens(device)
    model(inputs)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    with torch.no_grad():
        model(inputs)  # as the docs say: a forward without gradients
    copy.deepcopy(model)
    model(inputs)
    assert lnprune.renew_masked(model) is model
    copied = copy.deepcopy(model)
    model.eval(), copied.eval()
    assert torch.equal(copied(inputs), model(inputs))
    before = copied.conv.weight_orig.detach().clone()
    for each in (model, copied):
        each.train()
        step(each, inputs)
    assert not torch.equal(copied.conv.weight_orig, before)
    assert torch.equal(copied.conv.weight_orig, model.conv.weight_orig)
    assert copied.conv.weight_orig is not model.conv.weight_orig


def test_renewed_weights_are_those_of_now(device):
    model = masked(device)
    values = {key: torch.randn_like(value) for key, value in model.state_dict().items() if "_orig" in key}
    model.load_state_dict({**model.state_dict(), **values})
    lnprune.renew_masked(model)
    for module, name in ((model.embed, "weight"), (model.conv, "bias"), (model.cell, "weight_hh_l0")):
        original, mask = (getattr(module, f"{name}_{kind}") for kind in ("orig", "mask"))
        assert torch.equal(getattr(module, name), original * mask)
        assert getattr(module, name).is_leaf
    assert any(weight is model.cell.weight_hh_l0 for weight in model.cell._flat_weights)
    model(tokens(device)).sum().backward()
    assert model.conv.weight_orig.grad is not None


def test_renewing_a_model_without_masks(device):
    model = Network().to(device)
    snapshot = ModelSnapshot(model)
    assert lnprune.renew_masked(model) is model
    snapshot.assert_unchanged()


def test_a_renewal_that_fails_renews_nothing(device):
    model = masked(device)
    with torch.no_grad():
        model.conv.weight_orig += 1  # that is renewed before the one that fails
    model.head.weight_mask = torch.ones(2, 2, device=device)
    snapshot = ModelSnapshot(model)
    with pytest.raises(RuntimeError):
        lnprune.renew_masked(model)
    snapshot.assert_unchanged()


def test_averages_of_a_masked_model(device):
    model = masked(device)
    averaged = AveragedModel(lnprune.renew_masked(model))
    step(model, tokens(device))
    averaged.update_parameters(model)
    inputs = tokens(device)
    lnprune.renew_masked(averaged)
    conv = averaged.module.conv
    assert torch.equal(conv.weight_mask, model.conv.weight_mask)
    assert torch.equal(conv.weight, conv.weight_orig * conv.weight_mask)
    assert averaged(inputs).shape == (3, 5, 9)


def test_a_masked_model_is_quantized_as_a_copy_without_masks(device):
    """Torch's quantize_dynamic copies hooks, which find no mask in the new layers."""
    if device != "cpu":
        pytest.skip("torch quantizes dynamically on the CPU alone")
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    lnprune.local_structured(model, 0.5, 2, "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = lnprune.remove_all(copy.deepcopy(lnprune.renew_masked(model)))
        quantized = torch.ao.quantization.quantize_dynamic(copied, {nn.Linear})
        assert quantized(torch.randn(3, 8)).shape == (3, 4)
    assert lnprune.is_pruned(model)
