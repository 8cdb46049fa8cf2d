"""What couple() takes: checks of models and example inputs before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lnprune.errors import shown
from lnprune.modules.masked import is_masked
from lnprune.modules.parameters import check_is_eager
from lnprune.modules.sharded import kept_by_fsdp
from lnprune.steps.local import is_wrapper
from lnprune.torch_internals import WRAPPED_CHILDREN, is_compiled, own_parameters

_CHECKPOINT = WRAPPED_CHILDREN[1]


def checked_tensors(model: Any, may_be_meta: bool = False) -> dict[str, Tensor]:
    """The parameters and buffers of a model that can be coupled, each once, by the first of its names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {shown(model)}")
    kept = {module for module, _ in kept_by_fsdp()}
    for path, module in model.named_modules():
        check_is_eager(module)
        if id(module) in kept:
            raise TypeError(
                f"{path or 'model'}: expected a module as it was written, got one of fully_shard(): couple "
                "it before"
            )
        wrapper = next((name for name in WRAPPED_CHILDREN if hasattr(module, name)), None)
        if is_compiled(module) or wrapper not in (None, _CHECKPOINT):
            raise TypeError(
                f"{path or 'model'}: expected a module as it was written, got a {type(module).__name__}: "
                "couple it before it is compiled or wrapped"
            )
    tensors: dict[str, Tensor] = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name}: expected a parameter with a shape, got one not initialised yet")
        if is_wrapper(tensor):
            raise TypeError(f"{name}: expected a tensor that holds its own values, got {shown(tensor)}")
        if tensor.is_meta and not may_be_meta:
            raise ValueError(f"{name}: is on the device meta, where a model cannot be tried")
    if not tensors:
        raise ValueError(f"model: {type(model).__name__} has no parameters")
    return tensors


def prepared_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keywords that example inputs stand for."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    raise TypeError(
        f"example_inputs: expected a tensor, a tuple of arguments or a dict of keywords, got "
        f"{shown(example_inputs)}"
    )


def unprunable(model: nn.Module) -> dict[str, str]:
    """Parameters and buffers whose channels cannot go for what their modules are, and why not."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        if isinstance(module, parametrize.ParametrizationList):
            owner = path.rpartition(".parametrizations.")[0] or "the model"
            reason = f"is parametrized in `{owner}`: remove_parametrizations() first"
            found.update((start + name, reason) for name, _ in module.named_parameters())
            found.update((start + name, reason) for name, _ in module.named_buffers())
        for key in own_parameters(module):
            stem = key.removesuffix("_orig")
            if stem != key and is_masked(module, stem):
                reason = f"has a mask in `{path or 'the model'}`: remove it first, as remove_all() does"
                found[start + key] = found[f"{start}{stem}_mask"] = reason
    return found


def shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors that overlap others in memory, and why that pins them."""
    found = {}
    ends: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if not tensor.numel() or tensor.layout is not torch.strided:
            continue
        first = tensor.storage_offset()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = int(first) + sum((size - 1) * step for size, step in steps)
        for other_first, other_last, other in ends.setdefault(tensor.untyped_storage().data_ptr(), []):
            if first <= other_last and other_first <= last:
                found[name] = found[other] = f"`{name}` and `{other}` are two tensors in the same memory"
        ends[tensor.untyped_storage().data_ptr()].append((int(first), int(last), name))
    return found
