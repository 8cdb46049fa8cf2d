"""What lnprune knows of the model types of transformers: which numbers of a config say which sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Part(NamedTuple):
    """Channels that are as many in every layer, as many as the config says.

    Attributes:
        what: what they are called in messages.
        weights: a pattern of the weights that make them.
        keys: the numbers of the config that shrink with them.
    """

    what: str
    weights: str
    keys: tuple[str, ...]


class Heads(NamedTuple):
    """Attention heads, with the keys and values that they share.

    Attributes:
        weights: a pattern of the weights that make the queries.
        keys: the numbers of the config that shrink with them.
        size: the number of the config that says how many channels a head has. None: the code divides the
            hidden size by the number of heads, so that no config says how large fewer heads are.
    """

    weights: str
    keys: tuple[str, ...]
    size: str | None


class Experts(NamedTuple):
    """Layers of experts.

    Attributes:
        modules: a pattern of the modules that hold the weights of a layer's experts.
        router: the module beside them that chooses experts.
        width: the number of the config that says how many intermediate channels an expert has.
        number: the number of the config that says how many experts a layer has.
    """

    modules: str
    router: str
    width: str
    number: str


class ModelType(NamedTuple):
    """What is known of a model type; None: it has none, or lnprune cannot take them out."""

    widths: tuple[Part, ...]
    heads: Heads | None
    experts: Experts | None = None


_HEADS = "num_attention_heads", "num_key_value_heads"


def _width(weights: str, key: str = "intermediate_size") -> Part:
    return Part("intermediate channels", weights, (key,))


def _decoder(
    size: str | None = "head_dim", weights: str = "*.mlp.gate_proj.weight", has_heads: bool = True
) -> ModelType:
    return ModelType(
        (_width(weights),), Heads("*.self_attn.q_proj.weight", _HEADS, size) if has_heads else None
    )


def _encoder(weights: str = "*.intermediate.dense.weight") -> ModelType:
    heads = Heads("*.attention.self.query.weight", ("num_attention_heads",), None)
    return ModelType((_width(weights),), heads)


def _experts(width: str, count: str, router: str = "gate") -> Experts:
    return Experts("*.mlp.experts", router, width, count)


MODEL_TYPES: Mapping[str, ModelType] = {
    "bert": _encoder(),
    "camembert": _encoder(),
    "distilbert": ModelType(
        (_width("*.ffn.lin1.weight", "hidden_dim"),), Heads("*.attention.q_lin.weight", ("n_heads",), None)
    ),
    "electra": _encoder(),
    "gemma2": _decoder(),
    "gemma3_text": _decoder(),
    "gpt2": ModelType(
        (_width("*.mlp.c_fc.weight", "n_inner"),), Heads("*.attn.c_attn.weight", ("n_head",), None)
    ),
    "gpt_neox": _decoder(weights="*.mlp.dense_h_to_4h.weight", has_heads=False),
    "gpt_oss": ModelType(
        (),
        Heads("*.self_attn.q_proj.weight", _HEADS, "head_dim"),
        _experts("intermediate_size", "num_local_experts", "router"),
    ),
    "granite": _decoder(),
    "llama": _decoder(),
    "mistral": _decoder(),
    "mixtral": ModelType(
        (),
        Heads("*.self_attn.q_proj.weight", _HEADS, "head_dim"),
        _experts("intermediate_size", "num_local_experts"),
    ),
    "modernbert": ModelType(
        (_width("*.mlp.Wi.weight"),), Heads("*.attn.Wqkv.weight", ("num_attention_heads",), None)
    ),
    "nemotron_h": ModelType(
        (
            _width("*.mixer.up_proj.weight"),
            Part(
                "intermediate channels of shared experts",
                "*.mixer.shared_experts.up_proj.weight",
                ("moe_shared_expert_intermediate_size",),
            ),
        ),
        Heads("*.mixer.q_proj.weight", _HEADS, "head_dim"),
        Experts("*.mixer.experts", "gate", "moe_intermediate_size", "n_routed_experts"),
    ),
    "olmo2": _decoder(has_heads=False),
    "olmoe": ModelType((), None, _experts("intermediate_size", "num_experts")),
    "opt": ModelType(
        (_width("*.fc1.weight", "ffn_dim"),),
        Heads("*.self_attn.q_proj.weight", ("num_attention_heads",), None),
    ),
    "phi3": _decoder(weights="*.mlp.gate_up_proj.weight", has_heads=False),
    "qwen2": _decoder(),
    "qwen2_moe": ModelType(
        (
            _width("*.mlp.gate_proj.weight"),
            Part(
                "intermediate channels of shared experts",
                "*.mlp.shared_expert.gate_proj.weight",
                ("shared_expert_intermediate_size",),
            ),
        ),
        Heads("*.self_attn.q_proj.weight", _HEADS, "head_dim"),
        _experts("moe_intermediate_size", "num_experts"),
    ),
    "qwen3": _decoder(),
    "qwen3_moe": ModelType(
        (_width("*.mlp.gate_proj.weight"),),
        Heads("*.self_attn.q_proj.weight", _HEADS, "head_dim"),
        _experts("moe_intermediate_size", "num_experts"),
    ),
    "roberta": _encoder(),
    "smollm3": _decoder(),
    "t5": ModelType(
        (_width("*.DenseReluDense.wi*.weight", "d_ff"),),
        Heads("*Attention.q.weight", ("num_heads",), "d_kv"),
    ),
    "vit": ModelType(
        (_width("*.mlp.fc1.weight"),),
        Heads("*.attention.q_proj.weight", ("num_attention_heads",), "head_dim"),
    ),
    "xlm-roberta": _encoder(),
}
