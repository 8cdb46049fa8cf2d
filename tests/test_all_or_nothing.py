"""Whole-model calls that fail, at whatever step and parameter, leave every module exactly as it was."""

import contextlib
import itertools

import pytest
import torch
from module_state import DEVICES, ModelSnapshot, bits
from torch import nn
from torch.nn.utils import prune as stock
from torch.utils._python_dispatch import TorchDispatchMode

import lnprune
from lnprune import ops

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore"),
]

ERRORS = [KeyboardInterrupt, MemoryError]


class Noting(nn.Linear):
    """A module that keeps its own record of what is assigned."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.assigned = []

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if "assigned" in self.__dict__:
            self.assigned.append(name)


def fresh(device="cpu"):
    """Parameters of all paths: native, complex, two of one module, one of two modules."""
    model = nn.ModuleList(
        [
            nn.Linear(6, 8, device=device),
            nn.LSTM(6, 4, device=device),
            nn.Linear(4, 6, device=device),
            Noting(10, 8, device=device),
            nn.Linear(6, 8, device=device),
        ]
    )
    model[2].weight = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64, device=device))
    model[4].weight = model[0].weight
    for module in model:
        module.register_forward_pre_hook(lambda *_: None)
    return model


def pruned(device="cpu"):
    model = fresh(device)
    stock.random_unstructured(model[0], "bias", 1)
    lnprune.local_structured(pairs_of(model), 0.25, 2, 0)
    return model


def mixed(device="cpu"):
    """Some parameters pruned once, one twice, the others not."""
    model = fresh(device)
    stock.l1_unstructured(model[3], "weight", 5)
    lnprune.ln_structured(model[1], "weight_hh_l0", 3, 2, 0)
    lnprune.ln_structured(model[1], "weight_hh_l0", 1, 2, 1)
    stock.identity(model[2], "weight")
    return model


def large(device="cpu"):
    """The masked weights are written together with the masks."""
    model = nn.ModuleList([nn.Linear(520, 512, device=device) for _ in range(2)])
    lnprune.ln_structured(model[1], "weight", 0.25, 2, 0)
    return model


def shared(device="cpu"):
    """Two masks of one weight, which are multiplied into it one after the other."""
    model = nn.ModuleList([nn.Linear(6, 8, device=device) for _ in range(3)])
    model[2].weight = model[1].weight
    lnprune.ln_structured(model[1], "weight", 2, 2, 0)
    lnprune.ln_structured(model[2], "weight", 2, 2, 1)
    return model


MODELS = {"fresh": fresh, "pruned": pruned, "mixed": mixed, "large": large, "shared": shared}


def pairs_of(model):
    names = [("weight_ih_l0", "weight_hh_l0") if isinstance(m, nn.LSTM) else ("weight",) for m in model]
    return [(module, name) for module, group in zip(model, names, strict=True) for name in group]


NAMES = ["0.weight", "1.weight_ih_l0", "2.weight_hh_l0", "3.weight", "4.weight"]


def local(model, **options):
    return lambda: lnprune.local_structured(pairs_of(model), 0.25, 2, 0, **options)


def global_(model, **options):
    return lambda: lnprune.global_structured(pairs_of(model), 0.25, 2, 0, **options)


def apply(model, **options):
    plan = lnprune.rank(pairs_of(model), 2, 0).select(0.25)
    return lambda: plan.apply(**options)


def undo(model, **options):
    """A plan of its own each time: what the call undoes is applied again where it succeeds."""
    plan = lnprune.rank(pairs_of(model), 2, 0).select(0.25).apply(**options)
    return plan.undo


def remove(model):
    return lambda: lnprune.remove_all(model)


# Each prepares a model, and returns the call that is to fail.
CALLS = {
    "local": local,
    "local permanent": lambda model: local(model, permanent=True),
    "global": global_,
    "global permanent": lambda model: global_(model, permanent=True),
    "apply": apply,
    "apply bias": lambda model: apply(without_recurrent(model), bias=True),
    "apply permanent": lambda model: apply(model, permanent=True),
    "apply permanent, backup": lambda model: apply(model, permanent=True, keep_backup=True),
    "undo": undo,
    "undo permanent": lambda model: undo(model, permanent=True, keep_backup=True),
    "remove_all": remove,
}
CHANGES_VALUES = [name for name in CALLS if "permanent" in name or name == "remove_all"]


def without_recurrent(model):
    """Biases are those of modules with one `weight`."""
    return nn.ModuleList([module for module in model if not isinstance(module, nn.LSTM)])


@pytest.fixture(params=list(CALLS))
def prepared(request, device):
    """A factory of pairs: a model, and the call that is to fail."""

    def prepare(make):
        model = make(device)
        return model, CALLS[request.param](model)

    prepare.name = request.param
    return prepare


@pytest.fixture(params=list(MODELS))
def make(request):
    return MODELS[request.param]


def fail_at_every(step, model, call, least):
    """``step(k)`` is a context in which the k-th of some events fails, until there are no more of them."""
    for k in itertools.count():
        snapshot = ModelSnapshot(model)
        with step(k) as failing:
            try:
                call()
            except failing.error as error:
                assert str(error) == "on purpose"  # noqa: PT017
                failed = True
            else:
                failed = False
        if not failed:
            assert not failing.reached
            break
        assert failing.reached
        snapshot.assert_unchanged()
    assert k >= least, k
    return k


class Failing:
    """Fails at the k-th call of a method of nn.Module, before it does anything or when it has done all."""

    def __init__(self, name, k, early, error):
        self.name, self.left, self.early, self.error = name, k, early, error
        self.reached = False

    def __enter__(self):
        self.original = original = getattr(nn.Module, self.name)

        def failing(module, *args, **kwargs):
            self.left -= 1
            now = self.left == -1
            self.reached |= now
            if now and self.early:
                raise self.error("on purpose")
            result = original(module, *args, **kwargs)
            if now:
                raise self.error("on purpose")
            return result

        setattr(nn.Module, self.name, failing)
        return self

    def __exit__(self, *_):
        setattr(nn.Module, self.name, self.original)


# How often each step is reached at least, where a fresh model with 6 places is pruned.
STEPS = ["register_parameter", "register_buffer", "__setattr__", "__delattr__", "register_forward_pre_hook"]


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("make", [fresh, pruned, mixed])
@pytest.mark.parametrize("prepared", [name for name in CALLS if "global" not in name], indirect=True)
def test_every_step_of_registration_at_every_parameter(prepared, make, step, early, device):
    model, call = prepared(make)
    error = ERRORS[early]
    fail_at_every(lambda k: Failing(step, k, early, error), model, call, least=0)


def test_registration_has_these_steps(device):
    """The test above reaches what it is about."""
    for step in ("register_parameter", "register_buffer", "register_forward_pre_hook"):
        for early in (True, False):
            model = fresh(device)
            fail_at_every(
                lambda k, s=step, e=early: Failing(s, k, e, MemoryError),
                model,
                local(model),
                len(pairs_of(model)),
            )
    for step in ("__setattr__", "__delattr__"):
        model = pruned(device)
        fail_at_every(lambda k, s=step: Failing(s, k, True, MemoryError), model, remove(model), 6)


class FailingOperation(TorchDispatchMode):
    """Fails at the k-th operation of torch, whatever it is, native ones of lnprune included."""

    error = MemoryError

    def __init__(self, k, early):
        super().__init__()
        self.left, self.early = k, early

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else the first operation imports torch's compiler

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        now = self.left == -1
        if now and self.early:
            raise self.error("on purpose")
        result = function(*args, **(kwargs or {}))
        if now:
            raise self.error("on purpose")
        return result


class Recording(TorchDispatchMode):
    """Notes the operations of torch, native ones of lnprune included."""

    def __init__(self):
        super().__init__()
        self.operations = []

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("prepared", [name for name in CALLS if "global" not in name], indirect=True)
def test_every_operation_of_torch(prepared, make, device):
    """Each fails before it does anything, and when it has done all.

    But for one: where values change without a backup, nothing can fail when the last write is done, since
    it is the last operation of all.
    """
    _, call = prepared(make)
    with Recording() as record:
        call()
    count = whole = len(record.operations)
    backup = "backup" in prepared.name or prepared.name == "undo permanent"
    changes = prepared.name in CHANGES_VALUES and not backup
    if changes and count > 0 and record.operations[-1] in last_writes():
        count -= 1
    elif changes:
        assert not set(record.operations) & set(last_writes())
    for early in (True, False):
        model, call = prepared(make)
        for k in range(whole if early else count):
            snapshot = ModelSnapshot(model)
            with pytest.raises(MemoryError, match="on purpose"), FailingOperation(k, early):
                call()
            snapshot.assert_unchanged()
    assert whole >= (0 if prepared.name in ("undo", "remove_all") else 2)


def last_writes():
    return (
        torch.ops.lnprune.prune_channels_.default,
        torch.ops.lnprune.zero_channels_.default,
        torch.ops.aten._foreach_mul_.List,
    )


def nonempty_calls(monkeypatch, name, k, error):
    """Makes the k-th call of a native op fail that has any tensors."""
    original = getattr(ops, name)
    count = itertools.count()

    def failing(tensors, *args):
        if tensors and next(count) == k:
            raise error("on purpose")
        return original(tensors, *args)

    monkeypatch.setattr(ops, name, failing)
    return count


NATIVE = [
    "channel_norms",
    "select_channels",
    "write_masks",
    "prune_channels",
    "zero_channels_",
    "prune_channels_",
]
REACHED = {
    "local": {"prune_channels", "select_channels"},
    "local permanent": {"prune_channels_", "select_channels"},
    "global": {"channel_norms", "select_channels", "write_masks"},
    "global permanent": {"channel_norms", "select_channels", "zero_channels_"},
    "apply": {"write_masks"},
    "apply bias": {"write_masks"},
    "apply permanent": {"zero_channels_"},
    "apply permanent, backup": {"zero_channels_", "channel_norms"},
    "undo": set(),
    "undo permanent": {"channel_norms"},
    "remove_all": set(),
}


@pytest.mark.parametrize("error", ERRORS)
def test_every_native_op(prepared, make, error, monkeypatch, device):
    reached = set()
    for name in NATIVE:
        for k in itertools.count():
            model, call = prepared(make)
            snapshot = ModelSnapshot(model)
            with monkeypatch.context() as patch:
                nonempty_calls(patch, name, k, error)
                try:
                    call()
                except error:
                    reached.add(name)
                else:
                    break
            snapshot.assert_unchanged()
    if make is fresh:
        assert reached == REACHED[prepared.name]


class Stubborn(nn.Linear):
    """A module that refuses, once it is told to, to have its weight changed."""

    refusing = False

    def __setattr__(self, name, value):
        if self.refusing and name == "weight":
            raise PermissionError("no assignment")
        super().__setattr__(name, value)

    def register_buffer(self, *args, **kwargs):
        if self.refusing == "buffers":
            raise PermissionError("no buffer")
        super().register_buffer(*args, **kwargs)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("refusing", [True, "buffers"], ids=["attributes", "buffers"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prepared", [name for name in CALLS if "bias" not in name], indirect=True)
def test_a_module_that_refuses(prepared, refusing, position, masked, device):
    def make(device):
        model = nn.ModuleList([nn.Linear(6, 4, device=device) for _ in range(4)])
        model[position] = Stubborn(6, 4, device=device)
        if masked:
            for module in model:
                lnprune.ln_structured(module, "weight", 1, 2, 0)
        return model

    model, call = prepared(make)
    model[position].refusing = refusing
    snapshot = ModelSnapshot(model)
    try:
        call()
    except PermissionError:
        snapshot.assert_unchanged()
    else:
        # Nothing is assigned where plain parameters are zeroed, and no buffer where masks only go.
        assert not masked or refusing == "buffers" or prepared.name.startswith("undo")
        assert prepared.name in CHANGES_VALUES or prepared.name == "undo" or prepared.name == "remove_all"
        return
    model[position].refusing = False
    call()


# Bad input, which the message tells with the parameter's name.

BAD_AMOUNTS = {
    "too many": (1000, ValueError),
    "negative": (-1, ValueError),
    "above 1": (1.5, ValueError),
    "a negative share": (-0.5, ValueError),
    "NaN": (float("nan"), ValueError),
    "a string": ("1", TypeError),
    "complex": (1j, TypeError),
    "None": (None, TypeError),
}


@pytest.mark.parametrize("index", range(len(NAMES)))
@pytest.mark.parametrize("make", [fresh, pruned, mixed])
@pytest.mark.parametrize("amount", list(BAD_AMOUNTS))
def test_bad_amounts(make, device, index, amount):
    bad, error = BAD_AMOUNTS[amount]
    model = make(device)
    amounts = dict.fromkeys(NAMES, 1) | {NAMES[index]: bad}
    pairs = pairs_of(model)
    message = f"^{NAMES[index]}: ".replace(".", r"\.")
    for ranking in (contextlib.nullcontext, lnprune.reference_ranking):
        snapshot = ModelSnapshot(model)
        with ranking(), pytest.raises(error, match=message):
            lnprune.local_structured(pairs, amounts, 2, 0)
        snapshot.assert_unchanged()


@pytest.mark.parametrize("amount", BAD_AMOUNTS)
def test_bad_amounts_of_a_permanent_call(device, amount):
    """The types and, but for the name before them, the messages of ln_structured."""
    bad, error = BAD_AMOUNTS[amount]
    for index in (0, 1, 2):
        model = nn.Sequential(*(nn.Linear(6, 8, device=device) for _ in range(3)))
        amounts = dict.fromkeys(["0.weight", "1.weight", "2.weight"], 1) | {f"{index}.weight": bad}
        snapshot = ModelSnapshot(model)
        with pytest.raises(error) as failure:
            lnprune.ln_structured(nn.Linear(6, 8, device=device), "weight", bad, 2, 0)
        message = str(failure.value)
        with pytest.raises(error) as failure:
            lnprune.local_structured(model, amounts, 2, 0, permanent=True)
        snapshot.assert_unchanged()
        assert str(failure.value).startswith(f"{index}.weight: ")
        if error is ValueError:
            assert str(failure.value) == f"{index}.weight: {message}"


@pytest.mark.parametrize("call", [lnprune.local_structured, lnprune.global_structured])
@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("index", range(3))
def test_bad_inputs_by_parameter(device, call, permanent, index):
    model = nn.Sequential(*(nn.Linear(6, 8, device=device) for _ in range(3)))
    lnprune.ln_structured(model[1], "weight", 1, 2, 0)
    snapshot = ModelSnapshot(model)
    name = rf"^{index}\.weight: "

    def fails(error, message, amount=0.25, n=2, dim=0, scores=None):
        with pytest.raises(error, match=message):
            call(model, amount, n, dim, scores, permanent=permanent)
        snapshot.assert_unchanged()

    dims = [0, 0, 0]
    for bad, error in ((2, IndexError), (-3, IndexError)):
        dims[index] = bad
        fails(error, name, dim=dims)
    for bad in (torch.ones(8), torch.ones(6, 8), torch.ones(1, 6)):
        fails(ValueError, name, scores={f"{index}.weight": bad.to(device)})
    fails(ValueError, "none of the 3 parameters", scores={f"{index + 3}.weight": torch.ones(8, 6)})
    fails(
        RuntimeError, name, scores={f"{index}.weight": torch.ones(8, 6, dtype=torch.int64, device=device)}
    )
    fails((RuntimeError, TypeError), r"^\d\.weight: ", n="two")
    fails((RuntimeError, TypeError), r"^\d\.weight: ", n=2j)


def test_no_such_parameter(device):
    model = nn.Sequential(nn.Linear(6, 8, device=device), nn.Linear(8, 6, device=device))
    snapshot = ModelSnapshot(model)
    for bad, error in (
        ((model[1], "wait"), AttributeError),
        ((model[1], "bias"), ValueError),
        ((model[0], "weight"), ValueError),
        ((model[1], 3), TypeError),
        (model[1], TypeError),
    ):
        for call in (lnprune.local_structured, lnprune.global_structured):
            for permanent in (False, True):
                with pytest.raises(error, match=r"^(1\.|parameter 1)"):
                    call([(model[0], "weight"), bad], 0.5, 2, 0, permanent=permanent)
                snapshot.assert_unchanged()


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("taken", ["weight_mask", "weight_orig"])
def test_a_name_that_is_taken(device, position, taken):
    """As ln_structured, which says which attribute it is."""
    model = nn.Sequential(*(nn.Linear(6, 8, device=device) for _ in range(3)))
    plan = lnprune.rank(model, 2, "out").select(0.25)
    setattr(model[position], taken, 1)
    snapshot = ModelSnapshot(model)
    for call in (local_of(model), plan.apply, lambda: lnprune.global_structured(model, 0.25, 2, "out")):
        with pytest.raises(KeyError, match=taken):
            call()
        snapshot.assert_unchanged()
    delattr(model[position], taken)
    local_of(model)()


def local_of(model):
    return lambda: lnprune.local_structured(model, 0.25, 2, "out")


@pytest.mark.parametrize("position", range(3))
def test_two_hooks_for_one_parameter(device, position):
    """What torch forbids, made by hand."""
    model = nn.Sequential(*(nn.Linear(6, 8, device=device) for _ in range(3)))
    plan = lnprune.rank(model, 2, "out").select(0.25)
    lnprune.local_structured(model, 1, 2, 0)
    (hook,) = model[position]._forward_pre_hooks.values()
    model[position].register_forward_pre_hook(hook)
    snapshot = ModelSnapshot(model)
    for call in (
        local_of(model),
        lambda: lnprune.local_structured(model, 0.25, 2, 0, permanent=True),
        plan.apply,
        lambda: plan.apply(permanent=True),
        lambda: lnprune.remove_all(model),
    ):
        with pytest.raises(AssertionError, match="multiple pruning hooks"):
            call()
        snapshot.assert_unchanged()


def test_a_method_that_fails_in_its_container(device):
    """A container of the user's own combines the masks, and raises."""

    class Failing(stock.PruningContainer):
        def compute_mask(self, t, default_mask):
            raise MemoryError("on purpose")

    for position in range(3):
        model = nn.Sequential(*(nn.Linear(6, 8, device=device) for _ in range(3)))
        lnprune.local_structured(model, 1, 2, 0)
        ((key, hook),) = model[position]._forward_pre_hooks.items()
        model[position]._forward_pre_hooks[key] = Failing(hook)
        snapshot = ModelSnapshot(model)
        for permanent in (False, True):
            with pytest.raises(MemoryError, match="on purpose"):
                lnprune.local_structured(model, 0.25, 2, 0, permanent=permanent)
            snapshot.assert_unchanged()


def test_overlapping_weights(device):
    """Torch refuses to write some of them in place: then all others are as before too."""

    def bare(weight):
        module = nn.Module()
        module.weight = nn.Parameter(weight)
        return module

    for keep_backup in (False, True):
        gaps = torch.randn(4, 12, device=device)[:, ::2]
        overlapping = torch.randn(9, device=device).as_strided((4, 6), (1, 1))
        model = nn.ModuleList(
            [bare(gaps), nn.Linear(6, 4, device=device), bare(overlapping), bare(gaps.clone())]
        )
        lnprune.ln_structured(model[3], "weight", 1, 2, 0)
        plan = lnprune.rank([(module, "weight") for module in model], 2, 0).select(2)
        snapshot = ModelSnapshot(model)
        before = [bits(module.weight) for module in model]
        try:
            plan.apply(permanent=True, keep_backup=keep_backup)
        except RuntimeError:
            snapshot.assert_unchanged()
        else:
            keep = plan.keep["2.weight"].to(device)
            assert torch.equal(bits(model[2].weight[keep]), before[2].view(4, -1)[keep.cpu()].flatten())


@pytest.mark.parametrize("call", ["local", "apply", "remove_all"])
def test_a_weight_that_autograd_never_knew(device, call):
    """One made in inference mode, whose storage nothing may write outside: it gets values of its own."""
    with torch.inference_mode():
        unknown = nn.Linear(6, 8, device=device)
    model = nn.Sequential(nn.Linear(4, 6, device=device), unknown, nn.Linear(8, 4, device=device))
    lnprune.ln_structured(model[1], "weight", 1, 2, 0)
    if call == "remove_all":
        lnprune.ln_structured(model[0], "weight", 1, 2, 0)
    plan = lnprune.rank(model, 2, "out").select(0.5)
    before = [model[i].weight.detach().clone() for i in range(3)]
    if call == "local":
        lnprune.local_structured(model, 0.5, 2, "out", permanent=True)
    elif call == "apply":
        plan.apply(permanent=True)
    else:
        lnprune.remove_all(model)
    assert not lnprune.is_pruned(model)
    for i, name in enumerate(plan.keep):
        keep = torch.ones(len(before[i]), dtype=torch.bool) if call == "remove_all" else plan.keep[name]
        expected = before[i] * keep.to(device, before[i].dtype)[:, None]
        assert torch.equal(model[i].weight, expected), name
        assert isinstance(model[i].weight, nn.Parameter)


def test_calls_go_on_after_a_failure(prepared, make, device, monkeypatch):
    """Nothing of a failed call is left in the library either: the same call succeeds."""
    model, call = prepared(make)
    with monkeypatch.context() as patch:
        for name in NATIVE:
            nonempty_calls(patch, name, 0, MemoryError)
        snapshot = ModelSnapshot(model)
        try:
            call()
        except MemoryError:
            snapshot.assert_unchanged()
        else:
            assert not REACHED[prepared.name]
            return
    call()
    with pytest.raises(AssertionError):
        snapshot.assert_unchanged()
