"""What the reports of all benchmarks share: the machine, verdicts on targets, tables, Markdown and JSON."""

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
from benchmarks.shapes import Case, dtype_name, shape_name
from benchmarks.timing import Timing, geometric_mean
from lnprune.atomic_file import replacing

Row = dict[str, Any]
# The pages of the repository, from its root.
RESULTS = pathlib.Path("benchmarks/results")
README = pathlib.Path("README.md")


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it fails or is not installed."""
    folder = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _proc_entry(path: str, key: str) -> str:
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "unknown")


def environment(program: str) -> dict[str, Any]:
    """Everything needed to say where and how the figures of a program came about.

    The commit is that of the sources, or where they came without their history LNPRUNE_COMMIT.
    """
    memory = _proc_entry("/proc/meminfo", "MemTotal").split()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        "commit": output_of("git", "rev-parse", "HEAD") or os.environ.get("LNPRUNE_COMMIT", "unknown"),
        "dirty": bool(output_of("git", "status", "--porcelain")),
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


def provenance(machine: dict[str, Any], seconds: float) -> str:
    """The command, the date, the duration and the commit, as a sentence."""
    return (
        f"`{machine['command']}` on {machine['date']}, {seconds / 60:.1f} minutes, commit "
        f"{machine['commit'][:12]}{' with uncommitted changes' if machine['dirty'] else ''}."
    )


def build_of(machine: dict[str, Any]) -> str:
    """What the native library says about itself."""
    return ", ".join(f"{key} {value}" for key, value in machine["build"].items())


def cpu_of(machine: dict[str, Any]) -> str:
    """The processor, the system and the versions, as a sentence."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used, "
        f"{machine['memory_gib']} GiB, {machine['system']}; Python {machine['python']}, torch "
        f"{machine['torch']}, lnprune {machine['lnprune']} (native library: {build_of(machine)})."
    )


class Verdict(NamedTuple):
    target: str
    wanted: str
    measured: str
    met: bool | None


def verdict_lines(found: list[Verdict]) -> list[str]:
    """The verdicts as a Markdown table."""
    marks = {True: "yes", False: "no", None: ""}
    lines = ["| what | target | measured | met |", "| --- | --- | --- | --- |"]
    return lines + [f"| {v.target} | {v.wanted} | {v.measured} | {marks[v.met]} |" for v in found]


def case_row(case: Case, fault: str | None) -> Row:
    """The columns that name a case and say whether its result was right."""
    row: Row = {
        "shape": shape_name(case.shape),
        "dtype": dtype_name(case.dtype),
        "dim": case.dim,
        "n": case.n,
        "bytes": case.bytes,
        "correct": fault is None,
    }
    if fault is not None:
        row["fault"] = fault
    return row


def case_name(row: Row) -> str:
    if "shape" not in row:
        return row["variant"] if "variant" in row else row["call"]
    return f"{row['shape']} {row['dtype']} dim {row['dim']} n {row['n']}"


QUARTILES = "_quartiles"


def timed_columns(timing: Timing, **ratios: tuple[str, str]) -> Row:
    """The seconds of each peer, whether they settled, and ratios of two peers with their quartiles."""
    row: Row = {name: timing.seconds(name) for name in timing.rounds}
    row["settled"] = timing.settled
    for key, (name, other) in ratios.items():
        row[key] = timing.ratio(name, other)
        row[key + QUARTILES] = list(timing.quartiles(name, other))
    return row


def spread(rows: list[Row], key: str) -> str:
    """The geometric mean of a ratio over cases, and in brackets those of its quartiles."""
    mean = geometric_mean(row[key] for row in rows)
    lower, upper = (geometric_mean(row[key + QUARTILES][i] for row in rows) for i in (0, 1))
    return f"{mean:.2f} ({lower:.2f} to {upper:.2f})"


def faults(sections: dict[str, list[Row]]) -> list[Row]:
    """The rows whose result was wrong."""
    return [row for rows in sections.values() for row in rows if row.get("fault")]


def fault_lines(sections: dict[str, list[Row]]) -> list[str]:
    """The wrong results as a Markdown list, or nothing."""
    wrong = faults(sections)
    if not wrong:
        return []
    return ["", "Wrong results:", "", *(f"- {case_name(row)}: {row['fault']}" for row in wrong)]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


FORMATS: dict[str, Callable[[Any], str]] = {
    "lnprune": _time,
    "torch": _time,
    "sum": _time,
    "floor": _time,
    "compiled": _time,
    "peer": _time,
    "copy": _time,
    "predicted": _time,
    "wall": _time,
    "torch_wall": _time,
    "gigabytes_per_second": lambda value: f"{value:.1f}",
    "share": lambda value: f"{100 * value:.1f} %",
    "speedup": lambda value: f"{value:.2f} x",
    "wall_speedup": lambda value: f"{value:.2f} x",
    "over_sum": lambda value: f"{value:.2f}",
    "over_floor": lambda value: f"{value:.2f}",
    "over_torch": lambda value: f"{value:.2f}",
    "torch_over_sum": lambda value: f"{value:.2f}",
    "over_predicted": lambda value: f"{value:.2f}",
    "over_peer": lambda value: f"{value:.2f} x",
    "cp": _time,
    "read": _time,
    "over_cp": lambda value: f"{value:.2f}",
    "over_read": lambda value: f"{value:.2f}",
    "gigabytes": lambda value: f"{value:.2f}",
    "resident": lambda value: f"{value:.0f} MB",
    "largest": lambda value: f"{value:.0f} MB",
    "compiled_speedup": lambda value: f"{value:.2f} x",
    "rank": _time,
    "labels": _time,
    "forward": _time,
    "with_trial": lambda value: f"{value:.1f} s",
    "over_forward": lambda value: f"{value:.2f}",
    "select": _time,
    "over_rank": lambda value: f"{value:.3f}",
    "local": _time,
    "exchange": _time,
    "gather": _time,
    "over_local": lambda value: f"{value:.3f}",
    "in_dtype": _time,
    "in_float64": _time,
    "over_dtype": lambda value: f"{value:.2f} x",
    "over_float64": lambda value: f"{value:.2f} x",
    "megabytes": lambda value: f"{value:.1f}",
    "bytes_per_channel": lambda value: f"{value:.0f}",
    "error": lambda value: f"{value:.0e}",
    "peak": lambda value: f"{value:.3f}",
    "torch_peak": lambda value: f"{value:.3f}",
    "beyond_outputs": lambda value: f"{value:,} B",
    "correct": lambda value: "yes" if value else "NO",
    "settled": lambda value: "yes" if value else "NO",
    "time": _time,
    "over_lnprune": lambda value: f"{value:.3f}",
    "wall_over_lnprune": lambda value: f"{value:.3f}",
}
TITLES = {
    "lnprune": "lnprune",
    "torch": "torch",
    "sum": "torch.sum",
    "floor": "floor",
    "compiled": "torch.compile",
    "peer": "peer",
    "over_peer": "against the peer",
    "cp": "cp, fsync",
    "read": "read",
    "over_cp": "time / cp",
    "over_read": "time / read",
    "gigabytes": "GB",
    "resident": "most memory",
    "largest": "largest tensor",
    "copy": "copy",
    "predicted": "predicted",
    "wall": "wall",
    "torch_wall": "torch's wall",
    "gigabytes_per_second": "GB/s",
    "share": "of the copy",
    "speedup": "against torch",
    "wall_speedup": "wall against torch",
    "over_sum": "time / sum",
    "over_floor": "time / floor",
    "over_torch": "time / torch",
    "torch_over_sum": "torch / sum",
    "over_predicted": "time / predicted",
    "compiled_speedup": "against torch.compile",
    "error": "relative error",
    "peak": "peak, in weights",
    "torch_peak": "torch's peak, in weights",
    "beyond_outputs": "beyond the outputs",
    "labels": "couple, no trial",
    "with_trial": "couple",
    "over_forward": "no trial / forward",
    "select": "one selection",
    "over_rank": "selection / rank",
    "over_local": "exchange / local",
    "in_dtype": "product in its dtype",
    "in_float64": "product in float64",
    "over_dtype": "against its dtype",
    "over_float64": "against float64",
    "megabytes": "MB of sums",
    "gather": "gather one",
    "bytes_per_channel": "bytes per channel",
    "time": "variant",
    "over_lnprune": "variant / lnprune",
    "wall_over_lnprune": "wall",
}
HIDDEN = {"bytes", "fault", "settled", "state"}


def show(row: Row) -> None:
    """Prints a case's figures as soon as they are known."""
    keys = [key for key in row if key in FORMATS and key not in ("correct", "settled")]
    figures = "  ".join(f"{TITLES.get(key, key)} {cell(key, row)}" for key in keys)
    names = [f"{row['shape']:>18}", f"{row['dtype']:>8}"] if "dtype" in row else []
    names += [
        str(row[key])
        for key in ("variant", "call", "model", "selection", "channels", "normalize")
        if key in row
    ]
    names += [f"{key} {row[key]:>{width}}" for key, width in (("dim", 1), ("n", 4)) if key in row]
    print(
        f"{' '.join(names)}  {figures}{'  WRONG: ' + row['fault'] if row.get('fault') else ''}", flush=True
    )


def cell(key: str, row: Row) -> str:
    """A figure as text, with its quartiles where it has some; empty where the row has none."""
    value = row.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = FORMATS.get(key, str)(value)
    if key + QUARTILES in row:
        lower, upper = (FORMATS.get(key, str)(quartile) for quartile in row[key + QUARTILES])
        text += f" ({lower.removesuffix(' x')} to {upper.removesuffix(' x')})"
    return text


def table(rows: list[Row]) -> list[str]:
    """A Markdown table of the rows, one column per key that any of them has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys = [key for key in keys if key not in HIDDEN and not key.endswith(QUARTILES)]
    numeric = {key for key in keys if isinstance(next(row[key] for row in rows if key in row), int | float)}
    lines = ["| " + " | ".join(TITLES.get(key, key) for key in keys) + " |"]
    lines.append("|" + "|".join(" ---: " if key in numeric else " --- " for key in keys) + "|")
    lines += ["| " + " | ".join(cell(key, row) for key in keys) + " |" for row in rows]
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


def section(title: str, text: str, rows: list[Row], ratios: list[str]) -> list[str]:
    """A chapter of the report; with ratios, their means first and all cases folded away."""
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


def save_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def json_rows(rows: list[Row]) -> list[Row]:
    """Rows for JSON, which has no infinity and no NaN: they travel as text."""
    return [
        {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        for row in rows
    ]


def rows_of_json(rows: list[Row]) -> list[Row]:
    """Rows as they were before :func:`json_rows`."""
    numbers = ("inf", "-inf", "nan")
    return [{key: float(v) if v in numbers else v for key, v in row.items()} for row in rows]


def save_json(
    path: pathlib.Path, head: dict[str, Any], found: list[Verdict], sections: dict[str, list[Row]]
) -> None:
    """Writes all that was measured."""
    rows = {part: json_rows(content) for part, content in sections.items()}
    document = {**head, "targets": [verdict._asdict() for verdict in found], **rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _marks(program: str) -> tuple[str, str]:
    return f"<!-- made by python -m {program} -->\n\n", f"\n\n<!-- end of {program} -->"


def marked(path: pathlib.Path, program: str) -> str:
    """The part of a page that a program makes."""
    begin, end = _marks(program)
    return path.read_text().partition(begin)[2].partition(end)[0]


def replace_marked(path: pathlib.Path, program: str, lines: list[str]) -> None:
    """Puts other lines in place of the part of a page that a program makes."""
    begin, end = _marks(program)
    before, found, rest = path.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{path}: expected the lines {begin.strip()!r} and {end.strip()!r}")
    save_text(path, before + begin + "\n".join(lines) + end + after)
