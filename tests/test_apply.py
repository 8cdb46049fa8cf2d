"""Plan.apply and Plan.undo: what they install or write, and that the way back leads to the same bits."""

import math
from contextlib import nullcontext

import cases
import pytest
import torch
from module_state import (
    DEVICES,
    ModelSnapshot,
    assert_same_state,
    bits,
    twins,
)
from torch import nn
from torch.nn.utils import prune as stock

import lnprune

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore"),
]

INFINITY = math.inf


def bare(weight, requires_grad=True):
    """A module with this weight between two others."""
    module = nn.Module()
    module.register_parameter("before", nn.Parameter(torch.randn(2)))
    module.weight = nn.Parameter(weight, requires_grad=requires_grad)
    module.register_parameter("after", nn.Parameter(torch.randn(2)))
    return module


def pairs_of(model):
    return [(module, "weight") for module in model]


def linears(device="cpu"):
    return nn.Sequential(*(nn.Linear(*s, device=device) for s in ((10, 8), (8, 12), (12, 8))))


def convolutions(device="cpu"):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, bias=False), nn.ConvTranspose2d(6, 4, 3))
    return model.to(device=device, memory_format=torch.channels_last)


def large(device="cpu"):
    return nn.Sequential(nn.Linear(520, 512, device=device), nn.Linear(512, 260, device=device))


MODELS = {"linears": linears, "convolutions": convolutions, "large": large}


def soften(module):
    """A mask with values of its own, -0.0 and channels that are gone among them."""
    mask = torch.rand_like(module.weight).detach() + 0.5
    mask[0], mask[1, 0], mask[2] = 0, -0.0, -mask[2]
    stock.custom_from_mask(module, "weight", mask)


def container(module):
    lnprune.ln_structured(module, "weight", 1, 2, 0)
    lnprune.ln_structured(module, "weight", 0.25, 1, 1)


PREPARED = {
    "fresh": lambda module: None,
    "pruned": lambda module: lnprune.ln_structured(module, "weight", 2, 2, 0),
    "container": container,
    "identity": lambda module: stock.identity(module, "weight"),
    "soft mask": soften,
    "bias": lambda module: module.bias is not None and stock.random_unstructured(module, "bias", 1),
}


@pytest.fixture(params=list(PREPARED))
def prepare(request):
    """Turns a factory into one of models whose modules were pruned before, with hooks of others."""

    def prepared(make):
        def build():
            model = make()
            for module in model:
                module.register_forward_pre_hook(noted)
                PREPARED[request.param](module)
                module.register_forward_pre_hook(noted)
            return model

        return build

    return prepared


def noted(module, inputs):
    """A hook of the user's."""


@pytest.fixture(params=list(MODELS))
def make(request, device):
    return lambda: MODELS[request.param](device)


def select(model, amount=0.4, dim="out", **options):
    return lnprune.rank(model, 2, dim).select(amount, **{"scope": "global", **options})


def expected_mask(keep, original, old_mask, dim):
    """By torch: ones of the original's memory format, or the old mask in contiguous format."""
    shape = [1] * original.dim()
    shape[dim] = -1
    flags = keep.to(original.device).reshape(shape)
    old = (
        torch.ones_like(original, requires_grad=False)
        if old_mask is None
        else old_mask.detach().clone(memory_format=torch.contiguous_format)
    )
    return old * torch.empty_like(old).copy_(flags)


def states_by_identity(model):
    """Parameters, masks and hooks with their keys, in order, for a comparison by identity."""
    return [
        [
            *((key, id(value)) for key, value in module._parameters.items()),
            *((key, id(value)) for key, value in module._buffers.items()),
            *((key, id(value)) for key, value in module._forward_pre_hooks.items()),
            *(id(inner) for hook in module._forward_pre_hooks.values() for inner in inner_methods(hook)),
        ]
        for module in model.modules()
    ]


def inner_methods(hook):
    return hook._pruning_methods if isinstance(hook, stock.PruningContainer) else ()


def masks_and_hooks(model):
    return [key for key, _ in model.named_buffers()], lnprune.is_pruned(model)


# Masks.


def test_masks_are_the_flags_written(make, prepare, device):
    model, twin = twins(prepare(make))
    plan = select(model)
    assert plan.apply() is plan
    for index, (module, before) in enumerate(zip(model, twin, strict=True)):
        keep, dim = plan.keep[f"{index}.weight"], plan.entries[index].dim
        original = before._parameters.get("weight", before._parameters.get("weight_orig"))
        mask = expected_mask(keep, original, before._buffers.get("weight_mask"), dim)
        assert torch.equal(bits(module.weight_mask), bits(mask))
        assert (module.weight_mask.dtype, module.weight_mask.stride()) == (mask.dtype, mask.stride())
        product = mask * original
        assert torch.equal(bits(module.weight), bits(product))
        assert module.weight.stride() == product.stride()
        assert type(module.weight.grad_fn).__name__ == "MulBackward0"
    assert sum(int((~flags).sum()) for flags in plan.keep.values()) > 0


def test_the_state_is_what_ln_structured_leaves(make, device):
    """With scores that let the loop choose as the plan did."""
    model, twin = twins(make)
    plan = select(model).apply()
    for index, module in enumerate(twin):
        keep, dim = plan.keep[f"{index}.weight"], plan.entries[index].dim
        scores = torch.zeros_like(module.weight, requires_grad=False)
        scores.index_fill_(dim, keep.nonzero().flatten().to(device), 1)
        pruned = int((~keep).sum())
        lnprune.ln_structured(module, "weight", pruned, 2, dim, importance_scores=scores)
    assert_same_state(model, twin)


def test_hooks(make, prepare, device):
    """The last one is torch's, alone or in a container, and renews the weight as it is."""
    model, twin = twins(prepare(make))
    plan = select(model).apply()
    for index, (module, before) in enumerate(zip(model, twin, strict=True)):
        hook = last_hook(module)
        repeated = "weight_mask" in before._buffers
        assert type(hook) is (stock.PruningContainer if repeated else stock.LnStructured)
        inner = hook[-1] if repeated else hook
        assert type(inner) is stock.LnStructured
        assert list(inner.__dict__) == ["amount", "n", "dim", "_tensor_name"]
        assert (inner.n, inner.dim, inner._tensor_name) == (2, plan.entries[index].dim, "weight")
        weight = bits(module.weight)
        hook(module, ())
        assert torch.equal(bits(module.weight), weight)


def last_hook(module):
    return list(module._forward_pre_hooks.values())[-1]


@pytest.mark.parametrize("permanent", [False, True], ids=["masks", "permanent"])
def test_every_dtype_and_layout(device, permanent):
    for layout in (*cases.DENSE_LAYOUTS, "every_second", "rows_apart"):

        def make(layout=layout):
            weights = [
                cases.LAYOUTS[layout](cases.special_values((8, 6, 2), dtype, device))
                for dtype in cases.NATIVE_DTYPES
            ]
            return nn.ModuleList([bare(weight, weight.element_size() > 1) for weight in weights])

        for dim in (0, 1):
            model, twin = twins(make)
            plan = lnprune.rank(pairs_of(model), 1, dim).select(0.5)
            plan.apply(permanent=permanent)
            for index, (module, before) in enumerate(zip(model, twin, strict=True)):
                keep = plan.keep[f"{index}.weight"].to(device)
                mask = expected_mask(keep, before.weight, None, dim)
                if permanent:
                    lost = (~keep).nonzero().flatten()
                    wanted = cases.bits(before.weight.detach()).index_fill_(dim, lost, 0)
                    assert torch.equal(cases.bits(module.weight.detach()), wanted)
                    assert not masks_and_hooks(module)[1]
                else:
                    assert torch.equal(bits(module.weight_mask), bits(mask))
                    cases.assert_same_bits(module.weight.detach(), (mask * before.weight).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bool], ids=str)
def test_masks_of_other_dtypes(device, dtype):
    """As of scores of another dtype, or set by hand: the new mask is of the weight's."""
    for make in (linears, convolutions, large):
        model = make(device)
        plan = select(model)
        for module in model:
            mask = torch.rand(module.weight.shape, device=device) > 0.2
            stock.custom_from_mask(module, "weight", mask)
            module.weight_mask = mask.to(dtype)
        old = [module.weight_mask for module in model]
        plan.apply()
        for index, module in enumerate(model):
            keep, dim = plan.keep[f"{index}.weight"], plan.entries[index].dim
            expected = expected_mask(keep, module.weight_orig, old[index].to(torch.float32), dim)
            assert module.weight_mask.dtype is torch.float32
            assert torch.equal(module.weight_mask, expected)
            assert torch.equal(module.weight, expected * module.weight_orig)
        plan.undo()
        assert all(module.weight_mask is mask for module, mask in zip(model, old, strict=True))


def test_gradients_flow_through_the_masks(make, device):
    model = make()
    select(model).apply()
    sum((module.weight * 2).sum() for module in model).backward()
    for module in model:
        assert torch.equal(module.weight_orig.grad, 2 * module.weight_mask)


def test_undo_restores_the_very_state(make, prepare, device):
    """The same objects at the same places in the same order; a masked weight is made anew, bit for bit."""
    model, twin = twins(prepare(make))
    before = states_by_identity(model)
    snapshot = ModelSnapshot(model) if not lnprune.is_pruned(model) else None
    plan = select(model)
    for _ in range(2):
        plan.apply()
        assert states_by_identity(model) != before
        assert plan.undo() is plan
        assert states_by_identity(model) == before
        assert_same_state(model, twin)
        if snapshot is not None:
            snapshot.assert_unchanged()


def test_the_restored_model_runs_and_trains(prepare, device):
    model, twin = twins(prepare(lambda: linears(device)))
    select(model).apply().undo()
    inputs = torch.randn(3, 10, device=device)
    for _ in range(2):
        for net in (model, twin):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            optimizer.zero_grad()
            net(inputs).square().sum().backward()
            optimizer.step()
    assert torch.equal(model(inputs), twin(inputs))
    assert_same_state(model, twin)


def test_undo_leaves_what_else_changed(prepare, device):
    model = prepare(lambda: linears(device))()
    plan = select(model).apply()
    called = []
    handles = [module.register_forward_pre_hook(lambda *_: called.append(1)) for module in model]
    model[1].register_forward_hook(lambda *_: called.append(2))
    model[0].extra = nn.Parameter(torch.randn(2, device=device))
    model[2].register_buffer("noise", torch.randn(3, device=device))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    values = {id(parameter): bits(parameter) for parameter in model.parameters()}
    plan.undo()
    assert not model.training
    assert not model[1].training
    assert {id(p) for p in model.parameters()} == set(values)
    for parameter in model.parameters():
        assert torch.equal(bits(parameter), values[id(parameter)])
    assert "noise" in model[2]._buffers
    assert "extra" in model[0]._parameters
    for module in model:
        if "weight_mask" in module._buffers:
            assert torch.equal(bits(module.weight), bits(module.weight_mask * module.weight_orig))
    model(torch.randn(3, 10, device=device))
    assert sorted(called) == [1, 1, 1, 2]
    for handle in handles:
        handle.remove()
    called.clear()
    model(torch.randn(3, 10, device=device))
    assert called == [2]


def test_undo_of_a_half_trained_schedule(device):
    """The optimizer goes on with the very parameters, masked and unmasked."""
    model = linears(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(3, 10, device=device)
    plan = select(model).apply()
    model(inputs).square().sum().backward()
    optimizer.step()
    plan.undo()
    before = bits(model[0].weight)
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()
    assert not torch.equal(bits(model[0].weight), before)


# Permanent.


def test_permanent(make, prepare, device):
    """Zeros in place; masked parameters become what torch's remove makes of them."""
    model, twin = twins(prepare(make))
    parameters = {id(p): (p.data_ptr(), p.stride(), p._version) for p in model.parameters()}
    plan = select(model)
    plan.apply(permanent=True)
    assert not any("weight_mask" in key for key, _ in model.named_buffers())
    for index, (module, before) in enumerate(zip(model, twin, strict=True)):
        keep, dim = plan.keep[f"{index}.weight"], plan.entries[index].dim
        lost = (~keep).nonzero().flatten().to(device)
        wanted = before.weight.detach().clone().index_fill_(dim, lost, 0)
        assert torch.equal(module.weight, wanted)
        pointer, strides, version = parameters[id(module.weight)]
        assert (module.weight.data_ptr(), module.weight.stride()) == (pointer, strides)
        assert module.weight._version > version
        assert type(module.weight) is nn.Parameter
        if "weight_mask" not in before._buffers:
            assert torch.equal(bits(module.weight), bits(wanted))


def test_permanent_is_refused_a_way_back(make, prepare, device):
    model = prepare(make)()
    plan = select(model).apply(permanent=True)
    snapshot = ModelSnapshot(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="without keep_backup=True: the values are gone"):
            plan.undo()
        snapshot.assert_unchanged()


def test_a_backup_brings_the_values_back(make, prepare, device):
    model, twin = twins(prepare(make))
    before = states_by_identity(model)
    plan = select(model)
    for _ in range(2):
        plan.apply(permanent=True, keep_backup=True)
        assert any(not torch.equal(a.weight, b.weight) for a, b in zip(model, twin, strict=True))
        plan.undo()
        assert states_by_identity(model) == before
        assert_same_state(model, twin)


def random_bits(shape, dtype, device):
    """Any bits: NaN of every payload, signalling ones too."""
    elements = math.prod(shape) * dtype.itemsize
    return torch.randint(256, (elements,)).byte().view(dtype).view(shape).to(device)


BACKUP_DTYPES = [*cases.NATIVE_DTYPES, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", BACKUP_DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_a_backup_keeps_every_bit(device, dtype, masked):
    """NaN payloads, -0.0, whatever the memory holds."""
    for layout in ("contiguous", "transposed", "rows_apart"):
        for dim in (0, 1):
            weight = cases.LAYOUTS[layout](torch.randn(8, 6, device=device).to(dtype))
            with torch.no_grad():
                weight.copy_(random_bits((8, 6), dtype, device))
            model = nn.ModuleList([bare(weight, requires_grad=False)])
            if masked:
                stock.identity(model[0], "weight")
            parameter = model[0]._parameters["weight_orig" if masked else "weight"]
            before = raw(parameter)
            scores = {"0.weight": torch.randn(8, 6, device=device)}
            plan = lnprune.rank(pairs_of(model), 2, dim, scores).select(0.5)
            plan.apply(permanent=True, keep_backup=True)
            assert not torch.equal(raw(parameter), before)
            plan.undo()
            assert torch.equal(raw(parameter), before)
            assert model[0]._parameters["weight_orig" if masked else "weight"] is parameter


def raw(tensor):
    """A copy of the bits, without a step that could touch a NaN."""
    return (
        torch.view_as_real(tensor.detach()).clone().view(torch.uint8)
        if tensor.is_complex()
        else bits(tensor)
    )


def test_training_that_keeps_the_zeros_survives_undo(device):
    """Pruned channels come back, kept ones stay as trained; of masked parameters, elements do."""

    def make():
        model = linears(device)
        lnprune.ln_structured(model[2], "weight", 2, 2, 0)
        return model

    model, twin = twins(make)
    plan = select(model, 0.3, scope="local").apply(permanent=True, keep_backup=True)
    gone = [module.weight == 0 for module in model]
    with torch.no_grad():
        for module, zeros in zip(model, gone, strict=True):
            module.weight.add_(1).masked_fill_(zeros, 0)
    plan.undo()
    for module, before, zeros in zip(model, twin, gone, strict=True):
        restored, original = (
            each._parameters.get("weight", each._parameters.get("weight_orig")) for each in (module, before)
        )
        assert zeros.any()
        assert torch.equal(restored, torch.where(zeros, original, original + 1))
    assert torch.equal(model[2].weight, model[2].weight_mask * model[2].weight_orig)


def fill_the_zeros(module):
    with torch.no_grad():
        module.weight.add_(1)


def load_other_values(module):
    module.load_state_dict({key: torch.randn_like(value) for key, value in module.state_dict().items()})


def prune_by_torch(module):
    stock.remove(stock.ln_structured(module, "weight", 2, 2, 1), "weight")


CHANGES_OF_VALUES = {
    "training": (fill_the_zeros, "were replaced since"),
    "load_state_dict": (load_other_values, "were replaced since"),
    "local_structured": (
        lambda module: lnprune.local_structured([(module, "weight")], 2, 2, 1, permanent=True),
        "pruned since",
    ),
    "another plan": (
        lambda module: lnprune.rank([(module, "weight")], 2, 1).select(2).apply(permanent=True),
        "pruned since",
    ),
    "torch": (prune_by_torch, "pruned since"),
}


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("change", list(CHANGES_OF_VALUES))
def test_undo_of_a_permanent_apply_notices_new_values(device, masked, change):
    """It would lose them, or leave zeros where nothing is pruned any more."""
    model = linears(device)
    if masked:
        lnprune.local_structured(model, 1, 2, "out")
    plan = select(model, 0.3, scope="local").apply(permanent=True, keep_backup=True)
    make_change, message = CHANGES_OF_VALUES[change]
    make_change(model[1])
    snapshot = ModelSnapshot(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^1.weight: .*{message}"):
            plan.undo()
        snapshot.assert_unchanged()


def test_permanent_plans_undone_in_the_wrong_order(device):
    """The first refuses until the second is undone; then every bit is back."""
    model, twin = twins(lambda: linears(device))
    first = lnprune.rank(model, 2, "out").select(0.5)
    second = lnprune.rank(model, 2, "in").select(0.5)
    first.apply(permanent=True, keep_backup=True)
    second.apply(permanent=True, keep_backup=True)
    with pytest.raises(RuntimeError, match=r"^0\.weight: .*pruned since: undo what came after it first"):
        first.undo()
    second.undo()
    first.undo()
    assert_same_state(model, twin)


def test_a_loaded_checkpoint_of_the_pruned_model_can_be_undone(device):
    model, twin = twins(lambda: linears(device))
    plan = select(model).apply(permanent=True, keep_backup=True)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    plan.undo()
    assert_same_state(model, twin)


CONVERSIONS = {
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "there and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize(
    "options", [{}, {"permanent": True, "keep_backup": True}], ids=["masks", "permanent"]
)
@pytest.mark.parametrize("conversion", list(CONVERSIONS))
def test_undo_after_a_conversion(prepare, device, conversion, options):
    """What the model would be, had it been converted without being pruned."""
    model, twin = twins(prepare(lambda: linears(device)))
    plan = select(model).apply(**options)
    CONVERSIONS[conversion](model)
    CONVERSIONS[conversion](twin)
    plan.undo()
    for module in (*model, *twin):  # conversions leave attributes, and so products with masks, as they are
        for hook in module._forward_pre_hooks.values():
            if getattr(hook, "_tensor_name", "") == "bias" or any(module is other for other in twin):
                hook(module, ())
    assert_same_state(model, twin)


def test_undo_after_a_conversion_keeps_what_was_trained(device):
    model, twin = twins(lambda: linears(device))
    plan = select(model, 0.3, scope="local").apply(permanent=True, keep_backup=True)
    gone = [module.weight == 0 for module in model]
    model.double()
    with torch.no_grad():
        for module, zeros in zip(model, gone, strict=True):
            module.weight.mul_(3).masked_fill_(zeros, 0)
    plan.undo()
    for module, before, zeros in zip(model, twin, gone, strict=True):
        trained = before.weight.double() * 3
        assert torch.equal(module.weight, torch.where(zeros, before.weight.double(), trained))


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("now", [torch.float64, torch.float16], ids=str)
def test_undo_of_zeros_in_every_dtype_after_a_conversion(device, dtype, now):
    weight = torch.randn(8, 6, device=device).to(dtype)
    model = nn.ModuleList([bare(weight.clone(), requires_grad=False)])
    plan = lnprune.rank(pairs_of(model), 2, 0).select(3).apply(permanent=True, keep_backup=True)
    model.to(now)
    with pytest.raises(RuntimeError, match="pruned since") if now is torch.float64 else nullcontext():
        other = lnprune.rank(pairs_of(model), 2, 1).select(2).apply(permanent=True, keep_backup=True)
        if now is torch.float64:
            plan.undo()
    other.undo()
    plan.undo()
    assert torch.equal(model[0].weight, weight.to(now))


def test_zeros_that_a_conversion_makes_are_not_pruning(device):
    """Of values too small for the narrower type."""
    model, twin = twins(lambda: linears(device))
    with torch.no_grad():
        for net in (model, twin):
            net[0].weight[:, ::2] *= 1e-30
    plan = select(model).apply(permanent=True, keep_backup=True)
    model.half()
    plan.undo()
    assert_same_state(model, twin.half())


def test_new_values_where_torch_multiplied_into_other_memory(device):
    """Eight-bit values are not multiplied in place; kept ones stay as written since all the same."""
    weight = torch.randn(8, 6, device=device).to(torch.float8_e5m2)
    model = nn.ModuleList([bare(weight.clone(), requires_grad=False)])
    stock.identity(model[0], "weight")
    plan = lnprune.rank(pairs_of(model), 2, 0).select(3).apply(permanent=True, keep_backup=True)
    keep = plan.keep["0.weight"].to(device)[:, None]
    trained = torch.where(keep, weight.float() * 2, 0.0).to(weight.dtype)
    model[0].weight.data.copy_(trained)
    plan.undo()
    expected = torch.where(keep, trained.float(), weight.float())
    assert torch.equal(model[0].weight_orig.float(), expected)


def test_weights_that_were_tied_after_ranking(device, tmp_path):
    """Their channels lie along two dims of one tensor."""

    def make():
        return nn.ModuleDict(
            {"first": nn.Linear(6, 6, device=device), "second": nn.Embedding(6, 6, device=device)}
        )

    model = make()
    plan = lnprune.rank(model, 2, "out").select(2)
    plan.save(tmp_path / "plan")
    other = make()
    loaded = lnprune.load_plan(tmp_path / "plan", other)
    for chosen, tied in ((plan, model), (loaded, other)):
        tied["second"].weight = tied["first"].weight
        snapshot = ModelSnapshot(tied)
        for options in ({}, {"permanent": True}):
            with pytest.raises(
                RuntimeError, match=r"^second\.weight: shares its weight with first\.weight now"
            ):
                chosen.apply(**options)
            snapshot.assert_unchanged()


# The order of calls.


def test_apply_twice(make, device):
    model = make()
    for options in ({}, {"permanent": True}, {"permanent": True, "keep_backup": True}):
        plan = select(model, 0.1).apply(**options)
        snapshot = ModelSnapshot(model)
        for again in ({}, {"permanent": True}):
            with pytest.raises(RuntimeError, match="applied already"):
                plan.apply(**again)
            snapshot.assert_unchanged()


FLAGS = [{"permanent": "no"}, {"permanent": 1}, {"bias": None}, {"keep_backup": "yes"}]


@pytest.mark.parametrize("options", FLAGS, ids=str)
def test_options_are_true_or_false(device, options):
    model = linears()
    plan = select(model)
    snapshot = ModelSnapshot(model)
    ((name, _),) = options.items()
    calls = [lambda: plan.apply(**options)]
    if name == "permanent":
        calls += [
            lambda: lnprune.local_structured(model, 0.4, 2, "out", **options),
            lambda: lnprune.global_structured(model, 0.4, 2, "out", **options),
        ]
    for call in calls:
        with pytest.raises(TypeError, match=f"^{name}: expected True or False, got "):
            call()
        snapshot.assert_unchanged()
    plan.apply()


def test_apply_takes_no_model(device):
    """What it is given is not read as an option: neither model changes."""
    model, other = linears(), linears()
    plan = select(model)
    snapshots = [ModelSnapshot(model), ModelSnapshot(other)]
    for given, shown in ((other, "a module of type Sequential"), (True, "True"), ("no", "'no'")):
        with pytest.raises(TypeError, match=r"^apply takes no model.*load_plan\(path, model\)$") as caught:
            plan.apply(given)
        assert f"got {shown}: " in str(caught.value)
        for snapshot in snapshots:
            snapshot.assert_unchanged()


def test_masks_need_no_backup(device):
    model = linears()
    plan = select(model)
    snapshot = ModelSnapshot(model)
    with pytest.raises(ValueError, match=r"^keep_backup=True keeps what permanent=True overwrites"):
        plan.apply(keep_backup=True)
    snapshot.assert_unchanged()


def test_undo_twice_and_undo_of_nothing(make, device):
    model = make()
    plan = select(model)
    snapshot = ModelSnapshot(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="nothing to undo"):
            plan.undo()
        snapshot.assert_unchanged()
        plan.apply().undo()


def prune_more(module):
    stock.random_structured(module, "weight", 1, 0)


def load_into_a_new_mask(module):
    mask = module.weight_mask.clone()
    mask[1, 1] += 1
    module._buffers["weight_mask"] = mask


def replace_the_parameter(module):
    module.weight_orig = nn.Parameter(module.weight_orig.detach().clone())


def remove_and_prune_again(module):
    stock.remove(module, "weight")
    lnprune.ln_structured(module, "weight", 1, 2, 0)


def prune_and_take_back(module):
    other = lnprune.rank([(module, "weight")], 2, 0).select(1)
    other.apply().undo()


INTERVENTIONS = {
    "pruned": prune_more,
    "removed": lambda module: stock.remove(module, "weight"),
    "removed and pruned": remove_and_prune_again,
    "another mask": load_into_a_new_mask,
    "another parameter": replace_the_parameter,
}


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("intervention", list(INTERVENTIONS))
def test_undo_after_somebody_elses_change(prepare, device, intervention, index):
    model = prepare(lambda: linears(device))()
    plan = select(model, min_channels=4).apply()
    INTERVENTIONS[intervention](model[index])
    snapshot = ModelSnapshot(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{index}.weight: .*no longer the one that apply"):
            plan.undo()
        snapshot.assert_unchanged()


def test_undo_after_a_method_was_added_to_the_container(device):
    """To the hook alone, with no mask made yet."""
    model = linears(device)
    select(model).apply()
    plan = select(model).apply()
    method = stock.Identity()
    method._tensor_name = "weight"
    last_hook(model[1]).add_pruning_method(method)
    snapshot = ModelSnapshot(model)
    with pytest.raises(RuntimeError, match=r"^1\.weight: .*no longer the one"):
        plan.undo()
    snapshot.assert_unchanged()


def test_undo_after_a_change_that_was_taken_back(prepare, device):
    model, twin = twins(prepare(lambda: linears(device)))
    plan = select(model, min_channels=4).apply()
    prune_and_take_back(model[1])
    plan.undo()
    assert_same_state(model, twin)


@pytest.mark.parametrize("intervention", [prune_more, lambda module: setattr(module, "weight", None)])
def test_undo_of_a_permanent_apply_after_a_change(device, intervention):
    model = linears(device)
    plan = select(model).apply(permanent=True, keep_backup=True)
    intervention(model[1])
    snapshot = ModelSnapshot(model)
    with pytest.raises(RuntimeError, match=r"^1\.weight: "):
        plan.undo()
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "options", [{}, {"permanent": True, "keep_backup": True}], ids=["masks", "permanent"]
)
def test_stacked_plans(make, prepare, device, options):
    """Two plans of one ranking, and one of the masked model; undone in reverse, state by state."""
    model, twin = twins(prepare(make))
    ranking = lnprune.rank(model, 2, "out")
    plans = [ranking.select(0.1), ranking.select(0.3), None]
    states, zeros = [], []
    for i in range(3):
        plan = plans[i] = plans[i] or lnprune.rank(model, 1, "in").select(0.2)
        states.append(states_by_identity(model))
        zeros.append(count_zeros(model))
        plan.apply(**options)
        assert count_zeros(model) >= zeros[-1]
    assert count_zeros(model) > zeros[0]
    if not options:
        for plan in plans[:2]:
            with pytest.raises(RuntimeError, match="no longer the one"):
                plan.undo()
    for plan in reversed(plans):
        plan.undo()
        assert states_by_identity(model) == states.pop()
        assert count_zeros(model) == zeros.pop()
    assert_same_state(model, twin)


def count_zeros(model):
    return sum(int((module.weight == 0).sum()) for module in model)


def test_one_plan_masked_then_permanent(make, device):
    model, twin = twins(make)
    plan = select(model)
    plan.apply().undo().apply(permanent=True, keep_backup=True).undo()
    assert_same_state(model, twin)
    plan.apply(permanent=True)
    with pytest.raises(RuntimeError, match="values are gone"):
        plan.undo()
    assert not lnprune.is_pruned(model)


def test_the_weight_was_pruned_after_ranking(device):
    """The plan's flags count, on top of whatever mask is there when it is applied."""
    model = linears(device)
    plan = select(model)
    for module in model:
        stock.l1_unstructured(module, "weight", 0.3)
    old = [module.weight_mask.clone() for module in model]
    plan.apply()
    for index, module in enumerate(model):
        mask = expected_mask(plan.keep[f"{index}.weight"], module.weight_orig, old[index], 0)
        assert torch.equal(module.weight_mask, mask)


def test_a_changed_shape(device):
    model = linears(device)
    plan = select(model)
    model[2].weight = nn.Parameter(torch.randn(7, 12, device=device))
    for options in ({}, {"permanent": True}):
        snapshot = ModelSnapshot(model)
        with pytest.raises(RuntimeError, match=r"^2\.weight: expected shape \(8, 12\).*got \(7, 12\)"):
            plan.apply(**options)
        snapshot.assert_unchanged()
    model[2].weight = nn.Parameter(torch.randn(8, 12, device=device))
    plan.apply()


def test_loaded_plans(make, prepare, device, tmp_path):
    model, other = twins(prepare(make))
    select(model).save(tmp_path / "plan")
    for options in ({}, {"permanent": True, "keep_backup": True}, {"bias": True}):
        if "bias" in options and any(hasattr(module, "bias_mask") for module in model):
            continue
        plans = [select(model), lnprune.load_plan(tmp_path / "plan", other)]
        for plan in plans:
            plan.apply(**options)
        assert_same_state(other, model)
        for plan in plans:
            plan.undo()
        assert_same_state(other, model)


def test_loaded_plans_by_pairs(device, tmp_path):
    model, other = twins(lambda: linears(device))
    lnprune.rank(pairs_of(model), 2, 0).select(0.5).save(tmp_path / "plan")
    lnprune.rank(pairs_of(model), 2, 0).select(0.5).apply()
    lnprune.load_plan(tmp_path / "plan", pairs_of(other)).apply()
    assert_same_state(other, model)


def test_a_plan_loaded_for_a_model_on_meta(device, tmp_path):
    select(linears(device)).save(tmp_path / "plan")
    model = linears("meta")
    plan = lnprune.load_plan(tmp_path / "plan", model).apply()
    assert all(module.weight_mask.is_meta for module in model)
    plan.undo()
    assert not lnprune.is_pruned(model)


@pytest.mark.parametrize("keep_backup", [False, True])
def test_a_plan_loaded_for_a_model_on_meta_permanently(device, tmp_path, keep_backup):
    select(linears(device)).save(tmp_path / "plan")
    model = linears("meta")
    lnprune.load_plan(tmp_path / "plan", model).apply(permanent=True, keep_backup=keep_backup)
    assert not lnprune.is_pruned(model)


# Biases.


def biased(device="cpu"):
    return nn.Sequential(
        nn.Linear(6, 8, device=device),
        nn.Conv1d(4, 6, 3, groups=2, device=device),
        nn.Conv2d(3, 8, 3, device=device),
        nn.Conv3d(3, 5, 2, bias=False, device=device),
        nn.ConvTranspose1d(4, 6, 3, device=device),
        nn.ConvTranspose2d(6, 4, 3, device=device),
        nn.ConvTranspose2d(6, 12, 3, groups=3, device=device),
        nn.Embedding(7, 6, device=device),
    )


def expected_bias_flags(module, keep):
    """By what the module computes: its output channels that all weights of zero make constant."""
    if module.bias is None:
        return None
    groups = module.groups if isinstance(module, nn.ConvTranspose2d) else 1
    return keep.repeat(groups)


def bias_of(module):
    return module._parameters.get("bias", module._parameters.get("bias_orig"))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_masked_biases(device, times):
    model, twin = twins(lambda: biased(device))
    plans = []
    expected = [None] * len(model)
    for _ in range(times):
        plans.append(select(model, 0.3, scope="local").apply(bias=True))
        for index, module in enumerate(model):
            if getattr(module, "bias", None) is None:
                continue
            flags = expected_bias_flags(module, plans[-1].keep[f"{index}.weight"]).to(device)
            expected[index] = flags if expected[index] is None else expected[index] & flags
            assert torch.equal(module.bias_mask, expected[index].to(module.bias_mask.dtype))
            assert torch.equal(module.bias, module.bias_mask * module.bias_orig)
            assert type(module.bias.grad_fn).__name__ == "MulBackward0"
            hook = next(h for h in module._forward_pre_hooks.values() if h._tensor_name == "bias")
            assert type(hook) is (stock.CustomFromMask if len(plans) == 1 else stock.PruningContainer)
            inner = hook if len(plans) == 1 else hook[-1]
            assert type(inner) is stock.CustomFromMask
            assert inner.mask is module.bias_mask
    assert not hasattr(model[3], "bias_mask")
    assert not hasattr(model[7], "bias_mask")
    assert sum(int((mask == 0).sum()) for key, mask in model.named_buffers() if "bias" in key) > 0
    for plan in reversed(plans):
        plan.undo()
    assert_same_state(model, twin)


@pytest.mark.parametrize("masked_before", [False, True])
def test_permanent_biases(device, masked_before):
    def make():
        model = biased(device)
        if masked_before:
            for module in model:
                if getattr(module, "bias", None) is not None:
                    stock.l1_unstructured(module, "bias", 1)
            lnprune.ln_structured(model[0], "weight", 1, 2, 0)
        return model

    model, twin = twins(make)
    before = states_by_identity(model)
    plan = select(model, 0.3, scope="local").apply(permanent=True, bias=True, keep_backup=True)
    for index, (module, old) in enumerate(zip(model, twin, strict=True)):
        if getattr(module, "bias", None) is None:
            continue
        flags = expected_bias_flags(module, plan.keep[f"{index}.weight"]).to(device)
        assert torch.equal(module.bias, old.bias * flags)
        assert int((~flags).sum()) > 0
        assert module.bias is bias_of(module)
    assert not lnprune.is_pruned(model)
    plan.undo()
    assert states_by_identity(model) == before
    assert_same_state(model, twin)


def test_pruned_outputs_are_zero_with_their_biases(device):
    """The reason for bias=True, for each group of a transposed convolution too."""
    for module, inputs in (
        (nn.Linear(6, 8, device=device), torch.randn(3, 6)),
        (nn.Conv2d(4, 8, 3, groups=2, device=device), torch.randn(3, 4, 5, 5)),
        (nn.ConvTranspose2d(6, 12, 3, groups=3, device=device), torch.randn(3, 6, 5, 5)),
    ):
        model = nn.Sequential(module)
        lnprune.rank(model, 2, "out").select(0.5).apply(bias=True)
        output = model(inputs.to(device)).transpose(0, 1).flatten(1)
        assert int((output == 0).all(dim=1).sum()) == output.shape[0] // 2


@pytest.mark.parametrize("permanent", [False, True])
def test_biases_need_outputs(device, permanent):
    for model, dim in (
        (nn.Sequential(nn.Linear(6, 8)), "in"),
        (nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8)), 1),  # as many inputs as outputs
        (nn.Sequential(nn.ConvTranspose1d(6, 6, 3)), 0),
        (nn.Sequential(nn.Conv1d(6, 4, 3)), 2),
    ):
        model.to(device)
        plan = select(model, 0.3, dim)
        snapshot = ModelSnapshot(model)
        with pytest.raises(ValueError, match=r"^0\.weight: bias=True needs channels that are outputs"):
            plan.apply(permanent=permanent, bias=True)
        snapshot.assert_unchanged()
        plan.apply(permanent=permanent)
        assert not hasattr(model[0], "bias_mask")


def test_modules_without_a_bias_have_nothing_to_prune(device):
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Embedding(5, 6), nn.Conv1d(4, 4, 3, bias=False))
    model.to(device)
    select(model).apply(bias=True)
    assert sorted(key for key, _ in model.named_buffers()) == [f"{i}.weight_mask" for i in range(3)]
    lstm = nn.LSTM(6, 4, device=device)  # its attribute `bias` is a bool
    lnprune.rank([(lstm, "weight_ih_l0")], 2, 0).select(2).apply(bias=True)
    assert [key for key, _ in lstm.named_buffers()] == ["weight_ih_l0_mask"]


@pytest.mark.parametrize("permanent", [False, True])
def test_a_bias_that_modules_share_with_weights_of_their_own(device, permanent):
    """Each module's mask holds its own channels; zeros in place are those of both."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4)).to(device)
    with torch.no_grad():
        model[0].weight[0], model[1].weight[1] = 1e-9, 1e-9
    model[1].bias = model[0].bias
    before = bits(model[0].bias)
    plan = lnprune.rank(model, 2, "out").select(1)
    plan.apply(permanent=permanent, bias=True, keep_backup=permanent)
    if permanent:
        assert (model[0].bias == 0).tolist() == [True, True, False, False]
    else:
        assert model[0].bias_mask.tolist() == [0, 1, 1, 1]
        assert model[1].bias_mask.tolist() == [1, 0, 1, 1]
    plan.undo()
    assert model[1].bias is model[0].bias
    assert torch.equal(bits(model[0].bias), before)


@pytest.mark.parametrize("permanent", [False, True])
def test_biases_of_the_projections_of_attention(device, permanent):
    """In one for all three, of which each projection has a third where they are apart."""
    together = nn.MultiheadAttention(8, 2, device=device)
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, device=device)
    for attention in (together, apart):
        nn.init.normal_(attention.in_proj_bias)
        names = [name for name, _ in attention.named_parameters() if name.endswith("proj_weight")]
        pairs = [(attention, name) for name in names]
        plan = lnprune.rank(pairs, 2, 0).select(0.25).apply(permanent=permanent, bias=True)
        expected = torch.cat(list(plan.keep.values())).to(device)
        assert expected.shape == attention.in_proj_bias.shape
        assert torch.equal(attention.in_proj_bias != 0, expected)
        values = [torch.randn(3, 1, size, device=device) for size in (8, attention.kdim, attention.vdim)]
        attention(*values)[0].sum().backward()
    # Some of the thirds alone.
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, device=device)
    nn.init.normal_(apart.in_proj_bias)
    plan = lnprune.rank(apart, 2, "out", include="*v_proj_weight").select(3)
    plan.apply(permanent=permanent, bias=True)
    assert apart.in_proj_bias.view(3, 8).ne(0).sum(dim=1).tolist() == [8, 8, 5]
    plan = lnprune.rank([(nn.MultiheadAttention(8, 2, device=device), "in_proj_weight")], 2, 1).select(2)
    with pytest.raises(ValueError, match=r"^0\.in_proj_weight: bias=True needs channels that are outputs"):
        plan.apply(permanent=permanent, bias=True)


@pytest.mark.parametrize("ranked", [True, False])
def test_a_parameter_of_two_dims_that_is_called_bias(device, ranked):
    """Its hook is that of a ranked parameter, which it is, and not that of a bias."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(6, 4, device=device))

    module = Table()
    pairs = [(module, "bias")]
    if ranked:
        lnprune.local_structured(pairs, 2, 2, 0)
    else:
        lnprune.rank(pairs, 2, 0).select(2).apply()
    (hook,) = module._forward_pre_hooks.values()
    assert type(hook) is stock.LnStructured
    assert (hook.amount, hook.n, hook.dim) == (2, 2, 0)
    assert int((module.bias == 0).all(dim=1).sum()) == 2
    lnprune.rank(pairs, 2, 0).select(1).apply(bias=True)
    (container,) = module._forward_pre_hooks.values()
    assert [type(method) for method in container] == [stock.LnStructured] * 2
    assert int((module.bias == 0).all(dim=1).sum()) == 3


# Weights that no hook renews.


class ShiftedWindowAttention(nn.Module):
    """As torchvision has it: a function reads the weights of both layers."""

    __module__ = "torchvision.models.swin_transformer"

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.qkv.weight)[..., :8], self.proj.weight)


class Calling(ShiftedWindowAttention):
    """A subclass that calls the layers, whose hooks run then."""

    def forward(self, x):
        return self.proj(self.qkv(x)[..., :8])


READERS = {
    "Transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0, batch_first=True),
        "encoder.layers.0.self_attn.out_proj.weight",
        "MultiheadAttention",
    ),
    "another out_proj": (
        lambda: _with_another_out_proj(nn.MultiheadAttention(8, 2)),
        "out_proj.weight",
        "MultiheadAttention",
    ),
    "Swin": (ShiftedWindowAttention, "qkv.weight", "ShiftedWindowAttention"),
}


def _with_another_out_proj(attention):
    attention.out_proj = nn.Linear(8, 8)
    return attention


@pytest.mark.parametrize("kind", READERS)
def test_masks_that_no_hook_would_renew_are_refused(kind, device, tmp_path):
    make, name, reader = READERS[kind]
    model = make().to(device)
    snapshot = ModelSnapshot(model)
    lnprune.rank(model, 2, "out").select(2).save(tmp_path / "plan")
    for call in (
        lambda: lnprune.local_structured(model, 2, 2, "out"),
        lambda: lnprune.global_structured(model, 2, 2, "out"),
        lambda: lnprune.rank(model, 2, "out").select(2).apply(),
        lambda: lnprune.load_plan(tmp_path / "plan", model).apply(bias=True),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {reader} reads this weight .*permanent=True$"):
            call()
        snapshot.assert_unchanged()
    lnprune.local_structured(model, 2, 2, "out", permanent=True)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            assert int((parameter == 0).all(dim=1).sum()) == 2


def test_a_mask_on_an_output_projection_in_a_list_is_refused(device):
    attention = nn.MultiheadAttention(8, 2, device=device)
    pairs = [(attention, "in_proj_weight"), (attention.out_proj, "weight")]
    with pytest.raises(ValueError, match=r"^1\.weight: MultiheadAttention reads this weight itself"):
        lnprune.local_structured(pairs, 2, 2, 0)
    assert not lnprune.is_pruned(attention)
    lnprune.local_structured(pairs, 2, 2, 0, permanent=True)


class Listing(nn.Module):
    """Its forward reads parameters of a list, which is a module that is never called."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])

    def forward(self, x):
        for weight in self.weights:
            x = x @ weight
        return x


def test_masks_in_a_list_of_parameters_are_refused(device):
    model = Listing().to(device)
    plan = lnprune.rank(model, 2, 0, include="weights.*").select(1)
    with pytest.raises(ValueError, match=r"^weights\.0: what holds a ParameterList reads this weight"):
        plan.apply()
    with pytest.raises(ValueError, match=r"^0\.0: what holds a ParameterList reads this weight"):
        lnprune.local_structured([(model.weights, "0")], 1, 2, 0)
    plan.apply(permanent=True)
    assert [int((weight == 0).all(dim=1).sum()) for weight in model.weights] == [1, 1]


def test_what_a_module_calls_itself_is_masked(device):
    model = Calling().to(device)
    lnprune.local_structured(model, 2, 2, "out")
    assert lnprune.is_pruned(model.qkv)
    assert lnprune.is_pruned(model.proj)


@pytest.mark.parametrize("dropped", [None, "bias"])
def test_a_masked_transformer_trains(dropped, device):
    """All of its weights but those that nobody calls; the zeros stay, the rest learns, in eval mode too."""
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0, batch_first=True, device=device)
    plan = lnprune.rank(model, 2, "out", exclude="*.out_proj").select(0.25)
    plan.apply(bias=dropped == "bias")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    source, target = torch.randn(2, 3, 8, device=device), torch.randn(2, 4, 8, device=device)
    attention = model.encoder.layers[0].self_attn
    for _ in range(3):
        before = attention.in_proj_weight.detach().clone()
        optimizer.zero_grad()
        (model(source, target) * torch.randn_like(target)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()
            model(source, target)
            model.train()
        assert not torch.equal(attention.in_proj_weight, before)
        for name, keep in plan.keep.items():
            module, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            weight = getattr(module, attribute)
            assert torch.equal((weight != 0).any(dim=1).cpu(), keep)
            original, mask = (getattr(module, f"{attribute}_{kind}") for kind in ("orig", "mask"))
            assert torch.equal(weight, original * mask)


# Shared weights.


def shared(device="cpu"):
    model = linears(device)
    model.append(nn.Linear(10, 8, device=device))
    model[3].weight = model[0].weight
    return model


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_shared_weights(device, masked):
    def make():
        model = shared(device)
        if masked:
            lnprune.local_structured(model, 2, 2, "out")
        return model

    model, twin = twins(make)
    before = states_by_identity(model)
    plan = select(model)
    assert len(plan) == 3
    for options in ({}, {"bias": True}):
        plan.apply(**options)
        assert model[0].weight_orig is model[3].weight_orig
        assert model[0].weight_mask is model[3].weight_mask
        assert model[0].weight is not model[3].weight
        assert torch.equal(model[3].weight, model[0].weight_mask * model[0].weight_orig)
        assert hasattr(model[3], "bias_mask") is bool(options)
        plan.undo()
        assert states_by_identity(model) == before
        assert_same_state(model, twin)
    plan.apply(permanent=True, bias=True, keep_backup=True)
    assert model[0].weight is model[3].weight
    keep = plan.keep["0.weight"]
    for module in (model[0], model[3]):
        assert not module.weight[~keep].any()
        assert not module.bias[~keep].any()
    plan.undo()
    assert states_by_identity(model) == before
    assert_same_state(model, twin)


def test_a_shared_weight_with_two_masks(device):
    """Masks that a loop made are two: two weights of the plan, and both masks hold on undo."""

    def make():
        model = shared(device)
        for module in (model[0], model[3]):
            lnprune.ln_structured(module, "weight", 0.25, 2, 0)
        return model

    model, twin = twins(make)
    plan = lnprune.rank(model, 2, "in").select(0.5)
    assert len(plan) == 4
    old = [model[0].weight_mask, model[3].weight_mask]
    for options in ({}, {"permanent": True, "keep_backup": True}):
        plan.apply(**options)
        if options:
            assert model[0].weight is model[3].weight
        else:
            assert model[0].weight_mask is not model[3].weight_mask
        plan.undo()
        assert [model[0].weight_mask, model[3].weight_mask] == old or all(
            a is b for a, b in zip([model[0].weight_mask, model[3].weight_mask], old, strict=True)
        )
        assert_same_state(model, twin)


def test_recurrent_weights(device):
    names = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1"]
    model, twin = twins(lambda: nn.ModuleList([nn.LSTM(6, 4, 2, device=device)]))
    lstm = model[0]
    plan = lnprune.rank([(lstm, name) for name in names], 2, 0).select(0.25)
    inputs = torch.randn(3, 2, 6, device=device)
    for options in ({}, {"permanent": True, "keep_backup": True}):
        plan.apply(**options)
        flat = [getattr(lstm, name) for name in lstm._flat_weights_names]
        assert all(a is b for a, b in zip(lstm._flat_weights, flat, strict=True))
        assert not torch.equal(lstm(inputs)[0], twin[0](inputs)[0])
        plan.undo()
        assert_same_state(model, twin)
        assert torch.equal(lstm(inputs)[0], twin[0](inputs)[0])


# Weights that cannot be written in place.


@pytest.mark.parametrize("keep_backup", [False, True])
def test_float8_with_gaps_permanently(device, keep_backup):
    weight = cases.rows_apart(torch.randn(8, 6).to(torch.float8_e4m3fn)).to(device)
    model = nn.ModuleList([bare(weight, requires_grad=False)])
    before = bits(weight)
    plan = lnprune.rank(pairs_of(model), 2, 0).select(3).apply(permanent=True, keep_backup=keep_backup)
    assert int((model[0].weight.float() == 0).all(dim=1).sum()) == 3
    if keep_backup:
        plan.undo()
        assert torch.equal(bits(model[0].weight), before)


def test_channels_that_share_memory(device):
    """Rows that are one row in memory: a plan that prunes some of them must not zero all."""
    model = nn.ModuleList([bare(torch.randn(1, 6, device=device).expand(4, 6))])
    before = model[0].weight.detach().clone()
    plan = lnprune.rank(pairs_of(model), 2, 0).select(2)
    try:
        plan.apply(permanent=True)
    except RuntimeError:
        assert torch.equal(model[0].weight, before)
    else:
        assert torch.equal(model[0].weight, before * plan.keep["0.weight"].to(device)[:, None])


@pytest.mark.parametrize("kind", ["negative", "conjugate"])
def test_a_backup_of_lazily_negated_values(device, kind):
    values = torch.randn(4, 6, dtype=torch.complex64, device=device).conj()
    model = nn.ModuleList([bare(values if kind == "conjugate" else values.imag)])
    before = bits(model[0].weight)
    plan = lnprune.rank(pairs_of(model), 2, 0).select(2).apply(permanent=True, keep_backup=True)
    assert int((model[0].weight == 0).all(dim=1).sum()) == 2
    plan.undo()
    assert torch.equal(bits(model[0].weight), before)


# global_structured.


@pytest.mark.parametrize("permanent", [False, True])
def test_global_structured(make, prepare, device, permanent):
    model, twin = twins(prepare(make))
    options = {"min_channels": 2, "normalize": "layer", "of": "parameters"}
    assert lnprune.global_structured(model, 0.3, 2, "out", permanent=permanent, **options) is model
    lnprune.rank(twin, 2, "out").select(0.3, scope="global", **options).apply(permanent=permanent)
    assert_same_state(model, twin)


@pytest.mark.parametrize("call", [lnprune.local_structured, lnprune.global_structured])
def test_whole_model_calls_return_what_they_were_given(device, call):
    """As ln_structured and remove_all do."""
    for permanent in (False, True):
        model = linears(device)
        assert call(model, 0.25, 2, "out", permanent=permanent) is model
        pairs = [(module, "weight") for module in model]
        assert call(pairs, 0.25, 2, 0, permanent=permanent) is pairs
        assert lnprune.remove_all(model) is model


def test_global_structured_takes_all_that_rank_and_select_take(device):
    model, twin = twins(lambda: linears(device))
    scores = {"1.weight": torch.randn(12, 8, device=device)}
    choice = {"include": ["0", "1"], "exclude": None}
    options = {"normalize": "none", "min_channels": 2, "multiple_of": 2, "group_size": 2, "of": "channels"}
    lnprune.global_structured(model, 8, 1, "out", scores, **options, **choice)
    plan = lnprune.rank(twin, 1, "out", scores, **choice).select(8, scope="global", **options).apply()
    assert_same_state(model, twin)
    assert not hasattr(model[2], "weight_mask")
    assert sum(int((~keep).sum()) for keep in plan.keep.values()) == 8
