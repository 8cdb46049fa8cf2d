"""Experts of a layer in one parameter: how known modules lay them out, and what a channel of an expert is.

Most modules of the library transformers say it in attributes of their instances; others are known by the
names of their classes. Nothing is imported, and the shapes have to agree with what is known.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lnprune.modules.layer_types import Dims, names_of_type
from lnprune.modules.masked import parameter_of
from lnprune.steps.batches import Batch
from lnprune.torch_internals import own_buffers, own_modules, own_parameters


class ExpertWeight(NamedTuple):
    """The weights of all experts in one parameter: the dims of their outputs and inputs, and the batch."""

    dims: Dims
    batch: Batch


class ExpertSlices(NamedTuple):
    """What an intermediate channel has of a parameter: slices along a dim, and the channel of each."""

    module: nn.Module
    attribute: str
    dim: int
    batch: Batch
    channel_of: Tensor | None = None  # None: that of its number


class Intermediate(NamedTuple):
    """The channels between the projections of a layer's experts."""

    channels: int  # of each expert
    members: list[ExpertSlices]


# Classes that do not say how they are laid out, by name: whether the halves of `gate_up_proj` are gate and
# up. False: gate and up take turns.
_IS_CONCATENATED = {
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": True,
    "transformers.models.step3p7.modeling_step3p7.Step3p7Experts": True,
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": True,
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts": False,
}
# Each expert of `weight`, [experts, out, in], is a linear layer.
_LINEAR = {
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts",
    "transformers.models.granitemoe.modeling_granitemoe.GraniteMoeParallelExperts",
}
# Two children of that kind: gate and up in halves, and down.
_LINEAR_PAIRS = {
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeMoE": ("input_linear", "output_linear"),
    "transformers.models.granitemoe.modeling_granitemoe.GraniteMoeMoE": ("input_linear", "output_linear"),
}
# `w1`, `v1` and `w2`, each [experts * intermediate, hidden]: gate, up, and down transposed.
_FLAT = {"transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU": "moe_num_experts"}
_FUSED = ("gate_up_proj", "up_proj", "down_proj")


@functools.lru_cache(maxsize=1024)
def _kind(kind: type) -> str:
    """Which of the tables the class, or a base of it, is in."""
    names = names_of_type(kind)
    for word, table in (("linear", _LINEAR), ("pair", _LINEAR_PAIRS), ("flat", _FLAT)):
        if any(name in table for name in names):
            return word
    return ""


def _entry(table: Mapping[str, object], module: nn.Module) -> object:
    """What a table has for the class of a module, or for a base of it."""
    return next((table[name] for name in names_of_type(type(module)) if name in table), None)  # type: ignore[arg-type]


def expert_weights(module: nn.Module) -> Mapping[str, ExpertWeight]:
    """The attributes of a module that hold the weights of all experts of a layer."""
    parameters = own_parameters(module)
    if "down_proj" in parameters or "down_proj_orig" in parameters:
        return _fused(module)
    kind = _kind(type(module))  # type: ignore[arg-type]
    if kind == "linear":
        weight = _plain(module, "weight", 3)
        return {} if weight is None else {"weight": ExpertWeight(Dims(1, 2), Batch(0, weight.shape[0]))}
    return _flat(module) if kind == "flat" else {}


def _plain(module: nn.Module, attribute: str, dims: int) -> Tensor | None:
    """A parameter of so many dims, with numbers that are the weights themselves."""
    parameter = parameter_of(module, attribute)
    if (
        parameter is None
        or nn.parameter.is_lazy(parameter)
        or parameter.dim() != dims
        or _is_packed(parameter)
    ):
        return None
    return parameter if parameter.numel() > 0 else None


def _is_packed(parameter: Tensor) -> bool:
    """Whether scales, or more numbers in one element, belong to the values."""
    return not parameter.is_floating_point() or parameter.element_size() == 1


def _fused(module: nn.Module) -> dict[str, ExpertWeight]:
    """``gate_up_proj`` or ``up_proj``, and ``down_proj``, where attributes and shapes say how they lie."""
    down = _plain(module, "down_proj", 3)
    name = "gate_up_proj" if parameter_of(module, "gate_up_proj") is not None else "up_proj"
    up = _plain(module, name, 3)
    if down is None or up is None or up.shape[0] != down.shape[0]:
        return {}
    parts = 2 if name == "gate_up_proj" else 1
    _, rows, columns = up.shape
    fits = {
        False: rows == parts * down.shape[2] and columns == down.shape[1],
        True: columns == parts * down.shape[1] and rows == down.shape[2],
    }
    said = vars(module).get("is_transposed")
    found = [said] if type(said) is bool else [each for each in fits if fits[each]]
    if len(found) != 1 or not fits[found[0]]:
        return {}
    dims, batch = Dims(2, 1) if found[0] else Dims(1, 2), Batch(0, up.shape[0])
    return {name: ExpertWeight(dims, batch), "down_proj": ExpertWeight(dims, batch)}


def _flat(module: nn.Module) -> dict[str, ExpertWeight]:
    experts = vars(module).get(str(_entry(_FLAT, module)))
    weights = {name: _plain(module, name, 2) for name in ("w1", "v1", "w2")}
    shapes = {None if weight is None else tuple(weight.shape) for weight in weights.values()}
    if type(experts) is not int or len(shapes) != 1 or None in shapes:
        return {}
    rows = next(iter(shapes))[0]  # type: ignore[index]
    if experts < 1 or rows % experts:
        return {}
    batch = Batch(0, experts)
    return {name: ExpertWeight(Dims(1, 0) if name == "w2" else Dims(0, 1), batch) for name in weights}


def intermediate(module: nn.Module) -> Intermediate | str | None:
    """The intermediate channels of a layer's experts; why they are not known; None where there are none."""
    kind = _kind(type(module))  # type: ignore[arg-type]
    if kind == "pair":
        return _of_pair(module)
    weights = expert_weights(module)
    if kind == "flat" and weights:
        batch = weights["w1"].batch
        channels = parameter_of(module, "w1").shape[0] // batch.size  # type: ignore[union-attr]
        return Intermediate(channels, [ExpertSlices(module, name, 0, batch) for name in weights])
    if "down_proj" not in weights:
        return None
    dims, batch = weights["down_proj"]
    channels = parameter_of(module, "down_proj").shape[dims.into]  # type: ignore[union-attr]
    name = next(iter(weights))
    index = None
    if name == "gate_up_proj":
        known = _entry(_IS_CONCATENATED, module)
        concatenated = vars(module).get("is_concatenated", known)
        if type(concatenated) is not bool:
            return (
                f"whether gate and up are halves of gate_up_proj or take turns is not known of "
                f"{type(module).__name__}: set its attribute is_concatenated to True or False"
            )
        slices = torch.arange(2 * channels, device="cpu")
        index = slices % channels if concatenated else slices // 2
    members = [ExpertSlices(module, name, dims.out, batch, index)]
    bias = parameter_of(module, name + "_bias")
    if bias is not None:
        expected = batch.size, parameter_of(module, name).shape[dims.out]  # type: ignore[union-attr]
        if tuple(bias.shape) != expected:
            return f"expected {name}_bias of shape {expected}, got {tuple(bias.shape)}"
        members.append(ExpertSlices(module, name + "_bias", 1, batch, index))
    members.append(ExpertSlices(module, "down_proj", dims.into, batch))
    return Intermediate(channels, members)


def _of_pair(module: nn.Module) -> Intermediate | None:
    first, second = (own_modules(module).get(name) for name in _entry(_LINEAR_PAIRS, module))  # type: ignore[attr-defined]
    found = [expert_weights(each).get("weight") for each in (first, second) if each is not None]
    if first is None or second is None or len(found) != 2 or None in found:
        return None
    up, down = parameter_of(first, "weight"), parameter_of(second, "weight")
    assert up is not None
    assert down is not None
    channels, batch = down.shape[2], Batch(0, down.shape[0])
    if up.shape[0] != down.shape[0] or up.shape[1] != 2 * channels:
        return None
    index = torch.arange(2 * channels, device="cpu") % channels
    return Intermediate(
        channels, [ExpertSlices(first, "weight", 1, batch, index), ExpertSlices(second, "weight", 2, batch)]
    )


def packed_experts(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that look like packed or scaled weights of experts."""
    found = {}
    for registry in (own_parameters(module), own_buffers(module)):
        for name, tensor in registry.items():
            if tensor is not None and name.startswith(_FUSED) and tensor.dim() > 2 and _is_packed(tensor):
                found[name] = tensor
    return found
