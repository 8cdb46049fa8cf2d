"""Small models of transformers, one of each type that lnprune knows, with random weights."""

import sys
import types

import torch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {**SIZES, **ENDS, "num_key_value_heads": 2}
MOE = {**DECODER, "num_experts_per_tok": 2}


def library():
    """Transformers; what it takes from torchvision, which none of these needs, does not load everywhere."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("_meta_registrations"))
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


# By the model type: the names of the class and of its config, and the config's numbers.
MODELS = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "camembert": ("CamembertModel", "CamembertConfig", SIZES),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
    ),
    "electra": ("ElectraModel", "ElectraConfig", {**SIZES, "embedding_size": 32}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, **ENDS},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, **ENDS}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**MOE, "num_local_experts": 4, "head_dim": 8},
    ),
    "granite": ("GraniteForCausalLM", "GraniteConfig", DECODER),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**MOE, "num_local_experts": 4}),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**SIZES, **ENDS, "cls_token_id": 0, "sep_token_id": 1},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
            **{key: value for key, value in MOE.items() if key != "num_hidden_layers"},
            "head_dim": 8,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", DECODER),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**MOE, "num_experts": 4}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "word_embed_proj_dim": 32,
            **ENDS,
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**MOE, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**MOE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [1]},
    ),
    "roberta": ("RobertaModel", "RobertaConfig", SIZES),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", DECODER),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 64,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {
            **{key: value for key, value in SIZES.items() if key != "vocab_size"},
            "image_size": 32,
            "patch_size": 8,
        },
    ),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", SIZES),
}


def small_model(model_type, dtype=torch.float32, kind=None, **numbers):
    """A model of a type, of its class or another; with random numbers in all that is made of zeros."""
    name, config, known = MODELS[model_type]
    made = getattr(library(), kind or name)(getattr(library(), config)(**{**known, **numbers})).eval()
    with torch.no_grad():
        for key, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if tensor.is_floating_point() and not tensor.any() and "norm" not in key.lower():
                tensor.normal_(std=0.5)
    return made.to(dtype)
