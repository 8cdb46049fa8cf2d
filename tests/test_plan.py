"""Plans as data: entries, tables, pictures, and files that are read back or refused."""

import copy
import fractions
import json
import math
import sys

import cases
import numpy
import pytest
import torch
from module_state import Snapshot, assert_unchanged
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune.plans import report
from lnprune.plans.ranking import Ranking
from lnprune.plans.rows import Member, Row, Weight


def rows(*norms, size=1):
    """A Linear whose rows have these norms of order 1, 2 or infinity."""
    values = torch.zeros(len(norms), size, dtype=torch.float64)
    values[:, size // 2] = -torch.tensor(norms, dtype=torch.float64)
    module = nn.Linear(1, 1, bias=False)
    module.weight = nn.Parameter(values)
    return module


def prune_channels(module, channels):
    mask = torch.ones_like(module.weight)
    mask[channels] = 0
    return stock.custom_from_mask(module, "weight", mask)


def entry(name, shape, dim, channels, kept, norm_at_cut, margin, removed):
    return lnprune.PlanEntry(name, shape, dim, channels, kept, norm_at_cut, margin, removed)


def model_of_three():
    return nn.Sequential(rows(6, 1, 3, 3, size=3), nn.ReLU(), rows(8, 4, size=4), rows(2, 5, 1, size=2))


def example():
    """A plan whose entries are known."""
    amounts = {"0.weight": 0.5, "2.weight": 1, "3.weight": 0}
    return lnprune.rank(model_of_three(), 1, "out").select(amounts)


# ------------------------------------------------------------------------------------------- entries


def test_entries_by_example():
    assert example().entries == [
        entry("0.weight", (4, 3), 0, 4, 2, 3.0, 0.0, 6),
        entry("2.weight", (2, 4), 0, 2, 1, 8.0, 4.0, 4),
        entry("3.weight", (3, 2), 0, 3, 3, 1.0, None, 0),
    ]


def test_entries_of_layers_of_which_nothing_is_kept():
    plan = lnprune.rank(nn.Sequential(rows(3, 2), rows(size=2)), 2, 0).select(1.0, min_channels=0)
    assert plan.entries == [
        entry("0.weight", (2, 1), 0, 2, 0, None, None, 2),
        entry("1.weight", (0, 2), 0, 0, 0, None, None, 0),
    ]


@pytest.mark.parametrize(
    ("normalize", "compared", "kept", "cut"),
    [
        ("none", ([6.0, 3.0, 1.0], [5.0, 2.0]), [2, 1], 3.0),
        # Order 1: divided by the 4 and the 10 elements of a channel.
        ("size", ([1.5, 0.75, 0.25], [0.5, 0.2]), [2, 1], 0.5),
        # Divided by the means 10 / 3 and 3.5.
        ("layer", ([1.8, 0.9, 0.3], [5 / 3.5, 2 / 3.5]), [2, 1], 0.9),
    ],
)
def test_entries_of_global_plans_have_the_norms_that_were_compared(normalize, compared, kept, cut):
    model = nn.Sequential(rows(6, 3, 1, size=4), rows(5, 2, size=10))
    plan = lnprune.rank(model, 1, 0).select(2, scope="global", normalize=normalize)
    assert [each.kept for each in plan.entries] == kept
    for each, norms in zip(plan.entries, compared, strict=True):
        assert each.norm_at_cut == pytest.approx(norms[each.kept - 1])
        assert each.margin == pytest.approx(norms[each.kept - 1] - norms[each.kept])
    assert str(plan).splitlines()[-1].split()[-3] == f"{cut:.4g}"
    # No channel that goes is above the cut, and none that stays below it.
    for each, norms in zip(plan.entries, compared, strict=True):
        assert norms[each.kept - 1] >= cut * (1 - 1e-9)
        assert norms[each.kept] <= cut


def test_the_cut_of_blocks_is_their_mean():
    model = nn.Sequential(rows(6, 4, 1, 1), rows(5, 2, 3, 3))
    plan = lnprune.rank(model, 1, 0).select(4, scope="global", multiple_of=2, min_channels=0)
    assert [each.kept for each in plan.entries] == [2, 2]
    assert str(plan).splitlines()[-1].split()[-3] == "4"  # of 5 and 3; 6 and 4 have 5


@pytest.mark.parametrize(
    ("amount", "fewest", "cells"),
    [
        (6, 1, ["25.0%", "5", "6", "(75.0%)"]),
        (7, 1, ["25.0%", "5", "6", "(75.0%)"]),
        (4, 3, ["75.0%", "3", "2", "(25.0%)"]),  # a 1 and a 2 go and a 1 stays, since three have to
        (0, 1, ["100.0%", "0", "(0.0%)"]),
        (8, 0, ["0.0%", "8", "(100.0%)"]),
    ],
)
def test_the_cut_leaves_out_what_only_constraints_keep(amount, fewest, cells):
    model = nn.Sequential(rows(6, 4, 1, 1), rows(5, 2, 3, 3))
    plan = lnprune.rank(model, 1, 0).select(amount, scope="global", min_channels=fewest)
    assert str(plan).splitlines()[-1].split()[-len(cells) :] == cells


def test_entries_of_groups():
    plan = lnprune.rank(rows(3, 4, 0, 6, 5, 5, size=7), 2, 0).select(2, group_size=2)
    assert plan.entries == [entry("weight", (6, 7), 0, 6, 4, 6.0, 1.0, 14)]
    assert plan.keep["weight"].tolist() == [False, False, True, True, True, True]
    plan = lnprune.rank(rows(3, 4, 0, 6, 5, 5, size=7), 1, 0).select(2, group_size=2)
    assert plan.entries == [entry("weight", (6, 7), 0, 6, 4, 7.0, 1.0, 14)]


def test_entries_of_norms_that_are_not_finite():
    plan = lnprune.rank(rows(1, math.inf, math.inf, math.nan), 1, 0).select(1)
    assert plan.entries == [entry("weight", (4, 1), 0, 4, 3, math.inf, math.inf, 1)]
    (found,) = lnprune.rank(rows(1, math.inf, math.inf, math.nan), 1, 0).select(2).entries
    assert found.norm_at_cut == math.inf
    assert math.isnan(found.margin)
    (found,) = lnprune.rank(rows(1, math.inf, math.inf, math.nan), 1, 0).select(3).entries
    assert math.isnan(found.norm_at_cut)
    assert math.isnan(found.margin)
    assert (found.kept, found.parameters_removed) == (1, 3)


def test_entries_leave_out_what_was_pruned_before():
    module = prune_channels(rows(9, 5, 3, 2, 8, size=3), [0, 4])
    plan = lnprune.rank(module, 1, 0).select(1)
    assert plan.entries == [entry("weight", (5, 3), 0, 5, 2, 3.0, 1.0, 3)]
    assert plan.keep["weight"].tolist() == [False, True, True, False, False]
    assert plan.to_dict()["parameters"][0]["pruned"] == [0, 3, 4]
    plan = lnprune.rank(module, 1, 0).select(0)
    assert plan.entries == [entry("weight", (5, 3), 0, 5, 3, 2.0, None, 0)]


def python_entry(name, tensor, mask, dim, n, keep, group_size, scope):
    """One entry in plain Python, from the elements; of a global plan with norms divided by their size."""
    channels, count = tensor.movedim(dim, 0).flatten(1), tensor.shape[dim]
    alive = mask.movedim(dim, 0).flatten(1).any(dim=1).tolist()
    norms = {True: [], False: []}
    for start in range(0, count, group_size):
        if alive[start]:
            values = [abs(x) for x in channels[start : start + group_size].flatten().tolist()]
            norm = {
                0: lambda v: float(sum(x != 0 for x in v)),
                1: math.fsum,
                math.inf: max,
                -math.inf: min,
            }.get(n, lambda v: 0.0 if n < 0 and 0 in v else math.fsum(x**n for x in v) ** (1 / n))(values)
            if scope == "global":
                norm /= len(values) ** (1 if n == 0 else 1 / n)
            norms[keep[start]].append(norm)
    kept, lost = sorted(norms[True]), sorted(norms[False])
    return entry(
        name,
        tuple(tensor.shape),
        dim,
        count,
        len(kept) * group_size,
        pytest.approx(kept[0], rel=1e-12) if kept else None,
        pytest.approx(kept[0] - lost[-1], abs=1e-9 * kept[0]) if kept and lost else None,
        len(lost) * group_size * channels.shape[1],
    )


@pytest.mark.parametrize("n", [0, 1, 2, 3, 0.5, -1, math.inf, -math.inf])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_entries_against_plain_python(scope, group_size, n):
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.ConvTranspose1d(4, 6, 3), nn.Embedding(5, 10), nn.Linear(5, 4)
    )
    for module, dim in zip(model, (0, 1, 1, 0), strict=True):
        mask = torch.ones_like(module.weight)
        mask[torch.rand_like(mask) < 0.2] = 0.0
        mask.select(1 - dim, 0).fill_(1.0)  # something of every channel stays, but of the pruned ones
        mask.index_fill_(dim, torch.tensor([2, 3]), 0)
        if torch.rand(()) < 0.7:
            stock.custom_from_mask(module, "weight", mask)
    plan = lnprune.rank(model, n, "out").select(0.4, scope=scope, group_size=group_size)
    for i, (each, module) in enumerate(zip(plan.entries, model, strict=True)):
        dim = (0, 1, 1, 0)[i]
        mask = getattr(module, "weight_mask", torch.ones_like(module.weight))
        weight, keep = module.weight.detach().double(), plan.keep[f"{i}.weight"].tolist()
        assert each == python_entry(f"{i}.weight", weight, mask, dim, n, keep, group_size, scope)


def test_keep_len_and_repr():
    plan = example()
    assert {name: flags.tolist() for name, flags in plan.keep.items()} == {
        "0.weight": [True, False, True, False],
        "2.weight": [True, False],
        "3.weight": [True, True, True],
    }
    assert all(flags.dtype == torch.bool and flags.device.type == "cpu" for flags in plan.keep.values())
    assert len(plan) == 3
    assert repr(plan) == "Plan(3 parameters, 6 of 9 channels kept)"
    assert plan.n == 1
    assert plan.selection == {
        "amount": {"0.weight": 0.5, "2.weight": 1, "3.weight": 0},
        "scope": "local",
        "of": "channels",
        "normalize": "none",  # local: nothing is compared
        "min_channels": 1,
        "multiple_of": 1,
        "group_size": 1,
    }
    with pytest.raises(AttributeError):
        plan.entries[0].kept = 3


@pytest.mark.parametrize("device", cases.DEVICES)
def test_keep_is_on_the_cpu_and_neither_model_nor_plan_changes(device):
    model = model_of_three().to(device)
    snapshots = [(module, Snapshot(module)) for module in model.modules()]
    plan = lnprune.rank(model, 2, "in").select(0.5, scope="global")
    before = plan.to_dict()
    for flags in plan.keep.values():
        assert flags.device.type == "cpu"
    str(plan), repr(plan)
    with torch.no_grad():
        model[0].weight.fill_(7.0)
        model[0].weight.copy_(model_of_three()[0].weight)
    assert plan.to_dict() == before
    for module, snapshot in snapshots[1:]:
        assert_unchanged(module, snapshot)


# -------------------------------------------------------------------------------------------- tables


def test_a_table_has_a_line_for_each_parameter():
    pytest.importorskip("rich")
    lines = str(example()).splitlines()
    assert "amount=by name, n=1, scope='local'" in lines[0]
    expected = {
        "parameter": ["shape", "dim", "kept", "share", "norm", "at", "cut", "margin", "zeroed"],
        "0.weight": ["4", "x", "3", "0", "2", "of", "4", "50.0%", "3", "0", "6"],
        "2.weight": ["2", "x", "4", "0", "1", "of", "2", "50.0%", "8", "4", "4"],
        "3.weight": ["3", "x", "2", "0", "3", "of", "3", "100.0%", "1", "0"],
        "3": ["parameters", "26", "6", "of", "9", "66.7%", "10", "(38.5%)"],
    }
    for name, cells in expected.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.split()[1:] == cells
    assert all(line == line.rstrip() for line in lines)


def test_the_last_line_has_the_cut_of_a_global_plan():
    pytest.importorskip("rich")
    ranking = lnprune.rank(nn.Sequential(rows(6, 1, 3, 3, size=3000), rows(8, 4.25, size=4)), math.inf, 0)
    lines = str(ranking.select(2, scope="global", multiple_of=2, min_channels=0)).splitlines()
    assert " ".join(lines[-1].split()) == "2 parameters 12,008 4 of 6 66.7% 4.5 6,000 (50.0%)"
    assert "0.weight 4 x 3000 0 2 of 4 50.0% 3 0 6,000" in [" ".join(line.split()) for line in lines]


def test_without_rich_a_plan_prints_one_line_that_says_how_to_get_the_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    plan = example()
    assert str(plan) == f'{plan!r}; as a table with rich: pip install "lnprune[table]"'


def test_names_are_shown_in_full_and_as_they_are():
    pytest.importorskip("rich")
    model = nn.Sequential()
    names = ["a" * 300, "[red]", "[/b]", ":smile:", "layer\\[0]", "größe"]
    for name in names:
        model.add_module(name, rows(1, 2))
    text = str(lnprune.rank(model, 2, 0).select(0.5))
    for name in names:
        assert f"{name}.weight " in text
    assert text.count("1 of 2") == len(names)


@pytest.mark.parametrize("n", [2, math.inf, "fro", None, numpy.float64(2)])
def test_any_order_and_norms_that_are_not_finite_have_a_table(n):
    pytest.importorskip("rich")
    module = nn.Linear(1, 4)
    module.weight.data.copy_(torch.tensor([[1.0], [math.inf], [math.inf], [math.nan]]))
    for amount in (1, 2, 3):
        text = str(lnprune.rank(module, n, 0).select(amount))
        assert f"{4 - amount} of 4" in text
        assert ("nan" in text) == (amount > 1)
    assert "0 parameters" in str(Ranking([], n, []).select(0.5))


# ------------------------------------------------------------------------------------------ pictures


def busy_plan():
    """All that may look odd: ties, no finite norm, no norm at all, nothing kept, pruned before."""
    model = nn.Sequential(
        rows(6, 1, 3, 3, size=3),
        prune_channels(rows(8, 4, 2, 7), [1]),
        rows(size=3),
        rows(math.nan, math.inf),
        rows(1, 2, math.inf, math.nan),
        prune_channels(rows(1, 2), [0, 1]),
        nn.Sequential(nn.ModuleDict({"a_name_that_is_too_long_for_its_place": nn.Linear(3, 50)})),
    )
    return lnprune.rank(model, 1, 0).select(0.5, min_channels=0)


def test_a_plot_is_a_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    sizes = []
    for name, plan in (
        ("one", example()),
        ("busy", busy_plan()),
        ("none", Ranking([], 2, []).select(0)),
    ):
        path = tmp_path / f"{name}.png"
        assert plan.plot(path) is None
        pixels = image.imread(path)
        sizes.append(pixels.shape)
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.01
    assert sizes[1][0] > sizes[0][0], "more layers, more lines"
    example().plot(str(tmp_path / "plan.svg"))
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn.startswith("<?xml")


def test_a_plot_shows_the_norms_by_rank_and_how_many_are_kept(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(report, "plot", lambda *arguments: drawn.append(arguments))
    plan = example()
    plan.plot("path")
    ((n, selection, entries, ranked, cut, path),) = drawn
    assert (n, selection, entries, cut, path) == (1, plan.selection, plan.entries, None, "path")
    assert [entry.name for entry in entries] == ["0.weight", "2.weight", "3.weight"]
    assert [(norms.tolist(), kept) for norms, kept in ranked] == [
        ([6.0, 3.0, 3.0, 1.0], 2),
        ([8.0, 4.0], 1),
        ([5.0, 2.0, 1.0], 3),
    ]
    module = prune_channels(rows(9, 9, 3, 4, 0, 6), [0, 1])
    lnprune.rank(module, 2, 0).select(2, group_size=2).plot("path")
    ((norms, kept),) = drawn[1][3]
    assert (norms.tolist(), kept) == ([6.0, 5.0], 1)
    model = nn.Sequential(rows(6, 3, 1, size=4), rows(5, 2, size=10))
    lnprune.rank(model, 1, 0).select(2, scope="global").plot("path")
    ranked, cut = drawn[2][3:5]
    assert [norms.tolist() for norms, _ in ranked] == [[1.5, 0.75, 0.25], [0.5, 0.2]]
    assert cut == 0.5


def drawn_figure(plan, monkeypatch):
    """What a plot is made of: the axes of the layers, and the axis of the shares."""
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, *_, **__: figures.append(figure))
    plan.plot("path")
    (figure,) = figures
    figure.canvas.draw()
    return figure.axes[:-1], figure.axes[-1]


def test_a_plot_has_labels_whole_ticks_and_names(monkeypatch):
    pytest.importorskip("matplotlib")
    layers, shares = drawn_figure(example(), monkeypatch)
    assert [axis.get_title() for axis in layers] == ["0.weight", "2.weight", "3.weight"]
    assert [label.get_text() for label in shares.get_xticklabels()] == ["0.weight", "2.weight", "3.weight"]
    assert layers[0].get_ylabel() == "norm"
    assert {axis.get_xlabel() for axis in layers} == {"channels, by rank"}
    assert shares.get_ylabel() == "channels that stay"
    for axis in layers:
        assert all(float(tick).is_integer() for tick in axis.get_xticks())
    # Names are below the bars, and nothing is below the names.
    canvas = shares.figure.canvas.get_renderer()
    lowest = min(label.get_window_extent(canvas).y0 for label in shares.get_xticklabels())
    assert 0 <= lowest < 0.1 * shares.figure.bbox.height


def test_a_plot_of_a_global_plan_has_one_cut(monkeypatch):
    pytest.importorskip("matplotlib")
    model = nn.Sequential(rows(6, 3, 1, size=4), rows(5, 2, size=10))
    layers, _ = drawn_figure(lnprune.rank(model, 1, 0).select(2, scope="global"), monkeypatch)
    for axis in layers:
        _, cut = axis.get_lines()
        assert list(cut.get_ydata()) == [0.5, 0.5]
    assert "divided by their size" in layers[0].figure.get_suptitle()
    layers, _ = drawn_figure(example(), monkeypatch)
    assert all(len(axis.get_lines()) == 1 for axis in layers)


def test_names_in_a_plot_are_short_enough_and_told_apart():
    assert report._short(["0.weight", "2.weight"]) == ["0.weight", "2.weight"]
    long = [f"model.encoder.layers.{i}.attention.query.weight" for i in (0, 11)]
    assert report._short(long) == ["0.attention.query.weight", "11.attention.query.weight"]
    (name,) = report._short(["a" * 40])
    assert len(name) == 30
    assert report._short([]) == []


def test_without_matplotlib_a_plot_names_the_extra(monkeypatch, tmp_path):
    for name in (
        "matplotlib",
        "matplotlib.figure",
        "matplotlib.backends",
        "matplotlib.backends.backend_agg",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'extra "plot" brings: pip install "lnprune\[plot\]"$'):
        example().plot(tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- files


def round_trip(plan, model, tmp_path):
    """The plan as it comes back from a file; fails unless it is the same, bit for bit."""
    path = tmp_path / "plan.json"
    plan.save(path)
    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert values == plan.to_dict()
    loaded = lnprune.load_plan(path, model)
    assert loaded.to_dict() == plan.to_dict()
    assert list(loaded.keep) == list(plan.keep)
    for name, flags in plan.keep.items():
        assert loaded.keep[name].dtype == torch.bool
        assert torch.equal(loaded.keep[name], flags)
    assert len(loaded.entries) == len(plan.entries)
    for actual, expected in zip(loaded.entries, plan.entries, strict=True):
        for field in ("name", "shape", "dim", "channels", "kept", "parameters_removed"):
            assert getattr(actual, field) == getattr(expected, field)
            assert type(getattr(actual, field)) is type(getattr(expected, field))
        for field in ("norm_at_cut", "margin"):
            actual_value, expected_value = getattr(actual, field), getattr(expected, field)
            assert type(actual_value) is type(expected_value)
            assert actual_value == expected_value or (actual_value != actual_value) == (
                expected_value != expected_value
            )
    assert repr(loaded) == repr(plan)
    # A second generation is the same to the byte.
    second = tmp_path / "second.json"
    loaded.save(str(second))
    assert second.read_bytes() == path.read_bytes()
    assert lnprune.load_plan(str(second), model).to_dict() == plan.to_dict()
    return loaded


def test_a_dict_of_a_plan_by_example():
    values = example().to_dict()
    assert list(values) == ["format", "version", "n", "selection", "parameters"]
    assert values["format"] == "lnprune plan"
    assert values["version"] == 1
    assert values["n"] == 1
    assert values["selection"]["amount"] == {"0.weight": 0.5, "2.weight": 1, "3.weight": 0}
    assert values["parameters"][0] == {
        "name": "0.weight",
        "shape": [4, 3],
        "dim": 0,
        "channels": 4,
        "kept": 2,
        "norm_at_cut": 3.0,
        "margin": 0.0,
        "parameters_removed": 6,
        "shared_with": [],
        "pruned": [1, 3],
    }
    assert [each["pruned"] for each in values["parameters"]] == [[1, 3], [1], []]


def test_a_dict_of_a_plan_is_strict_json():
    text = json.dumps(busy_plan().to_dict(), allow_nan=False)
    values = json.loads(text)
    assert values == busy_plan_without_chance(values)
    assert {values["parameters"][i]["norm_at_cut"] for i in (3, 4)} == {"nan", "inf"}
    assert values["parameters"][4]["margin"] == "inf"


def busy_plan_without_chance(values):
    """The other plan of the same kind, but for the layer with random weights."""
    expected = busy_plan().to_dict()
    expected["parameters"][-1] = values["parameters"][-1]
    return expected


@pytest.mark.parametrize(
    "n", [0, 1, 2, 2.5, -1, math.inf, -math.inf, "fro", None, numpy.float32(0.5), numpy.float64(math.inf)]
)
def test_plans_come_back_for_every_order(n, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose1d(4, 6, 3), nn.Linear(5, 4))
    plan = lnprune.rank(model, n, "out").select(
        1 / 3, scope="global", of="parameters", normalize="layer", multiple_of=2
    )
    loaded = round_trip(plan, model, tmp_path)
    assert loaded.n == n
    assert loaded.selection == plan.selection
    # After the title, where numbers of numpy say so.
    assert str(loaded).splitlines()[-6:] == str(plan).splitlines()[-6:]
    with pytest.raises(RuntimeError, match=r"^plot needs the norms of a ranking"):
        loaded.plot(tmp_path / "plan.png")
    assert not (tmp_path / "plan.png").exists()


def test_a_plan_of_nuclear_norms_comes_back(tmp_path):
    module = nn.Conv1d(4, 6, 3)
    assert round_trip(lnprune.rank(module, "nuc", 0).select(2), module, tmp_path).n == "nuc"


def test_norms_that_are_not_finite_come_back(tmp_path):
    model = nn.Sequential(rows(math.nan, math.inf, 1), rows(math.inf, math.inf), rows(1e-320, 0.1, 1 / 3))
    for amount in (1, {"0.weight": 2, "1.weight": 1, "2.weight": 2}):
        round_trip(lnprune.rank(model, 1, 0).select(amount), model, tmp_path)
    round_trip(lnprune.rank(model, 1, 0).select(1.0, min_channels=0), model, tmp_path)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (1, 1),
        (0.1, 0.1),
        (numpy.int64(2), 2),
        (numpy.float32(0.5), 0.5),
        (numpy.float64(0.1), 0.1),
        (fractions.Fraction(1, 4), 0.25),
        ({"weight": 1}, {"weight": 1}),
        ({"weight": numpy.int32(1)}, {"weight": 1}),
        ({"weight": fractions.Fraction(1, 2)}, {"weight": 0.5}),
    ],
)
def test_amounts_come_back_as_numbers(amount, expected, tmp_path):
    module = rows(1, 2, 3, 4)
    loaded = round_trip(lnprune.rank(module, 1, 0).select(amount), module, tmp_path)
    found = loaded.selection["amount"]
    assert found == expected
    # 1 is one channel, 1.0 is all of them.
    if not isinstance(found, dict):
        found, expected = {"weight": found}, {"weight": expected}
    assert type(found["weight"]) is type(expected["weight"])


def test_what_was_pruned_before_comes_back(tmp_path):
    module = prune_channels(rows(9, 5, 3, 2, 8, size=3), [0, 4])
    loaded = round_trip(lnprune.rank(module, 1, 0).select(1), module, tmp_path)
    assert loaded.entries == [entry("weight", (5, 3), 0, 5, 2, 3.0, 1.0, 3)]


def tied():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["c"].weight = model["a"].weight
    return model


def test_shared_weights_come_back_with_all_their_names(tmp_path):
    model = tied()
    loaded = round_trip(lnprune.rank(model, 2, 0).select(0.5), model, tmp_path)
    assert list(loaded.keep) == ["a.weight", "b.weight"]
    assert [each["shared_with"] for each in loaded.to_dict()["parameters"]] == [["c.weight"], []]
    # For a model of the same kind as well as for the same model.
    twin = copy.deepcopy(model)
    lnprune.load_plan(tmp_path / "plan.json", twin).apply()
    flags = loaded.keep["a.weight"].tolist()
    for name in ("a", "c"):
        assert twin[name].weight_mask[:, 0].bool().tolist() == flags
        assert not hasattr(model[name], "weight_mask")


def test_plans_for_pairs_come_back_by_their_order(tmp_path):
    model = tied()
    pairs = [(model["c"], "weight"), (model["b"], "weight"), (model["a"], "weight")]
    loaded = round_trip(lnprune.rank(pairs, 2, 0).select(0.5), pairs, tmp_path)
    assert list(loaded.keep) == ["0.weight", "1.weight"]
    assert lnprune.load_plan(tmp_path / "plan.json", iter(pairs)).to_dict() == loaded.to_dict()


def test_a_module_at_two_places_is_found_by_its_first_name(tmp_path):
    block = nn.Linear(4, 4)
    model = nn.Sequential(block, nn.ReLU(), block)
    round_trip(lnprune.rank(model, 2, 0).select(0.5), model, tmp_path)


def test_modules_are_found_by_any_of_their_names(tmp_path):
    """Two modules that share a weight, or one module at both places: the names are the same."""
    model = tied()
    plan = lnprune.rank(model, 2, 0).select(0.5)
    one_module = nn.ModuleDict({"a": model["a"], "b": model["b"], "c": model["a"]})
    assert round_trip(plan, one_module, tmp_path).keep.keys() == plan.keep.keys()


def test_an_empty_plan_comes_back(tmp_path):
    assert len(round_trip(Ranking([], 2, []).select(0.5), [], tmp_path)) == 0


def saved(tmp_path, change=None, plan=None):
    """The file of a plan, after a change to what it holds."""
    path = tmp_path / "plan.json"
    values = (plan or example()).to_dict()
    if change is not None:
        change(values)
    path.write_text(json.dumps(values))
    return path


OTHER_MODELS = {
    "missing module": (
        lambda: model_of_three()[:3],
        "3.weight: Sequential has no module '3': the plan is for another model",
    ),
    "no such parameter": (
        lambda: nn.Sequential(*model_of_three()[:3], nn.ReLU()),
        "3.weight: expected a parameter of ReLU (it has none), got 'weight': the plan is for another model",
    ),
    "buffer": (
        lambda: nn.Sequential(*model_of_three()[:3], buffer_module()),
        "3.weight: expected a parameter of Module (it has none), got 'weight', which is Tensor",
    ),
    "other shape": (
        lambda: nn.Sequential(*model_of_three()[:3], nn.Linear(2, 4)),
        "3.weight: the plan is for shape (3, 2), Sequential has (4, 2)",
    ),
    "other count of dims": (
        lambda: nn.Sequential(*model_of_three()[:3], nn.Conv1d(2, 3, 1)),
        "3.weight: the plan is for shape (3, 2), Sequential has (3, 2, 1)",
    ),
    "one module": (nn.ReLU, "0.weight: ReLU has no module '0': the plan is for another model"),
    "empty list": (lambda: [], "expected the 3 parameters that the plan is for, got 0"),
    "list of more": (
        lambda: [(module, "weight") for module in (rows(1), rows(1), rows(1), rows(1))],
        "expected the 3 parameters that the plan is for, got 4",
    ),
    "list in another order": (
        lambda: [(model_of_three()[i], "weight") for i in (0, 3, 2)],
        "2.weight: the plan is for shape",
    ),
    "list with another name": (
        lambda: [(nn.Linear(3, 4), "bias"), (rows(1), "weight"), (rows(1), "weight")],
        "0.weight: the list has no such parameter: the plan is for another model",
    ),
}


def buffer_module():
    module = nn.Module()
    module.register_buffer("weight", torch.ones(3, 2))
    return module


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_plans_for_another_model_are_refused(case, tmp_path):
    make, message = OTHER_MODELS[case]
    plan = None
    if case == "list in another order":
        plan = lnprune.rank([(model_of_three()[i], "weight") for i in (0, 2, 3)], 1, 0).select(0)
        message = "1.weight: the plan is for shape (2, 4), the list has (3, 2)"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        lnprune.load_plan(saved(tmp_path, plan=plan), make())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_is_neither_a_module_nor_pairs_is_no_fault_of_the_file(tmp_path):
    path = saved(tmp_path)
    for parameters in ([rows(1)] * 3, [(rows(1),)] * 3, ["abc"] * 3):
        with pytest.raises(TypeError, match=r"^parameter 0: expected a pair \(module, name\), got "):
            lnprune.load_plan(path, parameters)
    with pytest.raises(TypeError, match=r"^expected a module or pairs \(module, name\), got NoneType$"):
        lnprune.load_plan(path, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a plan as JSON: "),
        (b"{", "expected a plan as JSON: "),
        (b"\xff\xfe\x00", "expected a plan as JSON: "),
        (b"PK\x03\x04", "expected a plan as JSON: "),
        (b"[]", "expected JSON of the format 'lnprune plan'"),
        (b"null", "expected JSON of the format 'lnprune plan'"),
        (b"{}", "expected JSON of the format 'lnprune plan'"),
        (b'{"format": "other", "version": 1}', "expected JSON of the format 'lnprune plan'"),
        (b'{"format": "lnprune plan"}', "expected version 1 of a plan, got None"),
        (b'{"format": "lnprune plan", "version": 2}', "expected version 1 of a plan, got 2"),
        (b'{"format": "lnprune plan", "version": "1"}', "expected version 1 of a plan, got '1'"),
        (b'{"format": "lnprune plan", "version": 1}', "the plan is damaged: "),
    ],
    ids=repr,
)
def test_files_that_are_no_plans_are_refused_by_name(content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        lnprune.load_plan(path, model_of_three())
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        lnprune.load_plan(tmp_path / "plan.json", model_of_three())
    with pytest.raises(FileNotFoundError, match=r"missing/plan\.json'$"):
        example().save(tmp_path / "missing" / "plan.json")


def with_field(field, value):
    """A change of one field of the first parameter."""
    return lambda values: values["parameters"][0].update({field: value})


def without_field(field):
    return lambda values: values["parameters"][0].pop(field)


PARAMETER_FIELDS = list(example().to_dict()["parameters"][0])
DAMAGE = {
    **{
        f"without {key}": (lambda values, key=key: values.pop(key))
        for key in ("n", "selection", "parameters")
    },
    **{f"without {field}": without_field(field) for field in PARAMETER_FIELDS},
    **{f"{field} is a dict": with_field(field, {"a": 1}) for field in PARAMETER_FIELDS},
    **{f"{field} is a bool": with_field(field, True) for field in PARAMETER_FIELDS},
    **{f"{field} is no word": with_field(field, "word") for field in PARAMETER_FIELDS if field != "name"},
    **{
        f"{field} is None": with_field(field, None)
        for field in PARAMETER_FIELDS
        if field not in ("norm_at_cut", "margin")
    },
    "pruned index too large": with_field("pruned", [1, 4]),
    "pruned index negative": with_field("pruned", [-1, 1]),
    "pruned index beyond 64 bits": with_field("pruned", [1, 2**70]),
    "pruned index no whole number": with_field("pruned", [1.5, 3]),
    "pruned index twice": with_field("pruned", [1, 1]),
    "pruned indices nested": with_field("pruned", [[1], [3]]),
    "pruned indices ragged": with_field("pruned", [[1, 2], 3]),
    "pruned flags": with_field("pruned", [False, True]),
    "more kept than not pruned": with_field("kept", 3),
    "fewer kept than not pruned": with_field("kept", 1),
    "channels negative": with_field("channels", -4),
    "channels huge": with_field("channels", 2**70),
    "channels not those of the shape": with_field("channels", 3),
    "channels no whole number": with_field("channels", 4.0),
    "dim too large": with_field("dim", 2),
    "dim negative": with_field("dim", -2),
    "dim no whole number": with_field("dim", 0.0),
    "shape of no dims": with_field("shape", []),
    "shape of words": with_field("shape", ["4", "3"]),
    "shape nested": with_field("shape", [[4, 3]]),
    "shared with no list": with_field("shared_with", "3.weight"),
    "shared with numbers": with_field("shared_with", [3]),
    "a parameter twice": lambda values: values["parameters"].append(values["parameters"][0]),
    "shared with another of the plan": with_field("shared_with", ["2.weight"]),
    "other names twice": with_field("shared_with", ["4.weight", "4.weight"]),
    "parameters as a dict": lambda values: values.update(parameters={"0.weight": {}}),
    "parameters as a number": lambda values: values.update(parameters=3),
    "parameters of numbers": lambda values: values.update(parameters=[1, 2]),
    "parameters as None": lambda values: values.update(parameters=None),
    "n as a list": lambda values: values.update(n=[2]),
    "selection as a list": lambda values: values.update(selection=[1]),
    "selection as None": lambda values: values.update(selection=None),
    "selection without an amount": lambda values: values["selection"].pop("amount"),
    "selection without group_size": lambda values: values["selection"].pop("group_size"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_plans_are_refused(case, tmp_path):
    model = nn.Sequential(*model_of_three()[:3], rows(2, 5, 1, size=2))
    model[2].weight.data.zero_()
    snapshots = [(module, Snapshot(module)) for module in model.modules()]
    path = saved(tmp_path, DAMAGE[case])
    with pytest.raises(ValueError, match="the plan is damaged: ") as caught:
        lnprune.load_plan(path, model)
    assert str(caught.value).startswith(f"{path}: the plan is damaged: ")
    assert "\n" not in str(caught.value)
    for module, snapshot in snapshots:
        assert_unchanged(module, snapshot)


def test_a_plan_that_is_not_damaged_is_taken(tmp_path):
    """What the tests of damage start from."""
    assert lnprune.load_plan(saved(tmp_path), model_of_three()).to_dict() == example().to_dict()


def test_entries_of_later_versions_may_have_more_fields(tmp_path):
    def change(values):
        values["comment"] = "by hand"
        values["parameters"][0]["comment"] = [1]

    assert lnprune.load_plan(saved(tmp_path, change), model_of_three()).to_dict() == example().to_dict()


# ---------------------------------------------------------------------------------- without a model


def rows_of_a_file():
    """Names, shapes and dims, as of tensors in a file."""
    first, second = Weight(["first"], (4, 3)), Weight(["second", "its other name"], (2, 4, 5))
    return [Row("first", 4, [Member(first, 0)]), Row("second", 4, [Member(second, 1)])]


def test_a_ranking_and_its_plan_need_no_model(tmp_path):
    norms = [torch.tensor([3.0, 1.0, 4.0, 2.0]).double(), torch.tensor([1.0, 9.0, 2.0, 5.0]).double()]
    ranking = Ranking(rows_of_a_file(), 2, norms)
    assert {name: values.tolist() for name, values in ranking.norms.items()} == {
        "first": norms[0].tolist(),
        "second": norms[1].tolist(),
    }
    plan = ranking.select(0.5)
    assert {name: keep.tolist() for name, keep in plan.keep.items()} == {
        "first": [True, False, True, False],
        "second": [False, True, False, True],
    }
    assert [entry.parameters_removed for entry in plan.entries] == [6, 20]
    assert "its other name" in str(plan.to_dict())
    plan.save(tmp_path / "plan")
    model = nn.Module()
    model.first = nn.Parameter(torch.randn(4, 3))
    model.second = nn.Parameter(torch.randn(2, 4, 5))
    setattr(model, "its other name", model.second)
    lnprune.load_plan(tmp_path / "plan", model).apply(permanent=True)
    assert model.first.ne(0).all(dim=1).tolist() == [True, False, True, False]
    assert model.second.ne(0).all(dim=2).tolist() == [[False, True, False, True]] * 2


def test_channels_pruned_before_take_no_part_without_a_model():
    norms = [torch.tensor([3.0, 1.0, 4.0, 2.0]).double(), torch.ones(4).double()]
    ranking = Ranking(rows_of_a_file(), 2, norms, {0: torch.tensor([3.0, 0.0, 3.0, 3.0])})
    assert ranking.select({"first": 1, "second": 0}).keep["first"].tolist() == [True, False, True, False]


def test_a_plan_without_a_model_is_not_applied():
    plan = Ranking(rows_of_a_file(), 2, [torch.ones(4).double()] * 2).select(1)
    for options in ({}, {"permanent": True}):
        with pytest.raises(RuntimeError, match=r"^first: the plan was made without a model"):
            plan.apply(**options)


def test_flags_that_are_handed_out_are_copies():
    plan = example()
    before = {name: keep.clone() for name, keep in plan.keep.items()}
    for keep in plan.keep.values():
        keep.logical_not_()
    assert all(torch.equal(plan.keep[name], keep) for name, keep in before.items())


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_plan_for_a_model_without_shapes_yet(tmp_path):
    lnprune.rank(nn.Sequential(nn.Linear(3, 4)), 2, "out").select(1).save(tmp_path / "plan")
    with pytest.raises(
        ValueError, match=r"^0\.weight: expected a parameter with a shape, got one not init"
    ):
        lnprune.load_plan(tmp_path / "plan", nn.Sequential(nn.LazyLinear(4)))
