"""A small model again from its file: from the code of the large one, whose weights are never made."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import lnprune
from tests.small_models import CASES, Net
from tests.test_coupled_plans import joined
from tests.test_coupling import assert_same_state, coupled, randomised, state


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(joined().double().eval())


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def saved(model, inputs, folder, amount=0.5, **options):
    plan = lnprune.couple(model, inputs).rank(2).select(amount, **options)
    plan.save(folder / "plan.json")
    small = plan.compact()
    torch.save(small.state_dict(), folder / "small.pt")
    return small, torch.load(folder / "small.pt")


def test_on_the_device_meta_in_another_process(model, inputs, tmp_path):
    small, _ = saved(model.float(), inputs.float(), tmp_path, scope="global")
    torch.save((inputs.float(), small(inputs.float())), tmp_path / "run.pt")
    code = f"""
        import pathlib
        import torch
        import lnprune
        from tests.test_coupled_plans import joined
        folder = pathlib.Path({str(tmp_path)!r})
        with torch.device("meta"):
            model = joined().eval()
        made = []
        small = lnprune.load_compact(folder / "plan.json", model, torch.load(folder / "small.pt"))
        assert all(held.is_meta for held in model.state_dict().values())
        inputs, want = torch.load(folder / "run.pt")
        print(torch.equal(small(inputs), want), small.training)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["True", "False"]


def test_ties_requires_grad_and_transient_buffers_on_the_device_meta(tmp_path):
    def make():
        embedding, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        head.weight = embedding.weight
        net = Net(
            lambda net, x: net.o(net.e(x) + net.b(net.e(x))) * net.scale, e=embedding, b=nn.Linear(8, 8)
        )
        net.o = head
        net.register_buffer("scale", torch.full((10,), 2.0), persistent=False)
        net.b.weight.requires_grad_(False)
        return net

    model, inputs = make(), torch.arange(10)
    small, values = saved(model, inputs, tmp_path)
    with torch.device("meta"):
        large = make()
    with pytest.raises(
        ValueError, match=r"scale: expected values in state_dict for what is on the device meta"
    ):
        lnprune.load_compact(tmp_path / "plan.json", large, values)
    values["scale"] = torch.full((10,), 2.0)
    again = lnprune.load_compact(tmp_path / "plan.json", large, values)
    assert set(values) == {*small.state_dict(), "scale"}
    assert again.e.weight is again.o.weight
    assert [held.requires_grad for held in again.parameters()] == [True, False, True]
    assert torch.equal(again(inputs), small(inputs))
    assert "scale" not in again.state_dict()


def test_attributes_are_set_from_the_file(tmp_path):
    model, _, coupling = coupled(CASES["attention"], check=True)
    plan = coupling.rank(2).select(0.5)
    plan.save(tmp_path / "plan.json")
    entries = json.loads((tmp_path / "plan.json").read_text())["parameters"]
    small = plan.compact()
    changed = [each for entry in entries for each in entry["attributes"]]
    for each in changed:
        new, old = (getattr(made.get_submodule(each["path"]), each["name"]) for made in (small, model))
        assert new < old
    again = lnprune.load_compact(
        tmp_path / "plan.json", CASES["attention"].make().double(), small.state_dict()
    )
    for each in changed:
        new, wanted = (getattr(made.get_submodule(each["path"]), each["name"]) for made in (again, small))
        assert new == wanted


def test_what_loading_refuses(model, inputs, tmp_path):
    _, values = saved(model, inputs, tmp_path)
    different = joined()
    different.b = nn.Conv2d(8, 7, 1)
    before = state(different)
    with pytest.raises(
        ValueError, match=r"plan.json: b.weight: expected shape \(6, 8, 1, 1\), got \(7, 8, 1, 1\)"
    ):
        lnprune.load_compact(tmp_path / "plan.json", different, values)
    assert_same_state(before, state(different))
    del different.b
    with pytest.raises(
        ValueError, match=r"b.weight: Net has no such parameter or buffer: the plan is for another"
    ):
        lnprune.load_compact(tmp_path / "plan.json", different, values)
    with pytest.raises(RuntimeError, match=r"size mismatch for a\.weight"):
        lnprune.load_compact(tmp_path / "plan.json", joined(), model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        lnprune.load_compact(tmp_path / "plan.json", joined(), {})
    with pytest.raises(TypeError, match="state_dict: expected a mapping"):
        lnprune.load_compact(tmp_path / "plan.json", joined(), [1])
    lnprune.rank(model, n=2, dim="out").select(0.5).save(tmp_path / "single.json")
    with pytest.raises(ValueError, match=r"single.json: expected a plan of coupled channels"):
        lnprune.load_compact(tmp_path / "single.json", model, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_channel": 0}, r"attributes.per_channel: expected 1 or more, got 0"),
        ({"position": -1}, r"attributes.position: expected 0 or more, got -1"),
        ({"name": 3}, r"attributes.name: expected str, got 3"),
    ],
)
def test_a_damaged_attribute_says_where(model, inputs, tmp_path, change, message):
    _, values = saved(model, inputs, tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    attribute = {"path": "a", "name": "heads", "position": None, "per_channel": 1, **change}
    document["parameters"][1]["attributes"].append(attribute)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"parameters\[1\]." + message):
        lnprune.load_compact(tmp_path / "plan.json", model, values)


def test_an_attribute_that_the_model_has_not_is_said(model, inputs, tmp_path):
    _, values = saved(model, inputs, tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    attribute = {"path": "a", "name": "heads", "position": None, "per_channel": 1}
    document["parameters"][1]["attributes"].append(attribute)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=r"the plan is for another model: 'Conv2d' object has no attribute 'heads'"
    ):
        lnprune.load_compact(tmp_path / "plan.json", model, values)
