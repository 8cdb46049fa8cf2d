"""Checks and times lnprune on the CPU: norms, whole calls, repeated calls, memory at the peak."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lnprune
from benchmarks import calls, cpu_report, memory, report
from benchmarks.report import Row
from benchmarks.shapes import (
    DTYPES,
    GENERIC_ORDERS,
    HUGE,
    INF,
    NAMED_ORDERS,
    RESNET50,
    TIMED,
    TIMED_QUICK,
    Case,
    cases,
    shape_name,
)
from benchmarks.timing import Peer, Timing, geometric_mean, interleaved

EVERY_CASE = pathlib.Path("build/benchmarks")
# A compilation takes seconds to tens of seconds.
COMPILED_SHAPES = [(384, 384), (1536, 384), (512, 512, 3, 3)]


def _row(case: Case, timing: Timing, fault: str | None) -> Row:
    return report.case_row(case, fault) | {name: timing.seconds(name) for name in timing.rounds}


def _show_means(rows: list[Row], ratios: list[str]) -> None:
    for ratio in ratios:
        mean = geometric_mean(row[ratio] for row in rows if ratio in row)
        print(f"geometric mean, {report.TITLES[ratio]}: {mean:.2f}", flush=True)


def time_norms(grid: list[Case], budget: float) -> list[Row]:
    print("\nnorms: lnprune.channel_norms", flush=True)
    weights, rows = calls.Weights(), []
    for case in grid:
        weight = weights.weight(case)
        error = calls.norm_error(lnprune.channel_norms(weight, case.n, case.dim), weights.norms(case))
        fault = None if error <= calls.LARGEST_NORM_ERROR else f"relative error {error:.1e}"
        peers = {
            "lnprune": Peer(lambda _, w=weight, c=case: lnprune.channel_norms(w, c.n, c.dim)),
            "torch": Peer(lambda _, w=weight, c=case: calls.torch_norm(w, c)),
            "sum": Peer(lambda _, w=weight: w.sum()),
        }
        if case.dtype is torch.float32 and case.n in (1, 2) and weight.numel() < HUGE:
            importance = calls.torch_pruning_importance(weight, case)
            if importance is not None:
                peers["torch_pruning"] = Peer(importance)
            peers["abs_pow_sum"] = Peer(lambda _, w=weight, c=case: calls.abs_pow_sum(w, c))
        timing = interleaved(peers, budget, weight.sum)
        row = _row(case, timing, fault)
        row["gigabytes_per_second"] = case.bytes / row["lnprune"] * 1e-9
        row["speedup"] = timing.ratio("torch", "lnprune")
        row["over_sum"] = timing.ratio("lnprune", "sum")
        row["error"] = error
        rows.append(row)
        report.show(row)
    _show_means(rows, ["speedup", "over_sum"])
    return rows


def time_first(grid: list[Case], budget: float) -> list[Row]:
    print("\nwhole call: ln_structured on a module not pruned yet", flush=True)
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
        row = _row(case, timing, fault)
        # Read twice (to rank and to mask), mask and masked weight written.
        row["gigabytes_per_second"] = 4 * case.bytes / row["lnprune"] * 1e-9
        row["speedup"] = timing.ratio("torch", "lnprune")
        row["over_torch"] = timing.ratio("lnprune", "torch")
        row["over_floor"] = timing.ratio("lnprune", "floor")
        rows.append(row)
        report.show(row)
    _show_means(rows, ["speedup", "over_floor"])
    return rows


def time_resnet50(budget: float) -> list[Row]:
    """All 54 weights of ResNet-50, one call each."""
    print("\nwhole call: the 54 weights of ResNet-50, one after the other", flush=True)
    rows = []
    shapes = [shape for count, shape in RESNET50 for _ in range(count)]
    for dim in (0, 1):
        grid = [Case(shape, torch.float32, dim, 2) for shape in shapes]
        tensors = [calls.random_weight(case) for case in grid]

        def make(tensors: list[Tensor] = tensors) -> Any:
            return [calls.bare_module(tensor) for tensor in tensors]

        peers = {}
        for name, call in calls.PRUNERS.items():
            prune = calls.prune_with(call, grid[0])
            peers[name] = Peer(lambda modules, prune=prune: [prune(module) for module in modules], make)
        floors = [calls.floor(tensor) for tensor in tensors]
        peers["floor"] = Peer(lambda _, floors=floors: [floor(None) for floor in floors])
        fault = None
        for case, tensor, module in zip(grid, tensors, peers["lnprune"].run(make()), strict=True):
            alive = torch.ones(case.channels, dtype=torch.bool)
            fault = fault or calls.pruning_fault(module, calls.reference_norms(tensor, case), case, alive)
        timing = interleaved(peers, 10 * budget, partial(calls.read_all, tensors))
        row = _row(grid[0], timing, fault)
        row["shape"] = cpu_report.ALL_OF_RESNET50
        row["bytes"] = sum(case.bytes for case in grid)
        row["gigabytes_per_second"] = 4 * row["bytes"] / row["lnprune"] * 1e-9
        row["speedup"] = timing.ratio("torch", "lnprune")
        row["over_torch"] = timing.ratio("lnprune", "torch")
        row["over_floor"] = timing.ratio("lnprune", "floor")
        rows.append(row)
        report.show(row)
    return rows


def time_compiled(grid: list[Case], budget: float) -> list[Row]:
    print("\nwhole call against torch.compile", flush=True)
    weights, rows = calls.Weights(), []
    for case in grid:
        weight = weights.weight(case)
        try:
            compiled = calls.compiled_pruning(case)
            compiled(weight)
        except Exception as error:  # whatever the compiler raises is the result of this case
            lines = str(error).strip().splitlines() or [""]
            rows.append(
                {
                    "shape": shape_name(case.shape),
                    "dim": case.dim,
                    "note": f"{type(error).__name__}: {lines[0]}",
                }
            )
            print(f"{rows[-1]['shape']}: {rows[-1]['note']}", flush=True)
            continue
        make = partial(calls.bare_module, weight)
        peers = {
            "lnprune": Peer(calls.prune_with(lnprune.ln_structured, case), make),
            "compiled": Peer(lambda _, f=compiled, w=weight: f(w)),
        }
        timing = interleaved(peers, budget, weight.sum)
        row = _row(case, timing, None)
        del row["correct"]  # timed only; the same cases are checked among the whole calls
        row["compiled_speedup"] = timing.ratio("compiled", "lnprune")
        rows.append(row)
        report.show(row)
    return rows


def time_repeated(grid: list[Case], budget: float) -> list[Row]:
    print("\nrepeated call: ln_structured on a module pruned once", flush=True)
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
        row = _row(case, timing, fault)
        row["speedup"] = timing.ratio("torch", "lnprune")
        rows.append(row)
        report.show(row)
    _show_means(rows, ["speedup"])
    return rows


def measure_memory() -> list[Row]:
    print("\nmemory at the peak of a call, in units of the weight", flush=True)
    rows = []
    for name in memory.CALLS:
        for dim in (0, 1):
            rows.append({"call": name, "dim": dim, "n": 2, "peak": memory.measure(name, dim)})
            print(f"{name:>8} dim {dim}: {rows[-1]['peak']:.3f}", flush=True)
    return rows


def measure(quick: bool) -> dict[str, list[Row]]:
    budget = 0.05 if quick else 0.12
    shapes = TIMED_QUICK if quick else TIMED
    dtypes = [torch.float32, torch.bfloat16] if quick else DTYPES
    compiled_grid = [] if quick else list(cases(COMPILED_SHAPES, [torch.float32], [2]))
    norm_orders = [1, 2, INF, 3] if quick else [*NAMED_ORDERS, *GENERIC_ORDERS]
    first_orders = [2, INF] if quick else [1, 2, 3, INF]
    few_dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    sections = {
        "norms": time_norms(list(cases(shapes, dtypes, norm_orders)), budget),
        "first": time_first(list(cases(shapes, few_dtypes, first_orders, huge_orders=(2,))), budget),
        "compiled": time_compiled(compiled_grid, budget) if compiled_grid else [],
        "repeated": time_repeated(list(cases(shapes, few_dtypes, [2])), budget),
        "memory": measure_memory(),
    }
    sections["first"] += time_resnet50(budget)
    return sections


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small grid, in under two minutes")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help=f"folder of the page and the picture ({report.RESULTS}; --quick: {EVERY_CASE})",
    )
    parser.add_argument("--threads", type=int, help="threads for torch and lnprune (default: torch's)")
    parser.add_argument(
        "--from", dest="saved", type=pathlib.Path, help="the JSON of a run, to write its page"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    if options.saved is None:
        start = time.perf_counter()
        sections = measure(options.quick)
        seconds = time.perf_counter() - start
        machine = report.environment("benchmarks.cpu")
        head = {"environment": machine, "seconds": seconds}
        every_case = EVERY_CASE / "cpu.json"
        report.save_json(every_case, head, cpu_report.verdicts(sections), sections)
        written = [every_case]
    else:
        machine, sections, seconds = cpu_report.load(options.saved)
        written = []
    folder = options.out or (EVERY_CASE if options.quick else report.RESULTS)
    written += cpu_report.write(folder, machine, sections, seconds)
    if folder == report.RESULTS:
        report.replace_marked(report.README, "benchmarks.cpu", cpu_report.speed_lines(sections))
        written.append(report.README)
    print("\n" + "\n".join(report.verdict_lines(cpu_report.verdicts(sections))))
    print(f"\n{seconds:.0f} s; wrote {', '.join(map(str, written))}")
    return 1 if report.faults(sections) else 0


if __name__ == "__main__":
    sys.exit(main())
