"""Experts by themselves in files and together in models: plans go both ways; vectors for scaled scores."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_files import save
from torch import nn

import lnprune
from lnprune.checkpoints.expert_names import LAYOUTS
from lnprune.commands.main import main

EXPERTS, HIDDEN, INTERMEDIATE = 5, 6, 8


class Layer(nn.Module):
    """As most layers of experts in transformers are in memory."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE))


def model_with_experts():
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Layer()}), "proj": nn.Linear(4, 4)})
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


def apart(state, layout, module="mlp"):
    """A state dict with each expert by itself."""
    gate, up, down = layout
    found = {}
    for name, tensor in state.items():
        if name.endswith("gate_up_proj"):
            for i, (one, other) in enumerate(zip(*tensor.chunk(2, 1), strict=True)):
                prefix = name.replace("gate_up_proj", str(i)).replace("mlp", module)
                found[f"{prefix}.{gate}.weight"], found[f"{prefix}.{up}.weight"] = one, other
        elif name.endswith("down_proj"):
            for i, one in enumerate(tensor):
                prefix = name.replace("down_proj", str(i)).replace("mlp", module)
                found[f"{prefix}.{down}.weight"] = one
        else:
            found[name] = tensor
    return found


@pytest.fixture
def run(capsys):
    def call(*words, code=0):
        capsys.readouterr()
        assert main([str(word) for word in words]) == code, capsys.readouterr().err
        return capsys.readouterr()

    return call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize(
    "options", [{"dim": "out"}, {"dim": "in"}, {"dim": "out", "experts": "intermediate"}]
)
def test_plans_of_models_apply_to_files(run, tmp_path, layout, module, options):
    model = model_with_experts()
    path = save(apart(model.state_dict(), layout, module), tmp_path, "safetensors")
    plan = lnprune.rank(model, n=2, **options).select(0.4, scope="global")
    plan.save(tmp_path / "plan.json")
    run("prune", path, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out.safetensors")
    assert (
        "as the plan says"
        in run("verify", tmp_path / "out.safetensors", "--plan", tmp_path / "plan.json").out
    )
    plan.apply(permanent=True)
    found = load_file(tmp_path / "out.safetensors")
    for name, tensor in apart(model.state_dict(), layout, module).items():
        assert torch.equal(found[name], tensor), name
    assert any((tensor == 0).any() for tensor in found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", ["mlp", "block_sparse_moe"])
def test_plans_of_files_apply_to_models(run, tmp_path, layout, module):
    model = model_with_experts()
    state = {name: each.clone() for name, each in apart(model.state_dict(), layout, module).items()}
    path = save(state, tmp_path, "safetensors")
    plan = tmp_path / "plan.json"
    options = "--amount", 0.3, "--scope", "global", "--exclude", "*.3.*"
    run("plan", path, *options, "--fused-experts", "-o", plan, "-q")
    lnprune.load_plan(plan, model).apply(permanent=True)
    run("prune", path, *options, "-o", tmp_path / "out.safetensors", "-q")
    run("prune", path, "--plan", plan, "-o", tmp_path / "same.safetensors", "-q")
    found = load_file(tmp_path / "out.safetensors")
    for name, tensor in apart(model.state_dict(), layout, module).items():
        assert torch.equal(found[name], tensor), name
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    assert any(not torch.equal(found[name], tensor) for name, tensor in state.items())


def test_inputs_of_gate_and_up_are_the_same_in_a_model(run, tmp_path):
    path = save(apart(model_with_experts().state_dict(), LAYOUTS[0]), tmp_path, "safetensors")
    words = "plan", path, "--amount", 0.5, "--dim", "in", "--fused-experts"
    err = run(*words, "-o", tmp_path / "plan.json", code=2).err
    assert "expected the same inputs pruned of gate and up projection" in err
    run(*words, "-o", tmp_path / "plan.json", "--include", "*.down_proj", "-q")
    lnprune.load_plan(tmp_path / "plan.json", model_with_experts()).apply()


def test_a_file_without_some_experts(run, tmp_path):
    model = model_with_experts()
    state = apart(model.state_dict(), LAYOUTS[0])
    del state["layers.0.mlp.experts.4.up_proj.weight"]
    path = save(state, tmp_path, "safetensors")
    plan = tmp_path / "plan.json"
    lnprune.rank(model, n=2, dim="out").select(1).save(plan)
    err = run("prune", path, "--plan", plan, "-o", tmp_path / "out.safetensors", code=2).err
    assert "the file has no layers.0.mlp.experts.4.up_proj.weight, one of 5 experts" in err


def test_whole_experts_are_no_slices_of_each(run, tmp_path):
    model = model_with_experts()
    path = save(apart(model.state_dict(), LAYOUTS[0]), tmp_path, "safetensors")
    plan = tmp_path / "plan.json"
    lnprune.rank(model, n=2, dim=0, include="*.down_proj").select(1).save(plan)
    err = run("prune", path, "--plan", plan, "-o", tmp_path / "out.safetensors", code=2).err
    assert "the file holds each expert by itself, so expected matrices along dim 0" in err


def test_scales_of_a_file(run, tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(8, 4), "c": nn.Linear(5, 3)})
    path = save(model.state_dict(), tmp_path, "sharded")
    scale = {"a.weight": torch.randn(8), "b.weight": torch.tensor([0.0, 1, 2, 3])}
    elements = {"a.weight": torch.randn(6), "c.weight": torch.randn(5)}
    save_file(scale, tmp_path / "scale.safetensors")
    save_file(elements, tmp_path / "elements.safetensors")
    expected = lnprune.rank(model, n=2, dim="out", scale=scale, element_scale=elements)
    ranking = lnprune.rank_checkpoint(path, 2, scale=scale, element_scale=elements)
    assert all(torch.equal(ranking.norms[name], norms) for name, norms in expected.norms.items())
    words = "--scale", tmp_path / "scale.safetensors", "--element-scale", tmp_path / "elements.safetensors"
    run("plan", path, *words, "--amount", 0.5, "-o", tmp_path / "plan.json", "-q")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document == json.loads(json.dumps(expected.select(0.5).to_dict()))
    with pytest.raises(ValueError, match=r"a.weight: element_scale: expected a vector of shape \(6,\)"):
        lnprune.rank_checkpoint(path, 2, element_scale={"a.weight": torch.ones(7)})
    with pytest.raises(ValueError, match="scale: 'x' is none of the 3 parameters"):
        lnprune.rank_checkpoint(path, 2, scale={"x": torch.ones(7)})
    assert "none.safetensors: " in run("rank", path, "--scale", tmp_path / "none.safetensors", code=3).err
