"""Layers of experts in every layout that is known, as their classes keep them, and what they compute."""

import torch
from torch import nn

EXPERTS, HIDDEN, INTERMEDIATE = 4, 6, 10


class Named(type):
    """A class under the name that another package gives it."""

    def __new__(mcs, name, bases, space, of=""):
        made = super().__new__(mcs, name, bases, space)
        if of:
            made.__module__, _, made.__qualname__ = of.rpartition(".")
        return made

    def __init__(cls, name, bases, space, of=""):
        super().__init__(name, bases, space)


def random(*shape):
    return nn.Parameter(torch.randn(*shape))


class Decorated(nn.Module):
    """As modules that transformers decorates: their instances say how they are laid out."""

    def __init__(self, transposed=False, concatenated=True, gate=True, bias=False, said=True):
        super().__init__()
        parts = 2 if gate else 1
        name = "gate_up_proj" if gate else "up_proj"
        up = (EXPERTS, parts * INTERMEDIATE, HIDDEN)
        down = (EXPERTS, HIDDEN, INTERMEDIATE)
        if transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
        self.register_parameter(name, random(*up))
        if bias:
            self.register_parameter(name + "_bias", random(EXPERTS, parts * INTERMEDIATE))
            self.down_proj_bias = random(EXPERTS, HIDDEN)
        self.down_proj = random(*down)
        self.layout = transposed, concatenated, gate
        if said:
            self.is_transposed, self.is_concatenated = transposed, concatenated
            self.has_gate, self.has_bias = gate, bias

    def forward(self, x):
        transposed, concatenated, gate = self.layout
        name = "gate_up_proj" if gate else "up_proj"
        up, down = getattr(self, name), self.down_proj
        if transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        hidden = torch.einsum("bi,eoi->ebo", x, up)
        if hasattr(self, "down_proj_bias"):
            hidden = hidden + getattr(self, name + "_bias").unsqueeze(1)
        if gate:
            halves = hidden.chunk(2, dim=-1) if concatenated else (hidden[..., ::2], hidden[..., 1::2])
            hidden = halves[0].sigmoid() * halves[1]
        else:
            hidden = hidden.tanh()
        out = torch.einsum("ebi,eoi->ebo", hidden, down)
        return out + self.down_proj_bias.unsqueeze(1) if hasattr(self, "down_proj_bias") else out


class Llama4(Decorated, metaclass=Named, of="transformers.models.llama4.modeling_llama4.Llama4TextExperts"):
    def __init__(self):
        super().__init__(transposed=True, said=False)


class GptOss(Decorated, metaclass=Named, of="transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts"):
    def __init__(self):
        super().__init__(transposed=True, concatenated=False, bias=True, said=False)


class Step(Decorated, metaclass=Named, of="transformers.models.step3p7.modeling_step3p7.Step3p7Experts"):
    def __init__(self):
        super().__init__(said=False)


class JetMoeLinear(
    nn.Module, metaclass=Named, of="transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts"
):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = random(EXPERTS, outputs, inputs)

    def forward(self, x):
        return torch.einsum("ebi,eoi->ebo", x, self.weight)


class JetMoe(nn.Module, metaclass=Named, of="transformers.models.jetmoe.modeling_jetmoe.JetMoeMoE"):
    def __init__(self):
        super().__init__()
        self.bias = random(HIDDEN)
        self.input_linear = JetMoeLinear(HIDDEN, 2 * INTERMEDIATE)
        self.output_linear = JetMoeLinear(INTERMEDIATE, HIDDEN)

    def forward(self, x):
        gate, up = self.input_linear(x.expand(EXPERTS, *x.shape)).chunk(2, dim=-1)
        return self.output_linear(gate.sigmoid() * up) + self.bias


class Dbrx(nn.Module, metaclass=Named, of="transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU"):
    def __init__(self):
        super().__init__()
        self.moe_num_experts = EXPERTS
        for name in ("w1", "v1", "w2"):
            self.register_parameter(name, random(EXPERTS * INTERMEDIATE, HIDDEN))

    def forward(self, x):
        gate, up, down = (
            getattr(self, name).view(EXPERTS, INTERMEDIATE, HIDDEN) for name in ("w1", "v1", "w2")
        )
        hidden = torch.einsum("bi,eoi->ebo", x, gate).sigmoid() * torch.einsum("bi,eoi->ebo", x, up)
        return torch.einsum("ebo,eoi->ebi", hidden, down)


# By name: a maker; and of each weight the dims of its outputs and inputs.
LAYOUTS = {
    "most": (Decorated, {"gate_up_proj": (1, 2), "down_proj": (1, 2)}),
    "gpt_oss": (
        lambda: Decorated(transposed=True, concatenated=False, bias=True),
        {"gate_up_proj": (2, 1), "down_proj": (2, 1)},
    ),
    "gpt_oss_by_name": (GptOss, {"gate_up_proj": (2, 1), "down_proj": (2, 1)}),
    "privacy_filter": (
        lambda: Decorated(transposed=True, bias=True),
        {"gate_up_proj": (2, 1), "down_proj": (2, 1)},
    ),
    "aria": (lambda: Decorated(transposed=True), {"gate_up_proj": (2, 1), "down_proj": (2, 1)}),
    "llama4": (Llama4, {"gate_up_proj": (2, 1), "down_proj": (2, 1)}),
    "step": (Step, {"gate_up_proj": (1, 2), "down_proj": (1, 2)}),
    "nemotron_h": (lambda: Decorated(gate=False), {"up_proj": (1, 2), "down_proj": (1, 2)}),
    "jetmoe": (JetMoe, {"input_linear.weight": (1, 2), "output_linear.weight": (1, 2)}),
    "dbrx": (Dbrx, {"w1": (0, 1), "v1": (0, 1), "w2": (1, 0)}),
}


def experts_of(name, layer):
    """Each weight of a layer as ``[experts, out, in]``, by its name; views."""
    found = {}
    for weight, (out, _) in LAYOUTS[name][1].items():
        tensor = layer.get_parameter(weight).detach()
        if name == "dbrx":
            tensor = tensor.view(EXPERTS, INTERMEDIATE, HIDDEN)
            found[weight] = tensor.transpose(1, 2) if weight == "w2" else tensor
        else:
            found[weight] = tensor if out == 1 else tensor.transpose(1, 2)
    return found


def slices_of(name, layer, expert, channel):
    """All that belongs to an intermediate channel of an expert; views, to be read or written."""
    weights = experts_of(name, layer)
    *first, last = weights
    found = [weights[last][expert][:, channel]]
    if len(first) == 2:
        return [*(weights[each][expert][channel] for each in first), *found]
    up = weights[first[0]][expert]
    if up.shape[0] == INTERMEDIATE:
        rows = [channel]
    elif name.startswith("gpt_oss"):
        rows = [2 * channel, 2 * channel + 1]
    else:
        rows = [channel, channel + INTERMEDIATE]
    found += [up[row] for row in rows]
    bias = getattr(layer, f"{first[0]}_bias", None)
    if bias is not None:
        found += [bias.detach()[expert, row] for row in rows]
    return found
