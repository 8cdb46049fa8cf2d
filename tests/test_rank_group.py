"""rank(..., group=): layers on several ranks in one ranking, as stages of a pipeline or experts."""

import copy

import pytest
import torch
from ranks import raised_by, ranks
from sharded_models import make_mesh, same_bits, shard_weights
from torch import nn

import lnprune

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")


def whole_model():
    """Layers of ever larger norms: no stage alone chooses what all choose together."""
    model = nn.Sequential(*(nn.Linear(6 + i, 7 + i) for i in range(8)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight *= 1 + i
    return model


def stage_of(model, rank, count):
    """The layers of a rank, under the names that they have in the whole model."""
    stage = nn.Module()
    for i in range(len(model)):
        if i * count // len(model) == rank:
            stage.add_module(str(i), model[i])
    return stage


def chooses_what_the_whole_model_does():
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.group.WORLD
    for n, options in ((2, {}), (1, {"normalize": "layer"}), (-1, {"min_channels": 2})):
        model = whole_model()
        expected_model, stage = copy.deepcopy(model), stage_of(model, rank, count)
        expected = lnprune.rank(expected_model, n, "out")
        ranking = lnprune.rank(stage, n, "out", group=group)
        assert sorted(ranking.names) == sorted(expected.names)
        assert len(ranking) == 8
        for name, norms in expected.norms.items():
            assert torch.equal(ranking.norms[name], norms)
        wanted = expected.select(0.4, scope="global", **options)
        plan = ranking.select(0.4, scope="global", **options)
        for name, flags in wanted.keep.items():
            assert torch.equal(plan.keep[name], flags)
        alone = lnprune.rank(stage, n, "out").select(0.4, scope="global", **options)
        same = all(torch.equal(flags, plan.keep[name]) for name, flags in alone.keep.items())
        others = torch.tensor(float(not same))
        torch.distributed.all_reduce(others)
        assert n != 2 or others > 0, "on some rank a stage alone chooses otherwise"

        wanted.apply(permanent=True, bias=True)
        plan.apply(permanent=True, bias=True, keep_backup=True)
        assert same_bits(stage_of(expected_model, rank, count).parameters(), stage.parameters())
        plan.undo().apply()
        assert sorted(name for name, _ in stage.named_buffers()) == sorted(
            f"{name}_mask" for name in alone.keep
        )
        # What is gone takes no part in the next ranking.
        again = lnprune.rank(stage, n, "out", group=group).select(1, scope="global", min_channels=0)
        kept = [sum(int(flags.sum()) for flags in each.keep.values()) for each in (plan, again)]
        assert kept[0] == kept[1] + 1


def saves_the_plan_of_all(folder):
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = whole_model()
    group = torch.distributed.group.WORLD
    plan = lnprune.rank(stage_of(model, rank, count), 2, "out", group=group).select(0.4, scope="global")
    plan.save(f"{folder}/{rank}.json")
    torch.distributed.barrier()
    loaded = lnprune.load_plan(f"{folder}/0.json", model)
    assert loaded.keep.keys() == plan.keep.keys()
    loaded.apply(permanent=True)
    assert loaded.to_dict() == plan.to_dict()


def tells_equal_names_apart():
    """Experts of several ranks have the same names; sharded layers of several stages too."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.group.WORLD
    experts = [nn.Linear(6, 8) for _ in range(count)]
    expected = [copy.deepcopy(expert) for expert in experts]
    mine = experts[rank]
    mine.extra = nn.Linear(3, 2 + rank) if rank else mine
    if not rank:
        del mine.extra
    ranking = lnprune.rank(mine, 2, "out", group=group)
    assert {f"weight@{i}" for i in range(count)} < set(ranking.names)
    plan = ranking.select(0.5, scope="global", min_channels=0).apply(permanent=True)
    assert "extra.weight@1" in ranking.names if count > 2 else "extra.weight" in ranking.names
    keep = plan.keep[f"weight@{rank}"]
    assert torch.equal(mine.weight, expected[rank].weight * keep[:, None])


def ranks_stages_of_shards(kind):
    """Two stages, each on two ranks: shards exchange sums, then stages norms."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = make_mesh([2, 2])  # stages by shards
    stage = mesh.get_local_rank("a")
    model = whole_model()
    expected_model, mine = copy.deepcopy(model), stage_of(model, stage, 2)
    if kind == "tensor parallel":
        shard_weights(list(mine.children()), mesh["b"], ["S1"])
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(mine, mesh=mesh["b"])
    group = mesh.get_group("a")
    lnprune.rank(mine, 2, "out", group=group)
    with CommDebugMode() as traffic:
        ranking = lnprune.rank(mine, 2, "out", group=group)
    assert traffic.get_total_counts() <= 3 + 2, traffic.get_comm_counts()  # objects take two: sizes, bytes
    plan = ranking.select(0.4, scope="global").apply(permanent=True)
    expected = lnprune.rank(expected_model, 2, "out").select(0.4, scope="global").apply(permanent=True)
    for name, flags in expected.keep.items():
        assert torch.equal(plan.keep[name], flags)
    assert same_bits(stage_of(expected_model, stage, 2).parameters(), mine.parameters())


def raises_on_every_rank():
    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    model = nn.Sequential(nn.Linear(6, 4))
    for call, here, there in (
        (lambda: lnprune.rank(model, 2, 7 * (rank == 0), group=group), "dim 7", "raised on rank 0"),
        (lambda: lnprune.rank(model, 1 + (rank == 0), 0, group=group), "one order", "one order"),
        (lambda: lnprune.rank(model, "x" if rank == 0 else 2, 0, group=group), "", "raised on rank 0"),
        (lambda: lnprune.rank(model, 2, 0, group="x"), "expected a torch", "expected a torch"),
    ):
        message = raised_by(call)
        assert (here if rank == 0 else there) in message, message
    first = torch.distributed.new_group([0])
    if rank == 0:
        assert lnprune.rank(model, 2, 0, group=first).names == ["0.weight"]
    else:
        assert "ValueError: group: " in raised_by(lambda: lnprune.rank(model, 2, 0, group=first))
    meta = nn.Sequential(nn.Linear(6, 4, device="meta" if rank == 0 else "cpu"))
    message = raised_by(lambda: lnprune.rank(meta, 2, 0, group=group))
    assert ("device meta" if rank == 0 else "raised on rank 0") in message


def test_two_stages_choose_what_the_whole_model_does():
    ranks(2).run(chooses_what_the_whole_model_does)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
def test_stages_choose_what_the_whole_model_does(count):
    ranks(count).run(chooses_what_the_whole_model_does)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_plan_of_all_stages(count, tmp_path):
    ranks(count).run(saves_the_plan_of_all, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_names_of_experts(count):
    ranks(count).run(tells_equal_names_apart)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_trouble_of_one_rank_reaches_all(count):
    ranks(count).run(raises_on_every_rank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor parallel", "fully_shard"])
def test_stages_that_are_sharded(kind):
    ranks(4).run(ranks_stages_of_shards, kind)
