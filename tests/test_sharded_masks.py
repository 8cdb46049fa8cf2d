"""Masks under tensor parallelism: DTensors, with torch's hooks, equal to those of the unsharded model."""

import copy
import io
import math

import pytest
import torch
from ranks import raised_by, ranks
from sharded_models import (
    LAYOUTS,
    blocks,
    layers,
    make_mesh,
    parallel,
    same_bits,
    shard_weights,
    sharded,
    whole,
)
from torch import nn
from torch.nn.utils import prune as stock

import lnprune

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")


def masks_of(model):
    """All masks, in order."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith("_mask")]


def weights_of(model):
    """The masked weights as they are now."""
    return [layer.weight for layer in model if hasattr(layer, "weight")]


def check_alike(model, shards):
    """Masks, weights and parameters have the same bits, names and hooks."""
    from torch.distributed.tensor import DTensor

    assert same_bits(masks_of(model), masks_of(shards))
    assert same_bits(weights_of(model), weights_of(shards))
    assert same_bits(model.parameters(), shards.parameters())
    assert list(model.state_dict()) == list(shards.state_dict())
    for layer, other in zip(model, shards, strict=True):
        hooks = [[type(hook) for hook in each._forward_pre_hooks.values()] for each in (layer, other)]
        assert hooks[0] == hooks[1]
        if isinstance(getattr(other, "weight_orig", None), DTensor):
            assert other.weight_mask.placements == other.weight_orig.placements
            assert other.weight_mask.dtype == layer.weight_mask.dtype


def masks_as_on_one_machine(layout, dtype):
    sizes, placements = LAYOUTS[layout]
    mesh = make_mesh(sizes)
    model = layers().to(dtype)
    shards = shard_weights(copy.deepcopy(model), mesh, placements)
    both = (model, shards)
    amounts = {f"{i}.weight": min(2, layer.weight.shape[0] - 1) for i, layer in enumerate(model)}
    scores = {f"{i}.weight": torch.randn_like(layer.weight) for i, layer in enumerate(model)}
    calls = [
        lambda each: [lnprune.ln_structured(layer, "weight", 0.3, 2, 0) for layer in each],
        lambda each: [lnprune.ln_structured(layer, "weight", 0.5, 1, -1) for layer in each],  # repeated
        lambda each: lnprune.local_structured(each, 0.2, math.inf, "in"),
        lnprune.remove_all,
        lambda each: lnprune.local_structured(each, amounts, -math.inf, 0, scores),
        lambda each: lnprune.local_structured(each, 0.4, 2, 0, scores),  # what is gone has scores too
        lambda each: lnprune.global_structured(each, 0.3, 2, "out"),
        lambda each: lnprune.rank(each, 3, "out").select(0.3).apply(bias=True),
        lambda each: lnprune.rank(each, 2, 1).select(0.3).apply(permanent=True),
        lambda each: [lnprune.LnStructured.apply(layer, "weight", 0, 2, 0) for layer in each],
    ]
    for call in calls:
        for each in both:
            call(each)
        check_alike(model, shards)

    plans = [lnprune.rank(each, 2, "out").select(0.4) for each in both]
    for left, right in zip(*(plan.keep.values() for plan in plans), strict=True):
        assert torch.equal(left, right)
    for plan in plans:
        plan.apply(bias=True)
    check_alike(model, shards)
    for plan in plans:
        plan.undo()
    check_alike(model, shards)
    for plan in plans:
        plan.apply(permanent=True, keep_backup=True)
    check_alike(model, shards)
    for plan in plans:
        plan.undo()
    check_alike(model, shards)


def takes_the_methods_of_torch():
    """A method of ours inside a container of torch's, and computed by itself."""
    mesh = make_mesh([-1])
    model = nn.Sequential(nn.Linear(6, 5))
    shards = shard_weights(copy.deepcopy(model), mesh, ["S1"])
    method = lnprune.LnStructured(2, 2, 0)
    results = []
    for each in (model, shards):
        weight = each[0].weight.detach()
        results.append(method.compute_mask(weight, torch.ones_like(weight)))
        results.append(method.prune(weight))
        results.append(lnprune.channel_norms(weight, 2, 1))
        results.append(lnprune.channel_mask(weight, 2, 2, 0))
    assert same_bits(results[:2], results[4:6])
    torch.testing.assert_close(results[6], results[2], rtol=1e-14, atol=0)
    assert torch.equal(results[3], results[7])
    with lnprune.patch():
        for each in (model, shards):
            stock.ln_structured(each[0], "weight", 2, 2, 0)
    check_alike(model, shards)


def makes_masks_of_other_placements_permanent():
    """Masks as torch's own methods take them: plain, or placed otherwise than the weight."""
    mesh = make_mesh([-1])
    for placement in ("S0", "R", None):
        model = nn.Sequential(nn.Linear(6, 5))
        mask = (torch.rand(5, 6) > 0.5).float()
        shards = shard_weights(copy.deepcopy(model), mesh, ["S1"])
        stock.custom_from_mask(model[0], "weight", mask)
        stock.custom_from_mask(shards[0], "weight", sharded(mask, mesh, [placement or "S1"]))
        if placement is None:
            shards[0].weight_mask = mask
        for each in (model, shards):
            lnprune.remove_all(each)
        assert same_bits(model.parameters(), shards.parameters())


def trains_alike(kind):
    model = blocks()
    shards = parallel(copy.deepcopy(model), kind)
    inputs, targets = torch.randn(32, 10), torch.randint(7, (32,))
    both = []
    for each in (model, shards):
        lnprune.local_structured(each, 0.5, 2, "out")
        both.append((each, torch.optim.AdamW(each.parameters(), lr=0.01)))
    for _ in range(4):
        found = []
        for each, optimizer in both:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(whole(each(inputs)), targets)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert math.isclose(*found, rel_tol=1e-5)
    lnprune.rank(shards, 2, "out").select(0.2).apply(bias=True)
    shards(inputs)
    buffer = io.BytesIO()
    torch.save({name: whole(tensor) for name, tensor in shards.state_dict().items()}, buffer)
    buffer.seek(0)
    loaded = blocks()
    lnprune.load_masked(loaded, torch.load(buffer))
    torch.testing.assert_close(loaded(inputs), whole(shards(inputs)))
    lnprune.remove_all(shards)
    assert not lnprune.is_pruned(shards)
    torch.testing.assert_close(loaded(inputs), whole(shards(inputs)))


def loads_and_copies():
    model = parallel(blocks(), "tensor parallel")
    lnprune.local_structured(model, 0.5, 2, "out")
    other = parallel(blocks(), "tensor parallel")
    lnprune.load_masked(other, model.state_dict())
    assert same_bits(model.state_dict().values(), other.state_dict().values())
    inputs = torch.randn(3, 10)
    assert torch.equal(whole(model(inputs)), whole(other(inputs)))
    copied = copy.deepcopy(lnprune.renew_masked(other))
    assert torch.equal(whole(model(inputs)), whole(copied(inputs)))


def raises_alike():
    rank = torch.distributed.get_rank()
    mesh = make_mesh([-1])
    shards = shard_weights(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), mesh, ["S0"])
    state = [*shards.state_dict()]
    layer = shards[0]
    for call, here, there in (
        (lambda: lnprune.ln_structured(layer, "weight", 1, 2, 9), "Invalid index 9", "Invalid index 9"),
        (lambda: lnprune.ln_structured(layer, "weight", 9, 2, 0), "amount=9", "amount=9"),
        (lambda: lnprune.ln_structured(layer, "weight", 1 + (rank == 0), 2, 0), "another", "another"),
        (
            lambda: lnprune.ln_structured(layer, "x" if rank == 0 else "weight", 1, 2, 0),
            "another",
            "another",
        ),
        (
            lambda: lnprune.channel_norms(layer.weight, 2, 5 * (rank == 0)),
            "Invalid index",
            "raised on rank 0",
        ),
        (lambda: lnprune.channel_mask(layer.weight, 9 * (rank == 0), 2, 0), "9", "raised on rank 0"),
        (lambda: lnprune.local_structured(shards, 1, 2, int(rank == 0)), "another", "another"),
    ):
        message = raised_by(call)
        assert (here if rank == 0 else there) in message, message
        assert [*shards.state_dict()] == state
    with lnprune.reference_ranking():
        assert "reference_ranking" in raised_by(lambda: lnprune.ln_structured(layer, "weight", 1, 2, 0))
    assert [*shards.state_dict()] == state


def keeps_traffic_small():
    from torch.distributed.tensor.debug import CommDebugMode

    shards = shard_weights(nn.Sequential(nn.Linear(64, 50), nn.Linear(50, 40)), make_mesh([-1]), ["S0"])
    for count, call in (
        (3, lambda: lnprune.ln_structured(shards[0], "weight", 0.5, 2, 0)),
        (3, lambda: lnprune.ln_structured(shards[0], "weight", 0.5, 2, 0)),
        (3, lambda: lnprune.local_structured(shards, 0.5, 2, 1)),
        (1, lambda: lnprune.remove_all(shards)),
    ):
        with CommDebugMode() as traffic:
            call()
        assert traffic.get_total_counts() == count, traffic.get_comm_counts()


def test_two_ranks_mask_what_one_does():
    ranks(2).run(masks_as_on_one_machine, "rows", torch.float32)


GRID = [
    *((count, layout) for count in (2, 3) for layout in ("rows", "columns", "replicated")),
    *((4, layout) for layout in LAYOUTS),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "layout"), GRID)
def test_masks_are_those_of_the_unsharded_model(count, layout, dtype):
    ranks(count).run(masks_as_on_one_machine, layout, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_masks_of_other_placements(count):
    ranks(count).run(makes_masks_of_other_placements_permanent)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_methods_and_containers(count):
    ranks(count).run(takes_the_methods_of_torch)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_training_with_masks_under_tensor_parallelism(count):
    ranks(count).run(trains_alike, "tensor parallel")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_masked_models_are_loaded_and_copied(count):
    ranks(count).run(loads_and_copies)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_errors_leave_all_ranks_as_they_were(count):
    ranks(count).run(raises_alike)


@pytest.mark.slow
def test_collectives_of_masks():
    ranks(2).run(keeps_traffic_small)
