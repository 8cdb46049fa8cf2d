"""LnStructured: torch's class with native methods, alone, in containers and subclassed."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from module_state import (
    DEVICES,
    assert_optimal,
    assert_same_outcome,
    assert_same_tensor,
    bits,
    exact_norms,
    kept_channels,
)
from torch import nn
from torch.nn.utils import prune as stock

import lnprune

pytestmark = pytest.mark.parametrize("device", DEVICES)

INFINITY = float("inf")
SHAPES = [(6, 8), (5, 4, 3, 3), (1, 7), (512, 520)]


def outcome(call):
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def test_is_torchs_class(device):
    method = lnprune.LnStructured(0.5, 2)
    assert isinstance(method, stock.LnStructured)
    assert method.PRUNING_TYPE == "structured"
    assert method.__dict__ == stock.LnStructured(0.5, 2).__dict__ == {"amount": 0.5, "n": 2, "dim": -1}
    for name in ("__init__", "apply"):
        ours = inspect.signature(getattr(lnprune.LnStructured, name)).parameters
        theirs = inspect.signature(getattr(stock.LnStructured, name)).parameters
        assert [(key, value.default, value.kind) for key, value in ours.items()] == [
            (key, value.default, value.kind) for key, value in theirs.items()
        ]
    assert list(inspect.signature(lnprune.ln_structured).parameters) == list(
        inspect.signature(stock.ln_structured).parameters
    )


@pytest.mark.parametrize("amount", ["1", None, 1.5, -1, 1j])
def test_bad_amounts(device, amount):
    assert outcome(lambda: lnprune.LnStructured(amount, 2)) == outcome(
        lambda: stock.LnStructured(amount, 2)
    )


def test_every_public_name_of_torch(device):
    public = [
        name
        for name, value in vars(stock).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == stock.__name__
    ]
    assert len(public) > 10
    for name in public:
        assert name in lnprune.__all__
        if name not in ("LnStructured", "ln_structured"):
            assert getattr(lnprune, name) is getattr(stock, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, torch.bool, torch.int64], ids=str)
def test_compute_mask_and_prune(device, shape, mask_dtype):
    scores = torch.randn(shape, device=device, requires_grad=True)
    default_mask = (torch.rand(shape, device=device) < 0.7).to(mask_dtype)
    other_scores = torch.randn(shape, device=device)
    for amount, n, dim in ((1, 2, 0), (0.5, 1, -1), (2, INFINITY, 1), (1.0, 0, 0)):
        ours, theirs = lnprune.LnStructured(amount, n, dim), stock.LnStructured(amount, n, dim)
        if type(amount) is int and amount > shape[dim]:
            continue
        with lnprune.reference_ranking():
            expected = theirs.compute_mask(scores, default_mask)
            assert_same_tensor(ours.compute_mask(scores, default_mask), expected, "mask")
            for arguments in ((), (default_mask,), (None, other_scores), (default_mask, other_scores)):
                pruned = ours.prune(scores, *arguments)
                assert_same_tensor(pruned, theirs.prune(scores, *arguments), "pruned")
        mask = ours.compute_mask(scores, torch.ones_like(scores))
        keep = kept_channels(mask, dim)
        count = amount if type(amount) is int else round(amount * shape[dim])
        assert_optimal(keep, exact_norms(scores, n, dim), count)
        masked = ours.compute_mask(scores, default_mask)
        assert torch.equal(bits(masked), bits(mask * default_mask.to(mask.dtype)))
        assert_same_tensor(masked, expected, "mask", with_bits=False)


LAYOUTS = {
    "transposed": lambda: torch.randn(6, 5).t(),
    "channels_last": lambda: torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last),
    "pointwise channels_last": lambda: torch.randn(6, 5, 1, 1).to(memory_format=torch.channels_last),
    "with gaps": lambda: torch.randn(6, 10)[:, ::2],
    "expanded": lambda: torch.randn(6, 1).expand(6, 5),
}


@pytest.mark.parametrize("make_scores", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_layout_of_the_mask(device, make_scores):
    scores = make_scores().to(device)
    for default_mask in (torch.ones(scores.shape, device=device), torch.ones_like(scores), scores > 0):
        for ranking in (True, False):
            expected = stock.LnStructured(2, 2, 0).compute_mask(scores, default_mask)
            method = lnprune.LnStructured(2, 2, 0)
            if ranking:
                with lnprune.reference_ranking():
                    assert_same_tensor(method.compute_mask(scores, default_mask), expected, "mask")
            else:
                mask = method.compute_mask(scores, default_mask)
                assert_same_tensor(mask, expected, "mask", with_bits=False)


def test_nothing_to_prune_returns_the_default_mask_itself(device):
    scores = torch.randn(4, 6, device=device)
    default_mask = torch.rand(4, 6, device=device)
    before = bits(default_mask)
    for amount in (0, 0.0, 0.1):
        assert lnprune.LnStructured(amount, 2, 0).compute_mask(scores, default_mask) is default_mask
    assert lnprune.LnStructured(1, 2, 0).compute_mask(scores, default_mask) is not default_mask
    assert torch.equal(bits(default_mask), before)


def test_errors_of_compute_mask(device):
    scores, mask = torch.randn(4, 6, device=device), torch.ones(4, 6, device=device)
    bad = [(5, 2, 0), (1, 2, 2), (1, 2, -3), (1, "two", 0), (0, "two", 0), (1, 2, 0.0), (1, 2j, 1)]
    for arguments in bad:
        found = outcome(lambda: lnprune.LnStructured(*arguments).compute_mask(scores, mask))  # noqa: B023
        assert found == outcome(lambda: stock.LnStructured(*arguments).compute_mask(scores, mask))  # noqa: B023
        assert issubclass(found[0], Exception)
    for shape in ((), (4,)):
        vector = torch.ones(shape, device=device)
        found = outcome(lambda: lnprune.LnStructured(1, 2, 0).compute_mask(vector, vector))  # noqa: B023
        assert found == outcome(lambda: stock.LnStructured(1, 2, 0).compute_mask(vector, vector))  # noqa: B023
        assert found[0] is ValueError
    wrong = torch.ones(4, 5, device=device)
    for call in ("compute_mask", "prune"):
        found = outcome(lambda: getattr(lnprune.LnStructured(1, 2, 0), call)(scores, wrong))  # noqa: B023
        assert found == outcome(lambda: getattr(stock.LnStructured(1, 2, 0), call)(scores, wrong))  # noqa: B023
        assert found[0] is RuntimeError


def test_a_default_mask_that_broadcasts(device):
    scores = torch.randn(4, 6, device=device)
    for shape in ((1, 6), (4, 1), (6,)):
        default_mask = torch.rand(shape, device=device)
        with lnprune.reference_ranking():
            mask = lnprune.LnStructured(2, 2, 0).compute_mask(scores, default_mask)
        assert_same_tensor(mask, stock.LnStructured(2, 2, 0).compute_mask(scores, default_mask), "mask")


def test_in_a_container_of_torch(device):
    scores = torch.randn(8, 6, device=device)
    default_mask = torch.ones(8, 6, device=device)
    default_mask[3], default_mask[:, 1] = 0, 0

    def container(library, name="weight"):
        methods = [stock.L1Unstructured(3), library.LnStructured(0.5, 2, 0)]
        for method in methods:
            method._tensor_name = name
        return stock.PruningContainer(*methods[:1]), methods[1]

    masks = []
    for library in (lnprune, stock):
        holder, method = container(library)
        holder.add_pruning_method(method)
        with lnprune.reference_ranking():
            masks.append(holder.compute_mask(scores, default_mask.clone()))
        exact = holder.compute_mask(scores, default_mask.clone())
        taking_part = kept_channels(default_mask, 0)
        assert_optimal(kept_channels(exact, 0), exact_norms(scores, 2, 0), round(0.5 * 7), taking_part)
    assert_same_tensor(masks[0], masks[1], "mask")


def test_apply_installs_torchs_class(device):
    module = nn.Linear(6, 4, device=device)
    method = lnprune.LnStructured.apply(module, "weight", 1, 2, 0)
    assert type(method) is stock.LnStructured
    assert list(module._forward_pre_hooks.values()) == [method]
    container = lnprune.LnStructured.apply(module, "weight", 1, n=2, dim=0)
    assert type(container) is stock.PruningContainer
    assert [type(inner) for inner in container] == [stock.LnStructured] * 2
    assert container[0] is method


def test_apply_leaves_torchs_state(device):
    scores = torch.randn(4, 6, device=device)

    def call(library, module):
        library.LnStructured.apply(module, "weight", 1, 2, 0)
        library.LnStructured.apply(module, "weight", amount=0.5, n=1, dim=1, importance_scores=scores)
        library.LnStructured.apply(module, "weight", 0.5, 1, 1, scores)

    with lnprune.reference_ranking():
        assert_same_outcome(lambda: nn.Linear(6, 4, device=device), call)


class FirstChannels(lnprune.LnStructured):
    """Prunes the first channels whatever their norms, and counts how often."""

    def __init__(self, amount, n, dim=-1):
        super().__init__(amount, n, dim)
        self.calls = 0

    def compute_mask(self, t, default_mask):
        self.calls += 1
        mask = default_mask.clone()
        mask.narrow(self.dim, 0, self.amount).zero_()
        return mask


class Doubled(lnprune.LnStructured):
    """Scores twice the tensor: the choice of its base, by way of super()."""

    def compute_mask(self, t, default_mask):
        return super().compute_mask(2 * t, default_mask)


def test_subclasses(device):
    module = nn.Linear(6, 4, device=device)
    with torch.no_grad():
        module.weight.copy_(torch.arange(4.0, 0, -1)[:, None].expand(4, 6))
    method = FirstChannels.apply(module, "weight", 1, 2, 0)
    assert type(method) is FirstChannels
    assert method.calls == 1
    assert kept_channels(module.weight_mask, 0).tolist() == [False, True, True, True]
    container = Doubled.apply(module, "weight", 1, 2, 0)
    assert [type(inner) for inner in container] == [FirstChannels, Doubled]
    assert kept_channels(module.weight_mask, 0).tolist() == [False, True, True, False]
    assert Doubled.apply(module, "weight", 1, 2, 0, importance_scores=-module.weight) is container
    lnprune.ln_structured(module, "weight", 1, 2, 0)
    assert [type(inner) for inner in container] == [FirstChannels, Doubled, Doubled, stock.LnStructured]
    assert not module.weight_mask.any()
    module(torch.zeros(1, 6, device=device))
    stock.remove(module, "weight")
    assert not lnprune.is_pruned(module)


def test_pickles_as_torchs_class(device):
    method = lnprune.LnStructured(0.5, INFINITY, 1)
    method._tensor_name = "weight"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(method, protocol)
        assert b"lnprune" not in data
        loaded = pickle.loads(data)
        assert type(loaded) is stock.LnStructured
        assert loaded.__dict__ == method.__dict__
    for copied in (copy.copy(method), copy.deepcopy(method)):
        assert type(copied) is stock.LnStructured
        assert copied.__dict__ == method.__dict__
        assert copied.__dict__ is not method.__dict__
    subclass = pickle.loads(pickle.dumps(FirstChannels(1, 2, 0)))
    assert type(subclass) is FirstChannels
    assert subclass.__dict__ == {"amount": 1, "n": 2, "dim": 0, "calls": 0}


def test_a_module_that_holds_our_class_loads_as_torchs(device):
    module = nn.Linear(6, 4, device=device)
    method = lnprune.LnStructured(1, 2, 0)
    method._tensor_name = "bias"
    module.register_forward_pre_hook(method)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(hook) for hook in loaded._forward_pre_hooks.values()] == [stock.LnStructured]


def test_the_rest_of_torchs_functions(device):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).to(device)
    assert not lnprune.is_pruned(model)
    lnprune.ln_structured(model[0], "weight", 1, 2, 0)
    assert lnprune.is_pruned(model)
    parameters = [(layer, "weight") for layer in model]
    lnprune.global_unstructured(parameters, pruning_method=lnprune.L1Unstructured, amount=0.5)
    zeros = sum(int((layer.weight_mask == 0).sum()) for layer in model)
    assert zeros == 6 + round(0.5 * (36 - 6))
    with pytest.raises(TypeError, match='Only "unstructured"'):
        lnprune.global_unstructured(parameters, pruning_method=lnprune.LnStructured, amount=1, n=2)
    for layer in model:
        lnprune.remove(layer, "weight")
    with pytest.raises(ValueError, match="has to be pruned"):
        lnprune.remove(model[0], "weight")
    assert not lnprune.is_pruned(model)


def test_a_method_shows_its_arguments(device):
    class Own(lnprune.LnStructured):
        pass

    assert repr(lnprune.LnStructured(0.5, 2, dim=-1)) == "LnStructured(amount=0.5, n=2, dim=-1)"
    assert repr(Own(3, "fro", 0)) == "Own(amount=3, n='fro', dim=0)"


def test_the_package_shows_its_public_names_alone(device):
    assert dir(lnprune) == sorted([*lnprune.__all__, "__version__"])
    assert all(hasattr(lnprune, name) for name in dir(lnprune))
