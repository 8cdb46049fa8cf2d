"""Weights in unusual places: other default devices, devices without float64, shards, memory of files."""

import mmap
import subprocess
import sys

import pytest
import torch
from module_state import ModelSnapshot, assert_same_state, twins
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore")


def linears():
    return nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 12))


# The default device.

SELECTIONS = {
    "local": {},
    "global": {"scope": "global", "normalize": "layer"},
    "blocks": {"scope": "global", "of": "parameters", "group_size": 2, "multiple_of": 4},
    "nothing": {"scope": "global", "min_channels": 0, "multiple_of": 64},
}


def whole_life(model, options, folder):
    """All that a plan is for, masked and permanent, twice."""
    texts = []
    for _ in range(2):
        plan = lnprune.rank(model, 2, "out").select(0.5, **options)
        texts += [str(plan), repr(plan), str(plan.to_dict())]
        plan.save(folder / "plan.json")
        plan.plot(folder / "plan.png")
        plan.apply(bias=True).undo()
        plan.apply(permanent=True, bias=True, keep_backup=True).undo()
        lnprune.load_plan(folder / "plan.json", model).apply(permanent=True)
    for n in (2, torch.tensor(3.0, device="cpu")):
        lnprune.ln_structured(model[0], "weight", 0.25, n, 1)
        lnprune.local_structured(model, 1, n, "in")
    lnprune.remove_all(model)
    return texts


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
def test_another_default_device(options, tmp_path):
    model, twin = twins(linears)
    expected = whole_life(twin, options, tmp_path)
    with torch.device("meta"):
        assert whole_life(model, options, tmp_path) == expected
    assert_same_state(model, twin)


# Devices without float64.


class OnMps(torch.Tensor):
    """A tensor that says it lies on Apple's GPU, and has, like it, no float64."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device="mps", strides=values.stride()
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        if kwargs.get("dtype") is torch.float64 and device in (None, torch.device("mps")):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        inner = [arg.values if isinstance(arg, cls) else arg for arg in args]
        result = function(*inner, **kwargs)
        if device == torch.device("cpu") or not isinstance(result, torch.Tensor):
            return result
        return cls(result)


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(reference, "_has_float64", lambda device_type: device_type != "mps")


@pytest.mark.parametrize("n", [0, 1, 2, 3, float("inf")])
def test_norms_on_a_device_without_float64(without_float64, n):
    values = torch.randn(6, 8)
    norms = lnprune.channel_norms(OnMps(values), n, 0)
    assert norms.device.type == "cpu"
    assert torch.equal(norms, reference.channel_norms(values, n, 0))
    keep = lnprune.channel_mask(OnMps(values), 2, n, 0)
    assert torch.equal(keep, lnprune.channel_mask(values, 2, n, 0))


def test_what_is_asked_of_a_device():
    assert reference._has_float64("cpu")
    assert reference._has_float64("meta")


# Wrappers.


class Scaled(torch.Tensor):
    """A tensor whose values lie in another one."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device=values.device
        )

    def __init__(self, values):
        self.values = values

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Scaled(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = lambda each: each.values if isinstance(each, Scaled) else each  # noqa: E731
        made = func(*map(unwrap, args), **(kwargs or {}))
        return (
            Scaled(made) if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) else made
        )


def test_wrappers_are_not_changed_for_good_in_silence():
    calls = {
        "local": lambda made: lnprune.local_structured(made, 0.5, 2, "out", permanent=True),
        "global": lambda made: lnprune.global_structured(made, 0.5, 2, "out", permanent=True),
        "select": lambda made: lnprune.rank(made, 2, "out").select(0.5).apply(permanent=True),
    }
    for call in calls.values():
        model = nn.Sequential(nn.Linear(6, 8))
        values = torch.randn(8, 6)
        model[0].weight = nn.Parameter(Scaled(values), requires_grad=False)
        before, parameters = values.clone(), dict(model[0].named_parameters())
        with pytest.raises(RuntimeError, match=r"0\.weight: expected a tensor that holds its own values"):
            call(model)
        assert torch.equal(values, before)
        assert dict(model[0].named_parameters()) == parameters
        assert not lnprune.is_pruned(model)


# Models in parallel.

DISTRIBUTED = """
import torch
import torch.distributed as dist
from torch import nn
import lnprune

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

# The names of a parallel model are those of the bare one.
bare = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
parallel = nn.parallel.DistributedDataParallel(bare)
assert lnprune.rank(parallel, 2, "out").names == ["0.weight", "2.weight"]
plan = lnprune.rank(torch.compile(parallel), 2, "out").select(0.5)
assert plan.apply().keep.keys() == {"0.weight", "2.weight"}
assert lnprune.is_pruned(bare[2])
dist.destroy_process_group()
"""


def test_names_of_a_parallel_model():
    arguments = [sys.executable, "-c", DISTRIBUTED]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# Memory that cannot be written.


def read_only(shape, folder):
    """A float32 tensor on a mapping of a file."""
    path = folder / "weight"
    path.write_bytes(torch.randn(shape).numpy().tobytes())
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return torch.frombuffer(mapping, dtype=torch.float32).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_pruning_in_place_of_a_read_only_mapping(tmp_path, dtype):
    """A write would end the process."""
    model = linears()
    weight = read_only((8, 12), tmp_path)
    model[1].weight = nn.Parameter(
        weight if dtype is torch.float32 else torch.view_as_complex(weight.view(8, 6, 2))
    )
    calls = {
        "local": lambda: lnprune.local_structured(model, 2, 2, 0, permanent=True),
        "global": lambda: lnprune.global_structured(model, 6, 2, 0, permanent=True),
        "apply": lambda: lnprune.rank(model, 2, 0).select(2).apply(permanent=True, keep_backup=True),
    }
    for call in calls.values():
        snapshot = ModelSnapshot(model)
        with pytest.raises(RuntimeError, match=r"^1\.weight: expected memory that can be written"):
            call()
        snapshot.assert_unchanged()


def test_masks_of_a_read_only_mapping(tmp_path):
    """They are memory of their own, and so is the weight that remove_all leaves, as torch's remove does."""
    weight = read_only((8, 10), tmp_path)
    module = nn.Linear(10, 8)
    module.weight = nn.Parameter(weight)
    lnprune.ln_structured(module, "weight", 2, 2, 0)
    masked = module.weight.detach().clone()
    lnprune.remove_all(module)
    assert torch.equal(module.weight, masked)
    addresses = [module.weight.data_ptr(), weight.data_ptr()]
    assert ops.first_unwritable(addresses) == 1
    assert ops.first_unwritable(addresses[:1]) == 1


# TorchScript.


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 4))])
def test_modules_of_torchscript(script):
    module = script(Wrapped())
    pairs = [(module.inner, "weight")]
    for call in (
        lambda: lnprune.ln_structured(module.inner, "weight", 1, 2, 0),
        lambda: lnprune.LnStructured.apply(module.inner, "weight", 1, 2, 0),
        lambda: lnprune.local_structured(pairs, 1, 2, 0),
        lambda: lnprune.local_structured(pairs, 1, 2, 0, permanent=True),
        lambda: lnprune.rank(pairs, 2, 0),
    ):
        with pytest.raises(RuntimeError, match="Can't add a new parameter after ScriptModule construction"):
            call()
    with pytest.raises(RuntimeError, match="Can't add a new parameter after ScriptModule construction"):
        stock.ln_structured(torch.jit.script(Wrapped()).inner, "weight", 1, 2, 0)
