"""Weights by their names in a model, and the values that weights have now, masked or not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lnprune.modules.finding import uncalled
from lnprune.modules.parameters import Weight, current_tensor, note_reader
from lnprune.steps.masks import masked
from lnprune.torch_internals import own_buffers, own_parameters


def weights_by_name(model: nn.Module, names: Iterable[str]) -> dict[str, Weight]:
    """The parameters of these names, each with all places that share it; no buffers."""
    wanted = dict.fromkeys(names)
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    tensors: dict[str, Tensor] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    seen = set()
    for path, module in modules:
        for key, parameter in own_parameters(module).items():
            name = f"{path}.{key}" if path else key
            if parameter is None:
                continue
            tensors[name] = parameter
            if (id(module), key) not in seen:
                seen.add((id(module), key))
                places.setdefault(id(parameter), []).append((name, module, key))
    readers = uncalled(module for _, module in modules)
    found = {}
    for name in wanted:
        held = tensors.get(name)
        if held is None:
            continue
        there = sorted(places[id(held)], key=lambda place: place[0] != name)
        weight = Weight(
            [place[0] for place in there], held.shape, [(module, key) for _, module, key in there]
        )
        for module, _ in weight.places:
            note_reader(weight, module, readers)
        found[name] = weight
    return found


def current_values(weights: Iterable[Weight]) -> tuple[dict[Weight, Tensor], dict[Weight, Tensor]]:
    """The values of weights as they are now, and the masks of those that have one.

    Raises:
        RuntimeError: a weight has another shape.
    """
    tensors, masks = {}, {}
    for weight in weights:
        module, attribute = weight.places[0]
        tensor = current_tensor(module, attribute, weight.name)
        if attribute not in own_parameters(module):
            mask = own_buffers(module)[attribute + "_mask"]
            original = own_parameters(module)[attribute + "_orig"]
            assert mask is not None
            assert original is not None
            masks[weight] = mask
            with torch.no_grad():
                tensor = masked(mask, original)
        if tuple(tensor.shape) != weight.shape:
            raise RuntimeError(
                f"{weight.name}: expected shape {weight.shape}, got {tuple(tensor.shape)} now: couple again"
            )
        tensors[weight] = tensor
    return tensors, masks
