"""patch: torch's class prunes natively for a while, with nothing of lnprune left in torch or in a model."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from module_state import DEVICES, assert_same_state, bits, kept_channels, twins
from test_portability import run_without_lnprune
from torch import nn
from torch.nn.utils import prune as stock
from torch.nn.utils.prune import LnStructured as imported_before
from torch.nn.utils.prune import ln_structured as imported_before_too

import lnprune
from lnprune import ops

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore"),
]

NAMES = ("apply", "compute_mask")
TORCHS = {name: vars(stock.LnStructured)[name] for name in NAMES}


def methods():
    return {name: vars(stock.LnStructured)[name] for name in NAMES}


def assert_torchs_again():
    assert methods() == TORCHS


def assert_native():
    assert all(method is not TORCHS[name] for name, method in methods().items())


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Whatever a test does, the module and the class are torch's before and after it."""
    assert_torchs_again()
    module, kind = dict(vars(stock)), content_of_the_class()
    yield
    assert_torchs_again()
    assert vars(stock) == module
    assert content_of_the_class() == kind


def content_of_the_class():
    """But for what the standard library keeps there when it pickles."""
    return {key: value for key, value in vars(stock.LnStructured).items() if key != "__slotnames__"}


def linear(device="cpu"):
    return nn.Linear(8, 6, device=device)


def test_methods_inside_and_after(device):
    for _ in range(2):
        with lnprune.patch() as value:
            assert value is None
            assert_native()
        assert_torchs_again()


def test_no_name_of_torchs_module_changes(device):
    names = dict(vars(stock))
    with lnprune.patch():
        assert vars(stock) == names


def test_a_patch_that_nobody_enters(device):
    lnprune.patch()
    assert_torchs_again()


def test_as_a_decorator(device):
    @lnprune.patch()
    def inside():
        assert_native()

    inside()
    inside()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_methods_after_an_error(device, error):
    with contextlib.suppress(error), lnprune.patch():
        assert_native()
        raise error("on purpose")
    assert_torchs_again()


def test_nested(device):
    with lnprune.patch():
        with lnprune.patch():
            assert_native()
        assert_native()
        with pytest.raises(ValueError, match="on purpose"), lnprune.patch():
            raise ValueError("on purpose")
        assert_native()


def test_entered_and_left_in_another_order(device):
    first, second = lnprune.patch(), lnprune.patch()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_native()
    second.__exit__(None, None, None)
    assert_torchs_again()


def test_for_all_threads(device):
    seen = []
    with lnprune.patch():
        thread = threading.Thread(target=lambda: seen.append(methods()))
        thread.start()
        thread.join()
        assert seen == [methods()]


def test_permanent(device):
    program = """
    import torch
    from torch.nn.utils import prune

    import lnprune

    torchs = vars(prune.LnStructured)["apply"]

    def is_native():
        return vars(prune.LnStructured)["apply"] is not torchs

    with lnprune.patch(permanently=True) as value:
        assert value is None
    assert is_native()
    with lnprune.patch():
        pass
    lnprune.patch(permanently=True)
    try:
        with lnprune.patch():
            raise ValueError
    except ValueError:
        pass
    assert is_native()
    module = prune.ln_structured(torch.nn.Linear(4, 4), "weight", 2, 2, 0)
    (hook,) = module._forward_pre_hooks.values()
    assert type(hook) is prune.LnStructured
    prune.remove(module, "weight")
    assert not prune.is_pruned(module)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# What runs inside.


def native_calls(monkeypatch):
    calls = []
    original = ops.prune_channels

    def counting(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(ops, "prune_channels", counting)
    return calls


@pytest.mark.parametrize("shape", [(8, 6), (520, 512)], ids=["small", "large"])
def test_torchs_names_prune_natively(device, monkeypatch, shape):
    """And leave what lnprune leaves outside: torch's hooks."""
    calls = native_calls(monkeypatch)
    actual, expected = twins(lambda: nn.Sequential(*(nn.Linear(*shape, device=device) for _ in range(2))))
    with lnprune.patch():
        for amount, dim in ((0.25, 0), (0.5, 1)):
            assert stock.ln_structured(actual[0], "weight", amount, 2, dim) is actual[0]
            stock.LnStructured.apply(actual[1], "weight", amount, 2, dim)
    assert len(calls) == 4
    for module in expected:
        for amount, dim in ((0.25, 0), (0.5, 1)):
            lnprune.ln_structured(module, "weight", amount, 2, dim)
    assert_same_state(actual, expected)
    for module in actual:
        (container,) = module._forward_pre_hooks.values()
        assert type(container) is stock.PruningContainer
        assert [type(hook) for hook in container] == [stock.LnStructured] * 2


def test_lnprune_itself_works_inside(device):
    """Every call goes its own way, not round in circles, and installs torch's class."""

    def make():
        return nn.Sequential(*(nn.Linear(*shape, device=device) for shape in ((8, 6), (6, 8), (8, 8))))

    def prune(model):
        lnprune.ln_structured(model[0], "weight", 0.25, 2, 0)
        lnprune.LnStructured.apply(model[0], "weight", 1, 2, 1)
        lnprune.local_structured(model, 0.25, 2, "out")
        lnprune.global_structured(model, 0.25, 2, "in")
        plan = lnprune.rank(model, 1, "out").select(0.5).apply(bias=True)
        plan.undo().apply()
        with lnprune.reference_ranking():
            lnprune.local_structured(model, 1, 2, "out")

    actual, expected = twins(make)
    with lnprune.patch():
        prune(actual)
    prune(expected)
    assert_same_state(actual, expected)
    for module in actual:
        (hook,) = module._forward_pre_hooks.values()
        assert type(hook) is stock.PruningContainer
        assert all(type(inner) is stock.LnStructured for inner in hook)
    with lnprune.patch():
        lnprune.remove_all(actual)
    lnprune.remove_all(expected)
    assert_same_state(actual, expected)


def test_inputs_that_native_code_does_not_take(device):
    """Plain torch, by way of torch's class, inside too."""

    def make():
        model = nn.ModuleList([nn.Module(), nn.Conv1d(4, 6, 3, device=device)])
        model[0].weight = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64, device=device))
        return model

    def prune(model):
        for _ in range(2):
            lnprune.ln_structured(model[0], "weight", 0.4, 2, 0)
            lnprune.ln_structured(model[1], "weight", 0.4, "nuc", 0)

    actual, expected = twins(make)
    with lnprune.patch():
        prune(actual)
    prune(expected)
    assert_same_state(actual, expected)


def test_torchs_other_functions(device):
    actual, expected = twins(lambda: linear(device))

    def prune(module, ln_structured):
        stock.l1_unstructured(module, "weight", 0.2)
        ln_structured(module, "weight", 0.25, 2, 0)
        stock.global_unstructured([(module, "weight"), (module, "bias")], stock.L1Unstructured, amount=0.2)
        assert stock.is_pruned(module)
        ln_structured(module, "weight", 1, 2, 1)
        module(torch.ones(2, 8, device=device))
        stock.remove(module, "weight")

    with lnprune.patch():
        prune(actual, stock.ln_structured)
    prune(expected, lnprune.ln_structured)
    assert_same_state(actual, expected)


def test_methods_in_a_container(device):
    """Built by hand from the class under torch's name."""
    scores = torch.randn(8, 6, device=device)
    with lnprune.patch():
        method = stock.LnStructured(amount=2, n=2, dim=0)
        other = stock.LnStructured(amount=0.5, n=1, dim=1)
        assert isinstance(method, stock.LnStructured)
        assert issubclass(stock.LnStructured, stock.BasePruningMethod)
        for each in (method, other):
            each._tensor_name = "weight"
        container = stock.PruningContainer(method)
        container.add_pruning_method(other)
        first = method.compute_mask(scores, torch.ones_like(scores))
        both = container.compute_mask(scores, first.clone())
    assert int(kept_channels(first, 0).sum()) == 6
    assert int(kept_channels(both, 1).sum()) == 3
    assert torch.equal(method.prune(scores), scores * first)


def test_what_was_imported_before_is_native(device, monkeypatch):
    calls = native_calls(monkeypatch)
    module = linear(device)
    imported_before_too(module, "weight", 2, 2, 0)
    assert calls == []
    with lnprune.patch():
        imported_before.apply(module, "weight", 1, 2, 1)
        imported_before_too(module, "weight", 1, 2, 1)
    assert len(calls) == 2


def test_masks_of_the_class_itself_are_native(device, monkeypatch):
    """Two channels that torch cannot tell apart: bfloat16 has no number for their difference."""
    scores = torch.tensor([[1.0, 1e-6], [1.0, 0.0], [1.0, 2e-6]], dtype=torch.bfloat16, device=device)
    method = imported_before(amount=1, n=1, dim=0)
    with lnprune.patch():
        mask = method.compute_mask(scores, torch.ones_like(scores))
        pruned = method.prune(scores)
    assert kept_channels(mask, 0).tolist() == [True, False, True]
    assert torch.equal(pruned, scores * mask)


class Own(stock.LnStructured):
    """A subclass of torch's class, from before."""


class Reversed(stock.LnStructured):
    """A subclass that prunes the largest."""

    def compute_mask(self, t, default_mask):
        return super().compute_mask(1 / t, default_mask)


@pytest.mark.parametrize("kind", [Own, Reversed])
def test_subclasses_from_before(device, kind):
    """They are installed as themselves, and choose as they do, by native norms."""
    with lnprune.reference_ranking():
        actual, expected = twins(lambda: linear(device))
        with lnprune.patch():
            kind.apply(actual, "weight", 0.5, 2, 0)
        kind.apply(expected, "weight", 0.5, 2, 0)
    assert_same_state(actual, expected)
    (hook,) = actual._forward_pre_hooks.values()
    assert type(hook) is kind


def test_subclasses_made_inside(device):
    """They work inside and after."""
    with lnprune.patch():

        class Inner(stock.LnStructured):
            """A subclass as a library makes it at import."""

            def compute_mask(self, t, default_mask):
                return super().compute_mask(-t, default_mask)

        module = linear(device)
        Inner.apply(module, "weight", 2, 2, 0)
        (hook,) = module._forward_pre_hooks.values()
        assert type(hook) is Inner
    assert issubclass(Inner, (stock.LnStructured, lnprune.LnStructured))
    assert int(kept_channels(module.weight_mask, 0).sum()) == 4
    Inner.apply(module, "weight", 1, 2, 0)
    assert int(kept_channels(module.weight_mask, 0).sum()) == 3
    stock.remove(module, "weight")
    assert int((module.weight == 0).all(dim=1).sum()) == 3


def test_isinstance_with_torchs_name(device):
    """What code that cannot be edited asks of the hooks that it installed."""
    with lnprune.patch():
        module = stock.ln_structured(linear(device), "weight", 2, 2, 0)
        (hook,) = module._forward_pre_hooks.values()
        assert isinstance(hook, stock.LnStructured)


def test_isinstance_with_the_base_class(device):
    with lnprune.patch():
        module = stock.ln_structured(linear(device), "weight", 2, 2, 0)
        (hook,) = module._forward_pre_hooks.values()
        assert isinstance(hook, stock.BasePruningMethod)
    assert isinstance(hook, stock.LnStructured)


# Pickles and copies.


def prepared(device="cpu"):
    """Pruned once, twice, and by an object of the class itself."""
    model = nn.Sequential(linear(device), nn.Linear(6, 4, device=device), nn.Linear(4, 4, device=device))
    model.requires_grad_(False)  # torch copies leaves alone
    stock.ln_structured(model[0], "weight", 0.5, 2, 0)
    for _ in range(2):
        stock.ln_structured(model[1], "weight", 1, 1, 0)
    method = stock.LnStructured(amount=1, n=2, dim=1)
    method._tensor_name = "weight"
    stock.identity(model[2], "weight")
    ((key, _),) = model[2]._forward_pre_hooks.items()
    model[2]._forward_pre_hooks[key] = stock.PruningContainer(method)
    return model


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


WRITERS = {
    "torch.save": by_torch,
    **{
        f"pickle {protocol}": lambda model, protocol=protocol: pickle.dumps(model, protocol)
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}
LOADED = """
    import io
    import pickle

    import torch
    from torch.nn.utils import prune

    def hooks(module):
        (hook,) = module._forward_pre_hooks.values()
        return list(hook) if isinstance(hook, prune.PruningContainer) else [hook]

    for path in sys.argv[2:]:
        with open(path, "rb") as file:
            content = file.read()
        if path.endswith("torch.save"):
            model = torch.load(io.BytesIO(content), weights_only=False)
        else:
            model = pickle.loads(content)
        assert [[type(hook) for hook in hooks(module)] for module in model] == [
            [prune.LnStructured], [prune.LnStructured] * 2, [prune.LnStructured]
        ]
        assert [hook.amount for module in model for hook in hooks(module)] == [0.5, 1, 1, 1]
        inputs, outputs = torch.load(sys.argv[1])
        assert torch.equal(model(inputs), outputs)
        prune.ln_structured(model[0], "weight", 1, 2, 1)
        for module in model:
            prune.remove(module, "weight")
    assert not any(name.partition(".")[0] == "lnprune" for name in sys.modules)
"""


def test_pickles_load_without_lnprune(device, tmp_path):
    """Pruned inside or outside, and written inside or outside."""
    torch.manual_seed(1)
    outside = prepared(device)
    torch.manual_seed(1)
    paths = []
    with lnprune.patch():
        inside = prepared(device)
        for origin, model in (("inside", inside), ("outside", outside)):
            for name, write in WRITERS.items():
                paths.append(tmp_path / f"{origin} written inside {name}")
                paths[-1].write_bytes(write(model))
    for name, write in WRITERS.items():
        paths.append(tmp_path / f"inside written outside {name}")
        paths[-1].write_bytes(write(inside))
    inputs = torch.randn(3, 8, device=device)
    assert torch.equal(inside(inputs), outside(inputs))
    torch.save((inputs, inside(inputs)), tmp_path / "expected")
    for path in paths:
        assert b"lnprune" not in path.read_bytes()
    run_without_lnprune(textwrap.dedent(LOADED), tmp_path / "expected", *paths)


def hook_types(model):
    found = []
    for module in model:
        (hook,) = module._forward_pre_hooks.values()
        found += [type(inner) for inner in (hook if isinstance(hook, stock.PruningContainer) else [hook])]
    return found


def test_pickles_load_inside(device):
    content = by_torch(prepared(device))
    with lnprune.patch():
        written_inside = by_torch(prepared(device))
        loaded = [torch.load(io.BytesIO(data), weights_only=False) for data in (content, written_inside)]
        for model in loaded:
            model(torch.ones(2, 8, device=device))
            stock.ln_structured(model[0], "weight", 1, 2, 0)
            assert b"lnprune" not in by_torch(model)
    for model in loaded:
        model(torch.ones(2, 8, device=device))
        assert all(issubclass(kind, stock.LnStructured) for kind in hook_types(model))
        assert b"lnprune" not in by_torch(model)


def test_deep_copies(device, tmp_path):
    """They are the same model, and leave nothing of lnprune in a file."""
    paths = []

    def written(model, name):
        paths.append(tmp_path / f"{name} torch.save")
        paths[-1].write_bytes(by_torch(model))

    torch.manual_seed(1)
    outside = prepared(device)
    with lnprune.patch():
        torch.manual_seed(1)
        inside = prepared(device)
        copies = {name: copy.deepcopy(m) for name, m in (("inside", inside), ("outside", outside))}
        for name, copied in copies.items():
            written(copied, f"{name} copied inside written inside")
    for name, copied in copies.items():
        written(copied, f"{name} copied inside written outside")
    copies["later"] = copy.deepcopy(inside)
    written(copies["later"], "inside copied outside written outside")
    inputs = torch.randn(3, 8, device=device)
    torch.save((inputs, inside(inputs)), tmp_path / "expected")
    for copied in copies.values():
        assert torch.equal(copied(inputs), inside(inputs))
        for left, right in zip(copied, inside, strict=True):
            assert left.weight_orig is not right.weight_orig
            assert torch.equal(bits(left.weight), bits(right.weight))
            assert list(left.state_dict()) == list(right.state_dict())
    run_without_lnprune(textwrap.dedent(LOADED), tmp_path / "expected", *paths)


def test_a_deep_copy_made_inside_holds_torchs_hooks(device):
    with lnprune.patch():
        module = stock.ln_structured(linear(device).requires_grad_(False), "weight", 2, 2, 0)
        copied = copy.deepcopy(module)
    assert hook_types([module]) == [stock.LnStructured]
    assert hook_types([copied]) == [stock.LnStructured]


@pytest.mark.parametrize("kind", ["torch's", "lnprune's"])
def test_the_class_itself_pickles(device, kind):
    chosen = stock.LnStructured if kind == "torch's" else lnprune.LnStructured
    for context in (lnprune.patch(), contextlib.nullcontext()):
        with context:
            assert pickle.loads(pickle.dumps(chosen)) is chosen
            method = pickle.loads(pickle.dumps(chosen(amount=1, n=2, dim=0)))
            assert type(method) is stock.LnStructured


def test_nothing_is_patched_for_good_by_mistake(device):
    torchs = vars(stock.LnStructured)["apply"]
    with pytest.raises(TypeError):
        lnprune.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^permanently: expected True or False, got 'no'"):
        lnprune.patch(permanently="no")
    assert vars(stock.LnStructured)["apply"] is torchs
