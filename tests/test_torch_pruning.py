"""LpImportance: Torch-Pruning's pruners choose with it as with their own, and it sums in float64."""

import importlib
import math
import sys

import pytest
import torch
from torch import nn

import lnprune
from benchmarks.resnet50 import resnet50
from tests.small_models import CASES
from tests.test_coupled_plans import joined
from tests.test_coupling import residual
from tests.test_library_models import torchvision_models

torch_pruning = pytest.importorskip("torch_pruning")

from lnprune.integrations.torch_pruning import LpImportance  # noqa: E402  # where Torch-Pruning is there

NAMES = ["residual", "batch norm", "cat", "depthwise", "flatten", "transposed"]
MODELS = {name: (CASES[name].make, CASES[name].shape) for name in NAMES}
MODELS |= {"stream": (residual, (2, 3)), "joined": (joined, (2, 3, 8, 8))}
THEIRS = torch_pruning.importance.GroupMagnitudeImportance


def grouped():
    """Convolutions in groups on both sides of a layer, whose input weights stand for several channels."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3))


MODELS["grouped"] = (grouped, (1, 3, 9, 9))


def normed():
    """A stream of linear layers with a layer norm and a bias on it."""
    return nn.Sequential(nn.Linear(4, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 5))


MODELS["layer norm"] = (normed, (2, 4))


def groups_of(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().eval()
    for module in model.modules():  # scales that all are 1 would rank nothing
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) and module.weight is not None:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.randn(shape), verbose=False)
    return list(graph.get_all_groups())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": 1, "bias": True},
        {"p": 3, "group_reduction": "sum", "normalizer": None},
        {"group_reduction": "max", "normalizer": "max"},
        {"group_reduction": "prod", "normalizer": "sum"},
        {"group_reduction": "first", "normalizer": "gaussian"},
        {"group_reduction": "gate", "normalizer": "lamp"},
        {"normalizer": "sentinel_0.5", "target_types": [nn.Linear]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_importances_are_those_of_torch_pruning(name, options):
    groups = groups_of(name)
    assert groups
    for group in groups:
        found, expected = LpImportance(**options)(group), THEIRS(**options)(group)
        if expected is None:
            assert found is None
        else:
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0, 0.5, 1, 2, 7, -1, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_are_made_in_float64(p, dtype):
    first, last = nn.Linear(300, 5), nn.Linear(5, 7)
    model = nn.Sequential(first, nn.ReLU(), last)
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.randn(1, 300), verbose=False)
    group = graph.get_pruning_group(first, torch_pruning.prune_linear_out_channels, list(range(5)))
    nn.init.normal_(first.weight, std=20)
    first.weight.data[:, ::7] = 0
    model.to(dtype)
    found = LpImportance(p=p, group_reduction="sum", normalizer=None)(group)
    expected = torch.zeros(5, dtype=torch.float64)
    for channels in (first.weight, last.weight.t()):
        sizes = channels.detach().double().abs()
        if p == 0:
            expected += (sizes != 0).sum(1)
        elif math.isinf(p):
            expected += sizes.amax(1) if p > 0 else sizes.amin(1)
        else:
            expected += sizes.pow(p).sum(1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


def pruned(make, inputs, importance, ratio, dtype, heads=lambda model: {}, **options):
    """The state dict of a model after a step of Torch-Pruning's pruner."""
    torch.manual_seed(0)
    model = make().to(dtype)
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        torch.randn(inputs, dtype=dtype),
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=[each for each in model.modules() if getattr(each, "out_features", 0) == 1000],
        num_heads=heads(model),
        **options,
    )
    before = sum(tensor.numel() for tensor in model.state_dict().values())
    pruner.step()
    after = sum(tensor.numel() for tensor in model.state_dict().values())
    assert after < 0.8 * before
    return model.state_dict()


def assert_same(make, inputs, p, **options):
    """Theirs is given the same weights in float64: it adds up in the dtype of the weights, and could choose
    another channel at the cut.
    """
    found = pruned(make, inputs, LpImportance(p=p), 0.4, torch.float32, **options)
    expected = pruned(make, inputs, THEIRS(p=p), 0.4, torch.float64, **options)
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(tensor.to(expected[name].dtype), expected[name]) for name, tensor in found.items()
    )


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("p", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pruner_leaves_the_same_resnet50(p, scope):
    assert_same(resnet50, (1, 3, 64, 64), p, global_pruning=scope == "global")


def vit_tiny():
    torchvision_models()  # timm needs them
    import timm

    return timm.create_model("vit_tiny_patch16_224").eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("p", [1, 2])
def test_a_pruner_leaves_the_same_vit_tiny(p, scope):
    def heads(model):
        return {each.qkv: each.num_heads for each in model.modules() if hasattr(each, "qkv")}

    assert_same(vit_tiny, (1, 3, 224, 224), p, heads=heads, global_pruning=scope == "global")


@pytest.mark.parametrize("p", ["fro", "nuc", None, 1j, math.nan])
def test_an_order_that_is_no_real_number_is_refused(p):
    with pytest.raises(ValueError, match=r"^expected p to be a real number, the order of the norm, got"):
        LpImportance(p=p)


def test_without_torch_pruning_the_import_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.delitem(sys.modules, "lnprune.integrations.torch_pruning")
    with pytest.raises(
        ImportError, match=r'"torch-pruning" brings: pip install "lnprune\[torch-pruning\]"$'
    ):
        importlib.import_module("lnprune.integrations.torch_pruning")


def test_taylor_scores_are_theirs_for_a_layer_by_itself():
    """The recipe of docs/scores.md: |weight * gradient| as scores, ranked by order 1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(150, 5)
    )
    inputs = torch.randn(2, 3, 9, 9)
    model(inputs).square().sum().backward()
    scores = {name: p.detach() * p.grad for name, p in model.named_parameters() if p.dim() > 1}
    found = lnprune.rank(model, 1, "out", scores).norms
    graph = torch_pruning.DependencyGraph().build_dependency(model, inputs)
    importance = torch_pruning.importance.GroupTaylorImportance(group_reduction="first", normalizer=None)
    names = {module: name for name, module in model.named_modules()}
    groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    assert len(groups) == 3
    for group in groups:
        norms = found[f"{names[group[0].dep.layer]}.weight"]
        torch.testing.assert_close(importance(group).double(), norms, rtol=1e-5, atol=1e-6)
