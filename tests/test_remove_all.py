"""remove_all against a loop of torch's remove, on masks of any method."""

import math

import cases
import pytest
import torch
from module_state import DEVICES, ModelSnapshot, assert_same_state, bits, twins
from torch import nn
from torch.nn.utils import prune as stock

import lnprune

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore"),
]


def bare(weight, requires_grad=True):
    """A module with this weight between two others."""
    module = nn.Module()
    module.register_parameter("before", nn.Parameter(torch.randn(2)))
    module.weight = nn.Parameter(weight, requires_grad=requires_grad)
    module.register_parameter("after", nn.Parameter(torch.randn(2)))
    return module


def network(device="cpu"):
    return nn.Sequential(
        nn.Linear(8, 6, device=device),
        nn.Sequential(nn.Conv2d(4, 6, 3, device=device), nn.BatchNorm2d(6, device=device)),
        nn.Embedding(7, 8, device=device),
        nn.Linear(300, 320, device=device),
        nn.LSTM(6, 4, 2, device=device),
    )


def prunable(model):
    """Every parameter of two dims or more."""
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in list(module._parameters.items())
        if parameter is not None and parameter.dim() > 1
    ]


def remove_one_by_one(model):
    """What remove_all has to do; in the order in which it meets the hooks."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, stock.BasePruningMethod):
                stock.remove(module, hook._tensor_name)


class Threshold(stock.BasePruningMethod):
    """A method of the user's."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, threshold):
        self.threshold = threshold

    def compute_mask(self, t, default_mask):
        return default_mask * (t.abs() > self.threshold).to(default_mask.dtype)


def random_mask(module, name, dtype=None):
    """Any numbers, -0.0 among them."""
    mask = torch.randn_like(getattr(module, name), dtype=dtype).detach()
    mask.flatten()[:2] = -0.0
    stock.custom_from_mask(module, name, mask)


METHODS = {
    "identity": stock.identity,
    "l1_unstructured": lambda module, name: stock.l1_unstructured(module, name, 0.4),
    "random_unstructured": lambda module, name: stock.random_unstructured(module, name, 0.1),
    "random_structured": lambda module, name: stock.random_structured(module, name, 0.3, 1),
    "ln_structured": lambda module, name: stock.ln_structured(module, name, 0.3, 2, 0),
    "lnprune": lambda module, name: lnprune.ln_structured(module, name, 0.3, 2, 0),
    "a method of the user's": lambda module, name: Threshold.apply(module, name, 0.1),
    "a mask of any numbers": random_mask,
}


def assert_removed(make, **options):
    """The loop's state, in the memory of each parameter; returns the two models."""
    actual, expected = twins(make)
    originals = {
        (id(module), name.removesuffix("_orig")): (
            parameter,
            parameter.data_ptr(),
            parameter._version,
            bits(parameter),
        )
        for module in actual.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    masked = {
        (id(module), hook._tensor_name)
        for module in actual.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, stock.BasePruningMethod)
    }
    assert lnprune.remove_all(actual) is actual
    remove_one_by_one(expected)
    assert_same_state(actual, expected, **options)
    assert not lnprune.is_pruned(actual)
    for module in actual.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            original, pointer, version, old_bits = originals[id(module), name]
            assert parameter is original
            if (id(module), name) not in masked:
                assert (parameter.data_ptr(), parameter._version) == (pointer, version)
                assert old_bits is None or torch.equal(bits(parameter), old_bits)
    return actual, expected


@pytest.mark.parametrize("second", [None, *METHODS])
@pytest.mark.parametrize("first", list(METHODS))
def test_masks_of_every_method(device, first, second):
    """Alone, and in containers of two."""

    def make():
        model = network(device)
        for module, name in prunable(model):
            METHODS[first](module, name)
            if second is not None:
                METHODS[second](module, name)
        stock.l1_unstructured(model[0], "bias", 2)
        return model

    assert_removed(make)


def test_in_place(device):
    model = network(device)
    lnprune.local_structured(model, 0.5, 2, "out")
    originals = [
        (p, p.data_ptr(), p._version) for key, p in model.named_parameters() if key.endswith("_orig")
    ]
    assert len(originals) == 4
    lnprune.remove_all(model)
    now = {id(parameter) for parameter in model.parameters()}
    for parameter, pointer, version in originals:
        assert id(parameter) in now
        assert parameter.data_ptr() == pointer
        assert parameter._version > version


def test_the_order_of_the_parameters(device):
    """Removed in the order of their hooks, each goes to the end of its module, as by torch."""

    def make():
        model = nn.Sequential(nn.Linear(6, 4, device=device), nn.Bilinear(3, 4, 5, device=device))
        for name in ("bias", "weight"):
            stock.identity(model[0], name)
        stock.identity(model[1], "weight")
        return model

    actual, _ = assert_removed(make)
    assert list(actual.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_some_masked_and_other_hooks(device):
    """Parameters without a mask and hooks of others stay as they are."""
    called = []

    def make():
        model = network(device)
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_: called.append(1))
        stock.l1_unstructured(model[1][0], "weight", 0.5)
        model[1][0].register_forward_pre_hook(lambda *_: called.append(2))
        stock.l1_unstructured(model[4], "weight_hh_l1", 0.5)
        return model

    actual, _ = assert_removed(make)
    actual[1](torch.randn(2, 4, 5, 5, device=device))
    assert called == [1, 1, 2, 1]


@pytest.mark.parametrize("ready", [False, True])
def test_a_model_without_masks(device, ready):
    model = network(device)
    if ready:
        lnprune.local_structured(model, 0.5, 2, "out", permanent=True)
    snapshot = ModelSnapshot(model)
    for _ in range(2):
        assert lnprune.remove_all(model) is model
        snapshot.assert_unchanged()


def test_one_module(device):
    def make():
        return lnprune.ln_structured(nn.Linear(6, 4, device=device), "weight", 2, 2, 0)

    assert_removed(make)


def test_trained_weights_count(device):
    """The product of mask and original now, not the weight of the last forward."""

    def make():
        model = network(device)
        lnprune.local_structured(model, 0.5, 2, "out")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        return model

    actual, _ = assert_removed(make)
    assert set(actual[0].weight.detach().abs().sum(dim=1).eq(0).tolist()) == {True, False}


DTYPES = [*cases.NATIVE_DTYPES, torch.complex64, torch.complex128]


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, dtype, mask_dtype):
    """A mask takes its weight's dtype; values are torch's to the last bit, but for NaN."""

    def make():
        weights = [
            cases.special_values((8, 6), dtype, device) if dtype in cases.NATIVE_DTYPES else None
        ] * 3
        weights = [torch.randn(8, 6, dtype=dtype, device=device) if w is None else w for w in weights]
        model = nn.ModuleList([bare(weight.clone(), requires_grad=False) for weight in weights])
        for module in model:
            stock.identity(module, "weight")
            mask = torch.randn(8, 6) > 0
            module.weight_mask = mask.to(device=device, dtype=mask_dtype or dtype)
        return model

    actual, expected = assert_removed(make, skipped_bits=("weight",))
    for left, right in zip(actual, expected, strict=True):
        assert left.weight.dtype is dtype
        if dtype.is_complex:
            assert torch.equal(left.weight, right.weight)
        else:
            cases.assert_same_bits(left.weight.detach(), right.weight.detach())


def test_mixed_dtypes(device):
    def make():
        weights = [torch.randn(8, 6).to(device=device, dtype=dtype) for dtype in DTYPES for _ in range(2)]
        model = nn.ModuleList([bare(weight, requires_grad=False) for weight in weights])
        for module in model:
            lnprune.ln_structured(module, "weight", 0.4, 2, 0)
        return model

    assert_removed(make)


@pytest.mark.parametrize("layout", list(cases.LAYOUTS))
def test_layouts(device, layout):
    """Weights keep memory and strides, but where elements share memory: those get new, as by torch."""

    def make():
        values = [cases.random_values(shape, torch.float32, device) for shape in shapes]
        model = nn.ModuleList([bare(cases.LAYOUTS[layout](each)) for each in values])
        for module in model:
            lnprune.ln_structured(module, "weight", 0.4, 2, 1)
        return model

    shapes = [(8, 6), (6, 8, 3, 3), (1, 6, 1, 4)]
    actual, expected = twins(make)
    pointers = [module.weight_orig.data_ptr() for module in actual]
    lnprune.remove_all(actual)
    remove_one_by_one(expected)
    for left, right, pointer in zip(actual, expected, pointers, strict=True):
        assert torch.equal(bits(left.weight), bits(right.weight))
        assert (left.weight.data_ptr() == pointer) is (layout != "expanded")
        if layout == "expanded":
            assert left.weight.stride() == right.weight.stride()


def test_strides_after_repeated_pruning_stay_the_weights(device):
    """In place: torch's remove leaves the contiguous strides of the second mask instead."""
    weight = torch.randn(6, 8, 3, 3, device=device).to(memory_format=torch.channels_last)
    model = nn.ModuleList([bare(weight)])
    for dim in (0, 1):
        lnprune.ln_structured(model[0], "weight", 0.25, 2, dim)
    expected = (model[0].weight_mask * model[0].weight_orig).detach()
    lnprune.remove_all(model)
    assert torch.equal(model[0].weight, expected)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def tied(device):
    model = nn.Sequential(*(nn.Linear(8, 6, device=device) for _ in range(3)))
    model[2].weight = model[0].weight
    return model


def test_a_shared_weight_with_one_mask(device):
    """Multiplied once: a mask of halves would show a second time."""

    def make():
        model = tied(device)
        stock.identity(model[0], "weight")
        stock.identity(model[2], "weight")
        with torch.no_grad():
            mask = model[0].weight_mask.mul_(0.5)
        model[2].weight_mask = mask
        return model

    model, twin = twins(make)
    lnprune.remove_all(model)
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, twin[0].weight_orig * 0.5)
    assert list(model.state_dict()) == ["0.bias", "0.weight", "1.weight", "1.bias", "2.bias", "2.weight"]


def test_a_shared_weight_of_local_structured(device):
    model, twin = twins(lambda: tied(device))
    lnprune.local_structured(model, 0.5, 2, "out")
    masked = model[2].weight.detach().clone()
    lnprune.remove_all(model)
    lnprune.local_structured(twin, 0.5, 2, "out", permanent=True)
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, masked)
    assert torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_shared_weight_with_two_masks(device, scale):
    """Both are multiplied into it, one after the other, as by a loop."""

    def make():
        model = tied(device)
        for index, dim in ((0, 0), (2, 1)):
            lnprune.ln_structured(model[index], "weight", 0.5, 2, dim)
            model[index].weight_mask *= scale
        return model

    actual, expected = twins(make)
    assert_removed(make)
    lnprune.remove_all(actual)
    remove_one_by_one(expected)
    assert actual[0].weight is actual[2].weight
    assert torch.equal(actual[0].weight, expected[2].weight)
    assert int((actual[0].weight == 0).sum()) == 3 * 8 + 3 * 4


def test_meta(device):
    def make():
        model = nn.Sequential(nn.Linear(8, 6, device="meta"), nn.Linear(6, 4, device=device))
        for module in model:
            stock.identity(module, "weight")
        return model

    actual, _ = assert_removed(make)
    assert actual[0].weight.is_meta


def test_modes_of_autograd(device):
    """Under no_grad and inside inference mode as outside; parameters go on requiring gradients."""
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            actual, _ = assert_removed(
                lambda: nn.Sequential(METHODS["ln_structured"](nn.Linear(8, 6, device=device), "weight"))
            )
        assert actual[0].weight.requires_grad
        assert actual[0].weight.is_leaf
    with torch.inference_mode():
        model = nn.Sequential(lnprune.ln_structured(nn.Linear(8, 6, device=device), "weight", 3, 2, 0))
        lnprune.remove_all(model)
        assert int((model[0].weight == 0).all(dim=1).sum()) == 3


def test_training_goes_on(device):
    """The optimizer holds the very parameters that are trained afterwards."""
    model = network(device)[0:1]
    lnprune.local_structured(model, 0.5, 2, "out")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(3, 8, device=device)
    lnprune.remove_all(model)
    before = model[0].weight.detach().clone()
    model(inputs).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_modules_that_two_paths_lead_to(device):
    shared = lnprune.ln_structured(nn.Linear(6, 6, device=device), "weight", 3, 2, 0)
    shared.weight_mask *= 0.5
    expected = (shared.weight_mask * shared.weight_orig).detach()
    lnprune.remove_all(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert torch.equal(shared.weight, expected)
    assert math.prod(shared.weight.shape) > int((shared.weight == 0).sum()) > 0
