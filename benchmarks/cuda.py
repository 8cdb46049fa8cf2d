"""Checks and times lnprune on a GPU: norms, whole calls, lists, repeated calls, memory, launches."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune as stock

import lnprune
from benchmarks import calls, cuda_page, cuda_report, report
from benchmarks.cuda_timing import Gpu, count_launches, peak_bytes
from benchmarks.predictions import predicted_seconds, prune_launches, rank_launches
from benchmarks.program import BUILD
from benchmarks.report import Row
from benchmarks.shapes import (
    DTYPES,
    FURTHER_LAYOUTS,
    INF,
    RESNET50,
    TRANSFORMER_7B,
    Case,
    Shape,
    convolution_of,
    matrix_of,
    shape_name,
)
from benchmarks.timing import Peer, Timing
from lnprune import ops

DEVICE = "cuda"
MEBIBYTE = 1 << 20
COPY_SIZES = [256 * MEBIBYTE, 1024 * MEBIBYTE, 4096 * MEBIBYTE]
MAIN_DTYPES = [torch.float32, torch.bfloat16]
SMALL_SHAPE = (64, 64)
ONE_MATRIX = (4096, 4096)
CONVOLUTION = (512, 512, 3, 3)
MANY_CHANNELS = (128_256, 1024)
# A list is pruned some twenty times in a row, which takes longer than one tensor.
LIST_BUDGETS = 10

LISTS: dict[str, tuple[list[tuple[int, Shape]], torch.dtype]] = {
    "ResNet-50, 54 weights": (RESNET50, torch.float32),
    "7B transformer, 224 matrices": (TRANSFORMER_7B, torch.bfloat16),
}


def large_cases(sizes: list[int], dtypes: list[torch.dtype], orders: list[float]) -> Iterator[Case]:
    """Matrices and 3x3 convolutions of at least these bytes, along both dims."""
    for size in sizes:
        for dtype in dtypes:
            for shape in (matrix_of(size, dtype), convolution_of(size, dtype)):
                for dim in (0, 1):
                    for n in orders:
                        yield Case(shape, dtype, dim, n)


def list_cases(name: str, dim: int) -> list[Case]:
    """One case per weight of a list."""
    shapes, dtype = LISTS[name]
    return [Case(shape, dtype, dim, 2) for count, shape in shapes for _ in range(count)]


def list_weights(grid: list[Case]) -> list[Tensor]:
    return [calls.random_weight(case, DEVICE, seed) for seed, case in enumerate(grid)]


def prune_list(weights: list[Tensor], grid: list[Case]) -> tuple[list[Tensor], list[Tensor]]:
    """Masks and masked weights of a list in one call."""
    dims, counts = [case.dim for case in grid], [-1] * len(grid)
    fractions = [calls.AMOUNT] * len(grid)
    return ops.prune_channels(weights, [], weights, dims, float(grid[0].n), counts, fractions)


def prune_like_torch(weights: list[Tensor], grid: list[Case]) -> list[tuple[Tensor, Tensor]]:
    return [calls.torch_steps(weight, case) for weight, case in zip(weights, grid, strict=True)]


def list_fault(weights: list[Tensor], grid: list[Case]) -> str | None:
    """What is wrong with the masks and the weights of a list, if anything."""
    masks, products = prune_list(weights, grid)
    for case, weight, mask, product in zip(grid, weights, masks, products, strict=True):
        norms = calls.reference_norms(weight, case)
        fault = calls.mask_fault(mask, weight, product, norms, case, alive_channels(case))
        if fault is not None:
            return f"{shape_name(case.shape)}: {fault}"
    return None


def list_row(name: str, grid: list[Case], fault: str | None) -> Row:
    return report.case_row(grid[0], fault) | {"shape": name, "bytes": sum(case.bytes for case in grid)}


def alive_channels(case: Case) -> Tensor:
    return torch.ones(case.channels, dtype=torch.bool, device=DEVICE)


class Benchmark:
    """The sections of the benchmark, each a generator of rows."""

    def __init__(self, gpu: Gpu, quick: bool) -> None:
        self.gpu = gpu
        self.quick = quick
        self.budget = 0.05 if quick else 0.25
        self.copy_bytes_per_second: float | None = None

    def sections(self) -> dict[str, Callable[[], Iterator[Row]]]:
        """By name, in the order in which they run: what matters most first, should the time run out.

        Counting launches slows down what comes after it.
        """
        return {
            "copy": self.copy,
            "whole": self.whole,
            "in_place": self.in_place,
            "lists": self.lists,
            "norms": self.norms,
            "sizes": self.sizes,
            "repeated": self.repeated,
            "small": self.small,
            "memory": self.memory,
            "further": self.further,
            "launches": self.launches,
        }

    def copy(self) -> Iterator[Row]:
        """A copy within the device's memory, the fastest of which the others are measured against."""
        for size in COPY_SIZES[:1] if self.quick else COPY_SIZES:
            seconds = self.gpu.copy_seconds(size, self.budget)
            rate = 2 * size / seconds
            self.copy_bytes_per_second = max(rate, self.copy_bytes_per_second or 0.0)
            size_name = f"{size // MEBIBYTE} MiB"
            yield {"size": size_name, "copy": seconds, "gigabytes_per_second": rate * 1e-9}

    def figures(self, timings: tuple[Timing, Timing], read: int, written: int, launches: int) -> Row:
        """The columns that follow from the times of lnprune and torch, and from the bytes to move."""
        device, wall = timings
        ours = device.seconds("lnprune")
        row: Row = {
            "lnprune": ours,
            "torch": device.seconds("torch"),
            "speedup": device.ratio("torch", "lnprune"),
            "gigabytes_per_second": (read + written) / ours * 1e-9,
        }
        if self.copy_bytes_per_second is not None:
            predicted = predicted_seconds(read, written, launches, self.copy_bytes_per_second)
            row["share"] = (read + written) / ours / self.copy_bytes_per_second
            row["predicted"] = predicted
            row["over_predicted"] = ours / predicted
        row["wall"] = wall.seconds("lnprune")
        row["torch_wall"] = wall.seconds("torch")
        row["wall_speedup"] = wall.ratio("torch", "lnprune")
        return row

    def norms(self) -> Iterator[Row]:
        """``channel_norms`` of one tensor."""
        sizes = [256 * MEBIBYTE] if self.quick else [1024 * MEBIBYTE, 256 * MEBIBYTE]
        grid = list(large_cases(sizes, MAIN_DTYPES, [2] if self.quick else [2, INF, 1]))
        if not self.quick:
            grid += [Case(MANY_CHANNELS, dtype, 0, 2) for dtype in MAIN_DTYPES]
        yield from self.norms_of(grid)

    def further(self) -> Iterator[Row]:
        """``channel_norms`` of other layouts and dtypes."""
        grid = [Case(shape, torch.float32, dim, 2) for shape, dim in FURTHER_LAYOUTS]
        if not self.quick:
            others = [dtype for dtype in DTYPES if dtype not in MAIN_DTYPES]
            grid += large_cases([256 * MEBIBYTE], others, [2, INF, 1])
        yield from self.norms_of(grid)

    def norms_of(self, grid: list[Case]) -> Iterator[Row]:
        weights = calls.Weights(DEVICE)
        for case in grid:
            weight = weights.weight(case)
            error = calls.norm_error(lnprune.channel_norms(weight, case.n, case.dim), weights.norms(case))
            fault = None if error <= calls.LARGEST_NORM_ERROR else f"relative error {error:.1e}"
            peers = {
                "lnprune": Peer(lambda _, w=weight, c=case: lnprune.channel_norms(w, c.n, c.dim)),
                "torch": Peer(lambda _, w=weight, c=case: calls.torch_norm(w, c)),
            }
            timings = self.gpu.interleaved(peers, self.budget)
            figures = self.figures(timings, case.bytes, 0, rank_launches())
            yield report.case_row(case, fault) | figures | {"error": error}

    def whole(self) -> Iterator[Row]:
        """``ln_structured`` on a module not pruned yet."""
        sizes = [256 * MEBIBYTE] if self.quick else [1024 * MEBIBYTE, 256 * MEBIBYTE]
        shapes = (ONE_MATRIX, CONVOLUTION)
        grid = [Case(shape, torch.float32, dim, 2) for shape in shapes for dim in (0, 1)]
        grid += large_cases(sizes, MAIN_DTYPES, [2])
        if not self.quick:
            grid += [Case(MANY_CHANNELS, dtype, 0, 2) for dtype in MAIN_DTYPES]
        yield from self.whole_of(grid)

    def whole_of(self, grid: list[Case]) -> Iterator[Row]:
        weights = calls.Weights(DEVICE)
        for case in grid:
            weight, norms = weights.weight(case), weights.norms(case)
            make = partial(calls.bare_module, weight)
            pruned = calls.prune_with(lnprune.ln_structured, case)(make())
            fault = calls.pruning_fault(pruned, norms, case, alive_channels(case))
            del pruned
            peers = {name: Peer(calls.prune_with(call, case), make) for name, call in calls.PRUNERS.items()}
            timings = self.gpu.interleaved(peers, self.budget)
            # Read to rank and to mask; mask and masked weight written.
            launches = prune_launches([case.shape[case.dim]])
            figures = self.figures(timings, 2 * case.bytes, 2 * case.bytes, launches)
            yield report.case_row(case, fault) | figures

    def sizes(self) -> Iterator[Row]:
        """Norms and whole calls over the size of the weight, with a copy of as many bytes beside them."""
        for power in range(0, 9, 4 if self.quick else 1):
            size = MEBIBYTE * 4**power // 16
            copied: Row = {"copy": self.gpu.copy_seconds(size, self.budget)}
            grid = [Case(matrix_of(size, torch.float32), torch.float32, dim, 2) for dim in (0, 1)]
            for row in self.norms_of(grid):
                yield {"call": cuda_report.NORMS, **row, **copied}
            for row in self.whole_of(grid):
                yield {"call": cuda_report.WHOLE, **row, **copied}

    def in_place(self) -> Iterator[Row]:
        """``local_structured`` with ``permanent=True``: zeros in place, in a fresh weight each time."""
        sizes = [256 * MEBIBYTE] if self.quick else [1024 * MEBIBYTE, 256 * MEBIBYTE]
        weights = calls.Weights(DEVICE)
        for case in large_cases(sizes, MAIN_DTYPES, [2]):
            weight, norms = weights.weight(case), weights.norms(case)

            def make(weight: Tensor = weight) -> Any:
                return calls.bare_module(weight.clone())

            def prune(module: Any, case: Case = case) -> Any:
                return lnprune.local_structured(
                    [(module, "weight")], calls.AMOUNT, case.n, case.dim, permanent=True
                )

            def torch_prune(module: Any, case: Case = case) -> Any:
                return stock.remove(calls.prune_with(stock.ln_structured, case)(module), "weight")

            module = make()
            prune(module)
            fault = calls.zeros_fault(module.weight.detach(), weight, norms, case)
            del module
            peers = {"lnprune": Peer(prune, make), "torch": Peer(torch_prune, make)}
            timings = self.gpu.interleaved(peers, self.budget)
            # Read to rank; the pruned half is written.
            launches = prune_launches([case.channels], in_place=True)
            figures = self.figures(timings, case.bytes, case.bytes // 2, launches)
            yield report.case_row(case, fault) | figures

    def lists(self) -> Iterator[Row]:
        """The weights of a model in one call, against torch's steps on one after the other."""
        for name in LISTS:
            for dim in (0,) if self.quick else (0, 1):
                grid = list_cases(name, dim)
                weights = list_weights(grid)
                fault = list_fault(weights, grid)
                peers = {
                    "lnprune": Peer(lambda _, w=weights, g=grid: prune_list(w, g)),
                    "torch": Peer(lambda _, w=weights, g=grid: prune_like_torch(w, g)),
                }
                timings = self.gpu.interleaved(peers, LIST_BUDGETS * self.budget)
                row = list_row(name, grid, fault)
                launches = prune_launches([case.shape[case.dim] for case in grid])
                yield row | self.figures(timings, 2 * row["bytes"], 2 * row["bytes"], launches)

    def repeated(self) -> Iterator[Row]:
        """The second ``ln_structured`` on a module."""
        dtypes = MAIN_DTYPES[:1] if self.quick else MAIN_DTYPES
        weights = calls.Weights(DEVICE)
        for case in large_cases([256 * MEBIBYTE], dtypes, [2]):
            weight, norms = weights.weight(case), weights.norms(case)
            prune = calls.prune_with(lnprune.ln_structured, case)
            once = prune(calls.bare_module(weight))
            alive = once.weight_mask.amax(dim=case.other_dims) != 0
            make = partial(calls.fresh_copy, once)
            # The second ranking sees the masked weight, where channels still alive are unchanged.
            fault = calls.pruning_fault(prune(make()), norms, case, alive)
            peers = {name: Peer(calls.prune_with(call, case), make) for name, call in calls.PRUNERS.items()}
            timings = self.gpu.interleaved(peers, self.budget)
            # Read: weight and mask to rank, mask and original to write.
            launches = prune_launches([case.shape[case.dim]], repeated=True)
            figures = self.figures(timings, 4 * case.bytes, 2 * case.bytes, launches)
            yield report.case_row(case, fault) | figures

    def small(self) -> Iterator[Row]:
        """``ln_structured`` where the time is that of Python and of launching."""
        for dim in (0, 1):
            case = Case(SMALL_SHAPE, torch.float32, dim, 2)
            weight = calls.random_weight(case, DEVICE)
            make = partial(calls.bare_module, weight)
            pruned = calls.prune_with(lnprune.ln_structured, case)(make())
            norms = calls.reference_norms(weight, case)
            fault = calls.pruning_fault(pruned, norms, case, alive_channels(case))
            peers = {name: Peer(calls.prune_with(call, case), make) for name, call in calls.PRUNERS.items()}
            device, wall = self.gpu.interleaved(peers, 4 * self.budget)
            yield report.case_row(case, fault) | {
                "lnprune": device.seconds("lnprune"),
                "torch": device.seconds("torch"),
                "speedup": device.ratio("torch", "lnprune"),
                "wall": wall.seconds("lnprune"),
                "torch_wall": wall.seconds("torch"),
                "wall_speedup": wall.ratio("torch", "lnprune"),
                "over_torch": wall.ratio("lnprune", "torch"),
            }

    def memory(self) -> Iterator[Row]:
        """The peak of a call beyond what was there, in units of the weights; the outputs are two."""
        case = Case(matrix_of(256 * MEBIBYTE, torch.float32), torch.float32, 0, 2)
        weight = calls.random_weight(case, DEVICE)
        grid = list_cases("ResNet-50, 54 weights", 0)
        weights = list_weights(grid)
        ours: dict[str, Callable[[], Any]] = {
            "one": lambda: calls.prune_with(lnprune.ln_structured, case)(calls.bare_module(weight)),
            "list": lambda: prune_list(weights, grid),
        }
        theirs: dict[str, Callable[[], Any]] = {
            "one": lambda: calls.prune_with(calls.PRUNERS["torch"], case)(calls.bare_module(weight)),
            "list": lambda: prune_like_torch(weights, grid),
        }
        rows = {"one": report.case_row(case, None), "list": list_row("ResNet-50, 54 weights", grid, None)}
        for name, row in rows.items():
            del row["correct"]  # the same cases are checked where they are timed
            size, peak = row["bytes"], peak_bytes(ours[name])
            yield row | {
                "peak": peak / size,
                "beyond_outputs": peak - 2 * size,
                "torch_peak": peak_bytes(theirs[name]) / size,
            }

    def launches(self) -> Iterator[Row]:
        """What a call puts on the device."""
        grid = list_cases("ResNet-50, 54 weights", 0)
        weights = list_weights(grid)
        matrix, convolution = (
            calls.random_weight(Case(shape, torch.float32, 0, 2), DEVICE)
            for shape in (ONE_MATRIX, CONVOLUTION)
        )
        case = Case(ONE_MATRIX, torch.float32, 0, 2)
        prune = calls.prune_with(lnprune.ln_structured, case)
        torch_prune = calls.prune_with(calls.PRUNERS["torch"], case)
        once = prune(calls.bare_module(matrix))
        counted: dict[str, Callable[[], Any]] = {
            "channel_norms, 4096 x 4096, dim 0": lambda: lnprune.channel_norms(matrix, 2, 0),
            "channel_norms, 4096 x 4096, dim 1": lambda: lnprune.channel_norms(matrix, 2, 1),
            "channel_norms, 512 x 512 x 3 x 3, dim 1": lambda: lnprune.channel_norms(convolution, 2, 1),
            "ln_structured, 4096 x 4096": lambda: prune(calls.bare_module(matrix)),
            "ln_structured, 4096 x 4096, torch's": lambda: torch_prune(calls.bare_module(matrix)),
            "ln_structured again, 4096 x 4096": lambda: prune(calls.fresh_copy(once)),
            "ln_structured again, 4096 x 4096, torch's": lambda: torch_prune(calls.fresh_copy(once)),
            cuda_report.RESNET50_LAUNCHES: lambda: prune_list(weights, grid),
            "the same, torch's loop": lambda: prune_like_torch(weights, grid),
        }
        count_launches(counted["channel_norms, 4096 x 4096, dim 0"])  # the profiler's first time is its own
        for name, run in counted.items():
            run()
            yield {"call": name, **count_launches(run)}


def show(row: Row) -> None:
    """Prints a row as soon as it is known."""
    if "shape" in row:
        report.show(row)
    else:
        figures = (f"{report.TITLES.get(key, key)} {report.cell(key, row)}" for key in row)
        print("  ".join(figures), flush=True)


def run_sections(
    sections: dict[str, Callable[[], Iterator[Row]]],
    write: Callable[[dict[str, list[Row]], dict[str, str]], None],
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Runs each section and writes all results so far after each row, should the run be stopped.

    Returns the rows and, for sections that failed, why.
    """
    found: dict[str, list[Row]] = {}
    failures: dict[str, str] = {}
    for name, section in sections.items():
        print(f"\n{name}: {' '.join((section.__doc__ or '').split())}", flush=True)
        found[name] = []
        try:
            for row in section():
                found[name].append(row)
                show(row)
                write(found, failures)
        except Exception as error:  # the other sections are worth having all the same
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"
            write(found, failures)
    return found, failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases, in under a minute")
    parser.add_argument("--out", type=pathlib.Path, default=BUILD, help=f"folder of all cases ({BUILD})")
    parser.add_argument("--sections", help=f"some of {', '.join(cuda_report.CHAPTERS)}, between commas")
    parser.add_argument(
        "--from", dest="saved", type=pathlib.Path, help="the folder of a run, to write its page in results/"
    )
    options = parser.parse_args()
    if options.saved is not None:
        try:
            print(f"wrote {', '.join(map(str, cuda_page.write(options.saved)))}")
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return 0
    names = options.sections.split(",") if options.sections else list(cuda_report.CHAPTERS)
    if unknown := set(names) - set(cuda_report.CHAPTERS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: nothing was measured")
    if not ops.has_cuda():
        parser.error(f"the CUDA library is missing: {ops.build_info()['cuda']}")

    start = time.perf_counter()
    machine = cuda_report.environment()

    def write(found: dict[str, list[Row]], failures: dict[str, str]) -> None:
        cuda_report.write(options.out, machine, found, failures, time.perf_counter() - start)

    sections = Benchmark(Gpu(), options.quick).sections()
    # Shares are of the copy, so it is always measured.
    sections = {name: section for name, section in sections.items() if name in {"copy", *names}}
    found, failures = run_sections(sections, write)
    print("\n" + "\n".join(report.verdict_lines(cuda_report.verdicts(found))))
    print(f"\n{time.perf_counter() - start:.0f} s; wrote {options.out / 'cuda.json'} and cuda_cases.md")
    return 1 if failures or report.faults(found) else 0


if __name__ == "__main__":
    sys.exit(main())
