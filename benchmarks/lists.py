"""Lists of weights pruned in one call, beside a loop of torch, and in place, beside reading them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import lnprune
from benchmarks import calls, report
from benchmarks.report import Row
from benchmarks.shapes import RESNET50, Case, Shape, shape_name
from benchmarks.timing import Peer, interleaved

ALL_OF_RESNET50 = "ResNet-50, 54 weights"
RESNET50_SHAPES = [shape for count, shape in RESNET50 for _ in range(count)]
# A list takes longer than one tensor.
LIST_BUDGETS = 10

Pairs = list[tuple[nn.Module, str]]


def name_of(shapes: list[Shape]) -> str:
    if shapes == RESNET50_SHAPES:
        return ALL_OF_RESNET50
    return shape_name(shapes[0]) if len(shapes) == 1 else f"{len(shapes)} of {shape_name(shapes[0])}"


def weights_of(shapes: list[Shape]) -> list[Tensor]:
    """Random float32 weights."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def torch_loop(pairs: Pairs, dim: int, permanent: bool) -> Pairs:
    for module, name in pairs:
        stock.ln_structured(module, name, amount=calls.AMOUNT, n=2, dim=dim)
        if permanent:
            stock.remove(module, name)
    return pairs


def local(pairs: Pairs, dim: int, permanent: bool, amount: float = calls.AMOUNT) -> Pairs:
    lnprune.local_structured(pairs, amount, 2, dim, permanent=permanent)
    return pairs


def list_fault(
    weights: list[Tensor], dim: int, permanent: bool, amount: float = calls.AMOUNT
) -> str | None:
    """What is wrong with a list that is pruned at once, against float64 norms."""
    pairs = local(
        [(calls.bare_module(weight.clone()), "weight") for weight in weights], dim, permanent, amount
    )
    for weight, (module, _) in zip(weights, pairs, strict=True):
        case = Case(tuple(weight.shape), weight.dtype, dim, 2)
        norms, pruned = calls.reference_norms(weight, case), module.weight.detach()
        if permanent:
            fault = calls.zeros_fault(pruned, weight, norms, case, amount)
        else:
            alive = torch.ones(case.channels, dtype=torch.bool)
            fault = calls.mask_fault(module.weight_mask, weight, pruned, norms, case, alive, amount)
        if fault is not None:
            return f"{shape_name(case.shape)}: {fault}"
    return None


def _row(shapes: list[Shape], call: str, dim: int, fault: str | None) -> Row:
    row: Row = {"shape": name_of(shapes), "call": call, "dtype": "float32", "dim": dim, "n": 2}
    row |= {"bytes": 4 * sum(math.prod(shape) for shape in shapes), "correct": fault is None}
    return row if fault is None else row | {"fault": fault}


def time_list(shapes: list[Shape], dim: int, permanent: bool, budget: float) -> Row:
    """One call of ``local_structured`` against a loop of torch; modules are made before the clock runs.

    Permanent: with weights of their own, against ``ln_structured`` and ``remove``.
    """
    weights = weights_of(shapes)

    def make() -> Any:
        return [(calls.bare_module(w.clone() if permanent else w), "weight") for w in weights]

    peers = {
        "lnprune": Peer(partial(local, dim=dim, permanent=permanent), make),
        "torch": Peer(partial(torch_loop, dim=dim, permanent=permanent), make),
    }
    row = _row(shapes, "permanent" if permanent else "masks", dim, list_fault(weights, dim, permanent))
    timing = interleaved(peers, LIST_BUDGETS * budget, partial(calls.read_all, weights))
    row |= report.timed_columns(timing, speedup=("torch", "lnprune"))
    report.show(row)
    return row


def time_in_place(shapes: list[Shape], dim: int, amount: float, budget: float) -> Row:
    """``local_structured`` with ``permanent`` on the same weights again and again, against reading them.

    Zeros or not, every channel is read and the same number is written.
    """
    weights = weights_of(shapes)
    row = _row(shapes, "in place", dim, list_fault(weights, dim, True, amount)) | {"amount": amount}
    pairs = [(calls.bare_module(weight), "weight") for weight in weights]
    peers = {
        "lnprune": Peer(lambda _: local(pairs, dim, True, amount)),
        "sum": Peer(lambda _: calls.read_all(weights)),
    }
    timing = interleaved(peers, LIST_BUDGETS * budget, partial(calls.read_all, weights))
    row |= report.timed_columns(timing, over_sum=("lnprune", "sum"))
    report.show(row)
    return row
