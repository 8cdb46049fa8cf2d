"""A call that fails, at whatever step, leaves the module exactly as it was."""

import contextlib

import pytest
import torch
from module_state import DEVICES, Snapshot, assert_unchanged
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune import ops, reference

pytestmark = pytest.mark.parametrize("device", DEVICES)


class Failure(BaseException):
    """No Exception: what KeyboardInterrupt and SystemExit are too."""


class Subclass(lnprune.LnStructured):
    """A user's own method."""


class Counting(nn.Linear):
    """A module that keeps its own record of what is assigned, in a list, a dict and a set."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.assigned = []

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if "assigned" in self.__dict__:
            self.assigned.append(name)


MODULES = {
    "Linear": lambda device: (nn.Linear(6, 4, device=device), "weight"),
    "LSTM": lambda device: (nn.LSTM(6, 4, device=device), "weight_ih_l0"),
    "own list": lambda device: (Counting(6, 4, device=device), "weight"),
}
PREPARED = {
    "first": lambda module, name: module.register_forward_pre_hook(lambda *_: None),
    "second": lambda module, name: lnprune.ln_structured(module, name, 1, 2, 0),
    "third": lambda module, name: lnprune.ln_structured(
        lnprune.ln_structured(module, name, 1, 2, 0), name, 1, 2, 1
    ),
}
CALLS = {
    "ln_structured": lnprune.ln_structured,
    "apply": lnprune.LnStructured.apply,
    "subclass": Subclass.apply,
}
ERRORS = [KeyboardInterrupt, MemoryError]
NATIVE = ("channel_norms", "select_channels", "write_masks", "prune_channels")


@pytest.fixture(params=list(MODULES))
def make(request):
    return MODULES[request.param]


@pytest.fixture(params=list(PREPARED))
def prepare(request):
    return PREPARED[request.param]


@pytest.fixture(params=list(CALLS))
def call(request):
    return CALLS[request.param]


@pytest.fixture
def pruned(make, prepare, device):
    return prepare_module(make, prepare, device)


def prepare_module(make, prepare, device):
    """A module, other parameters pruned too, and the name of the parameter to prune next."""
    module, name = make(device)
    other = name.replace("weight", "bias")
    lnprune.l1_unstructured(module, other, 1)
    prepare(module, name)
    module.register_forward_pre_hook(lambda *_: None)
    return module, name


def assert_fails_without_a_trace(module, name, call, arguments=(1, 2, 0), error=None):
    snapshot = Snapshot(module)
    with pytest.raises(error or Exception):
        call(module, name, *arguments)
    assert_unchanged(module, snapshot)


def assert_still_works(module, name, call):
    """The module prunes, runs, trains and lets go of its pruning."""
    before = module._parameters.get(name, module._parameters.get(name + "_orig"))
    call(module, name, 1, 2, 0)
    assert module._parameters[name + "_orig"] is before
    inputs = torch.randn(2, 3, module.input_size if isinstance(module, nn.LSTM) else module.in_features)
    output = module(inputs.to(before.device))
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    assert before.grad is not None
    hooks = [
        hook
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, stock.BasePruningMethod) and hook._tensor_name == name
    ]
    assert len(hooks) == 1
    stock.remove(module, name)
    assert module._parameters[name] is before


BAD_ARGUMENTS = {
    "amount type": ("1", 2, 0),
    "amount range": (1.5, 2, 0),
    "amount NaN": (float("nan"), 2, 0),
    "amount too large": (10**6, 2, 0),
    "n": (1, "two", 0),
    "n and nothing to prune": (0, "two", 0),
    "dim": (1, 2, 2),
    "negative dim": (1, 2, -3),
    "dim type": (1, 2, 0.0),
    "scores": (1, 2, 0, torch.ones(3, 3)),
    "integer scores": (1, 2, 0, "integer"),
    "scores without a shape": (1, 2, 0, "nothing"),
}


@pytest.mark.parametrize("arguments", list(BAD_ARGUMENTS.values()), ids=list(BAD_ARGUMENTS))
def test_bad_arguments(pruned, call, arguments, device):
    module, name = pruned
    if arguments[-1] == "integer":
        arguments = (*arguments[:3], torch.ones(getattr(module, name).shape, dtype=torch.int64))
    assert_fails_without_a_trace(module, name, call, arguments)
    with lnprune.reference_ranking():
        assert_fails_without_a_trace(module, name, call, arguments)
    assert_still_works(module, name, call)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "step", ["register_parameter", "register_buffer", "__setattr__", "register_forward_pre_hook"]
)
def test_steps_of_registration(pruned, call, step, early, error, monkeypatch, device):
    """Each step fails before it has done anything, or just after it has done all."""
    module, name = pruned
    original = getattr(type(module), step)
    reached = []

    def failing(self, *args, **kwargs):
        reached.append(step)
        if not early:
            original(self, *args, **kwargs)
        raise error("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(type(module), step, failing)
        first = name in module._parameters
        if step == "register_parameter" and not first:
            call(module, name, 1, 2, 0)
            assert not reached
        else:
            # The rollback of torch's own apply, which subclasses use, can raise KeyError in its turn.
            errors = (error, KeyError) if call == Subclass.apply else error
            assert_fails_without_a_trace(module, name, call, error=errors)
            assert reached[0] == step
    assert_still_works(module, name, call)


@pytest.mark.parametrize("error", ERRORS)
def test_steps_of_the_mask(pruned, call, error, monkeypatch, device):
    """Whatever the computation of the mask calls fails, in either ranking."""
    module, name = pruned
    reached = set()

    def failing(step):
        def fail(*args, **kwargs):
            reached.add(step)
            raise error("on purpose")

        return fail

    with monkeypatch.context() as patch:
        for step in NATIVE:
            patch.setattr(ops, step, failing(step))
        assert_fails_without_a_trace(module, name, call, error=error)
        assert reached <= set(NATIVE)
        assert reached
    reached.clear()
    with monkeypatch.context() as patch, lnprune.reference_ranking():
        patch.setattr(reference, "torch_keep_channels", failing("choice"))
        assert_fails_without_a_trace(module, name, call, error=error)
        assert reached == {"choice"}
    assert_still_works(module, name, call)


def native_steps(call, prepared, amount, ranking):
    """The ops that a call takes, in their order."""
    if ranking is lnprune.reference_ranking:
        return ["write_masks"]
    if call == Subclass.apply:
        return ["channel_norms", "select_channels", "write_masks"]
    # Torch compares a count with the channels that are left.
    counts = prepared != "first" and isinstance(amount, int)
    return ["channel_norms", "prune_channels"] if counts else ["prune_channels"]


@pytest.mark.parametrize("ranking", [contextlib.nullcontext, lnprune.reference_ranking])
@pytest.mark.parametrize("amount", [1, 0.25])
@pytest.mark.parametrize("prepared", PREPARED)
def test_one_native_step(make, prepared, call, amount, ranking, monkeypatch, device):
    """Each op that a call takes fails alone, so that the steps before it have done their work."""
    module, name = prepare_module(make, PREPARED[prepared], device)
    steps = native_steps(call, prepared, amount, ranking)
    for step in steps:
        reached = []

        def noting(op, step=step, reached=reached):
            original = getattr(ops, op)

            def run(*args, **kwargs):
                reached.append(op)
                if op == step:
                    raise MemoryError("on purpose")
                return original(*args, **kwargs)

            return run

        snapshot = Snapshot(module)
        with monkeypatch.context() as patch, ranking():
            for op in NATIVE:
                patch.setattr(ops, op, noting(op))
            with pytest.raises(MemoryError, match="on purpose"):
                call(module, name, amount, 2, 0)
        assert reached == steps[: steps.index(step) + 1]
        assert_unchanged(module, snapshot)
    assert_still_works(module, name, call)


@pytest.mark.parametrize("error", ERRORS)
def test_the_multiplication(device, error, call):
    """The product of mask and original fails, as it does when memory runs out."""

    class Refusing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.mul, torch.mul, torch.Tensor.__mul__):
                raise error("on purpose")
            return function(*args, **(kwargs or {}))

    for shape in ((6, 4), (520, 512)):
        for prepare in PREPARED.values():
            module = nn.Linear(*shape, device=device)
            prepare(module, "weight")
            snapshot = Snapshot(module)
            with Refusing(), pytest.raises(error):
                call(module, "weight", 1, 2, 0)
            assert_unchanged(module, snapshot)
            assert_still_works(module, "weight", call)


def test_old_container_keeps_its_contents(device, call):
    module = lnprune.ln_structured(nn.Linear(6, 4, device=device), "weight", 1, 2, 0)
    lnprune.ln_structured(module, "weight", 1, 2, 1)
    ((key, container),) = module._forward_pre_hooks.items()
    methods = tuple(container)
    for arguments in ((100, 2, 0), (1, "two", 0), (1, 2, 5), ("1", 2, 0)):
        with pytest.raises(Exception):  # noqa: B017, PT011
            call(module, "weight", *arguments)
        assert list(module._forward_pre_hooks.items()) == [(key, container)]
        assert len(container) == 2
        assert all(now is before for now, before in zip(container, methods, strict=True))
    stock.remove(module, "weight")
    assert list(module.state_dict()) == ["bias", "weight"]


def test_order_of_parameters_and_optimizers_survive(device, call):
    """Torch moves a parameter to the end of the order when a first call fails."""
    module = nn.Linear(6, 4, device=device)
    before = list(module.parameters())
    with pytest.raises(ValueError, match="should be smaller"):
        call(module, "weight", 5, 2, 0)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert all(now is old for now, old in zip(module.parameters(), before, strict=True))


def test_a_method_that_fails_in_its_own_mask(device):
    class Failing(lnprune.LnStructured):
        def compute_mask(self, t, default_mask):
            raise Failure("on purpose")

    for prepare in PREPARED.values():
        module = nn.LSTM(6, 4, device=device)
        prepare(module, "weight_ih_l0")
        assert_fails_without_a_trace(module, "weight_ih_l0", Failing.apply, error=Failure)
        assert_still_works(module, "weight_ih_l0", lnprune.ln_structured)


def test_a_name_that_is_taken(device, call):
    module = nn.Linear(6, 4, device=device)
    module.weight_mask = 1
    assert_fails_without_a_trace(module, "weight", call, error=KeyError)
    del module.weight_mask
    module.weight_orig = 1
    assert_fails_without_a_trace(module, "weight", call, error=KeyError)
    del module.weight_orig
    assert_still_works(module, "weight", call)
