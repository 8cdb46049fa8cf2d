"""Masked parameters: whether an attribute is one, and the parameter behind it."""

from __future__ import annotations

from torch import Tensor, nn

from lnprune.torch_internals import own_buffers, own_parameters


def is_masked(module: nn.Module, attribute: str) -> bool:
    """Whether the attribute is a masked weight. Spectral norm has an ``_orig`` too, but no mask."""
    return attribute + "_orig" in own_parameters(module) and attribute + "_mask" in own_buffers(module)


def parameter_of(module: nn.Module, attribute: str) -> Tensor | None:
    """The parameter behind an attribute, masked or not."""
    parameter = own_parameters(module).get(attribute)
    if parameter is None and is_masked(module, attribute):
        return own_parameters(module)[attribute + "_orig"]
    return parameter
