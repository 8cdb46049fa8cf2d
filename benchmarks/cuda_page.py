"""The page of the CUDA benchmark in the repository: figures on one screen, a plot, the README's part."""

from __future__ import annotations

import json
import math
import pathlib
from typing import TYPE_CHECKING, Any

from benchmarks import cuda_report, report
from benchmarks.cuda_variants import VARIANTS
from benchmarks.program import Sections
from benchmarks.report import Row
from benchmarks.timing import geometric_mean
from lnprune.plans.report import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODULE = "benchmarks.cuda"
# What `make gpu` leaves in its folder.
FIGURES, OTHERS, SUMMARY = "cuda.json", "variants.json", "summary.txt"
# The sections whose cases are calls, and what a call is named there.
CALLS = {
    "norms": "`channel_norms`",
    "whole": "`ln_structured`",
    "in_place": "in place",
    "repeated": "`ln_structured` again",
    "lists": "one list",
    "small": "`ln_structured`",
}
MEBIBYTE = 1 << 20
# Sizes that the plot names, in MiB.
TICKS = {"64 KiB": 1 / 16, "1 MiB": 1, "16 MiB": 16, "256 MiB": 256, "4 GiB": 4096}


def load(folder: pathlib.Path) -> tuple[dict[str, Any], Sections]:
    """What a run has left: the head of its JSON, with the summary of its stages, and its sections.

    Raises:
        FileNotFoundError: there is no cuda.json.
    """
    head = json.loads((folder / FIGURES).read_text())
    names = [name for name in cuda_report.CHAPTERS if name in head]
    sections = {name: report.rows_of_json(head.pop(name)) for name in names}
    if (folder / OTHERS).exists():
        sections["variants"] = report.rows_of_json(json.loads((folder / OTHERS).read_text())["variants"])
    summary = folder / SUMMARY
    head["summary"] = summary.read_text().splitlines() if summary.exists() else []
    return head, sections


def _by_dim(rows: list[Row]) -> list[dict[int, Row]]:
    """The rows of one weight together, by their dim."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["shape"], row["dtype"]), {})[row["dim"]] = row
    return list(found.values())


def _is_shown(row: Row) -> bool:
    """On the page: n = 2, and convolutions that are small; large ones are among all cases."""
    is_large = row["bytes"] >= cuda_report.LARGE_BYTES
    return row["n"] == 2 and not (is_large and row["shape"].endswith("x 3 x 3"))


def _cells(row: Row | None, keys: tuple[str, ...]) -> list[str]:
    return [report.cell(key, row) if row else "" for key in keys]


def call_lines(sections: Sections) -> list[str]:
    """Calls on single tensors and on lists, along both dims."""
    keys = ("lnprune", "share", "speedup", "wall_speedup")
    lines = [
        "| call | weight | dtype | dim 0 | of the copy | against torch | wall | dim 1 | of the copy "
        "| against torch | wall |",
        "| --- | --- | --- |" + " ---: |" * 8,
    ]
    for section, name in CALLS.items():
        rows = [row for row in sections.get(section, []) if _is_shown(row)]
        if section == "in_place":
            rows = [row for row in rows if row["bytes"] >= cuda_report.LARGEST_BYTES]
        for dims in _by_dim(rows):
            row = next(iter(dims.values()))
            cells = [cell for dim in (0, 1) for cell in _cells(dims.get(dim), keys)]
            lines.append(f"| {name} | {row['shape']} | {row['dtype']} | {' | '.join(cells)} |")
    return lines


def conversion_lines(sections: Sections) -> list[str]:
    """Whether sums in float64 hide under the memory time: n = 2 against n = inf on the same weights."""
    rows = sections.get("norms", [])
    times = {(row["shape"], row["dtype"], row["dim"], row["n"]): row["lnprune"] for row in rows}
    ratios: dict[str, list[float]] = {}
    for (shape, dtype, dim, n), seconds in times.items():
        if n == 2 and (other := times.get((shape, dtype, dim, math.inf))):
            ratios.setdefault(dtype, []).append(seconds / other)
    if not ratios:
        return []
    means = [f"{dtype} {_mean_and_range(some)}" for dtype, some in ratios.items()]
    return [
        "Sums convert each element to float64, largest magnitudes convert none. Time for n = 2 over that "
        f"for n = inf on the same weight, geometric mean and range: {', '.join(means)}."
    ]


def variant_lines(sections: Sections) -> list[str]:
    """Other ways to do the same, against the kernels as they are."""
    found: dict[str, list[Row]] = {}
    for row in sections.get("variants", []):
        found.setdefault(row["variant"], []).append(row)
    lines = [
        "",
        "| otherwise than it is | cases | time over what it is | wall |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, rows in found.items():
        title = VARIANTS[name].title if name in VARIANTS else name
        if faults := [row["fault"] for row in rows if row.get("fault")]:
            lines.append(f"| {title} | {len(rows)} | {faults[0]} | |")
            continue
        cells = [
            _mean_and_range([row[key] for row in rows]) for key in ("over_lnprune", "wall_over_lnprune")
        ]
        lines.append(f"| {title} | {len(rows)} | {' | '.join(cells)} |")
    return lines if found else []


def _mean_and_range(ratios: list[float]) -> str:
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def other_lines(sections: Sections) -> list[str]:
    """Copy, predictions, memory and launches: a sentence each."""
    said = []
    if copies := sections.get("copy"):
        fastest = max(row["gigabytes_per_second"] for row in copies)
        said.append(f"The fastest copy moved {fastest:,.0f} GB/s, read and written.")
    means = [
        f"{title} {geometric_mean(row['over_predicted'] for row in rows):.2f}"
        for name, title in (("norms", "norms"), ("whole", "first calls"), ("in_place", "in place"))
        if (rows := sections.get(name))
    ]
    if means:
        said.append(f"Time over what was predicted, geometric means: {', '.join(means)}.")
    if rows := sections.get("memory"):
        peaks = [f"{row['shape']}: {report.cell('beyond_outputs', row)}" for row in rows]
        said.append(f"Memory at the peak beyond mask and masked weight: {'; '.join(peaks)}.")
    if rows := sections.get("launches"):
        counts = [f"{row['call']}: {row['kernels']}" for row in rows]
        said.append(f"Kernels launched: {'; '.join(counts)}.")
    return ["", *said] if said else []


def stage_lines(head: dict[str, Any]) -> list[str]:
    """What `make gpu` said of its stages: the table, and none of the notes above it."""
    summary = head["summary"]
    start = next((at for at, line in enumerate(summary) if line.startswith("stage ")), len(summary))
    return ["", "```", *summary[start:], "```"] if start < len(summary) else []


def speed_lines(head: dict[str, Any], sections: Sections) -> list[str]:
    """What the README says: first calls and lists, and where."""
    machine = head["environment"]
    lines = ["| weight | dtype | dim 0: torch | lnprune | | dim 1: torch | lnprune | |"]
    lines.append("| --- | --- |" + " ---: |" * 6)
    rows = [row for row in (*sections.get("whole", []), *sections.get("lists", [])) if _is_shown(row)]
    for dims in _by_dim(rows):
        row = next(iter(dims.values()))
        cells = [cell for dim in (0, 1) for cell in _cells(dims.get(dim), ("torch", "lnprune", "speedup"))]
        lines.append(f"| {row['shape']} | {row['dtype']} | {' | '.join(cells)} |")
    return [*lines, "", f"Device time on an {machine['gpu']}, {machine['date'][:10]}."]


def markdown(head: dict[str, Any], sections: Sections) -> str:
    """The page."""
    machine = head["environment"]
    lines = [
        "# lnprune on a GPU",
        "",
        f"`make gpu` ({report.provenance(machine, head['seconds']).removesuffix('.')}).",
        cuda_report.gpu_of(machine),
        cuda_report.conditions(sections),
        *report.fault_lines(sections),
        "",
        "![The speed of norms and of calls over the size of the weight](cuda.png)",
        "Half of the channels, n = 2. *Of the copy*: bytes that have to be moved, per second, as a share "
        "of what a copy within the device's memory moves. *Against torch*: torch's time over ours on the "
        "device, and *wall* the same with Python.",
        "",
        *call_lines(sections),
        *other_lines(sections),
        *conversion_lines(sections),
        *variant_lines(sections),
        *stage_lines(head),
    ]
    return "\n".join(lines) + "\n"


def picture(sections: Sections) -> Figure:
    """GB/s over the size of the weight, ours and torch's, and as a share of the fastest copy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    fastest = max(row["gigabytes_per_second"] for row in sections["copy"])
    axes = figure.subplots(1, 2, sharey=True)
    for axis, call in zip(axes, (cuda_report.NORMS, cuda_report.WHOLE), strict=True):
        some = [row for row in sections["sizes"] if row["call"] == call]
        passes = 1 if call == cuda_report.NORMS else 4  # over the bytes of the weight
        for dim, line in ((0, "o-"), (1, "s--")):
            rows = sorted((row for row in some if row["dim"] == dim), key=lambda row: row["bytes"])
            sizes = [row["bytes"] / MEBIBYTE for row in rows]
            for name, color in (("lnprune", "tab:blue"), ("torch", "tab:orange")):
                speeds = [passes * row["bytes"] / row[name] * 1e-9 for row in rows]
                label = f"{name}, dim {dim}"
                axis.semilogx(sizes, speeds, line, color=color, label=label, markersize=3, base=4)
            if dim == 0:
                speeds = [2 * row["bytes"] / row["copy"] * 1e-9 for row in rows]
                axis.semilogx(sizes, speeds, ":", color="tab:gray", label="copy", base=4)
        axis.set_title(call, fontsize=10)
        axis.set_xticks(list(TICKS.values()), list(TICKS))
        axis.minorticks_off()
        axis.set_xlabel("weight, float32")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    share = axes[1].secondary_yaxis("right", (lambda speed: speed / fastest, lambda share: share * fastest))
    share.set_ylabel("share of the fastest copy")
    axes[0].set_ylabel("GB/s that have to be moved")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def write(
    saved: pathlib.Path, folder: pathlib.Path = report.RESULTS, readme: pathlib.Path = report.README
) -> list[pathlib.Path]:
    """Writes page and plot, and the README's part, from the folder that `make gpu` left.

    Raises:
        FileNotFoundError: there is no cuda.json.
        ValueError: the run has no sizes to plot, or the README no place for its part.
    """
    head, sections = load(saved)
    if not sections.get("sizes") or not sections.get("copy"):
        raise ValueError(
            f"{saved / FIGURES}: expected the sections copy and sizes, got {', '.join(sections)}"
        )
    plot, page = folder / "cuda.png", folder / "cuda.md"
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(picture(sections), plot, dpi=110)
    report.save_text(page, markdown(head, sections))
    report.replace_marked(readme, MODULE, speed_lines(head, sections))
    return [page, plot, readme]
