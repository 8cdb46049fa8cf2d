"""The proof that a smaller model computes what the model with zeros in place of channels computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lnprune.pretrained.slices import Going, zero_
from lnprune.removal.run import outputs
from lnprune.torch_internals import tree_map

TOLERANCE = 1e-9  # of the largest output, in float64


class _InFloat64(TorchFunctionMode):
    """Inside, what code would round to float32, as norms and routers do, stays in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = tree_map(_wider, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wider(leaf: Any) -> Any:
    return torch.float64 if leaf is torch.float32 else leaf


class _WithoutExperts(TorchFunctionMode):
    """Inside, routers give experts that are gone logits of minus infinity."""

    def __init__(self, routed: Mapping[int, Tensor]):
        super().__init__()
        self._routed = routed  # by where the router's weight is in memory
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and (gone := self._routed.get(args[1].data_ptr())) is not None:
            self.seen.add(args[1].data_ptr())
            result = result.index_fill(-1, gone, -torch.inf)
        return result


def reference(model: nn.Module, parts: Sequence[Going], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a model in float64 with zeros in place of what goes. The model keeps the zeros.

    Experts that go are not chosen: their logits are minus infinity.

    Raises:
        RuntimeError: a router computes its logits in a way that is not known.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    zero_(tensors, parts)
    routed = {}
    for router in (router for part in parts for router in part.routers):
        for name in router.names:
            if tensors[name].dim() > 1:
                routed[tensors[name].data_ptr()] = router.gone
            else:  # what is added to logits or scores
                tensors[name].data.index_fill_(0, router.gone, -torch.inf)
    with _WithoutExperts(routed) as mode:
        found = outputs_of(model, inputs)
    if missed := len(routed) - len(mode.seen):
        raise RuntimeError(f"{missed} routers of {type(model).__name__} compute no logits by a product")
    return found


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All numbers that a model in float64 returns."""
    given = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
    }
    with torch.no_grad(), torch.random.fork_rng([]), _InFloat64():
        torch.manual_seed(0)
        return [each for each in outputs(model.eval()(**given)) if each.is_floating_point()]


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest difference between outputs, as a share of the largest value of each."""
    if [each.shape for each in got] != [each.shape for each in want]:
        return torch.inf
    shares = [0.0]
    for a, b in zip(got, want, strict=True):
        # Logits of minus infinity are equal.
        error = torch.where(a == b, 0.0, (a - b).abs())
        largest = float(torch.where(torch.isfinite(b), b.abs(), 0).amax()) if b.numel() else 0.0
        shares.append(float(error.amax()) / max(largest, 1e-300) if b.numel() else 0.0)
    return max(torch.inf if share != share else share for share in shares)
