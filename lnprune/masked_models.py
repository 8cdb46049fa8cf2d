"""Models that hold masks: loading them from a state dict, and renewing them, so that they can be copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

from lnprune.errors import check_flags, shown
from lnprune.modules.registration import check_not_in_inference_mode
from lnprune.modules.transaction import Transaction
from lnprune.torch_internals import own_buffers, own_parameters, own_pre_hooks, pruned_name


def load_masked(model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True) -> Any:
    """Loads the state dict of a masked model into a model that has no masks yet.

    For every pair ``name_orig`` and ``name_mask`` in the state dict the parameter ``name`` gets such a mask
    first, by torch's own ``custom_from_mask``; then ``model.load_state_dict`` does the rest. Masks that the
    model has already are loaded into. Modules that share a parameter share its mask where the state dict
    has equal ones. All or, where it raises, nothing: for that the values of the model are copied meanwhile.

    Args:
        model: a module, changed in place. The parameter objects stay the same, so an optimizer that holds
            them goes on.
        state_dict: as :meth:`torch.nn.Module.state_dict` gives it, pruned by any method of
            ``torch.nn.utils.prune``.
        strict: as for :meth:`torch.nn.Module.load_state_dict`.

    Returns:
        what ``load_state_dict`` returns: the missing and the unexpected keys.

    Raises:
        RuntimeError: as ``load_state_dict``; or inside ``torch.inference_mode``.
        TypeError: ``state_dict`` is no mapping, or ``strict`` no bool.

    Example:
        >>> import lnprune
        >>> import torch
        >>> pruned, fresh = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        >>> lnprune.ln_structured(pruned, "weight", amount=0.5, n=2, dim=0).weight_mask.sum()
        tensor(16.)
        >>> lnprune.load_masked(fresh, pruned.state_dict())
        <All keys matched successfully>
        >>> torch.equal(fresh.weight, pruned.weight)
        True
    """
    check_flags(strict=strict)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping from names to tensors, got {shown(state_dict)}")
    values = [*model.parameters(), *model.buffers()]
    saved = [(held, held.detach().clone()) for held in values if not nn.parameter.is_lazy(held)]
    try:
        with Transaction() as transaction:
            places = _places(model, state_dict)
            for module, attribute in places:
                check_not_in_inference_mode(own_parameters(module)[attribute])
                transaction.touch(module)
                ones = torch.ones_like(own_parameters(module)[attribute], requires_grad=False)  # type: ignore[arg-type]
                stock.custom_from_mask(module, attribute, ones)
            loaded = model.load_state_dict(state_dict, strict=strict)
            _share_masks(places)
            _renew(model, transaction)
    except BaseException:
        with torch.no_grad():
            for held, before in saved:
                held.copy_(before)
        raise
    return loaded


def _places(model: nn.Module, state_dict: Mapping[str, Any]) -> list[tuple[nn.Module, str]]:
    """Module and attribute of the parameters that are masked in the state dict and not yet in the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[int, str], tuple[nn.Module, str]] = {}  # a module at two paths gets one mask
    for key in state_dict:
        name = key.removesuffix("_orig") if isinstance(key, str) else key
        if name == key or name + "_mask" not in state_dict:
            continue
        path, _, attribute = name.rpartition(".")
        module = modules.get(path)
        parameter = None if module is None else own_parameters(module).get(attribute)
        if module is not None and parameter is not None and not nn.parameter.is_lazy(parameter):
            found[id(module), attribute] = module, attribute
    return list(found.values())


def _share_masks(places: Sequence[tuple[nn.Module, str]]) -> None:
    """One mask, where it is equal, for places of one parameter; and for each with its hook."""
    masks: dict[int, Tensor] = {}
    for module, attribute in places:
        original = own_parameters(module)[attribute + "_orig"]
        mask = own_buffers(module)[attribute + "_mask"]
        assert mask is not None
        first = masks.setdefault(id(original), mask)
        if first is not mask and torch.equal(first, mask):
            own_buffers(module)[attribute + "_mask"] = mask = first
        for hook in own_pre_hooks(module).values():
            if isinstance(hook, stock.CustomFromMask) and pruned_name(hook) == attribute:
                hook.mask = mask


def _renew(model: nn.Module, transaction: Transaction) -> None:
    for module in model.modules():
        for hook in list(own_pre_hooks(module).values()):
            if isinstance(hook, stock.BasePruningMethod):
                transaction.touch(module)
                hook(module, None)


def renew_masked(model: nn.Module) -> nn.Module:
    """Computes every masked weight of a model anew, from its original and its mask, without gradient.

    What torch's hook does before each forward, for two cases in which none comes first. The attributes have
    the values of now, as after ``load_state_dict`` or an optimizer's step they have not. And the model can
    be deep-copied (snapshots, averaged models), which torch refuses as long as a masked weight is part of
    an autograd graph. The next forward with gradients makes them part of one again.

    Args:
        model: a module, which may hold no masks at all.

    Returns:
        ``model``, changed in place. All masked weights or, where one raises, none.

    Example:
        >>> import copy
        >>> import lnprune
        >>> import torch
        >>> layer = lnprune.ln_structured(torch.nn.Linear(8, 4), "weight", amount=0.5, n=2, dim=0)
        >>> copied = copy.deepcopy(lnprune.renew_masked(layer))
        >>> torch.equal(copied.weight, layer.weight)
        True
    """
    with torch.no_grad(), Transaction() as transaction:
        _renew(model, transaction)
    return model
