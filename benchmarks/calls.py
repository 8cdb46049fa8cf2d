"""What is timed: lnprune, its peers and the floors, each as a function of one tensor or module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import lnprune
from benchmarks.shapes import FLOAT8_DTYPES, Case

AMOUNT = 0.5


def random_weight(case: Case, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(case.shape, generator=generator, device=device).to(case.dtype)


def bare_module(weight: Tensor) -> nn.Module:
    """A module whose one parameter shares the memory of ``weight``, which pruning does not change."""
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module


def fresh_copy(module: nn.Module) -> nn.Module:
    """A module of its own with the same tensors and hooks, at no cost per byte."""
    copy = nn.Module.__new__(nn.Module)
    copy.__dict__ = {
        key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()
    }
    return copy


def prune_with(call: Callable[..., Any], case: Case) -> Callable[[nn.Module], nn.Module]:
    return lambda module: call(module, "weight", amount=AMOUNT, n=case.n, dim=case.dim)


def floor(weight: Tensor) -> Callable[[Any], Any]:
    """Reading the weight once, then writing a fresh mask and a fresh masked weight."""
    return lambda _: (weight.sum(), torch.empty_like(weight).fill_(1), weight.clone())


def plain_sum(weight: Tensor) -> Callable[[], Any]:
    """The sum of all elements; of float8, which torch does not add, that of as many bfloat16."""
    return (weight.bfloat16() if weight.dtype in FLOAT8_DTYPES else weight).sum


def read(weight: Tensor) -> Any:
    """Reads all bytes, as fast as they come."""
    if weight.dtype in FLOAT8_DTYPES:
        return weight.flatten().view(torch.bfloat16).sum()
    return weight.sum()


def read_all(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        read(tensor)


def torch_norm(weight: Tensor, case: Case) -> Tensor:
    """The call that torch's pruning makes."""
    return torch.norm(weight, p=case.n, dim=case.other_dims)


def compiled_pruning(case: Case) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Torch's mask and masked weight as one function through ``torch.compile``."""
    kept = case.channels - round(AMOUNT * case.channels)
    shape = [1] * len(case.shape)
    shape[case.dim] = -1

    def mask_and_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
        norms = torch.norm(weight, p=case.n, dim=case.other_dims)
        keep = torch.zeros_like(norms).index_fill(0, torch.topk(norms, k=kept).indices, 1)
        mask = torch.ones_like(weight) * keep.reshape(shape)
        return mask, mask * weight

    return torch.compile(mask_and_weight, dynamic=False)


def torch_steps(weight: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """The mask and the masked weight by what torch's ``ln_structured`` runs on the tensor."""
    method = stock.LnStructured(AMOUNT, case.n, case.dim)
    mask = method.compute_mask(weight, torch.ones_like(weight))
    return mask, mask * weight


def zeros_fault(
    weight: Tensor, original: Tensor, norms: Tensor, case: Case, amount: float = AMOUNT
) -> str | None:
    """What is wrong with a weight whose pruned channels were set to zero in place."""
    keep = weight.abs().amax(dim=case.other_dims, keepdim=True) != 0
    mask = torch.ones_like(original) * keep
    alive = torch.ones(case.channels, dtype=torch.bool, device=weight.device)
    return mask_fault(mask, original, weight, norms, case, alive, amount)


PRUNERS = {"lnprune": lnprune.ln_structured, "torch": stock.ln_structured}


def reference_norms(weight: Tensor, case: Case) -> Tensor:
    """The norms as torch computes them in float64."""
    return torch.norm(weight.double(), p=case.n, dim=case.other_dims)


def norm_error(norms: Tensor, expected: Tensor) -> float:
    """The largest relative difference; infinity where only one of the two is NaN."""
    scale = expected.abs().clamp_min(torch.finfo(torch.float64).tiny)
    difference = torch.where(norms == expected, 0.0, (norms - expected).abs() / scale)
    return float(difference.nan_to_num(nan=math.inf).max())


# Float64 sums of up to 1e6 terms in another order, and the powers of a generic order.
LARGEST_NORM_ERROR = 1e-10


class Weights:
    """The current case's tensors, made once for all the cases that share them."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._weight: dict[Any, Tensor] = {}
        self._norms: dict[Any, Tensor] = {}

    def weight(self, case: Case) -> Tensor:
        key = case.shape, case.dtype
        if key not in self._weight:
            self._weight = {}  # before the next one is made: two may not fit
            self._norms = {}
            self._weight[key] = random_weight(case, self._device)
        return self._weight[key]

    def norms(self, case: Case) -> Tensor:
        """Float64 norms by torch."""
        weight = self.weight(case)
        if case not in self._norms:
            self._norms[case] = reference_norms(weight, case)
        return self._norms[case]


def pruning_fault(module: nn.Module, norms: Tensor, case: Case, alive: Tensor) -> str | None:
    """What is wrong with a pruned module, given float64 norms and the channels that were alive before."""
    return mask_fault(
        module.weight_mask, module.weight_orig.detach(), module.weight.detach(), norms, case, alive
    )


def mask_fault(
    mask: Tensor,
    original: Tensor,
    weight: Tensor,
    norms: Tensor,
    case: Case,
    alive: Tensor,
    amount: float = AMOUNT,
) -> str | None:
    """What is wrong with a mask and a masked weight."""
    keep = mask.amax(dim=case.other_dims) != 0
    if not torch.equal(keep, mask.amin(dim=case.other_dims) == 1):
        return "the mask is not constant along channels"
    if bool((keep & ~alive).any()):
        return "a pruned channel came back"
    count = int(alive.sum())
    if int(keep.sum()) != count - round(amount * count):
        return f"{int(keep.sum())} of {count} channels kept"
    pruned = alive & ~keep
    if pruned.any() and keep.any():
        least, most = float(norms[keep].min()), float(norms[pruned].max())
        if least < most and not math.isclose(least, most, rel_tol=LARGEST_NORM_ERROR):
            return f"kept a norm of {least}, pruned one of {most}"
    if not torch.equal(weight, mask * original):
        return "the weight is not mask * original"
    return None
