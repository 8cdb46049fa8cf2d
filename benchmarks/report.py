"""Results as Markdown and JSON: machine, targets, summaries and tables."""

from __future__ import annotations

import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import lnprune
from benchmarks.shapes import GENERIC_ORDERS, NAMED_ORDERS
from benchmarks.timing import geometric_mean

Row = dict[str, Any]
ONE_MEGABYTE = 1 << 20
HALF_DTYPES = ("float16", "bfloat16")


def _git(*arguments: str) -> str:
    folder = pathlib.Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _proc_entry(path: str, key: str) -> str:
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "unknown")


def environment() -> dict[str, Any]:
    """Everything needed to say where and how a figure came about."""
    memory = _proc_entry("/proc/meminfo", "MemTotal").split()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["python", "-m", "benchmarks.cpu", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain")),
        "cpu": _proc_entry("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[0]) / 2**20, 1) if memory[0].isdigit() else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lnprune": lnprune.__version__,
        "build": lnprune.ops.build_info(),
    }


class Verdict(NamedTuple):
    target: str
    wanted: str
    measured: str
    met: bool | None


def _case_name(row: Row) -> str:
    return f"{row['shape']} {row['dtype']} dim {row['dim']} n {row['n']}"


def _at_most(rows: list[Row], ratio: str, limit: float) -> tuple[str, bool | None]:
    """How often a time ratio stays within the limit, and the worst case."""
    if not rows:
        return "not measured", None
    worst = max(rows, key=lambda row: row[ratio])
    within = sum(row[ratio] <= limit for row in rows)
    mean = geometric_mean(row[ratio] for row in rows)
    text = (
        f"{within} of {len(rows)} cases; geometric mean {mean:.2f}, "
        f"worst {worst[ratio]:.2f} ({_case_name(worst)})"
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
        f"({_case_name(worst)})"
    )
    if under:
        text += f"; {under} under {least_limit:g} x"
    return text, mean >= mean_limit and under == 0


def verdicts(sections: dict[str, list[Row]]) -> list[Verdict]:
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
        Verdict(
            f"norms, {named}, 1 MiB and larger, float32 and float64",
            "at most 1.2 x the time of torch.sum",
            *_at_most(wide, "over_sum", 1.2),
        ),
        Verdict(
            f"norms, {named}, 1 MiB and larger, float16 and bfloat16",
            "at most 1.5 x the time of torch.sum",
            *_at_most(half, "over_sum", 1.5),
        ),
        Verdict(
            "norms against torch.norm, every n",
            "geometric mean 10 x or more; nowhere slower",
            *_at_least(norms, 10, 1),
        ),
        Verdict(
            "norms against torch.norm, n in {0.5, 2.5, 3}",
            "3 x or more everywhere",
            *_at_least(generic, 3, 3),
        ),
        Verdict(
            "whole call, 1 MiB and larger, against the floor",
            "no slower than the floor",
            *_at_most(large_first, "over_floor", 1.0),
        ),
        Verdict(
            "whole call, 1 MiB and larger, against torch",
            "geometric mean 5 x or more; nowhere under 1.5 x",
            *_at_least(large_first, 5, 1.5),
        ),
        Verdict(
            "whole call on 8 x 8", "at most 0.65 of torch's time", *_at_most(tiny_first, "over_torch", 0.65)
        ),
        Verdict("repeated call against torch", "geometric mean 5 x or more", *_at_least(again, 5, 0)),
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
        Verdict("memory at the peak of a call", "mask + masked weight (2 weights) + O(channels)", *memory)
    )
    return found


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


FORMATS: dict[str, Callable[[Any], str]] = {
    "lnprune": _time,
    "torch": _time,
    "sum": _time,
    "floor": _time,
    "compiled": _time,
    "torch_pruning": _time,
    "abs_pow_sum": _time,
    "gigabytes_per_second": lambda value: f"{value:.1f}",
    "speedup": lambda value: f"{value:.2f} x",
    "over_sum": lambda value: f"{value:.2f}",
    "over_floor": lambda value: f"{value:.2f}",
    "over_torch": lambda value: f"{value:.2f}",
    "compiled_speedup": lambda value: f"{value:.2f} x",
    "error": lambda value: f"{value:.0e}",
    "peak": lambda value: f"{value:.3f}",
    "correct": lambda value: "yes" if value else "NO",
}
TITLES = {
    "lnprune": "lnprune",
    "torch": "torch",
    "sum": "torch.sum",
    "floor": "floor",
    "compiled": "torch.compile",
    "torch_pruning": "Torch-Pruning",
    "abs_pow_sum": "its expression",
    "gigabytes_per_second": "GB/s",
    "speedup": "against torch",
    "over_sum": "time / sum",
    "over_floor": "time / floor",
    "over_torch": "time / torch",
    "compiled_speedup": "against torch.compile",
    "error": "relative error",
    "peak": "peak, in weights",
}
HIDDEN = {"bytes", "fault"}


def _cell(key: str, row: Row) -> str:
    value = row.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return FORMATS.get(key, str)(value)


def table(rows: list[Row]) -> list[str]:
    """A Markdown table of the rows, one column per key that any of them has."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
    numeric = {key for key in keys if isinstance(next(row[key] for row in rows if key in row), int | float)}
    lines = ["| " + " | ".join(TITLES.get(key, key) for key in keys) + " |"]
    lines.append("|" + "|".join(" ---: " if key in numeric else " --- " for key in keys) + "|")
    lines += ["| " + " | ".join(_cell(key, row) for key in keys) + " |" for row in rows]
    return lines


def summary(rows: list[Row], ratios: list[str]) -> list[str]:
    """Geometric means per dtype, dim and order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["dim"], row["n"]), []).append(row)
    means = []
    for (dtype, dim, n), members in groups.items():
        mean: Row = {"dtype": dtype, "dim": dim, "n": n, "cases": len(members)}
        for ratio in ratios:
            mean[ratio] = geometric_mean(row[ratio] for row in members if ratio in row)
        means.append(mean)
    return table(means)


def _section(title: str, text: str, rows: list[Row], ratios: list[str]) -> list[str]:
    lines = ["", f"## {title}", "", text]
    if not rows:
        return [*lines, "", "Not measured in this run."]
    if ratios:
        lines += ["", "Geometric means:", "", *summary(rows, ratios)]
        lines += [
            "",
            f"<details><summary>All {len(rows)} cases</summary>",
            "",
            *table(rows),
            "",
            "</details>",
        ]
    else:
        lines += ["", *table(rows)]
    return lines


def verdict_lines(found: list[Verdict]) -> list[str]:
    marks = {True: "yes", False: "no", None: ""}
    lines = ["| what | target | measured | met |", "| --- | --- | --- | --- |"]
    return lines + [f"| {v.target} | {v.wanted} | {v.measured} | {marks[v.met]} |" for v in found]


def markdown(machine: dict[str, Any], sections: dict[str, list[Row]], seconds: float) -> str:
    """The whole report."""
    build = ", ".join(f"{key} {value}" for key, value in machine["build"].items())
    faults = [row for rows in sections.values() for row in rows if row.get("fault")]
    checked = sum(len(sections[name]) for name in ("norms", "first", "repeated"))
    lines = [
        "# lnprune on the CPU",
        "",
        f"`{machine['command']}` on {machine['date']}, {seconds / 60:.1f} minutes, commit "
        f"{machine['commit'][:12]}{' with uncommitted changes' if machine['dirty'] else ''}.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used, "
        f"{machine['memory_gib']} GiB, {machine['system']}; Python {machine['python']}, torch "
        f"{machine['torch']}, lnprune {machine['lnprune']} (native library: {build}).",
        "",
        f"Each of the {checked} cases was checked before it was timed; {len(faults)} failed. Times are "
        "medians, ratios are medians of the ratios within one round of interleaved runs.",
        "",
        "## Targets",
        "",
        *verdict_lines(verdicts(sections)),
    ]
    if faults:
        lines += ["", "Wrong results:", "", *(f"- {_case_name(row)}: {row['fault']}" for row in faults)]
    lines += _section(
        "Norms",
        "`lnprune.channel_norms` (float64 sums) against `torch.norm` over the other dims, which torch's "
        "pruning calls; against `torch.sum` over the same tensor, the time of reading it once; and against "
        "Torch-Pruning: its `MagnitudeImportance(p, normalizer=None)` on a group of this one layer, and "
        "the expression inside it, `w.flatten(1).abs().pow(p).sum(1)`. The relative error is against "
        "`torch.norm` in float64.",
        sections["norms"],
        ["speedup", "over_sum"],
    )
    lines += _section(
        "Whole call",
        "`ln_structured(module, 'weight', amount=0.5, n, dim)` on a module that is not pruned yet. The "
        "floor is `w.sum(); torch.empty_like(w).fill_(1); w.clone()`. Making and dropping modules is not "
        "timed.",
        sections["first"],
        ["speedup", "over_floor"],
    )
    lines += _section(
        "Whole call against torch.compile",
        "Mask and masked weight as one compiled function of the weight, compiled before the clock runs; it "
        "leaves out what `ln_structured` does to the module.",
        sections["compiled"],
        [],
    )
    lines += _section(
        "Repeated call",
        "The second `ln_structured` on a module, again with amount=0.5.",
        sections["repeated"],
        ["speedup"],
    )
    lines += _section(
        "Memory",
        "The peak of one call (VmHWM after it less VmRSS before it) on a float32 weight of 4096 x 11008, "
        "in a process of its own, in units of the weight. Mask and masked weight, which stay, are 2.",
        sections["memory"],
        [],
    )
    return "\n".join(lines) + "\n"


def _json_row(row: Row) -> Row:
    # JSON has no infinity and no NaN: they travel as text.
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def write(folder: pathlib.Path, sections: dict[str, list[Row]], seconds: float) -> None:
    """Writes cpu.md and cpu.json."""
    machine = environment()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.md").write_text(markdown(machine, sections, seconds))
    found = [verdict._asdict() for verdict in verdicts(sections)]
    rows = {name: [_json_row(row) for row in part] for name, part in sections.items()}
    document = {"environment": machine, "seconds": seconds, "targets": found, **rows}
    (folder / "cpu.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
