"""Mixtures of experts of the transformers library, from small configurations: found, ranked and zeroed."""

import copy
import sys
import types

import pytest
import torch

import lnprune

pytestmark = pytest.mark.slow
# Torchvision's operators, which transformers imports and none of these models needs, do not load beside
# every torch.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("_meta_registrations"))

VOCABULARY, HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 64, 32, 24, 4, 2


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
        )
    )


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            pad_token_id=0,
        )
    )


def nemotron_h():
    from transformers import NemotronHConfig, NemotronHForCausalLM

    return NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            layers_block_type=["attention", "moe"] * LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            n_routed_experts=EXPERTS,
            moe_intermediate_size=INTERMEDIATE,
            moe_shared_expert_intermediate_size=16,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
        )
    )


def dbrx():
    from transformers import DbrxConfig, DbrxForCausalLM

    return DbrxForCausalLM(
        DbrxConfig(
            d_model=HIDDEN,
            n_heads=4,
            n_layers=LAYERS,
            max_seq_len=32,
            vocab_size=VOCABULARY,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        )
    )


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            intermediate_size_mlp=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=EXPERTS,
            interleave_moe_layer_step=1,
            pad_token_id=0,
        )
    )


# How many weights hold experts, and which slices make channel `c` of expert `e`.
MODELS = {
    "mixtral": (
        mixtral,
        lambda layer, e, c: [
            layer.gate_up_proj[e, c],
            layer.gate_up_proj[e, INTERMEDIATE + c],
            layer.down_proj[e, :, c],
        ],
    ),
    "gpt_oss": (
        gpt_oss,
        lambda layer, e, c: [
            layer.gate_up_proj[e, :, 2 * c],
            layer.gate_up_proj[e, :, 2 * c + 1],
            layer.gate_up_proj_bias[e, 2 * c : 2 * c + 2],
            layer.down_proj[e, c],
        ],
    ),
    "nemotron_h": (
        nemotron_h,
        lambda layer, e, c: [layer.up_proj[e, c], layer.down_proj[e, :, c]],
    ),
    "dbrx": (
        dbrx,
        lambda layer, e, c: [
            getattr(layer, name).view(EXPERTS, INTERMEDIATE, HIDDEN)[e, c] for name in ("w1", "v1", "w2")
        ],
    ),
    "llama4": (
        llama4,
        lambda layer, e, c: [
            layer.gate_up_proj[e, :, c],
            layer.gate_up_proj[e, :, INTERMEDIATE + c],
            layer.down_proj[e, c],
        ],
    ),
}


def filled(model):
    """With values: some parameters are made without any, or all equal."""
    with torch.no_grad():
        for each in model.parameters():
            each.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_width_of_experts_as_brute_force_says(name):
    make, slices = MODELS[name]
    torch.manual_seed(0)
    model = filled(make())
    before = copy.deepcopy(model)
    ids = torch.randint(1, VOCABULARY, (2, 12))
    ranking = lnprune.rank(model, 2, "out", experts="intermediate")
    rows = [each for each in ranking.names if each.endswith("]")]
    assert len(rows) == LAYERS * EXPERTS
    assert str(ranking) == repr(ranking), "nothing is left out"
    plan = ranking.select({each: 0.25 if each in rows else 0 for each in ranking.names})
    paths = dict.fromkeys(row.rpartition("[")[0] for row in rows)
    expected = []
    with torch.no_grad():
        for path in paths:
            for e in range(EXPERTS):
                parts = [slices(before.get_submodule(path), e, c) for c in range(INTERMEDIATE)]
                norms = torch.stack(
                    [torch.cat([p.flatten() for p in part]).double().norm() for part in parts]
                )
                torch.testing.assert_close(ranking.norms[f"{path}[{e}]"], norms, rtol=1e-14, atol=0)
                keep = plan.keep[f"{path}[{e}]"]
                assert (
                    sorted(norms.argsort()[: INTERMEDIATE // 4].tolist())
                    == (~keep).nonzero().flatten().tolist()
                )
                expected += [(path, e, c) for c in (~keep).nonzero().flatten().tolist()]
        for path, e, c in expected:
            for each in slices(before.get_submodule(path), e, c):
                each.zero_()
    wanted = before(ids).logits
    assert not torch.allclose(model(ids).logits, wanted)
    plan.apply(permanent=True)
    for (key, got), (_, value) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(got, value), key
    assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_every_expert_is_ranked_by_itself(name):
    model = filled(MODELS[name][0]())
    for word in ("out", "in"):
        ranking = lnprune.rank(model, 1, word)
        found = {each.rpartition("[")[0] for each in ranking.names if each.endswith("]")}
        assert len(found) == LAYERS * (3 if name == "dbrx" else 2)
        lnprune.rank(model, 1, word).select(0.25).apply(permanent=True)
        again = lnprune.rank(model, 1, word).select(0)
        assert all(entry.channels - entry.kept == round(0.25 * entry.channels) for entry in again.entries)
