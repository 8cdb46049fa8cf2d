"""The report of the CPU benchmark: its targets, what was measured of them, and its chapters."""

from __future__ import annotations

import json
import math
import pathlib
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.report import Row
from benchmarks.shapes import GENERIC_ORDERS, INF, MLP, NAMED_ORDERS, TINY, shape_name
from benchmarks.timing import geometric_mean
from lnprune.report import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECTIONS = ("norms", "first", "compiled", "repeated", "memory")
ONE_MEGABYTE = 1 << 20
SIZES = {
    "under 1 MiB": (0, ONE_MEGABYTE),
    "1 to 32 MiB": (ONE_MEGABYTE, 32 * ONE_MEGABYTE),
    "over 32 MiB": (32 * ONE_MEGABYTE, math.inf),
}
HALF_DTYPES = ("float16", "bfloat16")
MEMORY = ("lnprune", "torch")
ALL_OF_RESNET50 = "ResNet-50, 54 weights"
# What the README shows.
CHOSEN = [
    (shape_name(TINY), "float32"),
    (shape_name((384, 384)), "float32"),
    (shape_name((512, 512, 3, 3)), "float32"),
    (shape_name(MLP), "float32"),
    (shape_name(MLP), "bfloat16"),
    (ALL_OF_RESNET50, "float32"),
]


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
    tiny_first = [row for row in first if row["shape"] == shape_name(TINY)]
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


def _in_size(row: Row, size: str) -> bool:
    least, end = SIZES[size]
    return least <= row["bytes"] < end


def _mean_cell(rows: list[Row], over: str) -> str:
    """Geometric means: the time over that of what must be done, and the speed-up over torch."""
    if not rows:
        return ""
    speedup = f"{geometric_mean(row['speedup'] for row in rows):.1f} x"
    if over not in rows[0]:
        return speedup
    return f"{geometric_mean(row[over] for row in rows):.2f} ({speedup})"


def _mean_table(
    groups: list[tuple[str, list[Row]]], orders: dict[str, list[float]], over: str
) -> list[str]:
    """A line of geometric means for each group that has rows, two columns for each group of orders."""
    titles = [f"{title}: dim {dim}" for title in orders for dim in (0, 1)]
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for title, rows in groups:
        cells = [
            _mean_cell([row for row in rows if row["n"] in some and row["dim"] == dim], over)
            for some in orders.values()
            for dim in (0, 1)
        ]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def norms_table(rows: list[Row]) -> list[str]:
    """Geometric means of the norms by dtype and size."""
    groups = [
        (f"{dtype}, {size}", [row for row in rows if row["dtype"] == dtype and _in_size(row, size)])
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
        for size in SIZES
    ]
    orders = {"n in {1, 2}": [1, 2], "n in {0, ±inf}": [0, INF, -INF], "n in {0.5, 2.5, 3}": GENERIC_ORDERS}
    return _mean_table(groups, orders, "over_sum")


def calls_table(first: list[Row], again: list[Row]) -> list[str]:
    """Geometric means of first and repeated calls by size."""
    single = [row for row in first if row["shape"] != ALL_OF_RESNET50]
    groups = [
        (f"{kind}, {size}", [row for row in rows if _in_size(row, size)])
        for kind, rows in (("first call", single), ("repeated call", again))
        for size in SIZES
    ]
    return _mean_table(groups, {"n in {1, 2, inf}": [1, 2, INF], "n = 3": [3]}, "over_floor")


def _slower(rows: list[Row]) -> str:
    """How many are slower than torch, and which."""
    slow = sorted((row for row in rows if row["speedup"] < 1), key=lambda row: row["speedup"])
    if not slow:
        return f"none of {len(rows)}"
    if len(slow) <= 4:
        which = "; ".join(f"{report.case_name(row)}: {row['speedup']:.2f} x" for row in slow)
    else:
        tiny = [row for row in slow if row["shape"] == shape_name(TINY)]
        vectorised = [row for row in slow if row not in tiny and (row["n"], row["dim"]) == (2, 0)]
        which = (
            f"{len(vectorised)} of them with n = 2 along dim 0, {len(tiny)} on {shape_name(TINY)}; "
            f"down to {slow[0]['speedup']:.2f} x"
        )
    return f"{len(slow)} of {len(rows)} ({which})"


def speed_lines(sections: dict[str, list[Row]]) -> list[str]:
    """What the README says of the speed: chosen calls, means, and where torch is faster."""
    norms, first, again = sections["norms"], sections["first"], sections["repeated"]
    lines = ["| weight | dtype | dim | torch | lnprune | |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    found = {(row["shape"], row["dtype"], row["dim"]): row for row in first if row["n"] == 2}
    for key in ((shape, dtype, dim) for shape, dtype in CHOSEN for dim in (0, 1)):
        if key in found:
            row = found[key]
            cells = [*map(str, key), *(report.cell(name, row) for name in ("torch", "lnprune", "speedup"))]
            lines.append(f"| {' | '.join(cells)} |")
    means = [
        f"{title} {geometric_mean(row['speedup'] for row in rows):.1f} x"
        for title, rows in (
            ("norms", norms),
            ("first calls", first),
            ("first calls on 1 MiB and more", [row for row in first if row["bytes"] >= ONE_MEGABYTE]),
            ("repeated calls", again),
        )
        if rows
    ]
    slow = [
        f"{title} {_slower(rows)}"
        for title, rows in (("first calls", first), ("repeated calls", again), ("norms alone", norms))
        if rows
    ]
    peaks = {name: [row["peak"] for row in sections["memory"] if row["call"] == name] for name in MEMORY}
    lines += ["", f"Geometric means of torch's time over ours, all cases: {', '.join(means)}."]
    if all(peaks.values()):
        ours, theirs = (max(peaks[name]) for name in MEMORY)
        lines[-1] += f" Memory at the peak of a call, in weights: {ours:.2f}, torch {theirs:.2f}."
    lines += ["", f"Slower than torch: {'; '.join(slow)}."]
    return lines


def markdown(machine: dict[str, Any], sections: dict[str, list[Row]], seconds: float) -> str:
    """The whole report, a page of one screen."""
    checked = sum(len(sections[name]) for name in ("norms", "first", "repeated"))
    compiled = [row["compiled_speedup"] for row in sections["compiled"] if "compiled_speedup" in row]
    others = [row["torch_pruning"] / row["lnprune"] for row in sections["norms"] if "torch_pruning" in row]
    beside = [
        f"{title} {geometric_mean(values):.1f} x over {len(values)} cases"
        for title, values in (
            ("`torch.compile` of mask and masked weight", compiled),
            ("norms by Torch-Pruning's `MagnitudeImportance`", others),
        )
        if values
    ]
    lines = [
        "# lnprune on the CPU",
        "",
        report.provenance(machine, seconds),
        report.cpu_of(machine),
        f"Each of {checked} cases was checked before it was timed; {len(report.faults(sections))} failed. "
        "Times are medians, ratios medians of the ratios within one round of interleaved runs. Every "
        "case is in the JSON that the command writes.",
        *report.fault_lines(sections),
        "",
        "## Targets",
        "",
        *report.verdict_lines(verdicts(sections)),
        "",
        "## Norms: time over that of `torch.sum`, and in brackets `torch.norm`'s time over ours",
        "",
        *norms_table(sections["norms"]),
        "",
        "## Calls: time over the floor, and in brackets torch's time over ours",
        "",
        "The floor is `w.sum(); torch.empty_like(w).fill_(1); w.clone()`. Amount 0.5; modules are made "
        "before the clock runs." + (f" Others' time over ours: {'; '.join(beside)}." if beside else ""),
        "",
        *calls_table(sections["first"], sections["repeated"]),
        "",
        "## Speed: first calls with n = 2, amount 0.5",
        "",
        *speed_lines(sections),
    ]
    return "\n".join(lines) + "\n"


def picture(sections: dict[str, list[Row]]) -> Figure:
    """The time of a first call over the bytes of the weight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for dim, axis in enumerate(axes):
        rows = [
            row
            for row in sections["first"]
            if (row["dtype"], row["dim"], row["n"]) == ("float32", dim, 2)
            and row["shape"] != ALL_OF_RESNET50
        ]
        rows.sort(key=lambda row: row["bytes"])
        sizes = [row["bytes"] / ONE_MEGABYTE for row in rows]
        for name, color, label in (
            ("torch", "tab:orange", "torch.nn.utils.prune"),
            ("lnprune", "tab:blue", "lnprune"),
            ("floor", "tab:gray", "w.sum(), a fill, w.clone()"),
        ):
            line = ":" if name == "floor" else "-"
            times = [row[name] * 1e3 for row in rows]
            axis.loglog(sizes, times, line, marker="o", markersize=3, color=color, label=label)
        axis.set_title(f"ln_structured, n = 2, dim {dim}", fontsize=10)
        axis.set_xlabel("weight, MiB of float32")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def load(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, list[Row]], float]:
    """The machine, the sections and the seconds of a run, from its JSON."""
    saved = json.loads(path.read_text())
    sections = {name: saved[name] for name in SECTIONS}
    for row in (row for rows in sections.values() for row in rows if "n" in row):
        row["n"] = float(row["n"]) if isinstance(row["n"], str) else row["n"]
    return saved["environment"], sections, saved["seconds"]


def write(
    folder: pathlib.Path, machine: dict[str, Any], sections: dict[str, list[Row]], seconds: float
) -> list[pathlib.Path]:
    """Writes the page and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    page, drawn = folder / "cpu.md", folder / "cpu.png"
    report.save_text(page, markdown(machine, sections, seconds))
    save_figure(picture(sections), drawn, dpi=110)
    return [page, drawn]
