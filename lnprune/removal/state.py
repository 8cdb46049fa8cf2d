"""What a run may change in a model, kept and put back: attributes, modes, values, random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lnprune.torch_internals import own_modules, own_registries, written_arguments


class Before:
    """Inside, a model may run; afterwards it is as it was."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]):
        self._modules = list(model.modules())
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        self._tensors = list(tensors.values())
        self._values: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._attributes: list[dict[str, Any]] = []
        self._registries: list[list[Any]] = []
        devices = {tensor.device for tensor in self._tensors if tensor.device.type == "cuda"}
        self._random = torch.random.fork_rng(sorted(device.index or 0 for device in devices))
        self._fastpath = torch.backends.mha.get_fastpath_enabled()

    def __enter__(self) -> Before:
        for module in self._modules:
            self._attributes.append(dict(vars(module)))
            self._registries.append([registry.copy() for registry in _registries(module)])
        self._random.__enter__()
        torch.backends.mha.set_fastpath_enabled(False)
        return self

    def __exit__(self, *error: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
        self._random.__exit__(*error)
        with torch.no_grad():
            for saved in self._values.values():
                for tensor, values in saved:
                    tensor.copy_(values)
        for module, attributes, copies in zip(
            self._modules, self._attributes, self._registries, strict=True
        ):
            vars(module).clear()
            vars(module).update(attributes)
            for registry, copy in zip(_registries(module), copies, strict=True):
                registry.clear()
                registry.update(copy)

    def save_written(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keeps the values of parameters and buffers that an operation is about to write to."""
        for written in written_arguments(func, args, kwargs):
            memory = written.untyped_storage().data_ptr()
            if memory in self._owned and memory not in self._values:
                mine = [t for t in self._tensors if t.untyped_storage().data_ptr() == memory]
                self._values[memory] = [(tensor, tensor.detach().clone()) for tensor in mine]


def _registries(module: nn.Module) -> list[Any]:
    return [*own_registries(module), own_modules(module)]
