"""Whole models on the CPU: lists of weights against loops of torch, selections, and memory."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import lnprune
from benchmarks import calls, report
from benchmarks.memory import read_status, reset_peak
from benchmarks.report import Row, Verdict
from benchmarks.shapes import MLP, RESNET50, Case
from benchmarks.timing import Peer, batch, interleaved
from lnprune.selection import Arrangement, Layers

AMOUNT = 0.5
Pairs = list[tuple[nn.Module, str]]
SMALL_LAYERS = 1000
SMALL = (16, 16)
SELECTIONS = 10
MANY_CHANNELS = 1_000_000
CONSTRAINTS = {"min_channels": 16, "multiple_of": 8, "group_size": 4}
CHAPTERS = {
    "lists": (
        "Lists of weights",
        "`local_structured(parameters, amount=0.5, n=2, dim)` against a loop of torch's `ln_structured`; "
        "permanent: `local_structured(..., permanent=True)` against a loop of `ln_structured` and "
        "`remove`. Modules are made before the clock runs, for `permanent` with weights of their own.",
    ),
    "in_place": (
        "One large matrix in place",
        "`local_structured([(module, 'weight')], amount, n=2, dim=0, permanent=True)` against `torch.sum` "
        "over the same float32 matrix of 4096 x 11008 (180 MB).",
    ),
    "selections": (
        "Selections",
        f"{SELECTIONS} calls of `Ranking.select`, amounts from 0.05 to 0.86, from one fresh ranking of "
        "ResNet-50's 54 weights; their mean, and its share of the time of `rank` (with the norms read).",
    ),
    "many": (
        "A million channels",
        "One global selection of half the parameters from 1,000,000 channels in 1,000 layers: the ranking "
        f"of blocks, and the cut, with all constraints ({CONSTRAINTS}).",
    ),
    "memory": (
        "Memory",
        "The peak of one call (VmHWM after it less VmRSS before it) on the matrix of 180 MB, in a process "
        "of its own, in units of the weight and in bytes per channel.",
    ),
}


def module_of(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module


def torch_loop(pairs: Pairs, dim: int) -> Pairs:
    for module, name in pairs:
        stock.ln_structured(module, name, amount=AMOUNT, n=2, dim=dim)
    return pairs


def torch_loop_and_remove(pairs: Pairs, dim: int) -> Pairs:
    for module, name in pairs:
        stock.ln_structured(module, name, amount=AMOUNT, n=2, dim=dim)
        stock.remove(module, name)
    return pairs


def local(pairs: Pairs, dim: int, permanent: bool) -> Pairs:
    lnprune.local_structured(pairs, AMOUNT, 2, dim, permanent=permanent)
    return pairs


def list_fault(weights: list[Tensor], dim: int, permanent: bool) -> str | None:
    """What is wrong with a list that is pruned at once, against float64 norms."""
    pairs = local([(module_of(weight.clone()), "weight") for weight in weights], dim, permanent)
    for weight, (module, _) in zip(weights, pairs, strict=True):
        case = Case(tuple(weight.shape), weight.dtype, dim, 2)
        mask = torch.ones_like(weight)
        if permanent:
            zero = (module.weight == 0).all(dim=case.other_dims[0]) if weight.dim() == 2 else None
            keep = ~zero if zero is not None else module.weight.abs().amax(dim=case.other_dims) != 0
            shape = [1] * weight.dim()
            shape[dim] = -1
            mask = mask * keep.view(shape)
        else:
            mask = module.weight_mask
        alive = torch.ones(case.channels, dtype=torch.bool)
        norms = calls.reference_norms(weight, case)
        fault = calls.mask_fault(mask, weight, module.weight.detach(), norms, case, alive)
        if fault is not None:
            return fault
    return None


def time_lists(budget: float) -> list[Row]:
    resnet50 = [torch.randn(shape) for count, shape in RESNET50 for _ in range(count)]
    small = [torch.randn(SMALL) for _ in range(SMALL_LAYERS)]
    rows = []
    for name, weights in (
        ("ResNet-50, 54 weights", resnet50),
        (f"{SMALL_LAYERS} of {SMALL[0]} x {SMALL[1]}", small),
    ):
        for dim in (0, 1):
            for permanent in (False, True):
                loop = torch_loop_and_remove if permanent else torch_loop

                def make(weights: list[Tensor] = weights, permanent: bool = permanent) -> Pairs:
                    return [(module_of(w.clone() if permanent else w), "weight") for w in weights]

                peers = {
                    "lnprune": Peer(lambda pairs, d=dim, p=permanent: local(pairs, d, p), make),
                    "torch": Peer(lambda pairs, d=dim, call=loop: call(pairs, d), make),
                }
                fault = list_fault(weights, dim, permanent)
                timing = interleaved(peers, 12 * budget, lambda weights=weights: [w.sum() for w in weights])
                row: Row = {
                    "shape": name,
                    "call": "permanent" if permanent else "masks",
                    "dim": dim,
                    "correct": fault is None,
                    "lnprune": timing.seconds("lnprune"),
                    "torch": timing.seconds("torch"),
                    "speedup": timing.ratio("torch", "lnprune"),
                }
                if fault is not None:
                    row["fault"] = fault
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def time_in_place(budget: float) -> list[Row]:
    weight = torch.randn(MLP)
    module = module_of(weight)
    rows = []
    for amount in (0.1, 0.3, 0.5):

        def prune(_: Any, amount: float = amount) -> None:
            # Zeros or not, every channel is read and the same number is written.
            lnprune.local_structured([(module, "weight")], amount, 2, 0, permanent=True)

        peers = {"lnprune": Peer(prune), "sum": Peer(lambda _: weight.sum())}
        timing = interleaved(peers, 12 * budget, weight.sum)
        row = {
            "shape": "4096 x 11008",
            "amount": amount,
            "lnprune": timing.seconds("lnprune"),
            "sum": timing.seconds("sum"),
            "over_sum": timing.ratio("lnprune", "sum"),
        }
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def time_selections(budget: float) -> list[Row]:
    weights = [torch.randn(shape) for count, shape in RESNET50 for _ in range(count)]
    pairs = [(module_of(weight), "weight") for weight in weights]
    rows = []
    for name, options in (
        ("local", {"scope": "local"}),
        ("global", {"scope": "global"}),
        ("global, of parameters", {"scope": "global", "of": "parameters"}),
        ("global, constraints", {"scope": "global", "of": "parameters", **CONSTRAINTS}),
    ):
        # The first convolution's three input channels are no group of four: outputs only.
        def rank(_: Any) -> Any:
            ranking = lnprune.rank(pairs, n=2, dim=0)
            assert ranking._layers is not None  # gathers the norms, as the first selection does
            return ranking

        def select(ranking: Any, options: dict[str, Any] = options) -> None:
            for i in range(SELECTIONS):
                ranking.select(0.05 + 0.09 * i, **options)

        peers = {"rank": Peer(rank), "select": Peer(select, lambda rank=rank: rank(None))}
        timing = interleaved(peers, 12 * budget, lambda: [w.sum() for w in weights])
        row = {
            "selection": name,
            "rank": timing.seconds("rank"),
            "select": timing.seconds("select") / SELECTIONS,
            "over_rank": timing.ratio("select", "rank") / SELECTIONS,
        }
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def time_many() -> list[Row]:
    layers = 1000
    count = MANY_CHANNELS // layers
    rows = []
    for normalize in ("size", "layer"):
        measured = Layers(
            [str(i) for i in range(layers)],
            [count] * layers,
            [64 * (1 + i % 7) for i in range(layers)],
            torch.rand(MANY_CHANNELS, dtype=torch.float64),
            None,
            2.0,
        )

        def select(_: Any, measured: Layers = measured, normalize: str = normalize) -> Tensor:
            arrangement = Arrangement(measured, normalize, **CONSTRAINTS)
            return arrangement.select_global(AMOUNT, "parameters")

        seconds = min(batch(Peer(select), 1) for _ in range(5))
        rows.append({"channels": MANY_CHANNELS, "normalize": normalize, "lnprune": seconds})
        print(_line(rows[-1]), flush=True)
    return rows


def measure_memory() -> list[Row]:
    rows = []
    for dim in (0, 1):
        command = [sys.executable, "-m", "benchmarks.models", "--peak", str(dim)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(json.loads(done.stdout))
        size = 4 * math.prod(MLP)
        rows.append(
            {
                "call": "permanent",
                "dim": dim,
                "peak": peak / size,
                "bytes_per_channel": peak / MLP[dim],
            }
        )
        print(_line(rows[-1]), flush=True)
    return rows


def peak_in_place(dim: int) -> int:
    """Bytes beyond what the process held before the call."""
    local([(module_of(torch.randn(1024, 1024)), "weight")], dim, permanent=True)
    pairs = [(module_of(torch.randn(MLP)), "weight")]
    reset_peak()
    before = read_status("VmRSS")
    local(pairs, dim, permanent=True)
    return read_status("VmHWM") - before


def _line(row: Row) -> str:
    return "  ".join(f"{report.TITLES.get(key, key)} {report.cell(key, row)}" for key in row)


def verdicts(sections: dict[str, list[Row]]) -> list[Verdict]:
    """What was asked for, and what was found."""
    found = []
    lists = {(row["shape"].split(",")[0], row["call"], row["dim"]): row for row in sections["lists"]}
    small = f"{SMALL_LAYERS} of {SMALL[0]} x {SMALL[1]}"
    for shape, call, wanted in (
        ("ResNet-50", "masks", (3.0, 6.0)),
        ("ResNet-50", "permanent", (15.0, 25.0)),
        (small, "masks", (2.5, 2.5)),
        (small, "permanent", (10.0, 10.0)),
    ):
        speedups = [lists[shape, call, dim]["speedup"] for dim in (0, 1)]
        found.append(
            Verdict(
                f"{shape}, {call}, dim 0 / dim 1, against torch",
                f"{wanted[0]:g} x / {wanted[1]:g} x",
                " / ".join(f"{value:.1f} x" for value in speedups),
                all(value >= least for value, least in zip(speedups, wanted, strict=True)),
            )
        )
    over = [row["over_sum"] for row in sections["in_place"]]
    amounts = ", ".join(f"{row['amount']:g}: {row['over_sum']:.2f}" for row in sections["in_place"])
    found.append(Verdict("180 MB in place, dim 0, against torch.sum", "1.3", amounts, max(over) <= 1.3))
    shares = {row["selection"]: row["over_rank"] for row in sections["selections"]}
    shown = ", ".join(f"{name}: {share:.3f}" for name, share in shares.items())
    found.append(
        Verdict("a selection's share of a ranking", "under 0.1", shown, max(shares.values()) < 0.1)
    )
    slowest = max(row["lnprune"] for row in sections["many"])
    found.append(
        Verdict("1,000,000 channels, all constraints", "under 1 s", f"{slowest:.2f} s", slowest < 1)
    )
    peaks = [row["bytes_per_channel"] for row in sections["memory"]]
    shown = ", ".join(f"{row['bytes_per_channel']:.0f} bytes per channel" for row in sections["memory"])
    # The interpreter's own growth, of some hundred kilobytes, is among them.
    found.append(Verdict("memory in place", "O(channels)", shown, max(peaks) < 1000))
    return found


def speed_lines(sections: dict[str, list[Row]]) -> list[str]:
    """What the README says of the speed."""
    found = {(row["shape"], row["call"], row["dim"]): row["speedup"] for row in sections["lists"]}
    lines = ["| weights | call | dim 0 | dim 1 |", "| --- | --- | ---: | ---: |"]
    for shape, call in dict.fromkeys(key[:2] for key in found):
        arguments = "..., permanent=True" if call == "permanent" else "..."
        speedups = " | ".join(f"{found[shape, call, dim]:.1f} x" for dim in (0, 1))
        lines.append(f"| {shape} | `local_structured({arguments})` | {speedups} |")
    return lines


def markdown(machine: dict[str, Any], sections: dict[str, list[Row]], seconds: float) -> str:
    """The whole report."""
    lines = [
        "# lnprune on whole models, on the CPU",
        "",
        report.provenance(machine, seconds),
        "",
        report.cpu_of(machine),
        "",
        "Times are medians, ratios are medians of the ratios within one round of interleaved runs. Lists "
        "were checked against float64 norms before they were timed; "
        f"{len(report.faults(sections))} failed.",
        "",
        "## Targets",
        "",
        *report.verdict_lines(verdicts(sections)),
    ]
    for name, (title, text) in CHAPTERS.items():
        lines += report.section(title, text, sections[name], [])
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=report.RESULTS)
    parser.add_argument("--budget", type=float, default=0.5, help="twelfths of seconds for each case")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.peak is not None:
        print(json.dumps(peak_in_place(options.peak)))
        return 0
    start = time.perf_counter()
    measure: dict[str, Callable[[], list[Row]]] = {
        "lists": lambda: time_lists(options.budget),
        "in_place": lambda: time_in_place(options.budget),
        "selections": lambda: time_selections(options.budget),
        "many": time_many,
        "memory": measure_memory,
    }
    sections = {}
    for name, function in measure.items():
        print(f"\n{CHAPTERS[name][0]}", flush=True)
        sections[name] = function()
    seconds = time.perf_counter() - start
    machine = report.environment("benchmarks.models")
    found = verdicts(sections)
    text = markdown(machine, sections, seconds)
    head = {"environment": machine, "seconds": seconds}
    report.write(options.out, "models", text, head, found, sections)
    if options.out == report.RESULTS:
        report.replace_marked(report.README, "benchmarks.models", speed_lines(sections))
    print("\n" + "\n".join(report.verdict_lines(found)))
    print(f"\n{seconds:.0f} s; wrote {options.out / 'models.md'} and {options.out / 'models.json'}")
    return 1 if report.faults(sections) else 0


if __name__ == "__main__":
    sys.exit(main())
