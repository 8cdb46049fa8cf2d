"""Zeros that stay: after every step of an optimizer, pruned channels are zeroed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lnprune.errors import shown
from lnprune.modules.registration import Target
from lnprune.modules.sharded import parameters_now
from lnprune.steps.in_place import write_zeros
from lnprune.steps.local import flags_here, held_here, layout_of


def keep_zeros(targets: Sequence[Target], optimizer: Any) -> RemovableHandle:
    """As :meth:`Plan.keep_zeros`, of parameters without masks."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {shown(optimizer)}")
    zeros = _Zeros(targets)
    stepped = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if all(id(parameter) not in stepped for parameter in zeros.parameters()):
        raise ValueError(
            f"optimizer: expected one that steps the pruned parameters ({targets[0].name}, ...), got a "
            f"{type(optimizer).__name__} of other tensors: make it after fully_shard() and conversions"
        )
    return optimizer.register_step_post_hook(zeros)


class _Zeros:
    """Called after a step: writes the zeros again. Flags stay on the devices of the parameters."""

    def __init__(self, targets: Sequence[Target]):
        self._targets = targets
        self._flags: dict[int, tuple[Any, Tensor]] = {}  # by index: the layout that they are for, and they

    def parameters(self) -> list[Tensor]:
        """Those of now, in their places; of gathered ones, what they are sharded as."""
        found = parameters_now((target.module, target.attribute) for target in self._targets)
        for target, parameter in zip(self._targets, found, strict=True):
            if parameter is None:
                raise RuntimeError(
                    f"{target.name}: expected a parameter without a mask, to keep its zeros, got none: "
                    "remove() the handle that keep_zeros gave, where the parameter got a mask or left"
                )
        return found  # type: ignore[return-value]

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """After a step of the optimizer."""
        tensors, flags, dims, batches = [], [], [], []
        seen = set()
        for i, (target, parameter) in enumerate(zip(self._targets, self.parameters(), strict=True)):
            place = id(parameter), target.dim, target.part, target.batch, id(target.keep)
            if place in seen:  # modules that share it
                continue
            seen.add(place)
            tensors.append(parameter if target.part is None else parameter.detach().narrow(*target.part))
            flags.append(self._flags_of(i, target, tensors[-1]))
            dims.append(target.dim)
            batches.append(target.batch)
        write_zeros(tensors, flags, dims, batches)

    def _flags_of(self, i: int, target: Target, tensor: Tensor) -> Tensor:
        held = held_here(tensor)
        layout = layout_of(tensor), held.device
        known = self._flags.get(i)
        if known is None or known[0] != layout:
            assert target.keep is not None
            flags = flags_here(tensor, target.dim, target.keep, target.batch).to(held.device)
            known = self._flags[i] = layout, flags
        return known[1]
