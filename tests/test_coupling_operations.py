"""Each operation in the table of coupled channels, called by its own name: right, and seen by its rule."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lnprune
from lnprune.removal.rules import RULES
from tests.small_models import CASES, Net
from tests.test_coupling import difference, randomised

aten = torch.ops.aten
# Two layers that make and read 8 channels, and inputs of the first, by the number of positions' dims.
LAYERS: list[Callable[[int, int], nn.Module]] = [
    nn.Linear,
    lambda i, o: nn.Conv1d(i, o, 1),
    lambda i, o: nn.Conv2d(i, o, 1),
    lambda i, o: nn.Conv3d(i, o, 1),
]
SHAPES = [(4, 6), (2, 6, 6), (2, 6, 6, 6), (2, 6, 4, 4, 4)]
BACKWARD = torch.arange(8).flip(0).expand(4, 8)
INDEX = torch.tensor([2, 0, 1, 3])


def model_of(function, dims=0):
    """A model with a function of channels between its layers; a parameter of their size is its ``p``."""
    layer = LAYERS[dims]

    @torch.inference_mode()  # in which composite operations arrive as themselves
    def forward(net, x):
        return net.o(function(net.a(x), net.p))

    return Net(forward, a=layer(6, 8), o=layer(8, 3), p=nn.Parameter(torch.rand(8) + 0.5))


# By the name of an operation: the dims of positions, and a function that calls it, of channels and of a
# parameter that has one element for each. All 8 channels can go.
KEPT: dict[str, tuple[int, Callable]] = {
    "ones": (0, lambda x, p: x + aten.ones(x.shape[1:])),
    "full": (0, lambda x, p: x * aten.full(x.shape[1:], 2.0)),
    "new_ones": (0, lambda x, p: x + aten.new_ones(x, [x.shape[1]])),
    "new_full": (0, lambda x, p: x + aten.new_full(x, [x.shape[1]], 2.0)),
    "scalar_tensor": (0, lambda x, p: x * aten.scalar_tensor(2.0)),
    "empty_strided": (0, lambda x, p: torch.where(x == x, x, aten.empty_strided([x.shape[1]], [1]))),
    "new_empty_strided": (
        0,
        lambda x, p: torch.where(x == x, x, aten.new_empty_strided(x, [x.shape[1]], [1])),
    ),
    "ones_like": (0, lambda x, p: x + aten.ones_like(x)),
    "full_like": (0, lambda x, p: x + aten.full_like(x, 2.0)),
    "empty_like": (0, lambda x, p: torch.where(x == x, x, aten.empty_like(x))),
    "rand_like": (0, lambda x, p: x + 0 * aten.rand_like(x)),
    "randn_like": (0, lambda x, p: x + 0 * aten.randn_like(x)),
    "randint_like": (0, lambda x, p: x + 0 * aten.randint_like(x, 2)),
    "bernoulli": (0, lambda x, p: x + 0 * aten.bernoulli(x.sigmoid())),
    "native_dropout": (0, lambda x, p: aten.native_dropout(x, 0.5, False)[0]),
    "hardsigmoid": (0, lambda x, p: aten.hardsigmoid(x)),
    "nan_to_num": (0, lambda x, p: aten.nan_to_num(x)),
    "_native_batch_norm_legit": (
        2,
        lambda x, p: aten._native_batch_norm_legit.no_stats(x, p, None, True, 0.1, 1e-5)[0],
    ),
    "_native_batch_norm_legit_no_training": (
        2,
        lambda x, p: aten._native_batch_norm_legit_no_training(x, p, None, p - p, p * p, 0.1, 1e-5)[0],
    ),
    "_batch_norm_no_update": (
        2,
        lambda x, p: aten._batch_norm_no_update(x, p, None, p - p, p * p, 0.1, 1e-5)[0],
    ),
    "_unsafe_index": (2, lambda x, p: aten._unsafe_index(x, [None, None, INDEX])),
    "index_copy": (2, lambda x, p: aten.index_copy(x, 2, INDEX, x[:, :, :4])),
    "index_fill": (2, lambda x, p: aten.index_fill(x, 2, INDEX, 0.0)),
    "_reshape_alias": (2, lambda x, p: aten._reshape_alias(x, x.shape, x.stride())),
    "alias": (0, lambda x, p: aten.alias(x)),
    "lift": (0, lambda x, p: aten.lift(x)),
    "resolve_conj": (0, lambda x, p: aten.resolve_conj(x)),
    "resolve_neg": (0, lambda x, p: aten.resolve_neg(x)),
    "split_with_sizes": (2, lambda x, p: aten.split_with_sizes(x, [2, 4], 2)[1]),
    "unsafe_chunk": (2, lambda x, p: aten.unsafe_chunk(x, 2, 2)[1]),
    "unsafe_split_with_sizes": (2, lambda x, p: aten.unsafe_split_with_sizes(x, [2, 4], 2)[1]),
    "unfold": (1, lambda x, p: aten.unfold(x, 2, 2, 2).sum(dim=3)),
    "dot": (0, lambda x, p: x * aten.dot(x[0], p)),
    "triu": (2, lambda x, p: aten.triu(x)),
    "amin": (2, lambda x, p: aten.amin(x, [2], True)),
    "prod": (2, lambda x, p: aten.prod(x, 2, True)),
    "var": (2, lambda x, p: aten.var(x, [2], keepdim=True)),
    "std": (2, lambda x, p: aten.std(x, [2], keepdim=True)),
    "std_mean": (2, lambda x, p: aten.std_mean(x, [2], keepdim=True)[1]),
    "any": (2, lambda x, p: x * aten.any(x > 0, 2, True)),
    "all": (2, lambda x, p: x * aten.all(x > 0, 2, True)),
    "argmin": (2, lambda x, p: x * aten.argmin(x, 2, True)),
    "min": (2, lambda x, p: aten.min(x, 2, True)[0]),
    "norm": (2, lambda x, p: aten.norm(x, 2, [2], True)),
    "median": (2, lambda x, p: aten.median(x, 2, True)[0]),
    "aminmax": (2, lambda x, p: aten.aminmax(x, dim=2, keepdim=True)[0]),
    "nansum": (2, lambda x, p: aten.nansum(x, [2], True)),
    "count_nonzero": (2, lambda x, p: x * aten.count_nonzero(x, 2).unsqueeze(2)),
    "cumprod": (2, lambda x, p: aten.cumprod(x, 2)),
    "kthvalue": (2, lambda x, p: aten.kthvalue(x, 2, 2, True)[0]),
    "logcumsumexp": (2, lambda x, p: x * aten.logcumsumexp(x, 2)),
    "cummax": (2, lambda x, p: aten.cummax(x, 2)[0]),
    "cummin": (2, lambda x, p: aten.cummin(x, 2)[0]),
    "avg_pool3d": (3, lambda x, p: aten.avg_pool3d(x, 2)),
    "max_pool1d": (1, lambda x, p: aten.max_pool1d(x, 2)),
    "max_pool1d_with_indices": (1, lambda x, p: aten.max_pool1d_with_indices(x, 2)[0]),
    "adaptive_avg_pool1d": (1, lambda x, p: aten.adaptive_avg_pool1d(x, 2)),
    "adaptive_avg_pool3d": (3, lambda x, p: aten.adaptive_avg_pool3d(x, [2, 2, 2])),
    "_adaptive_avg_pool2d": (2, lambda x, p: aten._adaptive_avg_pool2d(x, [2, 2])),
    "_adaptive_avg_pool3d": (3, lambda x, p: aten._adaptive_avg_pool3d(x, [2, 2, 2])),
    "adaptive_max_pool1d": (1, lambda x, p: aten.adaptive_max_pool1d(x, 2)[0]),
    "adaptive_max_pool2d": (2, lambda x, p: aten.adaptive_max_pool2d(x, 2)[0]),
    "adaptive_max_pool3d": (3, lambda x, p: aten.adaptive_max_pool3d(x, 2)[0]),
    "upsample_nearest1d": (1, lambda x, p: aten.upsample_nearest1d(x, [9])),
    "upsample_nearest3d": (3, lambda x, p: aten.upsample_nearest3d(x, [5, 5, 5])),
    "_upsample_nearest_exact1d": (1, lambda x, p: aten._upsample_nearest_exact1d(x, [9])),
    "_upsample_nearest_exact2d": (2, lambda x, p: aten._upsample_nearest_exact2d(x, [9, 9])),
    "_upsample_nearest_exact3d": (3, lambda x, p: aten._upsample_nearest_exact3d(x, [5, 5, 5])),
    "upsample_linear1d": (1, lambda x, p: aten.upsample_linear1d(x, [9], False)),
    "upsample_bicubic2d": (2, lambda x, p: aten.upsample_bicubic2d(x, [9, 9], False)),
    "upsample_trilinear3d": (3, lambda x, p: aten.upsample_trilinear3d(x, [5, 5, 5], False)),
    "_upsample_bilinear2d_aa": (2, lambda x, p: aten._upsample_bilinear2d_aa(x, [9, 9], False)),
    "_upsample_bicubic2d_aa": (2, lambda x, p: aten._upsample_bicubic2d_aa(x, [9, 9], False)),
    "reflection_pad1d": (1, lambda x, p: aten.reflection_pad1d(x, [1, 2])),
    "reflection_pad3d": (3, lambda x, p: aten.reflection_pad3d(x, [1, 1, 1, 1, 1, 1])),
    "replication_pad1d": (1, lambda x, p: aten.replication_pad1d(x, [1, 2])),
    "replication_pad2d": (2, lambda x, p: aten.replication_pad2d(x, [1, 2, 1, 2])),
    "replication_pad3d": (3, lambda x, p: aten.replication_pad3d(x, [1, 1, 1, 1, 1, 1])),
    "grid_sampler_2d": (
        2,
        lambda x, p: aten.grid_sampler_2d(x, torch.zeros(2, 3, 3, 2).to(x), 0, 0, False),
    ),
    "addmv": (0, lambda x, p: x * aten.addmv(torch.zeros(4).to(x), x, p).unsqueeze(1)),
    "baddbmm": (
        1,
        lambda x, p: x * aten.baddbmm(torch.zeros(2, 6, 1).to(x), x.mT, p.expand(2, 1, -1).mT).mT,
    ),
}
# What it crosses or takes by number cannot go, with the reason.
REFUSED: dict[str, tuple[int, Callable, str]] = {
    "take_along_dim": (0, lambda x, p: aten.take_along_dim(x, BACKWARD, 1), ""),
    "gather": (0, lambda x, p: aten.gather(x, 1, BACKWARD), ""),
    "scatter": (0, lambda x, p: aten.scatter(x, 1, BACKWARD, x), ""),
    "scatter_add": (0, lambda x, p: aten.scatter_add(x, 1, BACKWARD, x), ""),
    "scatter_reduce": (0, lambda x, p: aten.scatter_reduce(x, 1, BACKWARD, x, "sum"), ""),
    "index_copy": (0, lambda x, p: aten.index_copy(x, 1, INDEX, x[:, :4]), ""),
    "index_fill": (0, lambda x, p: aten.index_fill(x, 1, INDEX, 0.0), ""),
    "cumprod": (0, lambda x, p: aten.cumprod(x, 1), "cross"),
    "cummax": (0, lambda x, p: aten.cummax(x, 1)[0], "cross"),
    "cummin": (0, lambda x, p: aten.cummin(x, 1)[0], "cross"),
    "logcumsumexp": (0, lambda x, p: aten.logcumsumexp(x, 1), "cross"),
    "sort": (0, lambda x, p: aten.sort(x, 1)[0], "cross"),
    "_log_softmax": (0, lambda x, p: aten._log_softmax(x, 1, False), "cross"),
    "log_softmax": (0, lambda x, p: aten.log_softmax(x, 1), "cross"),
    "_safe_softmax": (0, lambda x, p: aten._safe_softmax(x, 1), "cross"),
    **{
        name: (0, lambda x, p, name=name: x * getattr(aten, name)(x, [1], keepdim=True), "cross")
        for name in ("var", "std", "mean", "amax", "amin")
    },
    "index_reduce": (0, lambda x, p: aten.index_reduce(x, 1, INDEX, x[:, :4], "mean"), ""),
    "fill": (0, lambda x, p: x + aten.fill(x, 2.0), "without channels"),
    "zero": (0, lambda x, p: x + aten.zero(x), "without channels"),
    "equal": (0, lambda x, p: x * (1 + aten.equal(x, x)), "by Python"),
    "bincount": (0, lambda x, p: x * p + aten.bincount((p * 4).long())[:1], "by Python"),
    "_fused_rms_norm": (0, lambda x, p: aten._fused_rms_norm(x, [8], p, 1e-5)[0], "cross"),
}


# For other devices than the CPU of the tests; their rules are those of operations that are tested.
OTHERS = {
    "_fused_dropout": "native_dropout",
    "cudnn_batch_norm": "native_batch_norm",
    "_batch_norm_with_update": "native_batch_norm",
    "_convolution": "convolution",
    "convolution_overrideable": "convolution",
}


@pytest.mark.parametrize("name", OTHERS)
def test_rules_of_other_devices_are_those_of_the_cpu(name):
    assert RULES[name].function is RULES[OTHERS[name]].function


@pytest.mark.parametrize("name", RULES)
def test_there_is_such_an_operation(name):
    assert hasattr(aten, name) or hasattr(aten, f"{name}_")


def ran(model, dims, name, monkeypatch):
    """The coupling by labels alone, of a model in which the operation met its rule."""
    called = []
    rule = RULES[name]

    def noted(*args, **kwargs):
        called.append(name)
        return rule.function(*args, **kwargs)

    monkeypatch.setitem(RULES, name, rule._replace(function=noted))
    torch.manual_seed(0)
    model = randomised(model.double().eval())
    inputs = torch.randn(SHAPES[dims], dtype=torch.float64)
    coupling = lnprune.couple(model, inputs, check=False)
    assert called
    return model, inputs, coupling


@pytest.mark.parametrize("name", KEPT)
def test_channels_go_through_it(name, monkeypatch):
    dims, function = KEPT[name]
    model, inputs, coupling = ran(model_of(function, dims), dims, name, monkeypatch)
    assert [group.channels for group in coupling.groups] == [8], str(coupling)
    for seed in range(3):
        assert difference(model, coupling.groups, (inputs,), seed) < 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_channels_cannot_go_through_it(name, monkeypatch):
    dims, function, reason = REFUSED[name]
    _, _, coupling = ran(model_of(function, dims), dims, name, monkeypatch)
    assert [group.channels for group in coupling.groups] == [], str(coupling)
    reasons = {each.reason for each in coupling.refused if each.parameter == "a.weight" and each.dim == 0}
    assert reasons, str(coupling)
    assert any(reason in each for each in reasons), str(coupling)


def test_of_a_shuffle_the_same_channels_of_each_half_go_together():
    torch.manual_seed(0)
    model = randomised(model_of(lambda x, p: aten.native_channel_shuffle(x, 2), 2).double().eval())
    inputs = torch.randn(SHAPES[2], dtype=torch.float64)
    (group,) = lnprune.couple(model, inputs).groups
    assert group.channels == 4
    assert group.members[0].channels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert difference(model, [group], (inputs,)) < 1e-12


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_found_by_trying])
def test_composite_operations_have_rules_that_say_the_same(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().eval()
    model.forward = torch.inference_mode()(model.forward)
    coupling = lnprune.couple(model, torch.randn(case.shape), check=False)
    assert sum(group.channels for group in coupling.groups) == case.channels, str(coupling)
