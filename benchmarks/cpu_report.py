"""The report of the CPU benchmark: its targets, what was measured of them, and its chapters."""

from __future__ import annotations

import pathlib
from typing import Any

from benchmarks import report
from benchmarks.report import Row
from benchmarks.shapes import GENERIC_ORDERS, NAMED_ORDERS
from benchmarks.timing import geometric_mean

ONE_MEGABYTE = 1 << 20
HALF_DTYPES = ("float16", "bfloat16")


def _at_most(rows: list[Row], ratio: str, limit: float) -> tuple[str, bool | None]:
    """How often a time ratio stays within the limit, and the worst case."""
    if not rows:
        return "not measured", None
    worst = max(rows, key=lambda row: row[ratio])
    within = sum(row[ratio] <= limit for row in rows)
    mean = geometric_mean(row[ratio] for row in rows)
    text = (
        f"{within} of {len(rows)} cases; geometric mean {mean:.2f}, "
        f"worst {worst[ratio]:.2f} ({report.case_name(worst)})"
    )
    return text, within == len(rows)


def _at_least(rows: list[Row], mean_limit: float, least_limit: float) -> tuple[str, bool | None]:
    """The geometric mean of the speed-up over torch, and the worst case."""
    if not rows:
        return "not measured", None
    worst = min(rows, key=lambda row: row["speedup"])
    under = sum(row["speedup"] < least_limit for row in rows)
    mean = geometric_mean(row["speedup"] for row in rows)
    text = (
        f"geometric mean {mean:.1f} x over {len(rows)} cases; worst {worst['speedup']:.2f} x "
        f"({report.case_name(worst)})"
    )
    if under:
        text += f"; {under} under {least_limit:g} x"
    return text, mean >= mean_limit and under == 0


def verdicts(sections: dict[str, list[Row]]) -> list[report.Verdict]:
    """Each target with what was measured and whether it is met."""
    norms, first, again = sections["norms"], sections["first"], sections["repeated"]
    large = [row for row in norms if row["bytes"] >= ONE_MEGABYTE and row["n"] in NAMED_ORDERS]
    wide = [row for row in large if row["dtype"] not in HALF_DTYPES]
    half = [row for row in large if row["dtype"] in HALF_DTYPES]
    generic = [row for row in norms if row["n"] in GENERIC_ORDERS]
    large_first = [row for row in first if row["bytes"] >= ONE_MEGABYTE]
    tiny_first = [row for row in first if row["shape"] == "8 x 8"]
    named = "n in {0, 1, 2, inf, -inf}"
    found = [
        report.Verdict(
            f"norms, {named}, 1 MiB and larger, float32 and float64",
            "at most 1.2 x the time of torch.sum",
            *_at_most(wide, "over_sum", 1.2),
        ),
        report.Verdict(
            f"norms, {named}, 1 MiB and larger, float16 and bfloat16",
            "at most 1.5 x the time of torch.sum",
            *_at_most(half, "over_sum", 1.5),
        ),
        report.Verdict(
            "norms against torch.norm, every n",
            "geometric mean 10 x or more; nowhere slower",
            *_at_least(norms, 10, 1),
        ),
        report.Verdict(
            "norms against torch.norm, n in {0.5, 2.5, 3}",
            "3 x or more everywhere",
            *_at_least(generic, 3, 3),
        ),
        report.Verdict(
            "whole call, 1 MiB and larger, against the floor",
            "no slower than the floor",
            *_at_most(large_first, "over_floor", 1.0),
        ),
        report.Verdict(
            "whole call, 1 MiB and larger, against torch",
            "geometric mean 5 x or more; nowhere under 1.5 x",
            *_at_least(large_first, 5, 1.5),
        ),
        report.Verdict(
            "whole call on 8 x 8", "at most 0.65 of torch's time", *_at_most(tiny_first, "over_torch", 0.65)
        ),
        report.Verdict(
            "repeated call against torch", "geometric mean 5 x or more", *_at_least(again, 5, 0)
        ),
    ]
    ours = [row["peak"] for row in sections["memory"] if row["call"] == "lnprune"]
    theirs = [row["peak"] for row in sections["memory"] if row["call"] == "torch"]
    if ours:
        measured = f"{max(ours):.3f} weights (torch: {max(theirs):.3f})"
        # 1 % of a 180 MB weight covers the norms, the flags and the allocator's pages.
        memory = (measured, max(ours) <= 2.01)
    else:
        memory = ("not measured", None)
    found.append(
        report.Verdict(
            "memory at the peak of a call", "mask + masked weight (2 weights) + O(channels)", *memory
        )
    )
    return found


def markdown(machine: dict[str, Any], sections: dict[str, list[Row]], seconds: float) -> str:
    """The whole report."""
    checked = sum(len(sections[name]) for name in ("norms", "first", "repeated"))
    lines = [
        "# lnprune on the CPU",
        "",
        report.provenance(machine, seconds),
        "",
        report.cpu_of(machine),
        "",
        f"Each of the {checked} cases was checked before it was timed; {len(report.faults(sections))} "
        "failed. Times are medians, ratios are medians of the ratios within one round of interleaved runs.",
        "",
        "## Targets",
        "",
        *report.verdict_lines(verdicts(sections)),
        *report.fault_lines(sections),
    ]
    lines += report.section(
        "Norms",
        "`lnprune.channel_norms` (float64 sums) against `torch.norm` over the other dims, which torch's "
        "pruning calls; against `torch.sum` over the same tensor, the time of reading it once; and against "
        "Torch-Pruning: its `MagnitudeImportance(p, normalizer=None)` on a group of this one layer, and "
        "the expression inside it, `w.flatten(1).abs().pow(p).sum(1)`. The relative error is against "
        "`torch.norm` in float64.",
        sections["norms"],
        ["speedup", "over_sum"],
    )
    lines += report.section(
        "Whole call",
        "`ln_structured(module, 'weight', amount=0.5, n, dim)` on a module that is not pruned yet. The "
        "floor is `w.sum(); torch.empty_like(w).fill_(1); w.clone()`. Making and dropping modules is not "
        "timed.",
        sections["first"],
        ["speedup", "over_floor"],
    )
    lines += report.section(
        "Whole call against torch.compile",
        "Mask and masked weight as one compiled function of the weight, compiled before the clock runs; it "
        "leaves out what `ln_structured` does to the module.",
        sections["compiled"],
        [],
    )
    lines += report.section(
        "Repeated call",
        "The second `ln_structured` on a module, again with amount=0.5.",
        sections["repeated"],
        ["speedup"],
    )
    lines += report.section(
        "Memory",
        "The peak of one call (VmHWM after it less VmRSS before it) on a float32 weight of 4096 x 11008, "
        "in a process of its own, in units of the weight. Mask and masked weight, which stay, are 2.",
        sections["memory"],
        [],
    )
    return "\n".join(lines) + "\n"


def write(folder: pathlib.Path, sections: dict[str, list[Row]], seconds: float) -> None:
    """Writes cpu.md and cpu.json."""
    machine = report.environment("benchmarks.cpu")
    head = {"environment": machine, "seconds": seconds}
    text = markdown(machine, sections, seconds)
    report.write(folder, "cpu", text, head, verdicts(sections), sections)
