"""How a pruned parameter is registered in its module: hook, original, mask, as the reference does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock
from torch.nn.utils.prune import LnStructured as StockLnStructured

from lnprune.modules.masked import parameter_of
from lnprune.modules.parameters import check_not_parametrized
from lnprune.steps.batches import Batch
from lnprune.steps.bits import bits
from lnprune.steps.flags import Request
from lnprune.steps.local import held_here
from lnprune.steps.masks import masked
from lnprune.torch_internals import (
    own_buffers,
    own_modules,
    own_parameters,
    own_pre_hooks,
    own_transient_buffers,
    pruned_name,
    pruning_methods,
    registrations_are_watched,
    set_pruned_name,
    set_pruning_methods,
    validate_pruning_amount_init,
)


def check_not_in_inference_mode(parameter: Tensor | None) -> None:
    """Refuses a mask that would be an inference tensor, on a parameter that is none."""
    if torch.is_inference_mode_enabled() and parameter is not None and not parameter.is_inference():
        raise RuntimeError(
            "inside torch.inference_mode() a mask would be an inference tensor, which no training takes: "
            "prune outside of it, or inside torch.no_grad()"
        )


def _is_vector(module: nn.Module, attribute: str) -> bool:
    parameter = parameter_of(module, attribute)
    return parameter is not None and parameter.dim() == 1


def _detach_hook(module: nn.Module, name: str) -> stock.BasePruningMethod | None:
    """Removes the parameter's pruning hook, if any, and returns it."""
    hooks = own_pre_hooks(module)
    if not hooks:
        return None
    found = [
        (key, hook)
        for key, hook in hooks.items()
        if isinstance(hook, stock.BasePruningMethod) and pruned_name(hook) == name
    ]
    if len(found) > 1:
        raise AssertionError(
            f"Avoid adding multiple pruning hooks to the "
            f"same tensor {name} of module {module}. Use a PruningContainer."
        )
    for key, hook in found:
        del hooks[key]
        return hook
    return None


# Torch's register_parameter and register_buffer first ask hasattr(module, name). Where the answer is no, as
# it is here, that takes longer than all the rest of a registration. So names are put into the module's
# dicts directly, unless the module's type has one of these methods of its own, or somebody watches
# registrations.
_TORCHS = (
    *(nn.Module.__setattr__, nn.Module.__getattr__, nn.Module.register_parameter),
    nn.Module.register_buffer,
)


def _is_free(module: nn.Module, attribute: str) -> bool:
    """Whether names may go into the module's dicts directly: methods are torch's, the names are free."""
    kind = type(module)
    attributes = module.__dict__
    original, mask = attribute + "_orig", attribute + "_mask"
    for registry in (attributes, own_parameters(module), own_buffers(module), own_modules(module)):
        if original in registry or mask in registry:
            return False
    return not (
        (kind.__setattr__, kind.__getattr__, kind.register_parameter, kind.register_buffer) != _TORCHS
        or "register_parameter" in attributes
        or "register_buffer" in attributes
        or attribute in attributes
        or registrations_are_watched()
        or hasattr(kind, attribute)
        or hasattr(kind, original)
        or hasattr(kind, mask)
    )


class Part(NamedTuple):
    """A part of a tensor: so many of its indices along a dim, from the first of them on."""

    dim: int
    start: int
    length: int


class Target(NamedTuple):
    """One place of a weight, and which channels to prune: an amount of those left, by rank, or by flags."""

    name: str  # for messages
    module: nn.Module
    attribute: str
    dim: int  # as it was given: the hook holds it
    amount: Any = None
    keep: Tensor | None = None  # bool flags; targets of one weight with the same flags share a mask
    scores: Tensor | None = None  # None: the weight is ranked
    part: Part | None = None  # None: all of the weight; no mask can be of less
    batch: Batch | None = None  # of matrices with channels and a ranking of their own


class Pruning:
    """One parameter being pruned: detached from its old hook, not yet with its new mask."""

    request: Request  # what is to be pruned; the mask and the masked weight come into it

    def __init__(self, target: Target, n: Any):
        """The first half of ``BasePruningMethod.apply``: its steps, and so its errors, in its order."""
        name, module, attribute, dim, amount, keep, importance_scores, _, batch = target
        self.module, self.attribute = module, attribute
        if torch.is_inference_mode_enabled():
            check_not_in_inference_mode(parameter_of(module, attribute))
        old = _detach_hook(module, attribute)
        if batch is not None or (keep is not None and _is_vector(module, attribute)):
            # No LnStructured can prune matrices apart, or a bias, which has no structure to prune.
            for amount_of_one in amount if isinstance(amount, tuple) else (amount,):
                if keep is None:
                    validate_pruning_amount_init(amount_of_one)
            new: Any = stock.CustomFromMask(keep)
        elif keep is None:
            new = StockLnStructured(amount, n, dim)
        else:
            new = StockLnStructured(int(keep.numel() - keep.sum()), n, dim)
        set_pruned_name(new, attribute)
        self.new = self.method = new
        if old is not None:
            self.method = old if isinstance(old, stock.PruningContainer) else stock.PruningContainer(old)
            self.method.add_pruning_method(new)
        parameters = own_parameters(module)
        current = parameters.get(attribute)
        if current is None:
            if old is None:
                check_not_parametrized(module, attribute)
            current = getattr(module, attribute)
        scores = current if importance_scores is None else importance_scores
        if importance_scores is not None and scores.shape != current.shape:
            raise AssertionError(
                f"importance_scores should have the same shape as parameter "
                f"{attribute} of {module}, got {scores.shape} vs {current.shape}"
            )
        self.is_free = old is None and _is_free(module, attribute)
        if old is None:
            self.request = Request(scores, current, dim, amount, keep, name)
            self.request.batch = batch
            if self.is_free and type(current) is nn.Parameter and current.grad_fn is None:
                parameters[attribute + "_orig"] = current
            else:
                module.register_parameter(attribute + "_orig", current)
            del parameters[attribute]
            return
        original = getattr(module, attribute + "_orig")
        # Flags are written into masks of the original's layout.
        ranked = scores if keep is None else original
        self.request = request = Request(ranked, original, dim, amount, keep, name)
        request.old_mask = getattr(module, attribute + "_mask")
        request.batch = batch
        # A user's container combines masks its own way.
        if keep is None and type(self.method) is not stock.PruningContainer:
            request.container = self.method

    def finish(self) -> None:
        """The second half, when there are mask and weight."""
        module, name, mask, weight = self.module, self.attribute, self.request.mask, self.request.weight
        if type(self.new) is stock.CustomFromMask:
            self.new.mask = mask
        if self.is_free:
            own_buffers(module)[name + "_mask"] = mask
            own_transient_buffers(module).discard(name + "_mask")
            module.__dict__[name] = weight
        else:
            module.register_buffer(name + "_mask", mask)
            setattr(module, name, weight)
        module.register_forward_pre_hook(self.method)


def unregister(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Makes a masked parameter an ordinary one, with its values as they are.

    The steps of ``torch.nn.utils.prune.remove``, but for the product.

    Returns:
        the parameter and the mask.
    """
    _detach_hook(module, name)
    original = own_parameters(module)[name + "_orig"]
    mask = own_buffers(module)[name + "_mask"]
    assert original is not None
    assert mask is not None
    if hasattr(module, name):
        delattr(module, name)
    del own_parameters(module)[name + "_orig"]
    delattr(module, name + "_mask")
    setattr(module, name, original)
    return original, mask


class ParameterState:
    """How one parameter is registered now: as itself, or as original, mask and hook."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.parameter = own_parameters(module).get(name)
        self.original = own_parameters(module).get(name + "_orig")
        self.mask = own_buffers(module).get(name + "_mask")
        self.hook: Any = None
        self.hook_key = None
        for key, hook in own_pre_hooks(module).items():
            if isinstance(hook, stock.BasePruningMethod) and pruned_name(hook) == name:
                self.hook, self.hook_key = hook, key
        self.methods = pruning_methods(self.hook) if isinstance(self.hook, stock.PruningContainer) else None
        self.orders = [list(registry) for registry in self._registries()]
        held = self.original if self.parameter is None else self.parameter
        self.dtype = None if held is None else held.dtype

    def _registries(self) -> tuple[Any, Any, Any]:
        module = self.module
        return own_parameters(module), own_buffers(module), own_pre_hooks(module)

    def is_current(self) -> bool:
        """Whether the parameter is registered now as it was then, conversions of dtype and device aside."""
        now = ParameterState(self.module, self.name)
        same = (
            now.parameter is self.parameter
            and now.original is self.original
            and now.hook is self.hook
            and now.methods == self.methods
        )
        return same and _is_conversion(now.mask, self.mask)

    def restore(self) -> None:
        """Registers the parameter as it was then, at its old places, and leaves all else as it is now.

        A module that was converted to another dtype or device since gets a mask of that, as it would have.
        """
        module, name = self.module, self.name
        parameters, buffers, hooks = self._registries()
        for key, hook in list(hooks.items()):
            if isinstance(hook, stock.BasePruningMethod) and pruned_name(hook) == name:
                del hooks[key]
        parameters.pop(name + "_orig", None)
        parameters.pop(name, None)
        buffers.pop(name + "_mask", None)
        module.__dict__.pop(name, None)
        if self.hook is not None:
            if self.methods is not None:
                set_pruning_methods(self.hook, self.methods)
            hooks[self.hook_key] = self.hook
        if self.original is not None:
            module.register_parameter(name + "_orig", self.original)
        if self.mask is not None:
            mask = self.mask
            if self.original is not None:
                converted = self.original.dtype != self.dtype and mask.is_floating_point()
                mask = mask.to(self.original.device, self.original.dtype if converted else mask.dtype)
            module.register_buffer(name + "_mask", mask)
        # By setattr, since an RNN keeps a list of its weights beside them.
        if self.parameter is not None:
            setattr(module, name, self.parameter)
        elif self.original is not None and self.mask is not None:
            setattr(module, name, masked(mask, self.original))
        for registry, order in zip(self._registries(), self.orders, strict=True):
            _reorder(registry, order)


def _is_conversion(now: Tensor | None, then: Tensor | None) -> bool:
    """Whether a mask is another one, or that one on another device or in another dtype."""
    if now is then or now is None or then is None:
        return now is then
    if now.shape != then.shape or now.is_meta or then.is_meta:
        return False
    return torch.equal(bits(held_here(now)), bits(held_here(then.to(now.device, now.dtype))))


def _reorder(registry: dict, first: Iterable[Any]) -> None:
    """Puts the keys that stood in ``first`` back into that order; newer ones follow."""
    items = dict(registry)
    registry.clear()
    registry.update((key, items.pop(key)) for key in first if key in items)
    registry.update(items)
