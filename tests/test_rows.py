"""Rows of several members, of parts of tensors, and of tensors without a module, against brute force."""

import math

import cases
import pytest
import torch
from module_state import ORDER_OF_NONE
from torch import nn

import lnprune
from lnprune.modules.transaction import Values
from lnprune.plans.ranking import Ranking, measure
from lnprune.plans.rows import Member, Part, Row, Weight, flags_of_weights

on_every_device = pytest.mark.parametrize("device", cases.DEVICES)

ORDERS = (0, 0.5, 1, 2, 3, "fro", *ORDER_OF_NONE, math.inf, -math.inf, -1)


def slices_of(member, tensor):
    """The slices of a member as rows of a float64 or complex128 matrix, and the channel of each."""
    if member.part is not None:
        tensor = tensor.narrow(*member.part)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    rows = tensor.detach().to(wide).movedim(member.dim, 0).flatten(1).cpu()
    return rows, torch.arange(len(rows)) if member.index is None else member.index


def brute_force(row, tensors, n):
    """The norms of the concatenated slices of each channel."""
    channels = [[] for _ in range(row.channels)]
    for member in row.members:
        slices, index = slices_of(member, tensors[member.weight])
        for part, channel in zip(slices, index.tolist(), strict=True):
            channels[channel].append(part)
    order = 2 if n in ("fro", None) else n
    return torch.stack([torch.linalg.vector_norm(torch.cat(parts), order) for parts in channels])


def assert_close(actual, expected):
    assert actual.dtype is torch.float64
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-12, atol=0, equal_nan=True)


def coupled(device, dtype=torch.float32):
    """Outputs, what reads them flattened, and their bias as one row; beside a row of one member."""
    shapes = {"conv": (6, 3, 2, 2), "linear": (5, 24), "bias": (6, 1), "alone": (7, 4)}
    weights = {name: Weight([name], shape) for name, shape in shapes.items()}
    tensors = {weight: torch.randn(weight.shape, device=device).to(dtype) for weight in weights.values()}
    flattened = Member(weights["linear"], 1, torch.arange(6).repeat_interleave(4))
    members = [Member(weights["conv"], 0), flattened, Member(weights["bias"], 0)]
    rows = [Row("alone", 4, [Member(weights["alone"], 1)]), Row("block", 6, members)]
    return rows, tensors, weights


@on_every_device
@pytest.mark.parametrize("n", ORDERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_two_weights_as_one_row_have_the_norms_of_their_slices_together(device, dtype, n):
    rows, tensors, _ = coupled(device, dtype)
    norms = measure(rows, n, tensors).norms
    assert list(norms) == ["alone", "block"]
    for row in rows:
        assert_close(norms[row.name], brute_force(row, tensors, n))


@on_every_device
@pytest.mark.parametrize("n", ORDERS, ids=repr)
def test_not_a_number_in_any_member_is_one_in_the_row(device, n):
    rows, tensors, weights = coupled(device)
    tensors[weights["linear"]][2, 13] = math.nan
    norms = measure(rows, n, tensors).norms["block"]
    assert_close(norms, brute_force(rows[1], tensors, n))
    assert norms.isnan().nonzero().flatten().tolist() == ([] if n == 0 else [3])


@on_every_device
def test_equal_channels_of_rows_tie(device):
    rows, tensors, weights = coupled(device)
    conv, linear, bias = (tensors[weights[name]] for name in ("conv", "linear", "bias"))
    conv[:], bias[:] = conv[:1].clone(), bias[:1].clone()
    linear.copy_(linear[:, :4].repeat(1, 6))
    assert len(measure(rows, 2, tensors).norms["block"].unique()) == 1
    keep = measure(rows, 2, tensors).select(0.5).keep["block"]
    assert keep.tolist() == [True] * 3 + [False] * 3


@on_every_device
def test_the_nuclear_norm_of_several_members_is_refused(device):
    rows, tensors, _ = coupled(device)
    with pytest.raises(ValueError, match=r"^block: .*'nuc'"):
        measure(rows[1:], "nuc", tensors)


@on_every_device
def test_a_plan_of_a_row_counts_the_elements_of_all_members(device, tmp_path):
    rows, tensors, _ = coupled(device)
    plan = measure(rows, 2, tensors).select(2, scope="global", normalize="size")
    sizes = {"alone": 7, "block": 12 + 20 + 1}
    for entry, row in zip(plan.entries, rows, strict=True):
        assert entry.channels == row.channels
        assert entry.parameters_removed == (entry.channels - entry.kept) * sizes[entry.name]
    assert plan.entries[1].shape == (6, 33)
    assert sum(entry.kept for entry in plan.entries) == 8
    scores = {
        (row.name, i): norm / math.sqrt(sizes[row.name])
        for row in rows
        for i, norm in enumerate(brute_force(row, tensors, 2).tolist())
    }
    gone = {(name, i) for name, keep in plan.keep.items() for i in (~keep).nonzero().flatten().tolist()}
    assert gone == set(sorted(scores, key=scores.get)[:2])
    assert "block" in str(plan.to_dict())
    plan.save(tmp_path / "plan")
    with pytest.raises(
        ValueError, match=r"^[a-z.]+: expected a parameter .* the plan is for another model"
    ):
        lnprune.load_plan(tmp_path / "plan", nn.ParameterDict({"alone": torch.randn(7, 4)}))


@on_every_device
def test_a_channel_is_gone_where_all_of_its_slices_are_zero(device):
    rows, tensors, weights = coupled(device)
    for name in ("conv", "bias"):
        tensors[weights[name]][1:3] = 0
    tensors[weights["linear"]][:, 4:8] = 0
    for n in (2, -1):  # whose norms of zeros are, and are not, the only ones that are 0
        plan = measure(rows, n, tensors).select({"alone": 0, "block": 1})
        assert plan.entries[1].kept == 4
        assert not plan.keep["block"][1]


def masks_of(rows, tensors):
    return {weight: torch.ones_like(tensor) for weight, tensor in tensors.items()}


@on_every_device
def test_a_channel_is_gone_where_masks_leave_none_of_its_slices(device):
    rows, tensors, weights = coupled(device)
    masks = masks_of(rows, tensors)
    for name in ("conv", "bias"):
        masks[weights[name]][1:3] = 0
    masks[weights["linear"]][:, 4:8] = 0
    del masks[weights["alone"]]
    plan = measure(rows, 2, tensors, masks=masks).select({"alone": 0, "block": 1})
    assert plan.entries[1].kept == 4
    del masks[weights["bias"]]
    plan = measure(rows, 2, tensors, masks=masks).select({"alone": 0, "block": 1})
    assert plan.entries[1].kept == 5, "what has no mask is not emptied by one"


# ------------------------------------------------------------------------------------------- modules


class Block(nn.Module):
    """A linear layer, what reads it, and experts that lie in one parameter."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 5)
        self.experts = nn.Parameter(torch.randn(3, 8, 5))


def weight_of(model, name):
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return Weight([name], getattr(module, attribute).shape, [(module, attribute)])


def values(weights):
    return {weight: getattr(*weight.places[0]).detach() for weight in weights}


def ranked(model, n=2):
    """Up's outputs with down's inputs as one row, and the outputs of each expert as a row of its own."""
    up, down, experts = (weight_of(model, name) for name in ("up.weight", "down.weight", "experts"))
    rows = [Row("hidden", 6, [Member(up, 0), Member(down, 1)])]
    rows += [Row(f"experts[{i}]", 8, [Member(experts, 1, part=Part(0, i, 1))]) for i in range(3)]
    return rows, measure(rows, n, values([up, down, experts]))


def expected_weights(model, keep):
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found["up.weight"][~keep["hidden"]] = 0
    found["down.weight"][:, ~keep["hidden"]] = 0
    for i in range(3):
        if f"experts[{i}]" in keep:
            found["experts"][i, ~keep[f"experts[{i}]"]] = 0
    return found


def assert_state(model, expected):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@on_every_device
@pytest.mark.parametrize("n", [1, 2, math.inf])
def test_parts_of_a_tensor_are_ranked_by_themselves(device, n):
    model = Block().to(device)
    rows, ranking = ranked(model, n)
    for row in rows:
        assert_close(ranking.norms[row.name], brute_force(row, values(m.weight for m in row.members), n))
    plan = ranking.select({"hidden": 2, "experts[0]": 3, "experts[1]": 0, "experts[2]": 7})
    assert [entry.kept for entry in plan.entries] == [4, 5, 8, 1]
    assert [entry.shape for entry in plan.entries] == [(6, 9), *[(1, 8, 5)] * 3]
    assert [line.split()[0] for line in str(plan).splitlines() if "experts[" in line] == [
        row.name for row in rows[1:]
    ]


@on_every_device
@pytest.mark.parametrize("keep_backup", [True, False])
def test_rows_are_zeroed_in_place(device, keep_backup):
    model = Block().to(device)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    plan = ranked(model)[1].select(0.5)
    expected = expected_weights(model, plan.keep)
    plan.apply(permanent=True, keep_backup=keep_backup)
    assert_state(model, expected)
    for name, parameter in model.named_parameters():
        assert (parameter._version > versions[name]) == (not name.endswith("bias")), name
    if keep_backup:
        plan.undo()
        assert_state(model, before)
    else:
        with pytest.raises(RuntimeError, match="keep_backup"):
            plan.undo()


@on_every_device
def test_parts_are_put_back_in_the_dtype_of_now_and_beside_what_was_trained(device):
    model = Block().to(device)
    plan = ranked(model)[1].select(0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan.apply(permanent=True, keep_backup=True)
    keep = plan.keep["experts[1]"]
    model.double()
    with torch.no_grad():
        model.experts[1, keep] = 7
    plan.undo()
    before["experts"][1, keep] = 7
    assert_state(model, {name: value.double() for name, value in before.items()})


@on_every_device
def test_values_that_came_into_a_pruned_part_are_not_lost(device):
    model = Block().to(device)
    plan = ranked(model)[1].select(0.5).apply(permanent=True, keep_backup=True)
    with torch.no_grad():
        model.experts[2] = 1
    with pytest.raises(RuntimeError, match=r"^experts: 20 of the values"):
        plan.undo()
    assert bool((model.experts[2] == 1).all())


@on_every_device
def test_a_failing_call_puts_parts_back(device, monkeypatch):
    model = Block().to(device)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = ranked(model)[1].select(0.5)
    zero = lnprune.ops.zero_channels_

    def failing(*arguments):
        zero(*arguments)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(lnprune.ops, "zero_channels_", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        plan.apply(permanent=True, keep_backup=True)
    assert_state(model, before)


@on_every_device
def test_an_undo_that_fails_leaves_the_zeros_of_parts(device, monkeypatch):
    model = Block().to(device)
    plan = ranked(model)[1].select(0.5).apply(permanent=True, keep_backup=True)
    expected = expected_weights(model, plan.keep)
    put_back, calls = Values.write, []

    def failing(values, bits):
        put_back(values, bits)
        calls.append(values)
        if len(calls) == 5:
            raise RuntimeError("on purpose")

    monkeypatch.setattr(Values, "write", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        plan.undo()
    assert_state(model, expected)


@on_every_device
def test_members_get_masks_along_their_dims(device):
    model = Block().to(device)
    rows, _ = ranked(model)
    ranking = measure(rows[:1], 2, values(member.weight for member in rows[0].members))
    plan = ranking.select(0.5)
    expected = expected_weights(model, plan.keep)
    plan.apply()
    assert torch.equal(model.up.weight, expected["up.weight"])
    assert torch.equal(model.down.weight, expected["down.weight"])
    assert model.down.weight_mask[0].tolist() == plan.keep["hidden"].float().tolist()
    plan.undo()
    assert not list(model.buffers())


@on_every_device
def test_masks_of_parts_are_refused_and_nothing_is_lost(device):
    model = Block().to(device)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    one = ranked(model)[0][2:3]
    for plan in (
        ranked(model)[1].select(0.5),
        measure(one, 2, values([one[0].members[0].weight])).select(0.5),
    ):
        with pytest.raises(ValueError, match=r"^experts: a mask is of a whole weight: prune parts"):
            plan.apply()
        assert_state(model, before)
        assert not list(model.buffers())


@on_every_device
def test_a_bias_of_a_part_is_refused(device):
    model = nn.Linear(4, 6, device=device)
    weight = weight_of(model, "weight")
    row = Row("half", 6, [Member(weight, 0, part=Part(1, 0, 2))])
    with pytest.raises(ValueError, match=r"^weight: bias=True needs channels that are outputs"):
        measure([row], 2, values([weight])).select(0.5).apply(permanent=True, bias=True)


@on_every_device
def test_one_weight_along_two_dims_in_place(device):
    model = Block().to(device)
    up = weight_of(model, "up.weight")
    before = model.up.weight.detach().clone()
    rows = [Row("in", 4, [Member(up, 1)]), Row("out", 6, [Member(up, 0)])]
    plan = measure(rows, 2, values([up])).select({"in": 1, "out": 2})
    plan.apply(permanent=True, keep_backup=True)
    expected = before * plan.keep["in"].to(device) * plan.keep["out"].to(device)[:, None]
    assert torch.equal(model.up.weight, expected)
    plan.undo()
    assert torch.equal(model.up.weight, before)


@on_every_device
def test_parts_of_what_cannot_be_written_are_refused(device):
    weight = Weight(["w"], (3, 8, 5))
    rows = [Row("w[0]", 8, [Member(weight, 1, part=Part(0, 0, 1))])]
    holder = nn.Module()
    holder.w = nn.Parameter(torch.randn(1, 8, 5, device=device).expand(3, 8, 5))
    weight.places.append((holder, "w"))
    plan = Ranking(rows, 2, [torch.arange(8).double()]).select(0.5)
    with pytest.raises(ValueError, match=r"^w: expected a parameter that can be written"):
        plan.apply(permanent=True)


def test_slices_that_several_rows_prune_are_pruned_once():
    weight, other = Weight(["w"], (2, 3)), Weight(["v"], (2, 3))
    rows = [
        Row("a", 2, [Member(weight, 0), Member(other, 1, torch.tensor([1, 0, 1]))]),
        Row("b", 2, [Member(weight, 0)]),
    ]
    found = flags_of_weights(rows, [torch.tensor([True, False]), torch.tensor([False, True])])
    assert [(each.weight, each.dim, each.keep.tolist(), each.part) for each in found] == [
        (weight, 0, [False, False], None),
        (other, 1, [False, True, False], None),
    ]


@on_every_device
def test_a_plan_with_parts_saves_and_loads(device, tmp_path):
    torch.manual_seed(0)
    model, other = Block().to(device), Block().to(device)
    other.load_state_dict(model.state_dict())
    plan = ranked(model)[1].select(0.5)
    plan.save(tmp_path / "plan")
    loaded = lnprune.load_plan(tmp_path / "plan", other)
    assert loaded.to_dict() == plan.to_dict()
    assert any("part" in member for entry in plan.to_dict()["parameters"] for member in entry["members"])
    plan.apply(permanent=True)
    loaded.apply(permanent=True)
    assert not torch.equal(model.experts, Block().to(device).experts)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name
