"""Sizes that modules keep in attributes, by the type of the module: set anew when slices are gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lnprune.modules.masked import is_masked
from lnprune.torch_internals import own_buffers, own_parameters

# Of a module whose slices are gone and the shapes that its parameters and buffers had: sets its attributes.
Setter = Callable[[Any, Mapping[str, tuple[int, ...]]], None]

_SETTERS: dict[type | str, Setter] = {}


def size_setter(kind: type[nn.Module] | str) -> Callable[[Setter], Setter]:
    """Teaches what attributes a type of module keeps sizes in, for modules that this package does not know.

    Args:
        kind: the type, or the name of one, for libraries that may not be installed.

    Returns:
        a decorator. Its function gets the module, whose parameters have lost slices, and the shapes that
        they had, by name, and sets the attributes.

    Example:
        >>> import lnprune
        >>> import torch
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.size, self.weight = size, torch.nn.Parameter(torch.rand(size))
        ...
        ...     def forward(self, x):
        ...         return x.view(-1, self.size) * self.weight
        >>> @lnprune.size_setter(Scale)
        ... def set_scale(module, shapes):
        ...     module.size = len(module.weight)
    """

    def put(setter: Setter) -> Setter:
        _SETTERS[kind] = setter
        return setter

    return put


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's own parameters and buffers; of masked ones under their own names."""
    found = {}
    for name, tensor in [*own_parameters(module).items(), *own_buffers(module).items()]:
        stem = name.removesuffix("_orig")
        name = stem if stem != name and is_masked(module, stem) else name
        if tensor is not None and not (name.endswith("_mask") and is_masked(module, name[:-5])):
            found[name] = tuple(tensor.shape)
    return found


def setter_of(module: nn.Module) -> Setter | None:
    """What sets the attributes of a module, by the first of its types that is known."""
    for kind in type(module).__mro__:
        setter = _SETTERS.get(kind) or _SETTERS.get(kind.__name__)
        if setter is not None:
            return setter
    return None


def set_sizes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Sets the attributes of a module that lost slices; ``shapes`` are those that it had."""
    setter = setter_of(module)
    if setter is not None:
        setter(module, shapes)


@size_setter(nn.Linear)
def _linear(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    weight = shapes_of(module).get("weight")
    if weight is not None:  # else it is computed from others
        module.out_features, module.in_features = weight


@size_setter(nn.Bilinear)
def _bilinear(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


@size_setter(nn.Embedding)
def _embedding(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


@size_setter(nn.LayerNorm)
def _layer_norm(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    module.normalized_shape = tuple(module.weight.shape)


@size_setter(nn.PReLU)
def _prelu(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    module.num_parameters = len(module.weight)


@size_setter(nn.RNNBase)
def _recurrent(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    module.input_size, module.hidden_size = module.weight_ih_l0.shape[1], module.weight_hh_l0.shape[1]


@size_setter("Conv1D")  # of transformers: a linear layer whose weight is (inputs, outputs)
def _conv1d(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    module.nx, module.nf = module.weight.shape


def _batch_norm(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    there = module.weight if module.weight is not None else module.running_mean
    if there is not None:
        module.num_features = len(there)


def _convolution(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    new = shapes_of(module)
    if "weight" not in new:  # its weight is computed from others
        return
    old, weight, groups = shapes["weight"], new["weight"], module.groups
    if groups > 1 and module.transposed and old[0] == groups:
        module.groups = weight[0]
    elif groups > 1 and not module.transposed and old[1] == 1:
        module.groups = weight[0] // (old[0] // groups)
    first, second = weight[0], weight[1] * module.groups
    module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)


_BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_SETTERS.update(dict.fromkeys(_BATCH_NORMS, _batch_norm))
_SETTERS.update(dict.fromkeys(_CONVOLUTIONS, _convolution))
