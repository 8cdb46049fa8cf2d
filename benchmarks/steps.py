"""Where a call's time goes: its steps one by one beside those of the floor, in warm and in cold caches."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

import lnprune
from benchmarks import calls
from benchmarks.shapes import Case, dtype_name, shape_name
from benchmarks.timing import Peer, interleaved
from lnprune import ops

CASES = [
    Case(shape, dtype, dim, 2)
    for shape, dtype in [
        ((8, 8), torch.float32),
        ((1536, 384), torch.float32),
        ((2048, 1024), torch.float32),
        ((30522, 384), torch.bfloat16),
    ]
    for dim in (0, 1)
]
# Read before each step, so that neither code nor data of the step is left in the caches.
OTHER_WORK_BYTES = 64 << 20


def steps(case: Case) -> dict[str, Callable[[], Any]]:
    weight = calls.random_weight(case)
    modules = calls.bare_module(weight)
    once = calls.prune_with(lnprune.ln_structured, case)(calls.bare_module(weight))
    mask, dims, count = once.weight_mask, [case.dim], case.channels // 2
    norms = ops.channel_norms([weight], dims, case.n)
    keep = ops.select_channels(norms, [], [count], [0.0])
    prune = calls.prune_with(lnprune.ln_structured, case)
    return {
        "sum": weight.sum,
        "fill": lambda: torch.empty_like(weight).fill_(1),
        "clone": weight.clone,
        "floor": lambda: calls.floor(weight)(None),
        "norms": lambda: ops.channel_norms([weight], dims, case.n),
        "select": lambda: ops.select_channels(norms, [], [count], [0.0]),
        "write": lambda: ops.write_masks(keep, [weight], [], [weight], dims),
        "all in one": lambda: ops.prune_channels([weight], [], [weight], dims, case.n, [count], [0.0]),
        "call": lambda: prune(calls.fresh_copy(modules)),
        "mask counts": lambda: ops.channel_norms([mask], dims, 0.0),
        "write again": lambda: ops.write_masks(keep, [weight], [mask], [weight], dims),
        "repeated call": lambda: prune(calls.fresh_copy(once)),
    }


def measure(case: Case, cold: bool, budget: float) -> dict[str, tuple[float, float]]:
    """Median microseconds and page faults of each step."""
    other = torch.ones(OTHER_WORK_BYTES // 4)
    functions = steps(case)

    def warm() -> None:
        if cold:
            other.sum()
        functions["sum"]()

    peers = {name: Peer(lambda _, step=step: step()) for name, step in functions.items()}
    timing = interleaved(peers, budget, warm, one_by_one=True)
    return {
        name: (1e6 * timing.seconds(name), statistics.median(timing.faults[name])) for name in functions
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each line (%(default)g)")
    budget = parser.parse_args().budget
    print("Median microseconds (page faults, where there are any); n = 2, half of the channels.\n")
    header: list[str] = []
    for case in CASES:
        for cold in (False, True):
            found = measure(case, cold, budget)
            if not header:
                header = ["shape", "dtype", "dim", "caches", *found]
                print("| " + " | ".join(header) + " |\n" + "| --- " * len(header) + "|")
            row = [
                shape_name(case.shape),
                dtype_name(case.dtype),
                str(case.dim),
                "cold" if cold else "warm",
            ]
            row += [
                f"{t:.0f} ({faults:.0f})" if faults >= 1 else f"{t:.0f}" for t, faults in found.values()
            ]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
