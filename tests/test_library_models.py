"""Models of torchvision, timm and transformers: coupled, or refused by name, and never wrong."""

import itertools
import sys
import types

import pytest
import torch
from torch import nn

import lnprune
from tests.test_coupling import difference, first, tensors_of

pytestmark = pytest.mark.slow

LARGE = 20_000_000  # parameters
# Models of timm that take no other images than those of their configuration.
OF_ONE_SIZE = (
    "mixer_s32_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "gmlp_ti16_224",
)


def torchvision_models():
    """Torchvision's models; its operators, which none of these needs, do not load beside every torch."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("_meta_registrations"))
    import torchvision.models

    return torchvision.models


def checked(model, inputs, groups, channels, refused=0):
    """Couples a model and takes channels out of it; the counts are those of groups that can go.

    ``refused`` is how many reasons the trial gives; None: any number but none.
    """
    torch.manual_seed(0)
    coupling = lnprune.couple(model, inputs, check=300)
    failed = {each.reason for each in coupling.refused if "size is written in the code" in each.reason}
    found = len(coupling.groups), sum(group.channels for group in coupling.groups)
    assert found == (groups, channels), str(coupling)
    assert len(failed) > 0 if refused is None else len(failed) == refused, str(coupling)
    if not coupling.groups:
        return
    model = model.double()
    for tensor in tensors_of(model).values():  # behind zeros any group would look right
        if tensor.is_floating_point() and tensor.abs().max() < 1e-3:
            tensor.data.normal_(std=0.5)
    inputs = tuple(each.double() if each.is_floating_point() else each for each in inputs)
    assert difference(model, coupling.groups, inputs, seed=1) < 1e-11
    compacts(model, coupling, lambda made: first(made(*inputs)))


def compacts(model, coupling, run):
    """Plans of a model in float64 take its channels out, and nothing else: as it is, and after a step."""
    eights = 8 if min(group.channels for group in coupling.groups) >= 8 else 1
    ranking = coupling.rank(2)
    scopes = {}, {"scope": "global", "multiple_of": eights}
    choices = list(itertools.product((0.3, 0.5), scopes))
    size = sum(each.numel() for each in model.parameters())
    # Of a large model, each amount with one scope.
    for amount, options in choices[::3] if size > LARGE else choices:
        plan = ranking.select(amount, **options)
        small = plan.compact(verify=False)
        with torch.no_grad():
            got = run(small)
            plan.apply(permanent=True, keep_backup=True)
            want = run(model)
            plan.undo()
            if not torch.isfinite(want).all():  # norms of weights: 0 / 0
                return
        assert_equal(got, want)
        gone = sum(entry.channels - entry.kept for entry in plan.entries)
        wanted = amount * sum(entry.channels for entry in plan.entries)
        assert abs(gone - wanted) <= eights * len(plan)
        assert sum(each.numel() for each in small.parameters()) < size - gone
    plan.apply()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = run(model)
    (outputs / outputs.detach().abs().max()).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        want = run(model)
    small = plan.compact(inplace=True)
    assert not lnprune.is_pruned(small)
    with torch.no_grad():
        assert_equal(run(small), want)


def assert_equal(got, want):
    assert float((got - want).abs().max()) <= 1e-12 * float(want.abs().max())


@pytest.mark.parametrize(
    ("name", "groups", "channels"),
    [
        ("resnet18", 12, 2880),
        ("resnet50", 37, 11456),
        ("mobilenet_v2", 25, 9128),
        ("mobilenet_v3_small", 27, 4872),
        ("densenet121", 120, 10240),
        ("googlenet", 57, 7280),
        ("inception_v3", 94, 17216),
        ("efficientnet_b0", 40, 11404),
        ("regnet_x_400mf", 49, 1392),
        ("regnet_y_400mf", 53, 2048),
        ("vgg11", 10, 10944),
        ("squeezenet1_0", 25, 2976),
        ("mnasnet1_0", 25, 10024),
        ("convnext_tiny", 18, 26496),
        ("vit_b_16", 12, 36864),
        ("shufflenet_v2_x1_0", 18, 3136),
        ("swin_t", 12, 17664),
    ],
)
def test_torchvision(name, groups, channels):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"image_size": 96} if name == "vit_b_16" else {}
    model = getattr(torchvision_models(), name)(weights=None, **options).eval()
    if name == "vgg11":  # most of its weights are here: a plane of 2 x 2 instead of 7 x 7
        model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d(2), nn.Linear(4 * 512, 4096)
    size = 128 if name == "inception_v3" else 96
    refused = {"vit_b_16": 12, "swin_t": 12, "shufflenet_v2_x1_0": None}.get(name, 0)
    checked(model, (torch.randn(2, 3, size, size),), groups, channels, refused)


@pytest.mark.parametrize(
    ("name", "groups", "channels", "refused"),
    [
        ("seresnet50", 53, 12400, 0),
        ("resnest14d", 19, 5888, 0),
        ("repvgg_a0", 5, 1664, 0),
        ("ghostnet_100", 31, 6844, 0),
        ("mobilenetv4_conv_small", 21, 7072, 0),
        ("dla34", 25, 5056, 0),
        ("poolformer_s12", 12, 13312, 0),
        ("mixer_s32_224", 16, 18432, 0),
        ("starnet_s1", 20, 6344, 0),
        ("deit_tiny_patch16_224", 24, 9252, 0),
        ("swin_tiny_patch4_window7_224", 24, 17802, 0),
        ("nfnet_l0", 13, 6080, 0),
        ("convnextv2_atto", 0, 0, 0),
        ("gmlp_ti16_224", 0, 0, 0),
        ("edgenext_xx_small", 12, 4032, 3),
    ],
)
def test_timm(name, groups, channels, refused):
    torchvision_models()
    import timm

    model = timm.create_model(name).eval()
    size = model.default_cfg["input_size"][-1] if name in OF_ONE_SIZE else 96
    checked(model, (torch.randn(2, 3, size, size),), groups, channels, refused)


def _language_models():
    import transformers as library

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    grouped = {**sizes, **ends, "num_key_value_heads": 2, "use_cache": False}
    return {
        "bert": (library.BertModel(library.BertConfig(**sizes)), 4, 104),
        "roberta": (library.RobertaModel(library.RobertaConfig(**sizes)), 4, 104),
        "llama": (library.LlamaForCausalLM(library.LlamaConfig(**grouped)), 4, 100),
        "qwen3": (library.Qwen3ForCausalLM(library.Qwen3Config(head_dim=8, **grouped)), 4, 100),
        "mixtral": (
            library.MixtralForCausalLM(library.MixtralConfig(num_local_experts=4, **grouped)),
            2,
            4,
        ),
        "t5": (
            library.T5ForConditionalGeneration(
                library.T5Config(
                    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, use_cache=False
                )
            ),
            6,
            200,
        ),
        "vit": (
            library.ViTModel(
                library.ViTConfig(
                    image_size=32,
                    patch_size=8,
                    **{key: value for key, value in sizes.items() if key != "vocab_size"},
                )
            ),
            4,
            104,
        ),
        "gpt2": (
            library.GPT2LMHeadModel(
                library.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, use_cache=False, **ends)
            ),
            4,
            264,
        ),
    }


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "qwen3", "mixtral", "gpt2", "t5", "vit"])
def test_transformers(name):
    torchvision_models()
    model, groups, channels = _language_models()[name]
    ids = torch.randint(0, 60, (2, 9))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "vit" else {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids
    coupling = lnprune.couple(model.eval(), inputs)
    found = len(coupling.groups), sum(group.channels for group in coupling.groups)
    assert found == (groups, channels), str(coupling)
    if name == "mixtral":  # its products of all experts at once take no float64
        model.set_experts_implementation("eager")
    model = model.double()
    inputs = {key: each.double() if each.is_floating_point() else each for key, each in inputs.items()}
    compacts(model, coupling, lambda made: first(made(**inputs).to_tuple()))
