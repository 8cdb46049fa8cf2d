"""Sharded weights: FSDP2, tensor parallel and their mixtures do what the unsharded model does."""

import copy
import math
import mmap
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from ranks import raised_by, ranks
from sharded_models import (
    KINDS,
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
from torch.utils._python_dispatch import TorchDispatchMode

import lnprune

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")

ORDERS = [0, 0.5, 1, 2, 3, math.inf, -math.inf]
EXACT = [0, math.inf, -math.inf]  # orders whose norms no order of addition changes


def spans_ranks(placements, mesh, dim):
    """Whether the slices of one channel lie on several ranks."""
    return any(
        word != "R" and int(word[1:]) != dim and mesh.size(i) > 1 for i, word in enumerate(placements)
    )


def check_norms(expected, got, exact):
    """Equal, or where sums were added in another order, equal but for rounding."""
    assert type(got) is torch.Tensor
    assert got.dtype is torch.float64
    if exact:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0, equal_nan=True)


def chooses_what_the_whole_model_does(layout, dtype, orders):
    """All orders, both dims, local and global, from one layout."""
    sizes, placements = LAYOUTS[layout]
    mesh = make_mesh(sizes)
    model = layers().to(dtype)
    with torch.no_grad():
        model[0].weight[12, 0] = math.nan  # in the last rank's shard, however they are cut
        model[1].weight[0, 3] = math.inf
        model[1].weight[2] = 0
        model[2].weight[:, 1] = 0
    shards = shard_weights(copy.deepcopy(model), mesh, placements)
    for n in orders:
        for dim in (0, 1, "out"):
            expected, got = lnprune.rank(model, n, dim), lnprune.rank(shards, n, dim)
            assert got.names == expected.names
            for layer, (name, norms) in zip(model, expected.norms.items(), strict=True):
                along = dim if dim != "out" else 1 if isinstance(layer, nn.ConvTranspose2d) else 0
                exact = n in EXACT or not spans_ranks(placements, mesh, along)
                check_norms(norms, got.norms[name], exact)
            for options in ({}, {"scope": "global", "min_channels": 0}):
                keep = got.select(0.4, **options).keep
                for name, flags in expected.select(0.4, **options).keep.items():
                    assert torch.equal(keep[name], flags), (n, dim, name)


def writes_what_the_whole_model_does(layout, dtype):
    """In place by plan, by amounts and by global ranking, and undone, with biases that are not sharded."""
    sizes, placements = LAYOUTS[layout]
    mesh = make_mesh(sizes)
    model = layers().to(dtype)
    for n, dim in ((2, "out"), (1, "in"), (math.inf, 0), (-math.inf, 1)):
        bias = dim == "out"
        expected = copy.deepcopy(model)
        got = shard_weights(copy.deepcopy(model), mesh, placements)
        lnprune.rank(expected, n, dim).select(0.4).apply(permanent=True, bias=bias)
        plan = lnprune.rank(got, n, dim).select(0.4).apply(permanent=True, bias=bias, keep_backup=True)
        assert same_bits(expected.parameters(), got.parameters())
        plan.undo()
        assert same_bits(model.parameters(), got.parameters())
        plan.apply(permanent=True, bias=bias)
        assert same_bits(expected.parameters(), got.parameters())

        expected = lnprune.local_structured(copy.deepcopy(model), 0.4, n, dim, permanent=True)
        got = shard_weights(copy.deepcopy(model), mesh, placements)
        assert lnprune.local_structured(got, 0.4, n, dim, permanent=True) is got
        assert same_bits(expected.parameters(), got.parameters())
        assert not list(got.buffers())

        expected = lnprune.global_structured(copy.deepcopy(model), 0.4, n, dim, permanent=True)
        got = shard_weights(copy.deepcopy(model), mesh, placements)
        lnprune.global_structured(got, 0.4, n, dim, permanent=True)
        assert same_bits(expected.parameters(), got.parameters())


def ranks_scores_and_mixtures():
    """Scores sharded otherwise than the weight, or not at all; plain weights beside sharded ones."""
    mesh = make_mesh([-1])
    model = layers()
    scores = {f"{i}.weight": torch.randn_like(layer.weight) for i, layer in enumerate(model) if i < 4}
    given = {
        name: sharded(score, mesh, [placement])
        for (name, score), placement in zip(scores.items(), ("S0", "S1", "R", "S0"), strict=True)
    }
    given["1.weight"] = scores["1.weight"]
    mixed = copy.deepcopy(model)
    for i in (0, 1, 2):
        mixed[i].weight = nn.Parameter(sharded(mixed[i].weight, mesh, ["S1"]))
    for permanent in (True,):
        expected, got = copy.deepcopy(model), copy.deepcopy(mixed)
        for each, some in ((expected, scores), (got, given)):
            lnprune.local_structured(each, 0.5, 2, 0, some, permanent=permanent)
        assert same_bits(expected.parameters(), got.parameters())
    plan = lnprune.rank(mixed, 2, 0, given).select(0.5)
    for name, flags in lnprune.rank(model, 2, 0, scores).select(0.5).keep.items():
        assert torch.equal(plan.keep[name], flags)


GRID = [
    *((count, layout) for count in (2, 3) for layout in ("rows", "columns", "replicated")),
    *((4, layout) for layout in LAYOUTS),
    (2, "rows on one dim of two"),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("count", "layout"), GRID)
def test_the_same_channels_as_unsharded(count, layout, dtype):
    ranks(count).run(chooses_what_the_whole_model_does, layout, dtype, ORDERS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "layout"), GRID)
def test_the_same_zeros_as_unsharded(count, layout, dtype):
    ranks(count).run(writes_what_the_whole_model_does, layout, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_scores_and_plain_weights_beside_shards(count):
    ranks(count).run(ranks_scores_and_mixtures)


def test_two_ranks_choose_and_write_what_one_does():
    ranks(2).run(chooses_what_the_whole_model_does, "columns", torch.float32, [2, -math.inf])
    ranks(2).run(writes_what_the_whole_model_does, "rows", torch.float32)


def runs_the_page(page):
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(block, names)
    model, plan = names["model"], names["plan"]
    assert sum(int(flags.sum()) for flags in plan.keep.values()) == 165
    kept = [int(whole(layer.weight).any(dim=1).sum()) for layer in (model[0], model[2])]
    assert kept[0] <= 64
    assert kept[1] <= 16
    assert 64 in kept or 16 in kept, "a quarter of the channels, where no more were gone before"


def test_code_of_the_docs_runs_on_two_ranks():
    page = pathlib.Path(__file__).parent.parent / "docs" / "sharded.md"
    ranks(2).run(runs_the_page, page.read_text())


# Dtypes that native code does not take, and tensors of one dim.


def takes_any_dtype():
    mesh = make_mesh([-1])
    for dtype in (torch.complex64, torch.float8_e4m3fn, torch.float16):
        for placements in (["S0"], ["S1"]):
            weight = torch.randn(5, 6, dtype=torch.complex64 if dtype.is_complex else torch.float32)
            weight = weight.to(dtype)
            model, shards = nn.Module(), nn.Module()
            model.weight = nn.Parameter(weight.clone())
            shards.weight = nn.Parameter(sharded(weight, mesh, placements))
            expected = lnprune.rank([(model, "weight")], 2, 0)
            got = lnprune.rank([(shards, "weight")], 2, 0)
            # Of complex numbers torch takes the root in its own way.
            exact = placements == ["S0"] and not dtype.is_complex
            check_norms(expected.norms["0.weight"], got.norms["0.weight"], exact)
            expected.select(2).apply(permanent=True)
            plan = got.select(2).apply(permanent=True, keep_backup=True)
            held = model.weight.to_local() if hasattr(model.weight, "to_local") else model.weight
            local = shards.weight.to_local()
            shard = sharded(held.detach(), mesh, placements).to_local()
            assert torch.equal(local.view(torch.uint8), shard.view(torch.uint8))
            plan.undo()
            before = sharded(weight, mesh, placements).to_local()
            assert torch.equal(shards.weight.to_local().view(torch.uint8), before.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_dtypes_that_native_code_does_not_take(count):
    ranks(count).run(takes_any_dtype)


# FSDP2 and tensor parallel as users set them up.


def prunes_parallel_models(kind):
    for n in ORDERS:
        for dim in ("out", "in"):
            model = blocks()
            shards = parallel(copy.deepcopy(model), kind)
            expected, got = lnprune.rank(model, n, dim), lnprune.rank(shards, n, dim)
            assert got.names == expected.names
            for name, norms in expected.norms.items():
                torch.testing.assert_close(got.norms[name], norms, rtol=1e-14, atol=0)
            bias = dim == "out"
            want = expected.select(0.5, scope="global").apply(permanent=True, bias=bias)
            plan = got.select(0.5, scope="global").apply(permanent=True, bias=bias, keep_backup=True)
            for name, flags in want.keep.items():
                assert torch.equal(plan.keep[name], flags)
            assert same_bits(model.parameters(), shards.parameters())
            inputs = torch.randn(3, 10)
            with torch.no_grad():
                expected_outputs, outputs = model(inputs), whole(shards(inputs))
            if kind.endswith("fully_shard"):
                assert torch.equal(outputs, expected_outputs), "bit for bit"
            else:
                torch.testing.assert_close(outputs, expected_outputs)


def undoes_every_bit(kind):
    model = parallel(blocks(), kind)
    before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
    plan = lnprune.rank(model, 2, "out").select(0.5)
    plan.apply(permanent=True, bias=True, keep_backup=True)
    assert not same_bits(before, model.parameters())
    model(torch.randn(3, 10)).sum().backward()
    plan.undo()
    assert same_bits(before, model.parameters())
    plan.apply(permanent=True, bias=True, keep_backup=True)
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        lnprune.steps.local.held_here(model[0].weight).add_(1 if rank == 0 else 0)
    left = [whole(parameter.detach()).clone() for parameter in model.parameters()]
    message = raised_by(plan.undo)
    assert ("replaced since" if rank == 0 else "raised on rank") in message
    assert same_bits(left, model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kind"), KINDS)
def test_models_in_parallel(count, kind):
    ranks(count).run(prunes_parallel_models, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kind"), KINDS)
def test_undo_brings_every_bit_back_on_every_rank(count, kind):
    ranks(count).run(undoes_every_bit, kind)


class Tied(nn.Module):
    """An embedding whose weight is also that of the head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.inner(self.embedding(tokens)))


def prunes_tied_weights():
    from torch.distributed.fsdp import fully_shard

    model = Tied()
    shards = fully_shard(copy.deepcopy(model), mesh=make_mesh([-1]))
    plans = [lnprune.rank(each, 2, 0).select(0.4).apply(permanent=True) for each in (model, shards)]
    assert plans[0].to_dict() == plans[1].to_dict()
    assert same_bits(model.parameters(), shards.parameters())
    optimizer = torch.optim.SGD(shards.parameters(), lr=0.1)
    plans[1].keep_zeros(optimizer)
    tokens = torch.arange(11)
    assert torch.equal(model(tokens), shards(tokens))
    shards(tokens).sum().backward()
    optimizer.step()
    zeros = (whole(shards.embedding.weight) == 0).all(dim=1)
    assert torch.equal(zeros, ~plans[1].keep["embedding.weight"])
    assert "couple it before" in raised_by(lambda: lnprune.couple(shards, tokens))


def notices_parameters_on_a_smaller_mesh():
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.Linear(8, 4))
    mesh = make_mesh([-1])
    fully_shard(model[0], mesh=mesh, reshard_after_forward=2)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        model(torch.randn(2, 6))
    assert model[0][0].weight.device_mesh != mesh
    assert "call reshard()" in raised_by(lambda: lnprune.rank(model[0], 2, 0))
    model[0].reshard()
    assert model[0][0].weight.device_mesh == mesh
    assert len(lnprune.rank(model[0], 2, 0)) == 1


def ranks_a_model_without_values():
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8))
    ranking = lnprune.rank(fully_shard(model, mesh=make_mesh([-1])), 2, 0)
    assert ranking.norms["0.weight"].is_meta
    assert "device meta" in raised_by(lambda: ranking.select(0.5))
    assert "0.weight: expected" in raised_by(
        lambda: lnprune.local_structured(model, 1, 2, 0, permanent=True)
    )


def prunes_other_placements():
    """Shards of dim 1 by fully_shard, with parameters in bfloat16 while it computes; kernels in shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    mesh = make_mesh([-1])
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    shards = fully_shard(
        copy.deepcopy(model),
        mesh=mesh,
        shard_placement_fn=lambda parameter: Shard(1) if parameter.dim() > 1 else None,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )
    for dim in ("out", "in"):
        for each in (model, shards):
            lnprune.rank(each, 2, dim).select(0.4).apply(permanent=True, bias=dim == "out")
        assert same_bits(model.parameters(), shards.parameters())
    shards(torch.randn(2, 8)).float().sum().backward()
    with torch.inference_mode():
        for each in (model, shards):
            lnprune.rank(each, 2, 0).select(0.3).apply(permanent=True)
    assert same_bits(model.parameters(), shards.parameters())
    for placement in ("S2", "S3"):
        model = nn.Sequential(nn.Conv2d(3, 5, (3, 2)), nn.ConvTranspose2d(5, 2, 3))
        shards = shard_weights(copy.deepcopy(model), mesh, [placement])
        for each in (model, shards):
            lnprune.rank(each, 2, "out").select(0.4).apply(permanent=True)
        assert same_bits(model.parameters(), shards.parameters())


def undoes_what_was_converted(permanent):
    kind = "fully_shard" if permanent else "tensor parallel"
    model = parallel(blocks(), kind)
    before = [whole(parameter.detach()).double() for parameter in model.parameters()]
    plan = lnprune.rank(model, 2, "out").select(0.5).apply(permanent=permanent, keep_backup=permanent)
    model.double()
    plan.undo()
    assert same_bits(before, model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_other_placements(count):
    ranks(count).run(prunes_other_placements)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_tied_weights(count):
    ranks(count).run(prunes_tied_weights)


@pytest.mark.slow
def test_parameters_on_a_smaller_mesh_after_a_forward():
    ranks(4).run(notices_parameters_on_a_smaller_mesh)


@pytest.mark.slow
def test_a_sharded_model_on_the_device_meta():
    ranks(2).run(ranks_a_model_without_values)


@pytest.mark.slow
@pytest.mark.parametrize("permanent", [True, False])
def test_undo_follows_a_conversion(permanent):
    ranks(2).run(undoes_what_was_converted, permanent)


# Training on.


def trains_as_with_masks(kind, make):
    from torch.distributed.tensor.debug import CommDebugMode

    model = blocks()
    masked, shards = copy.deepcopy(model), parallel(copy.deepcopy(model), kind)
    steps = [(each, make(each.parameters())) for each in (masked, shards)]
    inputs, targets = torch.randn(32, 10), torch.randint(7, (32,))

    def losses(count):
        found = []
        for each, optimizer in steps:
            for _ in range(count):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(whole(each(inputs)), targets)
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        if kind == "fully_shard" and torch.distributed.get_world_size() != 3:
            assert found[:count] == found[count:], "averages of equal gradients are exact"
        torch.testing.assert_close(found[:count], found[count:], rtol=1e-5, atol=1e-6)

    losses(3)  # momentum of before
    lnprune.rank(masked, 2, "out").select(0.5).apply(bias=True)
    plan = lnprune.rank(shards, 2, "out").select(0.5).apply(permanent=True, bias=True)
    plan.keep_zeros(steps[1][1])
    losses(3)
    gone = [~flags for flags in plan.keep.values()]
    zeros = lambda: [(whole(shards[i].weight) == 0).all(dim=1) for i in (0, 2, 4)]  # noqa: E731
    assert all(torch.equal(*pair) for pair in zip(zeros(), gone, strict=True))
    # After a forward without a backward FSDP2 has gathered the root's parameters.
    with torch.no_grad():
        shards(inputs)
    with CommDebugMode() as traffic:
        steps[1][1].step()
    assert traffic.get_total_counts() == 0
    if hasattr(shards, "reshard"):
        shards.reshard()
    assert all(torch.equal(*pair) for pair in zip(zeros(), gone, strict=True))


def follows_what_is_sharded_later():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    plan = lnprune.rank(model, 2, "out").select(0.5).apply(permanent=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan.keep_zeros(optimizer)
    optimizer.step()
    for placement in ("S0", "S1"):
        for layer in model:
            layer.weight = nn.Parameter(sharded(whole(layer.weight) + 1, make_mesh([-1]), [placement]))
        optimizer.step()
        for layer, flags in zip(model, plan.keep.values(), strict=True):
            assert torch.equal((whole(layer.weight) == 0).all(dim=1), ~flags)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_zeros_are_kept_in_what_is_sharded_later(count):
    ranks(count).run(follows_what_is_sharded_later)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("make", [adamw, momentum])
@pytest.mark.parametrize(("count", "kind"), KINDS)
def test_zeros_stay_and_losses_are_those_with_masks(count, kind, make):
    ranks(count).run(trains_as_with_masks, kind, make)


def _notices_a_change():
    model = shard_weights(nn.Sequential(nn.Linear(6, 4, bias=False)), make_mesh([-1]), ["S0"])
    plan = lnprune.rank(model, 2, 0).select(0.5)
    output = (model[0].weight * model[0].weight).sum()
    plan.apply(permanent=True)
    assert "modified by an inplace operation" in raised_by(output.backward)


def test_autograd_sees_that_a_sharded_weight_changed():
    ranks(2).run(_notices_a_change)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_example(count):
    root = pathlib.Path(__file__).resolve().parent.parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [
            *torchrun,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
            root / "examples/sharded.py",
        ],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = dict(re.findall(r"^(.{28}) (.+)$", done.stdout, re.MULTILINE))
    said = {key.strip(): value for key, value in said.items()}
    assert said["rank"] == f"2048 channels, {3 if count == 2 else 6} collectives"
    assert said["apply"].startswith("Plan(4 parameters, 1024 of 2048 channels kept)")
    assert float(said["loss after training pruned"]) < float(said["loss after training"])
    assert said["whole, from the checkpoint"].startswith("the same zeros")


# Ties.


def keeps_the_lower_index():
    mesh = make_mesh([-1])
    for _ in range(12):
        column = torch.randn(64, 1)
        model = nn.Linear(4096, 64, bias=False)
        model.weight = nn.Parameter(sharded(column.expand(64, 4096), mesh, ["S0"]))
        for n in (2, 3, 0.5):
            ranking = lnprune.rank([(model, "weight")], n, 1)
            assert ranking.norms["0.weight"].unique().numel() == 1
            keep = ranking.select(0.5).keep["0.weight"]
            assert keep[:2048].all()
            assert not keep[2048:].any()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_identical_channels_the_lower_index_stays(count):
    ranks(count).run(keeps_the_lower_index)


# Plans from one mesh for another, and checkpoints.


def saves_a_plan(folder):
    from torch.distributed import checkpoint

    torch.manual_seed(0)
    model = parallel(blocks(), "fully_shard over tensor parallel")
    before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
    plan = lnprune.rank(model, 2, "out").select(0.5, scope="global")
    plan.save(f"{folder}/plan{torch.distributed.get_rank()}.json")
    plan.apply(permanent=True)
    checkpoint.save(model.state_dict(), checkpoint_id=f"{folder}/checkpoint")
    return before, [whole(parameter.detach()) for parameter in model.parameters()]


def loads_a_plan(folder, before, expected):
    from torch.distributed import checkpoint

    model = parallel(blocks(), "fully_shard")
    state = model.state_dict()
    checkpoint.load(state, checkpoint_id=f"{folder}/checkpoint")
    model.load_state_dict(state)
    assert same_bits(expected, model.parameters())

    fresh = blocks()
    with torch.no_grad():
        for parameter, values in zip(fresh.parameters(), before, strict=True):
            parameter.copy_(values)
    fresh = parallel(fresh, "fully_shard")
    lnprune.load_plan(f"{folder}/plan3.json", fresh).apply(permanent=True)
    assert same_bits(expected, fresh.parameters())
    rank = torch.distributed.get_rank()
    path = f"{folder}/plan{rank}.json" if rank else f"{folder}/nothing.json"
    message = raised_by(lambda: lnprune.load_plan(path, fresh))
    assert ("No such file" if rank == 0 else "raised on rank 0") in message


@pytest.mark.slow
def test_a_checkpoint_and_a_plan_of_four_ranks_on_two():
    with tempfile.TemporaryDirectory() as folder:
        before, expected = ranks(4).run(saves_a_plan, folder)[0]
        ranks(2).run(loads_a_plan, folder, before, expected)


# Traffic and memory.


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {_address(leaf) for leaf in torch.utils._pytree.tree_leaves((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and _address(leaf) not in known:
                self.largest = max(self.largest, leaf.numel() * leaf.element_size())
        return made


def _address(leaf):
    if not isinstance(leaf, torch.Tensor):
        return None
    return (leaf._local_tensor if hasattr(leaf, "_local_tensor") else leaf).untyped_storage().data_ptr()


def measures_traffic(layout, groups):
    from torch.distributed.tensor.debug import CommDebugMode

    sizes, placements = LAYOUTS[layout]
    mesh = make_mesh(sizes)
    model = nn.Sequential(*(nn.Linear(512, 400, bias=False) for _ in range(3)))
    shards = shard_weights(model, mesh, placements)
    channels = 3 * 400
    lnprune.rank(shards, 2, 0)  # groups connect at their first use
    exchanged, agreed = groups
    plan = lnprune.rank(shards, 2, 0).select(0.5)
    for call, exchanges in (
        (lambda: lnprune.rank(shards, 2, 0), exchanged),
        (lambda: lnprune.local_structured(shards, 0.1, 2, 0, permanent=True), exchanged),
        (lambda: plan.apply(permanent=True), 0),
    ):
        with CommDebugMode() as traffic, Allocations() as allocations:
            call()
        assert traffic.get_total_counts() == 2 * exchanges + agreed, traffic.get_comm_counts()
        # A sum for each channel, padded to a multiple of the ranks; scalars beside it.
        assert allocations.largest <= 8 * (channels + torch.distributed.get_world_size())
    ranking = lnprune.rank(shards, 2, 0)
    with CommDebugMode() as traffic:
        ranking.select(0.5)
    assert traffic.get_total_counts() == 0
    with CommDebugMode() as traffic:
        lnprune.rank(shards, -1, 0)  # with counts, since norms of 0 are not those of zeros
    assert traffic.get_total_counts() == 2 * exchanged + agreed, traffic.get_comm_counts()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        ("rows", (1, 1)),
        ("columns", (1, 1)),
        ("replicated", (0, 0)),
        ("rows and columns", (2, 2)),
        ("replicas of rows", (1, 2)),  # replicas agree on what they do, and exchange nothing
    ],
)
def test_two_collectives_for_each_group_and_one_to_agree(layout, groups):
    ranks(4).run(measures_traffic, layout, groups)


# Errors.


def raises_on_all_ranks():
    from torch.distributed.fsdp import fully_shard

    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = make_mesh([-1])
    model = parallel(blocks(), "fully_shard")
    before = [whole(parameter.detach()).clone() for parameter in model.parameters()]

    def both(call, here, there="the same call raised on rank 0"):
        message = raised_by(call)
        assert (here if rank == 0 else there) in message, message
        assert same_bits(before, model.parameters())

    other = "got another one on rank"
    both(lambda: lnprune.rank(model, 2, 5 if rank == 0 else 0), "dim 5 is out of range")
    both(lambda: lnprune.rank(model, 2, 5), "dim 5 is out of range", "dim 5 is out of range")
    both(lambda: lnprune.rank(model, 1 if rank == 0 else 2, 0), other, other)
    both(lambda: lnprune.rank(model, 2, int(rank == 0)), other, other)
    both(lambda: lnprune.rank(model, 2, 0, include="0" if rank == 0 else None), other, other)
    both(lambda: lnprune.rank(model, 2, 0, include="x" if rank == 0 else None), "matches nothing")
    both(lambda: lnprune.local_structured(model, 2.5, 2, 0, permanent=True), "amount=2.5", "amount=2.5")
    both(lambda: lnprune.local_structured(model, -1 if rank == 0 else 1, 2, 0, permanent=True), "amount")
    both(lambda: lnprune.local_structured(model, 1 + (rank == 0), 2, 0, permanent=True), other, other)
    both(lambda: lnprune.rank(model, "nuc", 0), "n='nuc'", "n='nuc'")
    both(lambda: lnprune.rank(model, "abc", 0), "Error", "Error")
    scores = {(model[0], "weight"): model[0].weight.detach().abs()} if rank == 0 else None
    both(lambda: lnprune.rank(model, 2, 0, scores), other, other)
    call = lambda amount: lnprune.global_structured(model, amount, 2, 0, permanent=True)  # noqa: E731
    both(lambda: call(-1 if rank == 0 else 1), "amount")
    both(lambda: call(1 + (rank == 0)), other, other)
    pairs = [(model[0], "weight"), (model[2], "weight")]
    both(lambda: lnprune.rank(pairs[: 1 + (rank == 0)], 2, 0), other, other)
    both(lambda: lnprune.rank(iter(pairs[:1] * (1 + (rank == 0))), 2, 0), "every parameter once")

    ranking = lnprune.rank(model, 2, 0)
    both(lambda: ranking.select(1 + (rank == 0)).apply(permanent=True), other, other)
    both(lambda: ranking.select(1).apply(permanent=rank == 0, keep_backup=rank == 0), other, other)
    both(lambda: ranking.select(1).apply(), "permanent=True", "permanent=True")
    both(lambda: lnprune.local_structured(model, 1, 2, 0), "permanent=True", "permanent=True")
    both(lambda: lnprune.ln_structured(model[0], "weight", 1, 2, 0), "permanent=True", "permanent=True")
    with lnprune.reference_ranking():
        both(lambda: lnprune.rank(model, 2, 0), "reference_ranking", "reference_ranking")
        call = lambda: lnprune.local_structured(model, 1, 2, 0, permanent=True)  # noqa: E731
        both(call, "reference_ranking", "reference_ranking")
    plan = ranking.select(1)
    both(lambda: plan.apply(permanent=1 if rank == 0 else True), "expected True or False")
    both(plan.undo, "is not applied", "is not applied")
    plan.apply(permanent=True)
    before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
    both(plan.undo, "the values are gone", "the values are gone")
    fresh = ranking.select(1)
    both(lambda: (plan if rank == 0 else fresh).apply(permanent=True), "is applied already")
    both((plan if rank == 0 else fresh).undo, "the values are gone", "is not applied")

    # Gathered parameters: of the root, after a forward without a backward.
    plan = ranking.select(2)
    root = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    fully_shard(root, mesh=mesh)
    saved = lnprune.rank(root, 2, 0).select(1)
    with torch.no_grad():
        root(torch.randn(2, 6))
    for call in (
        lambda: lnprune.rank(root, 2, 0),
        lambda: lnprune.rank(root[0], 2, 0),
        lambda: lnprune.local_structured([(root[0], "weight")], 1, 2, 0, permanent=True),
        lambda: saved.apply(permanent=True),
    ):
        both(call, "call reshard()", "call reshard()")
    root.reshard()
    saved.apply(permanent=True, keep_backup=True)
    with torch.no_grad():
        root(torch.randn(2, 6))
    both(saved.undo, "call reshard()", "call reshard()")
    root.reshard()
    saved.undo()

    # Placements.
    partial = nn.Linear(6, 4, bias=False)
    partial.weight = nn.Parameter(_partial(torch.randn(4, 6), mesh))
    for call in (
        lambda: lnprune.rank([(partial, "weight")], 2, 0),
        lambda: lnprune.local_structured([(partial, "weight")], 1, 2, 0, permanent=True),
    ):
        both(call, "0.weight: expected a DTensor that is", "0.weight: expected a DTensor that is")
    assert count > 1


def raises_where_one_shard_cannot_be_written(folder):
    """A write to that one would end its process. No other rank writes, either."""
    from torch.distributed.tensor import DTensor, Shard

    rank, mesh = torch.distributed.get_rank(), make_mesh([-1])
    local = torch.randn(4, 6)
    if rank == 0:
        path = pathlib.Path(folder) / "weight"
        path.write_bytes(local.numpy().tobytes())
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        local = torch.frombuffer(mapping, dtype=torch.float32).view(4, 6)
    model = nn.Linear(6, 4, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
    before = local.clone()
    plan = lnprune.rank([(model, "weight")], 2, 1).select(3)
    for call in (
        lambda: plan.apply(permanent=True, keep_backup=True),
        lambda: lnprune.local_structured([(model, "weight")], 3, 2, 1, permanent=True),
    ):
        assert ("read-only mapping" if rank == 0 else "raised on rank 0") in raised_by(call)
        assert torch.equal(local, before)


def _partial(tensor, mesh):
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(tensor, mesh, [Partial()])


def raises_where_meshes_differ():
    """The first layer, which is not pruned, lies on another mesh than the one that is."""
    rank = torch.distributed.get_rank()
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    model[0].weight = nn.Parameter(sharded(model[0].weight, make_mesh([2, 2]), ["S0", "S1"]))
    model[1].weight = nn.Parameter(sharded(model[1].weight, make_mesh([4]), ["S0"]))
    for amount, expected in ((9.0, "amount"), (1, None)):
        call = lambda: lnprune.global_structured(  # noqa: E731
            model,
            amount if rank == 0 else 1,  # noqa: B023
            2,
            0,
            exclude="0",
            permanent=True,
        )
        if expected is None:
            call()
        else:
            assert (expected if rank == 0 else "raised on rank") in raised_by(call)


def raises_outside_of_the_mesh():
    from torch.distributed.device_mesh import DeviceMesh

    inside = torch.distributed.get_rank() < 2
    mesh = DeviceMesh("cpu", [0, 1])
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(sharded(model.weight, mesh, ["S0"]))
    calls = [
        lambda: lnprune.rank([(model, "weight")], 2, 0),
        lambda: lnprune.local_structured([(model, "weight")], 1, 2, 0, permanent=True),
    ]
    for call in calls:
        if inside:
            call()
        else:
            assert "ValueError: 0.weight: expected a rank of the DTensor's mesh" in raised_by(call)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_errors_are_raised_on_all_ranks_and_none_waits(count):
    ranks(count).run(raises_on_all_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_shard_that_cannot_be_written(count, tmp_path):
    ranks(count).run(raises_where_one_shard_cannot_be_written, str(tmp_path))


@pytest.mark.slow
def test_trouble_between_ranking_and_pruning_where_meshes_differ():
    ranks(4).run(raises_where_meshes_differ)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
def test_ranks_outside_of_the_mesh(count):
    ranks(count).run(raises_outside_of_the_mesh)


def _another_call_on_one_rank(kind):
    """On a mesh of two dims all learn of the rank that did otherwise."""
    model = parallel(blocks(), kind)
    rank = torch.distributed.get_rank()
    for trouble in range(4):
        messages = (
            raised_by(lambda: lnprune.rank(model, 2, int(rank == trouble))),  # noqa: B023
            raised_by(lambda: lnprune.rank(model, 2, 9 if rank == trouble else 0)),  # noqa: B023
        )
        assert "another" in messages[0] or "raised on rank" in messages[0]
        assert "out of range" in messages[1] or "raised on rank" in messages[1]
    lnprune.rank(model, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fully_shard over tensor parallel", "replicated fully_shard"])
def test_every_rank_of_a_mesh_of_two_dims_learns_of_trouble(kind):
    ranks(4).run(_another_call_on_one_rank, kind)
