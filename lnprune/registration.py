"""How a pruned parameter is registered in its module: hook, original, mask, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune as stock
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ParameterState", "Pruning", "Snapshot", "masked", "masked_all", "unregister"]


class _Product(TorchDispatchMode):
    """Answers the one multiplication inside with a product that is at hand.

    Autograd, above the dispatch mode, records the stock MulBackward0 all the same.
    """

    product: Tensor

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch's wrapper around __torch_dispatch__ would import the whole compiler on the first call.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.mul.Tensor:
            return self.product
        return func(*args, **(kwargs or {}))


def masked(mask: Tensor, original: Tensor, products: list[Tensor]) -> Tensor:
    """``mask.to(original.dtype) * original``, differentiable in the original.

    ``products`` is empty, or holds the product where the native code made it.
    """
    if not products:
        return (mask if mask.dtype == original.dtype else mask.to(original.dtype)) * original
    if not (original.requires_grad and torch.is_grad_enabled()):
        return products[0]
    return masked_all([mask], [original], products)[0]


def masked_all(masks: list[Tensor], originals: list[Tensor], products: list[Tensor]) -> list[Tensor]:
    """``mask * original`` of each, differentiable in the originals, by products that are at hand."""
    grad = torch.is_grad_enabled()
    mode = _Product()
    weights = []
    with mode:
        for mask, original, product in zip(masks, originals, products, strict=True):
            mode.product = product
            weights.append(mask * original if grad and original.requires_grad else product)
    return weights


class Snapshot:
    """What a pruning call may change in a module, to put it back when the call fails."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = attributes = module.__dict__.copy()
        self.parameters = attributes["_parameters"].copy()
        self.buffers = attributes["_buffers"].copy()
        self.transient = attributes["_non_persistent_buffers_set"].copy()
        self.hooks = attributes["_forward_pre_hooks"].copy()
        # Lists of parameters that a module of its own __setattr__ keeps beside them, as an RNN does.
        self.lists: list[tuple[list, list]] = []
        if type(module).__setattr__ is not nn.Module.__setattr__:
            self.lists = [(v, v.copy()) for v in attributes.values() if type(v) is list]
        self.methods: list[tuple[stock.PruningContainer, Any]] = [
            (hook, hook._pruning_methods)
            for hook in self.hooks.values()
            if isinstance(hook, stock.PruningContainer)
        ]

    def restore(self) -> None:
        attributes = self.attributes
        self.module.__dict__.clear()
        self.module.__dict__.update(attributes)
        for name, content in (
            ("_parameters", self.parameters),
            ("_buffers", self.buffers),
            ("_non_persistent_buffers_set", self.transient),
            ("_forward_pre_hooks", self.hooks),
        ):
            attributes[name].clear()
            attributes[name].update(content)
        for value, content in self.lists:
            value[:] = content
        for hook, pruning_methods in self.methods:
            hook._pruning_methods = pruning_methods


def _detach_hook(module: nn.Module, name: str) -> stock.BasePruningMethod | None:
    """Removes the parameter's pruning hook, if any, and returns it."""
    if not module._forward_pre_hooks:
        return None
    found = [
        (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, stock.BasePruningMethod) and hook._tensor_name == name
    ]
    if len(found) > 1:
        raise AssertionError(
            f"Avoid adding multiple pruning hooks to the "
            f"same tensor {name} of module {module}. Use a PruningContainer."
        )
    for key, hook in found:
        del module._forward_pre_hooks[key]
        return hook
    return None


# What registers in a module looks up the name with hasattr, whose failure costs more than all the rest.
# Modules with registration of their own, by a method or a global hook, are registered with by its methods.
_METHODS = frozenset({"register_parameter", "register_buffer"})
_TORCHS = (
    *(nn.Module.__setattr__, nn.Module.__getattr__, nn.Module.register_parameter),
    nn.Module.register_buffer,
)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module registers by torch's own methods, and nobody is told of it."""
    kind = type(module)
    methods = (kind.__setattr__, kind.__getattr__, kind.register_parameter, kind.register_buffer)
    return (
        methods == _TORCHS
        and _METHODS.isdisjoint(module.__dict__)
        and not torch_module._global_parameter_registration_hooks
        and not torch_module._global_buffer_registration_hooks
    )


def _is_taken(module: nn.Module, name: str) -> bool:
    """Whether a plain module has anything of this name."""
    return (
        name in module.__dict__
        or name in module._parameters
        or name in module._buffers
        or name in module._modules
        or hasattr(type(module), name)
    )


def _register_parameter(module: nn.Module, name: str, parameter: Any) -> None:
    if (
        type(parameter) is nn.Parameter
        and parameter.grad_fn is None
        and _is_plain(module)
        and not _is_taken(module, name)
    ):
        module._parameters[name] = parameter
    else:
        module.register_parameter(name, parameter)


def _register_buffer(module: nn.Module, name: str, buffer: Tensor) -> None:
    if _is_plain(module) and not _is_taken(module, name):
        module._buffers[name] = buffer
        module._non_persistent_buffers_set.discard(name)
    else:
        module.register_buffer(name, buffer)


class Pruning:
    """One parameter being pruned: detached from its old hook, not yet with its new mask."""

    __slots__ = ("method", "module", "name", "new", "old_mask", "original", "scores")

    def __init__(
        self,
        module: nn.Module,
        name: str,
        make_method: Callable[[], stock.BasePruningMethod],
        importance_scores: Tensor | None = None,
    ):
        """The first half of ``BasePruningMethod.apply``: its steps, and so its errors, in its order."""
        self.module, self.name = module, name
        old = _detach_hook(module, name)
        self.new: Any = make_method()
        self.new._tensor_name = name
        self.method: Any = self.new
        if old is not None:
            self.method = old if isinstance(old, stock.PruningContainer) else stock.PruningContainer(old)
            self.method.add_pruning_method(self.new)
        current = module._parameters.get(name)
        if current is None:
            current = getattr(module, name)
        self.scores: Tensor = current if importance_scores is None else importance_scores
        if importance_scores is not None and self.scores.shape != current.shape:
            raise AssertionError(
                f"importance_scores should have the same shape as parameter "
                f"{name} of {module}, got {self.scores.shape} vs {current.shape}"
            )
        self.old_mask: Tensor | None = None
        if old is None:
            self.original: Tensor = current
            _register_parameter(module, name + "_orig", current)
            del module._parameters[name]
        else:
            self.old_mask = getattr(module, name + "_mask")
            self.original = getattr(module, name + "_orig")

    def combines_as_torch(self) -> bool:
        """Whether masks combine as in torch's container; a user's combines them its own way."""
        return self.old_mask is None or type(self.method) is stock.PruningContainer

    def finish(self, mask: Tensor, weight: Tensor) -> None:
        """The second half."""
        module, name = self.module, self.name
        _register_buffer(module, name + "_mask", mask)
        if _is_plain(module) and not _is_taken(module, name):
            module.__dict__[name] = weight
        else:
            setattr(module, name, weight)
        module.register_forward_pre_hook(self.method)


def unregister(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Makes a masked parameter an ordinary one, with its values as they are.

    The steps of ``torch.nn.utils.prune.remove``, but for the product.

    Returns:
        the parameter and the mask.
    """
    _detach_hook(module, name)
    original = module._parameters[name + "_orig"]
    mask = module._buffers[name + "_mask"]
    assert original is not None
    assert mask is not None
    if hasattr(module, name):
        delattr(module, name)
    del module._parameters[name + "_orig"]
    delattr(module, name + "_mask")
    setattr(module, name, original)
    return original, mask


class ParameterState:
    """How one parameter is registered now: as itself, or as original, mask and hook."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.parameter = module._parameters.get(name)
        self.original = module._parameters.get(name + "_orig")
        self.mask = module._buffers.get(name + "_mask")
        self.hook: Any = None
        self.hook_key = None
        for key, hook in module._forward_pre_hooks.items():
            if isinstance(hook, stock.BasePruningMethod) and hook._tensor_name == name:
                self.hook, self.hook_key = hook, key
        self.methods = self.hook._pruning_methods if isinstance(self.hook, stock.PruningContainer) else None
        self.orders = [list(registry) for registry in self._registries()]

    def _registries(self) -> tuple[Any, Any, Any]:
        module = self.module
        return module._parameters, module._buffers, module._forward_pre_hooks

    def is_current(self) -> bool:
        """Whether the parameter is registered now as it was then."""
        now = ParameterState(self.module, self.name)
        same = (
            now.parameter is self.parameter
            and now.original is self.original
            and now.mask is self.mask
            and now.hook is self.hook
        )
        return same and now.methods == self.methods

    def restore(self) -> None:
        """Registers the parameter as it was then, at its old places, and leaves all else as it is now."""
        module, name = self.module, self.name
        parameters, buffers, hooks = self._registries()
        for key, hook in list(hooks.items()):
            if isinstance(hook, stock.BasePruningMethod) and hook._tensor_name == name:
                del hooks[key]
        parameters.pop(name + "_orig", None)
        parameters.pop(name, None)
        buffers.pop(name + "_mask", None)
        module.__dict__.pop(name, None)
        if self.hook is not None:
            if self.methods is not None:
                self.hook._pruning_methods = self.methods
            hooks[self.hook_key] = self.hook
        if self.mask is not None:
            module.register_buffer(name + "_mask", self.mask)
        if self.original is not None:
            module.register_parameter(name + "_orig", self.original)
        # By setattr, since an RNN keeps a list of its weights beside them.
        if self.parameter is not None:
            setattr(module, name, self.parameter)
        elif self.original is not None and self.mask is not None:
            setattr(module, name, masked(self.mask, self.original, []))
        for registry, order in zip(self._registries(), self.orders, strict=True):
            _reorder(registry, order)


def _reorder(registry: dict, first: Iterable[Any]) -> None:
    """Puts the keys that stood in ``first`` back into that order; newer ones follow."""
    items = dict(registry)
    registry.clear()
    registry.update((key, items.pop(key)) for key in first if key in items)
    registry.update(items)
