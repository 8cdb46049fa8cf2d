"""What is known of types of modules: their weights, the dims of channels, what others do with them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from lnprune.torch_internals import (
    WRAPPED_CHILDREN,
    NonDynamicallyQuantizableLinear,
    own_modules,
    projects_apart,
)


class Dims(NamedTuple):
    """The dims of a weight whose channels are the module's outputs, and its inputs."""

    out: int
    into: int


_ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_COLUMNS = (*_TRANSPOSED, nn.Embedding)
# Of nn.MultiheadAttention: all three in one, or, where keys and values have sizes of their own, apart.
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
# Types of other packages, by the names of their classes, so that nothing is imported.
_OTHERS = {
    "transformers.pytorch_utils.Conv1D": Dims(1, 0),
    "transformers.modeling_utils.Conv1D": Dims(1, 0),
}
# For messages.
KNOWN = "Linear, convolutions, Embedding, MultiheadAttention, transformers' Conv1D and experts"


# Types come and go, those of parametrized modules say: what was found of them is kept for some.
_by_type = functools.lru_cache(maxsize=1024)


@_by_type
def names_of_type(kind: type) -> list[str]:
    """The names of a class and of its bases."""
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]


@_by_type
def _weights_of_type(kind: type) -> Mapping[str, Dims]:
    if issubclass(kind, _ROWS):
        return {"weight": Dims(0, 1)}
    if issubclass(kind, _COLUMNS):
        return {"weight": Dims(1, 0)}
    for name in names_of_type(kind):  # type: ignore[arg-type]
        if name in _OTHERS:
            return {"weight": _OTHERS[name]}
    return {}


def known_weights(module: nn.Module) -> Mapping[str, Dims]:
    """The attributes of a module that are weights, where its type is known, each with its dims."""
    if isinstance(module, nn.MultiheadAttention):
        return dict.fromkeys(_PROJECTIONS if projects_apart(module) else ("in_proj_weight",), Dims(0, 1))
    return _weights_of_type(type(module))  # type: ignore[arg-type]


class BiasPart(NamedTuple):
    """The bias of a weight: its attribute, and which of so many equal parts of it is the weight's."""

    attribute: str
    part: int = 0
    parts: int = 1
    repeats: int = 1  # a flag of a channel stands for so many values of the bias, one part after another


def bias_part(module: nn.Module, attribute: str) -> BiasPart:
    """Where the bias of a weight's output channels is, if the module has it."""
    if isinstance(module, nn.MultiheadAttention):
        if attribute in _PROJECTIONS:
            return BiasPart("in_proj_bias", _PROJECTIONS.index(attribute), len(_PROJECTIONS))
        return BiasPart("in_proj_bias")
    # A transposed convolution has a bias for each channel of each group.
    repeats = module.groups if isinstance(module, _TRANSPOSED) else 1
    return BiasPart("bias", repeats=repeats)


# Modules that hand weights of their children to functions, by the class whose forward does. The children
# are never called, so that no hook of theirs runs.
_UNCALLED = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("qkv", "proj"),
    "transformers.models.dbrx.modeling_dbrx.DbrxExperts": ("mlp",),  # called after they are read
}


@_by_type
def _uncalled_of_type(kind: type) -> tuple[str, ...]:
    forward = next(base for base in kind.__mro__ if "forward" in vars(base))
    return _UNCALLED.get(f"{forward.__module__}.{forward.__qualname__}", ())


def uncalled_children(module: nn.Module) -> list[nn.Module]:
    """The children whose forward hooks never run, since the module reads their weights itself."""
    names = _uncalled_of_type(type(module))  # type: ignore[arg-type]
    if not names or "forward" in vars(module):
        return []
    return [child for name in names if (child := own_modules(module).get(name)) is not None]


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def never_called(module: nn.Module) -> str | None:
    """Who reads the weights of a module in place of its own forward, where its type says so."""
    if type(module) is NonDynamicallyQuantizableLinear:  # torch makes these for MultiheadAttention alone
        return nn.MultiheadAttention.__name__
    if isinstance(module, _CONTAINERS):
        return f"what holds a {type(module).__name__}"
    return None


# Wrappers that call their child `module`, as others may too. WRAPPED_CHILDREN are the names that only
# wrappers have.
_WRAPPERS = (
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.optim.swa_utils.AveragedModel",
)


def wrapped_child(module: nn.Module) -> nn.Module | None:
    """The module that this one is only a wrapper of: compiled, parallel, averaged."""
    children = own_modules(module)
    if not children:
        return None
    for name in WRAPPED_CHILDREN:
        if (child := children.get(name)) is not None:
            return child
    if "module" in children and any(name in _WRAPPERS for name in names_of_type(type(module))):  # type: ignore[arg-type]
        return children["module"]
    return None


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    parts = [part for part in name.split(".") if part not in WRAPPED_CHILDREN]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)
