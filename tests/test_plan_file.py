"""The file of a plan by itself: what can be written can be read, and what is damaged is named."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lnprune.plans import plan_file
from lnprune.plans.plan_file import PlanEntry

SELECTION = {
    **{"amount": 0.5, "scope": "global", "of": "channels", "normalize": "size"},
    **{"min_channels": 1, "multiple_of": 2, "group_size": 1},
}
ENTRY = {
    **{"name": "a.weight", "shape": [4, 3], "dim": 0, "channels": 4, "kept": 2, "norm_at_cut": 1.5},
    **{"margin": 0.5, "parameters_removed": 6, "shared_with": ["b.weight"], "pruned": [1, 3]},
}
OTHER = {**ENTRY, "name": "c.weight", "shared_with": []}
PLAN = {
    **{"format": "lnprune plan", "version": 1, "n": 2, "cut": 0.25},
    **{"selection": SELECTION, "parameters": [ENTRY, OTHER]},
}

numbers = st.one_of(st.none(), st.floats(), st.sampled_from([math.inf, -math.inf, math.nan, 0.0]))
shares = st.one_of(st.integers(0, 2**60), st.floats(0, 1), st.booleans())
orders = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.sampled_from(["fro", "nuc", math.inf])
)


@st.composite
def parameters(draw):
    """Entry, names and pruned channels of one parameter; its names are made distinct later."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    flags = draw(st.lists(st.booleans(), min_size=shape[dim], max_size=shape[dim]))
    pruned = [i for i, flag in enumerate(flags) if flag]
    entry = PlanEntry(
        draw(st.text()),
        tuple(shape),
        dim,
        shape[dim],
        shape[dim] - len(pruned),
        draw(numbers),
        draw(numbers),
        draw(st.integers(0, 2**60)),
    )
    return entry, draw(st.lists(st.text(), max_size=2)), pruned


@st.composite
def plans(draw):
    """What document() takes."""
    rows = draw(st.lists(parameters(), max_size=4))
    entries, names = [], []
    for i, (entry, others, _) in enumerate(rows):
        known = [f"{i}.{k}.{name}" for k, name in enumerate([entry.name, *others])]
        entries.append(PlanEntry(known[0], *list(vars(entry).values())[1:]))
        names.append(known)
    amount = draw(st.one_of(shares, st.dictionaries(st.text(), shares, max_size=3)))
    selection = SELECTION | {
        "amount": amount,
        "scope": draw(st.sampled_from(["local", "global"])),
        "of": draw(st.sampled_from(["channels", "parameters"])),
        "normalize": draw(st.sampled_from(["size", "layer", "none"])),
        "min_channels": draw(st.integers(0, 2**60)),
        "group_size": draw(st.integers(1, 2**60)),
    }
    pruned = [indices for _, _, indices in rows]
    return draw(orders), selection, entries, names, pruned, draw(numbers)


def as_text(values):
    """Like ==, but NaN equals NaN, and 1, 1.0 and True differ."""
    return repr(values)


@settings(max_examples=200, deadline=None)
@given(plan=plans())
def test_what_can_be_written_can_be_read(plan, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "written.json"
    document = plan_file.document(*plan)
    plan_file.write(path, document)
    found = plan_file.read(path)
    assert as_text(found.n) == as_text(plan[0])
    assert as_text(list(found)[: len(plan)]) == as_text(list(plan))
    assert found.groups is None
    assert plan_file.document(*found) == document


@pytest.mark.parametrize("n", [None, True, 2, 2.5, math.inf, -math.inf, math.nan, "fro", "nuc"], ids=repr)
def test_every_order_comes_back(n, tmp_path):
    path = tmp_path / "plan.json"
    plan_file.write(path, plan_file.document(n, SELECTION, [], [], [], math.inf))
    assert as_text(plan_file.read(path).n) == as_text(n)


def read(path, values):
    path.write_text(json.dumps(values))
    return plan_file.read(path)


def changed(place, value):
    """The plan with another value at a place, a chain of keys and indices."""
    values = json.loads(json.dumps(PLAN))
    within = values
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    return values


PLACES = [
    ("n",),
    *(("selection", key) for key in SELECTION),
    *(("parameters", 1, key) for key in ENTRY),
    *(("parameters", 1, key, 0) for key in ("shape", "pruned")),
]
# Of every type, and numbers from everywhere; strings that are no word.
VALUES = [
    None,
    True,
    -1,
    10**400,
    1.5,
    math.nan,
    math.inf,
    "x",
    [],
    [[1]],
    [None],
    {},
    {"a": "x"},
    {"a": -1},
]


def test_the_plan_that_is_damaged_below_can_be_read(tmp_path):
    found = read(tmp_path / "plan.json", PLAN)
    assert found.selection == SELECTION
    assert [entry.name for entry in found.entries] == ["a.weight", "c.weight"]


def field_of(place):
    """How an error names a place; of a list it names the list."""
    text = ""
    for part in place[:3]:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:10])
@pytest.mark.parametrize("place", PLACES, ids=field_of)
def test_a_value_is_taken_or_named(place, value, tmp_path):
    path = tmp_path / "plan.json"
    try:
        found = read(path, changed(place, value))
    except ValueError as error:
        text = str(error)
        # A number that the others contradict is named as one of those.
        others = [("parameters", 1, key) for key in ("channels", "pruned")]
        names = [f"{path}: the plan is damaged: {field_of(each)}" for each in (place, *others)]
        assert text.startswith(tuple(names)), text
        assert "\n" not in text
        assert len(text) < len(str(path)) + 200
    else:
        assert value in TAKEN.get(place[-1], [])
        document = plan_file.document(*found)
        path.write_text("")
        plan_file.write(path, document)
        assert plan_file.document(*plan_file.read(path)) == document


# Of the values above, those that a field takes; the others take none.
TAKEN = {
    **{"n": [None, True, -1, 1.5], "amount": [True, {}]},
    **{"name": ["x"], "shared_with": [[]]},
    **{key: [None, -1, 1.5] for key in ("norm_at_cut", "margin", "cut")},
}

NAMED = {
    "version is a bool": (("version",), True, "expected version 1 of a plan, got True"),
    "version is a float": (("version",), 1.0, "expected version 1 of a plan, got 1.0"),
    "version is a list": (("version",), [[1]], "expected version 1 of a plan, got [[1]]"),
    "n": (("n",), "x", "n: expected 'fro' or 'nuc' or 'inf' or '-inf' or 'nan', got 'x'"),
    "amount": (
        ("selection", "amount"),
        [1],
        "selection.amount: expected int or float or bool or dict, got",
    ),
    "an amount": (("selection", "amount"), {"a": 1.5}, "selection.amount.a: expected a count, or a share"),
    "scope": (
        ("selection", "scope"),
        "world",
        "selection.scope: expected 'local' or 'global', got 'world'",
    ),
    "margin": (("parameters", 1, "margin"), "wide", "parameters[1].margin: expected 'inf' or '-inf' or"),
    "a literal": (("parameters", 1, "margin"), math.nan, "parameters[1].margin: expected a finite number"),
    "negative": (("parameters", 1, "kept"), -1, "parameters[1].kept: expected 0 or more, got -1"),
    "negative size": (
        ("parameters", 1, "shape"),
        [4, -3],
        "parameters[1].shape: expected sizes of 0 or more",
    ),
    "entry": (("parameters", 1), 3, "parameters: expected a list of dict, got 3 in it"),
    "twice": (("parameters", 1, "name"), "b.weight", "parameters: 'b.weight' is there 2 times"),
    "long": (
        ("parameters", 1, "name"),
        list(range(10**5)),
        "parameters[1].name: expected str, got [0, 1, 2,",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_damage_is_named_with_its_field(case, tmp_path):
    place, value, message = NAMED[case]
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(path, changed(place, value))
    damage = "" if place == ("version",) else "the plan is damaged: "
    assert str(caught.value).startswith(f"{path}: {damage}{message}")
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    "place", [place for place in PLACES if not isinstance(place[-1], int)], ids=field_of
)
def test_what_is_missing_is_named(place, tmp_path):
    values = changed(place, None)
    within = values
    for key in place[:-1]:
        within = within[key]
    del within[place[-1]]
    path = tmp_path / "plan.json"
    # Other words of a selection are for readers alone.
    if place[0] == "selection" and place[-1] not in ("amount", "group_size"):
        assert place[-1] not in read(path, values).selection
        return
    with pytest.raises(ValueError, match="it is missing") as caught:
        read(path, values)
    assert str(caught.value) == f"{path}: the plan is damaged: {field_of(place)}: it is missing"


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5], ids=["lists", "dicts"])
def test_deep_nesting_is_no_plan(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        plan_file.read(path)
    assert str(caught.value) == f"{path}: expected a plan as JSON: it is nested too deeply"


def test_what_later_versions_say_of_a_selection_is_left_out(tmp_path):
    values = changed(("selection", "comment"), [1])
    found = read(tmp_path / "plan.json", values)
    assert found.selection == SELECTION
    plan_file.document(*found)
