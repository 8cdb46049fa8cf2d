"""prune_pretrained: folders that from_pretrained loads, against zeros in the larger models."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lnprune.checkpoints.failures import RefusedTarget, UnusableCheckpoint
from lnprune.commands.main import main
from lnprune.integrations.transformers import prune_pretrained
from lnprune.pretrained import choosing, proof, pruning
from lnprune.pretrained.model_types import MODEL_TYPES
from lnprune.pretrained.slices import without_slices
from tests.pretrained_models import MODELS, library, small_model
from tests.test_readme import ROOT, code_of

slow = pytest.mark.slow
OF_HEADS = [name for name, known in MODEL_TYPES.items() if known.heads and known.heads.size]
OF_CODE = [name for name, known in MODEL_TYPES.items() if known.heads and not known.heads.size]
OF_EXPERTS = [name for name, known in MODEL_TYPES.items() if known.experts]
IDS = {"input_ids": torch.arange(3, 27).view(2, 12)}


def saved(path, model_type, dtype=torch.float32, kind=None, **numbers):
    """A folder of a small model; and it."""
    model = small_model(model_type, dtype, kind, **numbers)
    model.save_pretrained(path)
    return str(path)


def loaded(path, **options):
    """The model of a folder in float64, whatever attention it takes by itself."""
    with open(os.path.join(path, "config.json")) as file:
        (name,) = json.load(file)["architectures"]
    model_class = getattr(library(), name)
    model, found = model_class.from_pretrained(
        path, dtype=torch.float64, output_loading_info=True, local_files_only=True, **options
    )
    assert not any(found.values()), found
    return model.to(torch.float64).eval()


def config_of(path):
    with open(os.path.join(path, "config.json")) as file:
        return json.load(file)


def inputs_of(model_type):
    if model_type == "vit":
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator).double()}
    return {**IDS, "decoder_input_ids": IDS["input_ids"]} if model_type == "t5" else IDS


def output(model, inputs):
    """The first output; what code rounds to float32 is not rounded."""
    with torch.no_grad(), proof._InFloat64():
        return model(**inputs)[0]


def kept_along(whole, part, dim):
    """Which slices of a tensor are those of a part of it, in order."""
    whole, part = (each.unsqueeze(-1).movedim(dim, 0).flatten(1) for each in (whole, part))
    found = (part[:, None] == whole[None]).all(-1)
    assert (found.sum(1) == 1).all()
    index = found.int().argmax(1)
    assert (index.diff() > 0).all(), "the order stays"
    return index


def zeroed_like(model, small):
    """Zeros in a model where a smaller one has lost slices; which slices are left, by name."""
    known = small.state_dict()
    kept = {}
    for name, tensor in model.state_dict().items():
        other = known[name]
        dims = [dim for dim, size in enumerate(tensor.shape) if size != other.shape[dim]]
        if not dims:
            assert torch.equal(tensor, other), name
            continue
        (dim,) = dims
        if tensor.dim() == 3 or (tensor.dim() == 2 and "experts" in name and "bias" in name and dim == 1):
            kept[name] = (
                [kept_along(a, b, dim - 1) for a, b in zip(tensor, other, strict=True)]
                if dim
                else [kept_along(tensor, other, 0)]
            )
        else:
            kept[name] = [kept_along(tensor, other, dim)]
        parts = tensor if len(kept[name]) > 1 else [tensor]
        for each, index in zip(parts, kept[name], strict=True):
            along = dim - 1 if len(kept[name]) > 1 else dim
            gone = torch.ones(each.shape[along], dtype=torch.bool)
            gone[index] = False
            each.index_fill_(along, gone.nonzero().flatten(), 0)
    return kept


def assert_equal(got, want):
    assert float((got - want).abs().max()) <= 1e-12 * float(want.abs().max())


@slow
@pytest.mark.parametrize("model_type", MODELS)
def test_every_model_type_loads_and_computes_the_same(tmp_path, model_type):
    source, target = saved(tmp_path / "in", model_type), str(tmp_path / "out")
    heads = 0.5 if model_type in OF_HEADS else None
    pruned = prune_pretrained(source, target, 0.25, heads=heads)
    assert pruned.difference <= 1e-12
    options = (
        {"experts_implementation": "eager"} if model_type in OF_EXPERTS else {}
    )  # others know no float64
    small, model = loaded(target, **options), loaded(source, **options)
    before = output(model, inputs_of(model_type))
    kept = zeroed_like(model, small)
    assert len(kept) >= 4
    want = output(model, inputs_of(model_type))
    assert_equal(output(small, inputs_of(model_type)), want)
    assert float((before - want).abs().max()) > 1e-6 * float(want.abs().max())
    sizes = [sum(each.numel() for each in made.parameters()) for made in (model, small)]
    assert tuple(sizes) == pruned.parameters
    assert pruned.size[1] < pruned.size[0]


def test_the_models_of_the_table_are_the_models_of_the_tests():
    assert set(MODELS) == set(MODEL_TYPES)


@slow
@pytest.mark.parametrize("model_type", OF_EXPERTS)
def test_whole_experts_go_with_their_router(tmp_path, model_type, monkeypatch):
    source, target = saved(tmp_path / "in", model_type), str(tmp_path / "out")
    pruned = prune_pretrained(source, target, 0, experts=2 if model_type == "nemotron_h" else 1)
    assert pruned.difference <= 1e-12
    small = loaded(target, experts_implementation="eager")
    model = loaded(source, experts_implementation="eager")
    kept = zeroed_like(model, small)
    routers = {name: index for name, (index,) in kept.items() if "gate." in name or "router." in name}
    assert routers
    weights = dict([*model.named_parameters(), *model.named_buffers()])
    linear = nn.functional.linear

    def routed(given, weight, bias=None):
        """Logits of experts that are gone are minus infinity."""
        made = linear(given, weight, bias)
        for name, index in routers.items():
            if weight is weights[name]:
                gone = torch.ones(made.shape[-1], dtype=torch.bool)
                gone[index] = False
                made = made.masked_fill(gone, -torch.inf)
        return made

    for name, index in routers.items():
        if weights[name].dim() == 1:  # what is added to scores: zeros now
            gone = torch.ones(len(weights[name]), dtype=torch.bool)
            gone[index] = False
            weights[name].data[gone] = -torch.inf
    got = output(small, IDS)
    monkeypatch.setattr(nn.functional, "linear", routed)
    assert_equal(got, output(model, IDS))


@slow
@pytest.mark.parametrize("model_type", OF_EXPERTS)
def test_experts_and_widths_and_heads_together(tmp_path, model_type):
    source, target = saved(tmp_path / "in", model_type), str(tmp_path / "out")
    heads = 2 if model_type in OF_HEADS else None
    pruned = prune_pretrained(source, target, 8, heads=heads, experts=0.25, multiple_of=4)
    assert pruned.difference <= 1e-12
    known = MODEL_TYPES[model_type].experts
    config = loaded(target).config
    count = 8 if model_type == "nemotron_h" else 4
    assert getattr(config, known.number) == count * 3 // 4
    before, after = pruned.numbers[known.width]
    assert getattr(config, known.width) == after == before - 8


def norms_of(*tensors):
    """The L2 norm of all slices that belong to a channel: each tensor has channels along dim 0."""
    return sum(each.double().flatten(1).square().sum(1) for each in tensors).sqrt()


def largest(norms, count):
    return norms.argsort(descending=True, stable=True)[:count].sort().values


@slow
def test_of_every_layer_the_channels_and_heads_with_the_largest_norms_stay(tmp_path):
    source, target = saved(tmp_path / "in", "llama"), str(tmp_path / "out")
    pruned = prune_pretrained(source, target, 0.25, heads=2)
    assert pruned.numbers == {
        "intermediate_size": (48, 36),
        "num_attention_heads": (4, 2),
        "num_key_value_heads": (2, 1),
    }
    model, small = loaded(source), loaded(target)
    for layer, other in zip(model.model.layers, small.model.layers, strict=True):
        gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
        keep = largest(norms_of(gate, up, down.T), 36)
        assert torch.equal(other.mlp.gate_proj.weight, gate[keep])
        assert torch.equal(other.mlp.down_proj.weight, down[:, keep])
        attention = layer.self_attn
        queries = attention.q_proj.weight.view(2, 16, 32)
        keys, values = (each.weight.view(2, 8, 32) for each in (attention.k_proj, attention.v_proj))
        outputs = attention.o_proj.weight.T.reshape(2, 16, 32)
        (head,) = largest(norms_of(queries, keys, values, outputs), 1)
        assert torch.equal(other.self_attn.q_proj.weight, queries[head])
        assert torch.equal(other.self_attn.k_proj.weight, keys[head])


@slow
def test_of_every_layer_the_experts_with_the_largest_norms_stay_and_of_each_its_channels(tmp_path):
    source, target = saved(tmp_path / "in", "mixtral"), str(tmp_path / "out")
    prune_pretrained(source, target, 12, experts=1)
    model, small = loaded(source), loaded(target)
    for layer, other in zip(model.model.layers, small.model.layers, strict=True):
        experts, router = layer.mlp.experts, layer.mlp.gate.weight
        keep = largest(norms_of(experts.gate_up_proj, experts.down_proj, router), 3)
        assert torch.equal(other.mlp.gate.weight, router[keep])
        for index, expert in enumerate(keep):
            both, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            channels = largest(norms_of(both[:48], both[48:], down.T), 36)
            assert torch.equal(
                other.mlp.experts.gate_up_proj[index], both[torch.cat([channels, channels + 48])]
            )
            assert torch.equal(other.mlp.experts.down_proj[index], down[:, channels])


VARIANTS = {
    "gated T5": ("t5", {"feed_forward_proj": "gated-gelu"}, {"heads": 1}, None),
    "tied embeddings": ("qwen3", {"tie_word_embeddings": True}, {"heads": 2}, None),
    "as many keys as queries": ("mistral", {"num_key_value_heads": 4}, {"heads": 1}, None),
    "one key for all": ("qwen2", {"num_key_value_heads": 1}, {}, None),
    "a size of its own": ("gpt2", {"n_inner": 40}, {}, None),
    "no experts shared": ("qwen2_moe", {"decoder_sparse_step": 2}, {"experts": 1}, None),
    "routed by one group": ("nemotron_h", {"n_group": 1}, {"experts": 3}, None),
    "the base model": ("llama", {}, {"heads": 2}, "LlamaModel"),
    "a classifier": ("bert", {}, {"heads": 1, "custom_code": True}, "BertForSequenceClassification"),
    "masked words": ("roberta", {}, {"heads": 1, "custom_code": True}, "RobertaForMaskedLM"),
    "pictures in classes": ("vit", {}, {"heads": 1}, "ViTForImageClassification"),
}


@slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tmp_path, variant, monkeypatch):
    model_type, numbers, options, kind = VARIANTS[variant]
    source, target = saved(tmp_path / "in", model_type, kind=kind, **numbers), str(tmp_path / "out")
    assert prune_pretrained(source, target, 0.25, **options).difference <= 1e-12
    name = kind or MODELS[model_type][0]
    model_class = getattr(library(), name)
    if "custom_code" in options:
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
        found = getattr(
            library(), f"Auto{name.replace(name.partition('For')[0], 'Model')}"
        ).from_pretrained(target, trust_remote_code=True)
    else:
        found = model_class.from_pretrained(target)
    assert isinstance(found, model_class)


@slow
@pytest.mark.parametrize("model_type", OF_CODE)
def test_heads_that_no_config_tells_of_go_with_code(tmp_path, model_type, monkeypatch):
    source, target = saved(tmp_path / "in", model_type), str(tmp_path / "out")
    pruned = prune_pretrained(source, target, 0.25, heads=1, custom_code=True)
    assert pruned.difference <= 1e-12
    known = MODEL_TYPES[model_type]
    assert pruned.numbers[known.heads.keys[0]] == (4, 3)
    (kind,) = config_of(target)["auto_map"]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    small, found = getattr(library(), kind).from_pretrained(
        target, trust_remote_code=True, dtype=torch.float64, output_loading_info=True
    )
    assert not any(found.values())
    assert isinstance(small, getattr(library(), MODELS[model_type][0]))
    model = loaded(source)
    zeroed_like(model, small)
    assert_equal(output(small.eval(), IDS), output(model, IDS))
    assert sum(each.numel() for each in small.parameters()) == pruned.parameters[1]
    # Without the code it does not load by mistake.
    with pytest.raises(RuntimeError):
        getattr(library(), MODELS[model_type][0]).from_pretrained(target)
    # What was loaded is saved, and loaded again.
    small.save_pretrained(tmp_path / "again")
    again = getattr(library(), kind).from_pretrained(
        tmp_path / "again", trust_remote_code=True, dtype=torch.float64
    )
    assert torch.equal(output(again.eval(), IDS), output(small, IDS))


@slow
def test_code_that_gives_other_sizes_is_found_and_nothing_is_left(tmp_path, monkeypatch):
    source = saved(tmp_path / "in", "gpt2")
    real = choosing.sizes_without

    def wrong(*args):
        """The code would split queries, keys and values elsewhere."""
        sizes = real(*args)
        sizes["attributes"] = {
            key: value for key, value in sizes["attributes"].items() if "split" not in key
        }
        return sizes

    monkeypatch.setattr(choosing, "sizes_without", wrong)
    with pytest.raises(RuntimeError):
        prune_pretrained(source, tmp_path / "out", 0.25, heads=1, custom_code=True)
    assert os.listdir(tmp_path) == ["in"]


@slow
def test_scores_and_factors_choose(tmp_path):
    source = saved(tmp_path / "in", "qwen2_moe")
    model = loaded(source)
    names = dict(model.named_parameters())
    mlp, experts = "model.layers.0.mlp.shared_expert", "model.layers.1.mlp.experts"
    scores = {
        f"{mlp}.{name}_proj.weight": torch.zeros(names[f"{mlp}.{name}_proj.weight"].shape)
        for name in ("gate", "up", "down")
    }
    scores[f"{mlp}.gate_proj.weight"][10:] = 1
    scores["model.embed_tokens.weight"] = torch.ones(64, 32)  # of what is not measured
    favoured = torch.ones(4, 24)
    favoured[:, :6] = 1e-6
    scale = {experts: favoured}
    prune_pretrained(source, tmp_path / "out", 0.25, importance_scores=scores, scale=scale)
    small = dict(loaded(str(tmp_path / "out")).named_parameters())
    assert torch.equal(small[f"{mlp}.up_proj.weight"], names[f"{mlp}.up_proj.weight"][10:])
    assert torch.equal(small[f"{experts}.down_proj"], names[f"{experts}.down_proj"][:, :, 6:])
    for argument in ("importance_scores", "scale", "element_scale"):
        with pytest.raises(ValueError, match=f"{argument}: 'no.such' is nothing that is measured"):
            prune_pretrained(source, tmp_path / "more", 0.25, **{argument: {"no.such": torch.ones(3)}})
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@slow
def test_the_folder_keeps_its_dtype_its_other_files_and_its_tied_weights(tmp_path):
    source = saved(tmp_path / "in", "gpt2", torch.bfloat16)
    os.makedirs(tmp_path / "in" / "1_Pooling")
    for name in ("tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", "model.onnx"):
        (tmp_path / "in" / name).write_text("{}")
    os.symlink(tmp_path / "in" / "tokenizer.json", tmp_path / "in" / "vocab.json")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "HEAD").write_text("ref")
    prune_pretrained(source, tmp_path / "out", 0.5)
    assert sorted(
        os.path.relpath(os.path.join(folder, name), tmp_path / "out")
        for folder, _, names in os.walk(tmp_path / "out")
        for name in names
    ) == [
        "1_Pooling/config.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.json",
    ]
    assert not os.path.islink(tmp_path / "out" / "vocab.json")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert len(modes) == 1
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    before = {**config_of(source), "n_inner": 64}
    assert config_of(tmp_path / "out") == before
    model = library().AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.dtype == torch.bfloat16


@slow
def test_a_pruned_folder_is_pruned_again_and_zeros_go_first(tmp_path):
    source = saved(tmp_path / "in", "bert")
    tensors = load_file(os.path.join(source, "model.safetensors"))
    for layer in range(2):
        for name, dim in (("intermediate.dense.weight", 0), ("output.dense.weight", 1)):
            tensors[f"encoder.layer.{layer}.{name}"].index_fill_(dim, torch.arange(8 * (layer + 1)), 0)
    save_file(tensors, os.path.join(source, "model.safetensors"), {"format": "pt"})
    # Of 40 and 32 that are left go a quarter, and as many as the other has.
    prune_pretrained(source, tmp_path / "out", 0.25)
    kept = config_of(tmp_path / "out")["intermediate_size"]
    assert kept in (24, 27, 30)
    prune_pretrained(tmp_path / "out", tmp_path / "more", 4)
    assert config_of(tmp_path / "more")["intermediate_size"] == kept - 4


@slow
def test_a_wrong_cut_is_found_and_named_and_nothing_is_left(tmp_path, monkeypatch):
    source = saved(tmp_path / "in", "llama")

    def wrong(tensors, parts):
        """Takes other rows of one weight."""
        made = without_slices(tensors, parts)
        name = "model.layers.1.mlp.up_proj.weight"
        if name in made and made[name].shape != tensors[name].shape:
            made[name] = tensors[name][: len(made[name])]
        return made

    monkeypatch.setattr(pruning, "without_slices", wrong)
    with pytest.raises(
        RuntimeError, match=r"^what was written is not .* in place of intermediate channels: with their own"
    ):
        prune_pretrained(source, tmp_path / "out", 0.25, heads=2)
    assert os.listdir(tmp_path) == ["in"]
    assert prune_pretrained(source, tmp_path / "out", 0.25, heads=2, verify=False).difference is None


@slow
def test_random_weights_find_what_zeros_hide(tmp_path, monkeypatch):
    source = saved(tmp_path / "in", "llama")
    tensors = load_file(os.path.join(source, "model.safetensors"))
    for name in tensors:
        if "up_proj" in name:
            tensors[name].zero_()
    save_file(tensors, os.path.join(source, "model.safetensors"), {"format": "pt"})
    whole = proof.zero_
    monkeypatch.setattr(
        proof,
        "zero_",
        lambda tensors, parts: whole(tensors, [p for p in parts if "channels" not in p.what]),
    )
    with pytest.raises(RuntimeError, match="intermediate channels: with random weights outputs differ by"):
        prune_pretrained(source, tmp_path / "out", 0.25, heads=2)
    assert os.listdir(tmp_path) == ["in"]


@slow
@pytest.mark.parametrize("place", ["save", "compare"])
@pytest.mark.parametrize("was_there", [False, True])
def test_an_interrupted_run_leaves_the_target_as_it_was(tmp_path, monkeypatch, place, was_there):
    source, target = saved(tmp_path / "in", "bert"), tmp_path / "out"
    if was_there:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    before = load_file(os.path.join(source, "model.safetensors"))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    if place == "save":
        monkeypatch.setattr(library().PreTrainedModel, "save_pretrained", interrupted)
    else:
        monkeypatch.setattr(proof, "difference", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_pretrained(source, target, 0.25, force=was_there)
    assert sorted(os.listdir(tmp_path)) == ["in", *(["out"] * was_there)]
    assert not was_there or os.listdir(target) == ["mine.txt"]
    after = load_file(os.path.join(source, "model.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.undo()
    prune_pretrained(source, target, 0.25, force=was_there)
    assert "mine.txt" not in os.listdir(target)


def edited(folder, **entries):
    config = {**config_of(folder), **entries}
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({key: value for key, value in config.items() if value is not ...}, file)


REFUSED = {
    "no config": (
        lambda folder: os.remove(os.path.join(folder, "config.json")),
        UnusableCheckpoint,
        "expected a folder of transformers, with a config.json",
    ),
    "broken config": (
        lambda folder: pathlib.Path(folder, "config.json").write_text("{"),
        UnusableCheckpoint,
        "transformers does not read its config.json",
    ),
    "a type that transformers does not know": (
        lambda folder: edited(folder, model_type="no_such"),
        UnusableCheckpoint,
        "transformers does not read its config.json",
    ),
    "a type that lnprune does not know": (
        lambda folder: edited(folder, model_type="xlm"),
        UnusableCheckpoint,
        r"is not known of the model type 'xlm', only of bert, .*Plan\.compact\(\) and load_compact\(\)",
    ),
    "code of its own": (
        lambda folder: edited(folder, model_type="no_such", auto_map={"AutoConfig": "code.Config"}),
        UnusableCheckpoint,
        "transformers does not read its config.json: .*contains custom code",
    ),
    "no architecture": (
        lambda folder: edited(folder, architectures=...),
        UnusableCheckpoint,
        "expected one class of transformers as `architectures` of its config.json, got none",
    ),
    "quantized": (
        lambda folder: edited(
            folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
        ),
        UnusableCheckpoint,
        "is quantized, as the quantization_config",
    ),
    "no weights": (
        lambda folder: os.remove(os.path.join(folder, "model.safetensors")),
        UnusableCheckpoint,
        "holds no .safetensors",
    ),
    "another size than the config says": (
        lambda folder: edited(folder, intermediate_size=64),
        UnusableCheckpoint,
        "has weights of another shape for",
    ),
}


@slow
@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_that_cannot_be_pruned_is_refused_by_name(tmp_path, what):
    spoil, kind, words = REFUSED[what]
    source = saved(tmp_path / "in", "bert")
    spoil(source)
    with pytest.raises(kind, match=words) as caught:
        prune_pretrained(source, tmp_path / "out", 0.25)
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    assert os.listdir(tmp_path) == ["in"]


@slow
def test_weights_that_are_missing_packed_or_too_many_are_refused(tmp_path):
    source = saved(tmp_path / "in", "bert")
    file = os.path.join(source, "model.safetensors")
    tensors = load_file(file)
    name = "encoder.layer.1.output.dense.weight"

    def refused(changes, words):
        made = {key: tensor for key, tensor in {**tensors, **changes}.items() if tensor is not None}
        save_file(made, file, {"format": "pt"})
        with pytest.raises(UnusableCheckpoint, match=words):
            prune_pretrained(source, tmp_path / "out", 0.25)
        assert os.listdir(tmp_path) == ["in"]

    refused({name: None}, f"has no weights for {name} of BertModel")
    refused(
        {"more.weight": torch.ones(3)}, "has weights that the model does not load: more.weight of BertModel"
    )
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn):
        refused({name: tensors[name].to(dtype)}, f"{name} is of .*got quantized or packed ones")
    save_file({**tensors, "position_ids": torch.arange(512)[None]}, file, {"format": "pt"})
    prune_pretrained(source, tmp_path / "out", 0.25)


@slow
@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        (
            "bert",
            {"heads": 1},
            "BertModel divides hidden_size by the number of heads .* with custom_code=True",
        ),
        ("olmo2", {"heads": 1, "custom_code": True}, "cannot take heads out of Olmo2ForCausalLM"),
        ("olmo2", {"heads": 1}, "cannot take heads out of Olmo2ForCausalLM"),
        ("llama", {"heads": 1}, "expected a multiple of 2, as so many share keys and values, got 1"),
        ("llama", {"experts": 1}, "LlamaForCausalLM has none"),
        ("llama", {"amount": 0}, "expected channels, heads or experts that go, got none"),
        ("llama", {"amount": 49}, "49"),
        ("llama", {"amount": -1}, "amount: expected a count, or a share in"),
        ("llama", {"heads": 1.5}, "heads: expected a count, or a share in"),
        ("llama", {"multiple_of": 0}, "multiple_of: expected 1 or more, got 0"),
        ("mixtral", {"experts": 3}, "each token takes 2: expected so many that stay, got 1"),
        ("nemotron_h", {"experts": 1}, "expected a multiple of 2, the groups of the router, got 1"),
        (
            "nemotron_h",
            {"heads": 2, "layers_block_type": ["moe", "mlp"]},
            "has no layers of attention heads",
        ),
        ("qwen3_moe", {"experts": 1, "mlp_only_layers": [0, 1]}, "has no layers of experts"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path, model_type, options, words):
    numbers = {key: options.pop(key) for key in ("mlp_only_layers", "layers_block_type") if key in options}
    source = saved(tmp_path / "in", model_type, **numbers)
    with pytest.raises(ValueError, match=words):
        prune_pretrained(source, tmp_path / "out", **{"amount": 0.25, **options})
    assert os.listdir(tmp_path) == ["in"]


@slow
def test_heads_that_a_config_does_not_allow_are_refused_by_its_own_words(tmp_path):
    source = saved(tmp_path / "in", "llama", num_key_value_heads=4)
    with pytest.raises(
        ValueError,
        match=r"LlamaConfig does not allow .*num_attention_heads=3.*not a multiple of the number",
    ):
        prune_pretrained(source, tmp_path / "out", 0.25, heads=1)
    assert os.listdir(tmp_path) == ["in"]


@slow
def test_weights_that_are_tied_are_not_cut(tmp_path, monkeypatch):
    source = saved(tmp_path / "in", "bert")
    real = pruning.Folder.load

    def tied(folder, *args):
        model = real(folder, *args)
        first, second = (layer.intermediate.dense for layer in model.encoder.layer)
        second.weight = first.weight
        return model

    monkeypatch.setattr(pruning.Folder, "load", tied)
    with pytest.raises(
        ValueError, match=r"are one weight \(tied\): expected channels that go to be its alone"
    ):
        prune_pretrained(source, tmp_path / "out", 0.25)
    assert os.listdir(tmp_path) == ["in"]


@slow
def test_targets_that_are_not_written_to(tmp_path):
    source = saved(tmp_path / "in", "bert")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("there", "file", "in", "in/inside", "no/such"):
        with pytest.raises(RefusedTarget):
            prune_pretrained(source, tmp_path / name, 0.25)
    assert (tmp_path / "there" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    prune_pretrained(source, tmp_path / "empty", 0.25)
    prune_pretrained(source, tmp_path / "there", 0.25, force=True)
    assert sorted(os.listdir(tmp_path / "there")) == ["config.json", "model.safetensors"]


@slow
def test_a_model_in_several_files_and_one_in_bin_files(tmp_path):
    model = small_model("llama")
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert "model.safetensors.index.json" in os.listdir(tmp_path / "in")
    prune_pretrained(tmp_path / "in", tmp_path / "out", 0.25)
    assert "model.safetensors.index.json" not in os.listdir(tmp_path / "out")
    whole = tmp_path / "bin"
    shutil.copytree(tmp_path / "in", whole, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(model.state_dict(), whole / "pytorch_model.bin")
    prune_pretrained(whole, tmp_path / "other", 0.25)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_transformers_a_call_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    with pytest.raises(ImportError, match=r'"transformers" brings: pip install "lnprune\[transformers\]"$'):
        prune_pretrained(tmp_path / "in", tmp_path / "out", 0.25)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("amount", ["0.5", None, True, [0.5]])
def test_amounts_that_are_no_numbers_are_refused(tmp_path, amount):
    with pytest.raises(TypeError, match=r"^amount: expected a count \(int\) or a share \(float\), got"):
        prune_pretrained(tmp_path, tmp_path / "out", amount)


@slow
def test_something_of_every_layer_stays(tmp_path):
    source = saved(tmp_path / "in", "qwen3")
    pruned = prune_pretrained(source, tmp_path / "out", 1.0, heads=4, multiple_of=16)
    assert pruned.numbers == {
        "intermediate_size": (48, 16),
        "num_attention_heads": (4, 2),
        "num_key_value_heads": (2, 1),
    }
    assert pruned.difference <= 1e-12


def command(capsys, *words):
    """What the command line prints, and how it ends."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@slow
def test_the_command_writes_the_same_folder(tmp_path, capsys):
    source = saved(tmp_path / "in", "llama")
    words = "compact", source, "--amount", "0.25", "--heads", 2
    code, out, err = command(capsys, *words, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [
        "intermediate_size: 48 -> 36",
        "num_attention_heads: 4 -> 2",
        "num_key_value_heads: 2 -> 1",
    ]
    assert lines[3] == "parameters: 19,616 -> 14,240"
    assert lines[-1] == str(tmp_path / "out")
    prune_pretrained(source, tmp_path / "other", 0.25, heads=2)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    code, out, _ = command(
        capsys, *words, "-o", tmp_path / "out", "--force", "--json", "--no-verify", "-n", 1
    )
    said = json.loads(out)
    assert said["config"]["num_attention_heads"] == {"before": 4, "after": 2}
    assert said["difference"] is None
    assert said["bytes"]["after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    code, out, _ = command(capsys, *words, "-o", tmp_path / "out", "--force", "-q")
    assert out == f"{tmp_path / 'out'}\n"


@slow
def test_the_command_takes_files_of_scores_and_scales(tmp_path, capsys):
    source = saved(tmp_path / "in", "bert")
    name = "encoder.layer.1.intermediate.dense.weight"
    save_file({name: torch.arange(48.0)}, tmp_path / "scale.safetensors")
    scores = {key: tensor.abs() for key, tensor in loaded(source).named_parameters() if tensor.dim() > 1}
    save_file(scores, tmp_path / "scores.safetensors")
    code, _, err = command(
        capsys,
        *(
            "compact",
            source,
            "-o",
            tmp_path / "out",
            "--amount",
            8,
            "--scale",
            tmp_path / "scale.safetensors",
        ),
        *("--importance-scores", tmp_path / "scores.safetensors"),
    )
    assert (code, err) == (0, "")
    prune_pretrained(source, tmp_path / "other", 8, scale={name: torch.arange(48.0)})
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "other"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@slow
def test_what_the_command_refuses_has_a_code_and_a_line(tmp_path, capsys):
    source = saved(tmp_path / "in", "bert")
    (tmp_path / "nothing").mkdir()
    for code, words in (
        (2, ("compact", source, "-o", tmp_path / "out")),
        (2, ("compact", source, "-o", tmp_path / "out", "--heads", 1)),
        (3, ("compact", tmp_path / "nothing", "-o", tmp_path / "out", "--amount", "0.5")),
        (3, ("compact", tmp_path / "no", "-o", tmp_path / "out", "--amount", "0.5")),
        (4, ("compact", source, "-o", source, "--amount", "0.5")),
    ):
        found, out, err = command(capsys, *words)
        assert (found, out, len(err.splitlines())) == (code, "", 1), err
        assert err.startswith("lnprune: ")
    assert sorted(os.listdir(tmp_path)) == ["in", "nothing"]


def test_the_command_without_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = command(capsys, "compact", tmp_path, "-o", tmp_path / "out", "--amount", "0.5")
    assert (code, out) == (1, "")
    assert err.endswith('pip install "lnprune[transformers]"\n')


@slow
def test_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    library()
    names = {}
    blocks = code_of(ROOT / "docs" / "transformers.md")
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out.strip().splitlines()
    assert said == re.findall(r"^print.+  # (.+)$", "".join(blocks), re.MULTILINE)
    recipe = [line for line in blocks[1].splitlines() if line]
    assert len(recipe) <= 30
    before = dict(loaded("large").named_parameters())
    taken = dict(names["model"].named_parameters())
    for folder, channel_norms in (
        (
            "by-loss",
            lambda gate, up, down: sum(
                (taken[n] * taken[n].grad).abs().sum(d) for n, d in ((gate, 1), (up, 1), (down, 0))
            ),
        ),
        (
            "by-activations",
            lambda gate, up, down: (
                norms_of(taken[gate], taken[up], taken[down].T) * names["squares"][gate].sqrt()
            ),
        ),
    ):
        small = dict(loaded(folder).named_parameters())
        for layer in range(2):
            mlp = [f"model.layers.{layer}.mlp.{each}_proj.weight" for each in ("gate", "up", "down")]
            keep = largest(channel_norms(*mlp), 72)
            assert torch.equal(small[mlp[0]], before[mlp[0]][keep]), folder


def test_the_page_lists_the_model_types():
    page = (ROOT / "docs" / "transformers.md").read_text()
    rows = re.findall(
        r"^\| ((?:[\w-]+, )*[\w-]+) \| yes \| (yes|with code|no|) ?(?:\[\d\] )?\| (yes)? ?\|$",
        page,
        re.MULTILINE,
    )
    found = {name: (heads, experts) for names, heads, experts in rows for name in names.split(", ")}
    want = {}
    for name, known in MODEL_TYPES.items():
        heads = "no" if known.heads is None else ("yes" if known.heads.size else "with code")
        want[name] = heads, "yes" if known.experts else ""
    assert found == want


@slow
def test_the_real_sentence_encoder_from_folder_to_folder(tmp_path):
    """The example, as a process of its own: two commands, three models, a row of a table for each."""
    words = [
        sys.executable,
        "examples/transformers_folder.py",
        "--rounds",
        "1",
        "--folder",
        tmp_path / "made",
    ]
    done = subprocess.run(words, check=True, cwd=ROOT, capture_output=True, text=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[1] for row in rows] == ["22,713,216", "20,941,440", "20,350,464"]
    cosines = [float(row[3].split(",")[0]) for row in rows]
    assert 1 == cosines[0] > cosines[1] > cosines[2] > 0.7
    assert done.stdout.count("num_attention_heads: 12 -> 10") == 1
    differences = re.findall(r"the largest difference is (\S+) of", done.stdout)
    assert len(differences) == 2
    assert all(float(each) <= 1e-12 for each in differences)


@slow
def test_a_process_that_is_killed_leaves_the_target_as_it_was_or_complete(tmp_path):
    """Killed from the moment on that the new folder begins to be there, later each time."""
    source, target = saved(tmp_path / "in", "llama"), tmp_path / "out"
    prune_pretrained(source, target, 4)
    old = load_file(target / "model.safetensors")
    prune_pretrained(source, tmp_path / "new", 8, heads=2)
    new = load_file(tmp_path / "new" / "model.safetensors")
    code = (
        "from tests.pretrained_models import library; library(); from lnprune.commands.main import main; "
        f"main(['compact', {source!r}, '-o', {str(target)!r}, '--amount', '8', '--heads', '2', '--force'])"
    )
    ends = []
    for delay in (0, 0.002, 0.01, 0.05, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not any(
            name.startswith(".lnprune-") for name in os.listdir(tmp_path)
        ):
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        process.wait()
        for name in os.listdir(tmp_path):
            if name.startswith(".lnprune-"):
                shutil.rmtree(tmp_path / name)
        assert sorted(os.listdir(target)) == ["config.json", "generation_config.json", "model.safetensors"]
        found = load_file(target / "model.safetensors")
        size = 44 if found["model.layers.0.mlp.up_proj.weight"].shape[0] == 44 else 40
        assert config_of(target)["intermediate_size"] == size
        assert all(
            torch.equal(found[name], tensor) for name, tensor in (old if size == 44 else new).items()
        )
        ends.append(process.returncode)
    assert ends[0] == -9, "the first was killed before it was done"
