"""Whole models on the CPU: lists of weights against loops of torch, selections, and memory."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lnprune
from benchmarks import calls, memory, program, report
from benchmarks.lists import (
    ALL_OF_RESNET50,
    LIST_BUDGETS,
    RESNET50_SHAPES,
    name_of,
    time_in_place,
    time_list,
    weights_of,
)
from benchmarks.program import RECYCLED, Program, Sections
from benchmarks.report import Row, Verdict
from benchmarks.shapes import MLP, Shape, shape_name
from benchmarks.timing import Peer, interleaved
from lnprune.plans.layers import Layers
from lnprune.plans.selection import Arrangement

SMALL_SHAPES: list[Shape] = [(16, 16)] * 1000
SELECTIONS = 10
MANY_LAYERS, MANY_CHANNELS = 1000, 1_000_000
CONSTRAINTS = {"min_channels": 16, "multiple_of": 8, "group_size": 4}
# The tables of the page: what each shows, and its columns.
CHAPTERS = {
    "in_place": (
        f"Zeros in place, dim 0, in one float32 matrix of {shape_name(MLP)} (180 MB), over `torch.sum` of "
        "that matrix, which reads it once:",
        ("amount", "lnprune", "sum", "over_sum"),
    ),
    "selections": (
        "One selection from the ranking of ResNet-50's 54 weights (`Ranking.select`, the mean of "
        f"{SELECTIONS} with amounts from 0.05 to 0.86), over the ranking itself (`rank`):",
        ("selection", "rank", "select", "over_rank"),
    ),
    "many": (
        "One global selection of half the parameters from 1,000,000 channels in 1,000 layers, with all "
        f"constraints ({', '.join(f'{name}={value}' for name, value in CONSTRAINTS.items())}):",
        ("normalize", "lnprune"),
    ),
    "memory": (
        "New memory while zeros are written into that matrix, in sizes of the matrix and for each channel "
        "(the peak of a process of its own):",
        ("dim", "peak", "bytes_per_channel"),
    ),
}


def time_lists(budget: float) -> list[Row]:
    kinds = [(RESNET50_SHAPES, True), (SMALL_SHAPES, False), (SMALL_SHAPES, True)]
    return [time_list(shapes, dim, permanent, budget) for shapes, permanent in kinds for dim in (0, 1)]


def time_selections(budget: float) -> list[Row]:
    weights = weights_of(RESNET50_SHAPES)
    pairs = [(calls.bare_module(weight), "weight") for weight in weights]
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
        timing = interleaved(peers, LIST_BUDGETS * budget, partial(calls.read_all, weights))
        row = {"selection": name} | report.timed_columns(timing, over_rank=("select", "rank"))
        row["select"] /= SELECTIONS
        row["over_rank"] /= SELECTIONS
        row["over_rank" + report.QUARTILES] = [q / SELECTIONS for q in row["over_rank" + report.QUARTILES]]
        rows.append(row)
        report.show(row)
    return rows


def time_many(budget: float) -> list[Row]:
    count = MANY_CHANNELS // MANY_LAYERS
    rows = []
    for normalize in ("size", "layer"):
        measured = Layers(
            [str(i) for i in range(MANY_LAYERS)],
            [count] * MANY_LAYERS,
            [64 * (1 + i % 7) for i in range(MANY_LAYERS)],
            torch.rand(MANY_CHANNELS, dtype=torch.float64),
            None,
            None,
            2.0,
        )

        def select(_: Any, measured: Layers = measured, normalize: str = normalize) -> Tensor:
            arrangement = Arrangement(measured, normalize, **CONSTRAINTS)
            return arrangement.select_global(calls.AMOUNT, "parameters")

        timing = interleaved({"lnprune": Peer(select)}, budget, lambda: None)
        rows.append({"channels": MANY_CHANNELS, "normalize": normalize} | report.timed_columns(timing))
        report.show(rows[-1])
    return rows


def measure_memory() -> list[Row]:
    rows = []
    for dim in (0, 1):
        peak = memory.measure("in place", dim)
        row = {"call": "permanent", "dim": dim, "peak": peak}
        rows.append(row | {"bytes_per_channel": peak * 4 * MLP[0] * MLP[1] / MLP[dim]})
        report.show(rows[-1])
    return rows


def verdicts(sections: Sections) -> list[Verdict]:
    """What was asked for, and what was found."""
    found = []
    lists = {(row["shape"], row["call"], row["dim"]): row for row in sections["lists"]}
    small = name_of(SMALL_SHAPES)
    for shape, call, wanted in (
        (ALL_OF_RESNET50, "permanent", (15.0, 25.0)),
        (small, "masks", (2.5, 2.5)),
        (small, "permanent", (10.0, 10.0)),
    ):
        rows = [lists[shape, call, dim] for dim in (0, 1)]
        found.append(
            Verdict(
                f"{shape}, {call}, dim 0 / dim 1, against torch",
                f"{wanted[0]:g} x / {wanted[1]:g} x",
                " / ".join(report.cell("speedup", row) for row in rows),
                all(row["speedup"] >= least for row, least in zip(rows, wanted, strict=True)),
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


def speed_lines(machine: dict[str, Any], sections: Sections) -> list[str]:
    """What the README says of the speed."""
    found = {(row["shape"], row["call"], row["dim"]): row["speedup"] for row in sections["lists"]}
    lines = ["| weights | call | dim 0 | dim 1 |", "| --- | --- | ---: | ---: |"]
    for shape, call in dict.fromkeys(key[:2] for key in found):
        arguments = "..., permanent=True" if call == "permanent" else "..."
        speedups = " | ".join(f"{found[shape, call, dim]:.1f} x" for dim in (0, 1))
        lines.append(f"| {shape} | `local_structured({arguments})` | {speedups} |")
    return lines


def markdown(machine: dict[str, Any], sections: Sections, seconds: float) -> str:
    """The page: figures, and what they mean, on one screen."""
    lines = [
        "# lnprune on whole models, on the CPU",
        "",
        report.provenance(machine, seconds),
        report.cpu_of(machine),
        f"{program.conditions(machine, sections)} Memory was used before. Lists were checked against "
        f"float64 norms before they were timed; {len(report.faults(sections))} failed.",
        *report.fault_lines(sections),
        "",
        "Torch's time over ours: one call against a loop over the same weights, of `ln_structured` or, "
        "where `permanent=True` writes zeros in place, of `ln_structured` and `remove`. n = 2, half of the "
        "channels of each weight. Modules are made before the clock runs.",
        "",
        *speed_lines(machine, sections),
    ]
    for name, (text, columns) in CHAPTERS.items():
        shown = (*columns, *(column + report.QUARTILES for column in columns))
        rows = [{key: row[key] for key in shown if key in row} for row in sections[name]]
        lines += ["", text, "", *(report.table(rows) if rows else ["Not measured in this run."])]
    return "\n".join([*lines, *program.warning(machine)]) + "\n"


PROGRAM = Program(
    module="benchmarks.models",
    description=__doc__,
    budget=0.4,
    sections={
        "lists": lambda o: time_lists(o.budget),
        "in_place": lambda o: [time_in_place([MLP], 0, amount, o.budget) for amount in (0.1, 0.3, 0.5)],
        "selections": lambda o: time_selections(o.budget),
        "many": lambda o: time_many(o.budget),
        "memory": lambda _: measure_memory(),
    },
    states={RECYCLED: ["lists", *CHAPTERS]},
    verdicts=verdicts,
    markdown=markdown,
    speed_lines=speed_lines,
    pictures=lambda _: {},
)


if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
