"""Checks and times lnprune on the CPU: norms, first and repeated calls, lists, peers, peaks of memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import lnprune
from benchmarks import calls, cpu_report, memory, program, report
from benchmarks.lists import RESNET50_SHAPES, time_in_place, time_list
from benchmarks.peers import time_peers
from benchmarks.program import FRESH, RECYCLED, Program
from benchmarks.report import Row
from benchmarks.shapes import (
    CURVE,
    DTYPES,
    FLOAT8_DTYPES,
    GENERIC_ORDERS,
    INF,
    MINILM,
    NAMED_ORDERS,
    TIMED,
    TIMED_QUICK,
    TINY,
    Case,
    Shape,
    cases,
    shape_name,
)
from benchmarks.timing import Peer, Timing, interleaved
from lnprune import ops

FEW_DTYPES = [torch.float32, torch.bfloat16]
COMPILED_SHAPES: list[Shape] = [(1536, 384), (512, 512, 3, 3), (30522, 384), (4096, 4096)]
IN_PLACE_AMOUNT = 0.3
LAYERS = 24


def _row(case: Case, timing: Timing, fault: str | None, **ratios: tuple[str, str]) -> Row:
    row = report.case_row(case, fault) | report.timed_columns(timing, **ratios)
    report.show(row)
    return row


def time_norms(grid: list[Case], budget: float) -> list[Row]:
    """``channel_norms``, torch's norm, and a plain sum."""
    weights, rows = calls.Weights(), []
    for case in grid:
        weight = weights.weight(case)
        error = calls.norm_error(lnprune.channel_norms(weight, case.n, case.dim), weights.norms(case))
        fault = None if error <= calls.LARGEST_NORM_ERROR else f"relative error {error:.1e}"
        plain_sum = calls.plain_sum(weight)
        peers = {
            "lnprune": Peer(lambda _, w=weight, c=case: lnprune.channel_norms(w, c.n, c.dim)),
            "sum": Peer(lambda _, plain_sum=plain_sum: plain_sum()),
        }
        ratios = {"over_sum": ("lnprune", "sum")}
        if case.dtype not in FLOAT8_DTYPES:  # which torch has no norm of
            peers["torch"] = Peer(lambda _, w=weight, c=case: calls.torch_norm(w, c))
            ratios |= {"speedup": ("torch", "lnprune"), "torch_over_sum": ("torch", "sum")}
        timing = interleaved(peers, budget, partial(calls.read, weight))
        rows.append(_row(case, timing, fault, **ratios))
    return rows


def time_first(grid: list[Case], budget: float) -> list[Row]:
    """``ln_structured`` on a module not pruned yet, and the floor."""
    weights, rows = calls.Weights(), []
    for case in grid:
        weight, norms = weights.weight(case), weights.norms(case)
        module = calls.prune_with(lnprune.ln_structured, case)(calls.bare_module(weight))
        fault = calls.pruning_fault(module, norms, case, torch.ones(case.channels, dtype=torch.bool))
        del module
        make = partial(calls.bare_module, weight)
        peers = {name: Peer(calls.prune_with(call, case), make) for name, call in calls.PRUNERS.items()}
        peers["floor"] = Peer(calls.floor(weight))
        timing = interleaved(peers, budget, weight.sum)
        ratios = {"speedup": ("torch", "lnprune"), "over_torch": ("lnprune", "torch")}
        rows.append(_row(case, timing, fault, **ratios, over_floor=("lnprune", "floor")))
    return rows


def time_repeated(grid: list[Case], budget: float) -> list[Row]:
    """``ln_structured`` on a module pruned once."""
    weights, rows = calls.Weights(), []
    for case in grid:
        weight, norms = weights.weight(case), weights.norms(case)
        prune = calls.prune_with(lnprune.ln_structured, case)
        once = prune(calls.bare_module(weight))
        alive = once.weight_mask.amax(dim=case.other_dims) != 0
        twice = prune(calls.fresh_copy(once))
        # The second ranking sees the masked weight, where channels still alive are unchanged.
        fault = calls.pruning_fault(twice, norms, case, alive)
        del twice
        make = partial(calls.fresh_copy, once)
        peers = {name: Peer(calls.prune_with(call, case), make) for name, call in calls.PRUNERS.items()}
        timing = interleaved(peers, budget, weight.sum)
        rows.append(_row(case, timing, fault, speedup=("torch", "lnprune")))
    return rows


def time_loop(count: int, case: Case, budget: float) -> list[Row]:
    """``ln_structured`` on layers one after the other."""
    tensors = [calls.random_weight(case, seed=seed) for seed in range(count)]

    def make() -> Any:
        return [calls.bare_module(tensor) for tensor in tensors]

    peers = {}
    for name, call in calls.PRUNERS.items():
        prune = calls.prune_with(call, case)
        peers[name] = Peer(lambda modules, prune=prune: [prune(module) for module in modules], make)
    fault = None
    for tensor, module in zip(tensors, peers["lnprune"].run(make()), strict=True):
        alive = torch.ones(case.channels, dtype=torch.bool)
        fault = fault or calls.pruning_fault(module, calls.reference_norms(tensor, case), case, alive)
    timing = interleaved(peers, budget, partial(calls.read_all, tensors))
    row = report.case_row(case, fault) | {"shape": f"{count} of {shape_name(case.shape)}"}
    row["bytes"] *= count
    row |= report.timed_columns(timing, over_torch=("lnprune", "torch"), speedup=("torch", "lnprune"))
    report.show(row)
    return [row]


def time_compiled(grid: list[Case], budget: float) -> list[Row]:
    """The op that makes mask and masked weight, and torch's code for them through ``torch.compile``."""
    weights, rows = calls.Weights(), []
    for case in grid:
        weight = weights.weight(case)

        def prune(_: Any, weight: torch.Tensor = weight, case: Case = case) -> Any:
            return ops.prune_channels(
                [weight], [], [weight], [case.dim], float(case.n), [-1], [calls.AMOUNT]
            )

        (mask,), (masked,) = prune(None)
        alive = torch.ones(case.channels, dtype=torch.bool)
        fault = calls.mask_fault(mask, weight, masked, weights.norms(case), case, alive)
        try:
            compiled = calls.compiled_pruning(case)
            theirs = compiled(weight)[0]
        except Exception as error:  # whatever the compiler raises is the result of this case
            lines = str(error).strip().splitlines() or [""]
            rows.append(report.case_row(case, fault) | {"note": f"{type(error).__name__}: {lines[0]}"})
            print(f"{report.case_name(rows[-1])}: {rows[-1]['note']}", flush=True)
            continue
        # Norms in float32 may order a channel or two otherwise.
        if fault is None and float((theirs != mask).double().mean()) > 4 / case.channels:
            fault = "torch.compile has another mask"
        del mask, masked, theirs
        peers = {"lnprune": Peer(prune), "compiled": Peer(lambda _, f=compiled, w=weight: f(w))}
        timing = interleaved(peers, budget, weight.sum)
        rows.append(_row(case, timing, fault, compiled_speedup=("compiled", "lnprune")))
    return rows


def measure_memory() -> list[Row]:
    """The peak of a call, in units of the weight."""
    rows = []
    for name in cpu_report.MEMORY:
        for dim in (0, 1):
            rows.append({"call": name, "dim": dim, "n": 2, "peak": memory.measure(name, dim)})
            report.show(rows[-1])
    return rows


def curve_cases() -> list[Case]:
    """What the plots have besides other cases."""
    return [case for case in cases(CURVE, [torch.float32], [2]) if case.shape not in TIMED]


def norm_cases(quick: bool) -> list[Case]:
    if quick:
        few = cases([*TIMED_QUICK, MINILM], [*FEW_DTYPES, *FLOAT8_DTYPES], [2, INF])
        return [*few, *curve_cases()]
    return [
        *cases(TIMED, [*DTYPES, *FLOAT8_DTYPES], NAMED_ORDERS, least_bytes=cpu_report.ONE_MEGABYTE),
        *cases([TINY, MINILM], FEW_DTYPES, [2, INF]),
        *curve_cases(),
        *cases([(1536, 384), (512, 512, 3, 3)], [torch.float32], GENERIC_ORDERS),
    ]


def call_cases(quick: bool) -> list[Case]:
    if quick:
        return [*cases([TINY, MINILM, *TIMED_QUICK], [torch.float32], [2]), *curve_cases()]
    return [*cases([TINY, MINILM, *TIMED], FEW_DTYPES, [2]), *curve_cases()]


def repeated_cases(quick: bool) -> list[Case]:
    return list(cases(TIMED_QUICK, [torch.float32], [2]) if quick else cases(TIMED, FEW_DTYPES, [2]))


def compiled_cases(quick: bool) -> list[Case]:
    return list(cases(COMPILED_SHAPES[:1] if quick else COMPILED_SHAPES, [torch.float32], [2]))


def _both_dims(time: Callable[[int], Row]) -> list[Row]:
    return [time(dim) for dim in (0, 1)]


PROGRAM = Program(
    module="benchmarks.cpu",
    description=__doc__,
    budget=0.12,
    sections={
        "norms": lambda o: time_norms(norm_cases(o.quick), o.budget),
        "first": lambda o: time_first(call_cases(o.quick), o.budget),
        "repeated": lambda o: time_repeated(repeated_cases(o.quick), o.budget),
        "masks": lambda o: _both_dims(lambda dim: time_list(RESNET50_SHAPES, dim, False, o.budget)),
        "in_place": lambda o: _both_dims(
            lambda dim: time_in_place(RESNET50_SHAPES, dim, IN_PLACE_AMOUNT, o.budget)
        ),
        "compiled": lambda o: time_compiled(compiled_cases(o.quick), o.budget),
        "loop": lambda o: time_loop(LAYERS, Case(MINILM, torch.float32, 0, 2), 5 * o.budget),
        "peers": lambda o: time_peers(o.budget),
        "memory": lambda _: measure_memory(),
    },
    states={
        RECYCLED: ["norms", "first", "repeated", "masks", "in_place", "compiled", "loop", "peers"],
        FRESH: ["first", "masks", "memory"],
    },
    verdicts=cpu_report.verdicts,
    markdown=cpu_report.markdown,
    speed_lines=cpu_report.speed_lines,
    pictures=cpu_report.pictures,
)


if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
