"""The report of the CPU benchmark: its page, its plots, and what was measured of its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import program, report
from benchmarks.lists import ALL_OF_RESNET50
from benchmarks.program import FRESH, RECYCLED, Sections
from benchmarks.report import Row, Verdict
from benchmarks.shapes import (
    CURVE,
    FLOAT8_DTYPES,
    GENERIC_ORDERS,
    INF,
    MINILM,
    MLP,
    NAMED_ORDERS,
    TINY,
    dtype_name,
    shape_name,
)
from benchmarks.timing import geometric_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE_MEGABYTE = 1 << 20
# Weights below are in a cache of 32 MB when they are timed, others come from memory.
CACHED_BYTES = 32 * ONE_MEGABYTE
HALF_DTYPES = ("float16", "bfloat16")
# The most that a norm may take over a plain sum, by dtype.
NORM_LIMITS = {
    "float32 and float64": (("float32", "float64"), 1.35),
    "halves": (HALF_DTYPES, 1.6),
    "float8": (tuple(map(dtype_name, FLOAT8_DTYPES)), 1.6),
}
MEMORY = ("lnprune", "torch")
# What the README shows.
CHOSEN = [
    (shape_name(TINY), "float32"),
    (shape_name(MINILM), "float32"),
    (shape_name((512, 512, 3, 3)), "float32"),
    (shape_name(MLP), "float32"),
    (shape_name(MLP), "bfloat16"),
    (ALL_OF_RESNET50, "float32"),
]
Measured = tuple[str, bool | None]
NOT_MEASURED: Measured = ("not measured", None)


def _mean(rows: list[Row], key: str) -> float:
    return geometric_mean(row[key] for row in rows)


def _extreme(rows: list[Row], key: str, most: bool) -> str:
    """The case with the largest or the smallest figure."""
    row = (max if most else min)(rows, key=lambda row: row[key])
    return f"{row[key]:.2f} ({report.case_name(row)})"


def _in(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _large(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["bytes"] >= ONE_MEGABYTE]


def _norms_over_sum(rows: list[Row]) -> Measured:
    if not rows:
        return NOT_MEASURED
    text = f"{report.spread(rows, 'over_sum')} over {len(rows)} cases"
    met = _mean(rows, "over_sum") <= 1.1
    for title, (dtypes, limit) in NORM_LIMITS.items():
        some = [row for row in rows if row["dtype"] in dtypes]
        over = sum(row["over_sum"] > limit for row in some)
        if some:
            mean, worst = _mean(some, "over_sum"), _extreme(some, "over_sum", True)
            text += f"; {title}: {mean:.2f}, worst {worst}, {over} over {limit:g}"
        met &= over == 0
    uncached = [row for row in rows if row["bytes"] >= CACHED_BYTES]
    if uncached:
        text += f"; over 32 MiB alone: {report.spread(uncached, 'over_sum')}"
    return text, met


def _bound_by_conversions(row: Row) -> bool:
    """Whether a norm adds up halves along rows that are in cache: one conversion to float64 for each."""
    sums = row["dtype"] in HALF_DTYPES and row["n"] not in (0, INF, -INF)
    return sums and row["dim"] == 0 and row["bytes"] < CACHED_BYTES


def _norms_over_torch(rows: list[Row]) -> Measured:
    rows = [row for row in rows if "speedup" in row]
    if not rows:
        return NOT_MEASURED
    text = f"{report.spread(rows, 'speedup')} over {len(rows)} cases"
    met = _mean(rows, "speedup") >= 12
    converted = [row for row in rows if _bound_by_conversions(row)]
    others = [row for row in rows if not _bound_by_conversions(row)]
    if others:
        under = sum(row["speedup"] < 0.95 for row in others)
        text += f"; least {_extreme(others, 'speedup', False)}, {under} under 0.95"
        met &= under == 0
    if converted:
        rate = geometric_mean(row["bytes"] / 2 / row["lnprune"] * 1e-9 for row in converted)
        text += (
            f"; the {len(converted)} of halves along rows from cache: least "
            f"{_extreme(converted, 'speedup', False)}, {rate:.1f} conversions to float64 a nanosecond"
        )
    return text, met


def _over_floor(rows: list[Row]) -> Measured:
    parts, met = [], True
    for state, limit in ((RECYCLED, 0.8), (FRESH, 0.75)):
        some = _in(rows, state=state)
        if not some:
            return NOT_MEASURED
        parts.append(f"{report.spread(some, 'over_floor')}, worst {_extreme(some, 'over_floor', True)}")
        met &= _mean(some, "over_floor") <= limit
    return f"{' / '.join(parts)}; {len(rows)} cases", met


def _over_torch(rows: list[Row], mean: float, dim_0: float, least: float | None) -> Measured:
    """The speed-up of all, that along dim 0, and the least."""
    first = _in(rows, dim=0)
    if not first:
        return NOT_MEASURED
    text = f"{report.spread(rows, 'speedup')}; {report.spread(first, 'speedup')}; least "
    text += f"{_extreme(rows, 'speedup', False)}; {len(rows)} cases"
    met = _mean(rows, "speedup") >= mean and _mean(first, "speedup") >= dim_0
    if least is not None:
        under = sum(row["speedup"] < least for row in rows)
        text += f", {under} under {least:g}"
        met &= under == 0
    return text, met


def _both_dims(rows: list[Row], key: str, limits: tuple[float, float], most: bool) -> Measured:
    """A figure for each dim; at most the limits, or at least."""
    dims = [_in(rows, dim=dim) for dim in (0, 1)]
    if not all(dims):
        return NOT_MEASURED
    means = [_mean(some, key) for some in dims]
    met = all(mean <= limit if most else mean >= limit for mean, limit in zip(means, limits, strict=True))
    return " / ".join(report.spread(some, key) for some in dims), met


def _over_compiled(rows: list[Row]) -> Measured:
    timed = [row for row in rows if "compiled_speedup" in row]
    if not timed:
        return NOT_MEASURED
    least = min(row["compiled_speedup"] for row in timed)
    text = f"{report.spread(timed, 'compiled_speedup')} over {len(timed)} cases; least "
    text += _extreme(timed, "compiled_speedup", False)
    if len(timed) < len(rows):
        text += f"; {len(rows) - len(timed)} that it does not compile"
    return text, _mean(timed, "compiled_speedup") >= 2 and least >= 1.2


def _share(rows: list[Row], limit: float) -> Measured:
    """Our time over torch's, at most the limit."""
    if not rows:
        return NOT_MEASURED
    return report.spread(rows, "over_torch"), _mean(rows, "over_torch") <= limit


def _single(rows: list[Row]) -> list[Row]:
    """First calls on one weight whose size memory decides about."""
    return [row for row in _large(rows) if row["n"] in NAMED_ORDERS]


def verdicts(sections: Sections) -> list[Verdict]:
    """Each target with what was measured and whether it is met; in brackets the quartiles."""
    norms = [row for row in _large(sections["norms"]) if row["n"] in NAMED_ORDERS]
    first, again = _single(sections["first"]), _large(sections["repeated"])
    tiny = _in(sections["first"], state=RECYCLED, shape=shape_name(TINY), dtype="float32")
    masks = _in(sections["masks"], state=RECYCLED)
    return [
        Verdict(
            "norms, n in {0, 1, 2, inf, -inf}, 1 MB and more, every dtype and dim, against `torch.sum`",
            "1.1 at most, no case over 1.35 (halves and float8: no case over 1.6)",
            *_norms_over_sum(norms),
        ),
        Verdict(
            "the same against torch",
            "12 x, no case under 0.95; halves along rows from cache: as the conversions to float64 allow, "
            "with their count",
            *_norms_over_torch(norms),
        ),
        Verdict(
            "first call, 1 MB and more, against the floor, recycled / fresh",
            "0.80 / 0.75 at most",
            *_over_floor(first),
        ),
        Verdict(
            "first call against torch, recycled: all; dim 0 alone",
            "7 x; 5 x; no case under 2.8 x",
            *_over_torch(_in(first, state=RECYCLED), 7, 5, 2.8),
        ),
        Verdict(
            "repeated call against torch, recycled: all; dim 0 alone",
            "8 x; 5.5 x",
            *_over_torch(again, 8, 5.5, None),
        ),
        Verdict(
            "ResNet-50's 54 weights, masks, dim 0 / 1, recycled",
            "3.5 x / 6 x",
            *_both_dims(masks, "speedup", (3.5, 6), most=False),
        ),
        Verdict(
            "the same in place, amount 0.3, against `torch.sum` over the list, dim 0 / 1",
            "1.5 / 2.5 at most",
            *_both_dims(sections["in_place"], "over_sum", (1.5, 2.5), most=True),
        ),
        Verdict(
            "our op against the same through `torch.compile`, 1 MB and more",
            "2 x, no case under 1.2 x",
            *_over_compiled(_large(sections["compiled"])),
        ),
        Verdict(
            "384 x 384, float32, dim 0, in a loop over 24 layers, against torch (share of its time)",
            "0.45",
            *_share(sections["loop"], 0.45),
        ),
        Verdict("8 x 8 (share of torch's time)", "0.50", *_share(tiny, 0.50)),
    ]


def _table(titles: list[str], lines: dict[str, list[str]]) -> list[str]:
    """A Markdown table whose lines have a name and figures; lines without a figure are left out."""
    head = ["| | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items() if any(cells)]


def _speedup_cell(rows: list[Row]) -> str:
    """The geometric mean of torch's time over ours."""
    return f"{_mean(rows, 'speedup'):.1f} x" if rows else ""


def _mean_cell(rows: list[Row], over: str) -> str:
    """Geometric means: the time over that of what must be done, and torch's time over ours."""
    if not rows:
        return ""
    speedups = [row["speedup"] for row in rows if "speedup" in row]
    cells = [f"{_mean(rows, over):.2f}"] if over in rows[0] else []
    cells += [f"({geometric_mean(speedups):.1f} x)"] if speedups else []
    return " ".join(cells)


def _by_size(rows: list[Row]) -> list[list[Row]]:
    """From 1 MiB on, in cache, and those that are not."""
    rows = _large(rows)
    return [[row for row in rows if (row["bytes"] < CACHED_BYTES) == cached] for cached in (True, False)]


SIZES = ("1 to 32 MiB", "over 32 MiB")
BY_DIM_AND_SIZE = [f"dim {dim}, {size}" for dim in (0, 1) for size in SIZES]


def _norm_cells(rows: list[Row]) -> list[str]:
    return [_mean_cell(part, "over_sum") for dim in (0, 1) for part in _by_size(_in(rows, dim=dim))]


def norms_table(rows: list[Row]) -> list[str]:
    """Geometric means of the norms, of each dtype and kind of order, by dim and size."""
    groups = {"n in {1, 2}": (1, 2), "n in {0, ±inf}": (0, INF, -INF)}
    lines = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for title, orders in groups.items():
            some = [row for row in rows if row["dtype"] == dtype and row["n"] in orders]
            lines[f"{dtype}, {title}"] = _norm_cells(some)
    orders = " and ".join(f"{n:g}" for n in GENERIC_ORDERS)
    lines[f"float32, n = {orders}"] = _norm_cells([row for row in rows if row["n"] in GENERIC_ORDERS])
    return _table(BY_DIM_AND_SIZE, lines)


def calls_table(sections: Sections) -> list[str]:
    """Torch's time over ours, geometric means of calls by size."""
    first = sections["first"]
    groups = {f"first call, {state} memory": _in(first, state=state) for state in program.STATES}
    groups["repeated call, recycled memory"] = sections["repeated"]
    lines = {
        name: [_speedup_cell(some) for dim in (0, 1) for some in _by_size(_in(rows, dim=dim))]
        for name, rows in groups.items()
    }
    for state in program.STATES:
        masks = [_in(sections["masks"], state=state, dim=dim) for dim in (0, 1)]
        cells = [_speedup_cell(some) for some in masks]
        lines[f"{ALL_OF_RESNET50}, {state} memory"] = ["", cells[0], "", cells[1]]
    return _table(BY_DIM_AND_SIZE, lines)


def others_table(sections: Sections) -> list[str]:
    """Other ways to the same result."""
    columns = ("peer", "lnprune", "over_peer")
    lines = {
        f"{ALL_OF_RESNET50}: {row['call']}": [report.cell(key, row) for key in columns]
        for row in sections["peers"]
    }
    compiled = [row for row in _large(sections["compiled"]) if "compiled_speedup" in row]
    if compiled:
        spread = report.spread(compiled, "compiled_speedup")
        name = f"torch's mask and masked weight through `torch.compile`, {len(compiled)} weights"
        lines[name] = ["", "", spread.replace(" (", " x (")]
    return _table(["the other", "lnprune", "the other's time over ours"], lines)


def _slower(rows: list[Row]) -> str:
    """How many are slower than torch, and which: the slowest, and the slowest of 1 MiB and more."""
    slow = sorted((row for row in rows if row.get("speedup", 1) < 1), key=lambda row: row["speedup"])
    timed = sum("speedup" in row for row in rows)
    if not slow:
        return f"none of {timed}"
    said = [f"{report.case_name(row)}: {row['speedup']:.2f} x" for row in (slow[0], *_large(slow)[:1])]
    named = said[0] if said[-1] == said[0] else f"{said[0]}; of 1 MiB and more {said[1]}"
    return f"{len(slow)} of {timed} ({'the slowest ' if len(slow) > 1 else ''}{named})"


def speed_lines(machine: dict[str, Any], sections: Sections) -> list[str]:
    """What the README says of the speed: chosen calls, their mean, and where torch is faster."""
    norms, again = sections["norms"], sections["repeated"]
    first = _in(sections["first"], state=RECYCLED)
    lines = ["| weight | dtype | dim 0: torch | lnprune | | dim 1: torch | lnprune | |"]
    lines.append("| --- | --- |" + " ---: |" * 6)
    rows = [row for row in first if row["n"] == 2] + _in(sections["masks"], state=RECYCLED)
    found = {(row["shape"], row["dtype"], row["dim"]): row for row in rows}
    for shape, dtype in CHOSEN:
        dims = [found.get((shape, dtype, dim), {}) for dim in (0, 1)]
        cells = [
            report.FORMATS[key](row[key]) for row in dims if row for key in ("torch", "lnprune", "speedup")
        ]
        if cells:
            lines.append(f"| {shape} | {dtype} | {' | '.join(cells)} |")
    threads = machine["threads"]
    lines += ["", f"On {threads} thread{'s' if threads > 1 else ''}."]
    if first:
        lines[-1] += (
            f" Torch's time over ours, the geometric mean of all {len(first)} first calls that were timed: "
            f"{_mean(first, 'speedup'):.1f} x."
        )
    peaks = [[row["peak"] for row in _in(sections["memory"], call=name)] for name in MEMORY]
    if all(peaks):
        ours, theirs = map(max, peaks)
        lines[-1] += (
            f" New memory while a call runs: {ours:.1f} times the size of the weight, with torch "
            f"{theirs:.1f} times."
        )
    slow = [
        f"{title} {_slower(rows)}"
        for title, rows in (("first calls", first), ("repeated calls", again), ("norms alone", norms))
        if rows
    ]
    lines += ["", f"Slower than torch: {'; '.join(slow)}."]
    return lines


def markdown(machine: dict[str, Any], sections: Sections, seconds: float) -> str:
    """The page: figures, and what they mean, on one screen."""
    checked = sum("correct" in row for rows in sections.values() for row in rows)
    lines = [
        "# lnprune on the CPU",
        "",
        report.provenance(machine, seconds),
        report.cpu_of(machine),
        f"Each of {checked} cases was checked before it was timed; {len(report.faults(sections))} failed. "
        f"{program.conditions(machine, sections)}",
        *report.fault_lines(sections),
        "",
        "A *first* call prunes a weight without a mask, a *repeated* one a weight that has one. *Recycled* "
        "memory was used before, as in a process that has run for a while; *fresh* memory comes from the "
        "system, page by page. Where nothing is said, memory is recycled, n = 2, half of the channels go, "
        "and modules are made before the clock runs.",
        "",
        "![The time of a call over the size of the weight](cpu.png)",
        "![The speed of norms as a share of a plain sum's](cpu_norms.png)",
        "",
        "First calls. The dotted line is what each has to do at least: read the weight once, and write two "
        "tensors of its size (`w.sum(); torch.empty_like(w).fill_(1); w.clone()`).",
        "",
        *speed_lines(machine, sections),
        "",
        "Calls, torch's time over ours. ResNet-50: one `local_structured` against a loop of torch.",
        "",
        *calls_table(sections),
        "",
        "Norms: time over that of `torch.sum`, which reads the weight once too (of float8, which torch "
        "does not add, of as many bfloat16), and in brackets torch's time over ours.",
        "",
        *norms_table(sections["norms"]),
        "",
        "Other ways to the same norms, or the same mask:",
        "",
        *others_table(sections),
        *program.warning(machine),
    ]
    return "\n".join(lines) + "\n"


class Curve(NamedTuple):
    """A line of a plot: its label, style and color, and the figure of a row."""

    label: str
    line: str
    color: str
    value: Callable[[Row], float]


def _curve(rows: list[Row], dim: int) -> list[Row]:
    """The matrices of the plots, by size."""
    shapes = {shape_name(shape) for shape in CURVE}
    rows = [
        row for row in _in(rows, dtype="float32", dim=dim, n=2, state=RECYCLED) if row["shape"] in shapes
    ]
    return sorted(rows, key=lambda row: row["bytes"])


def _plot(rows: list[Row], title: str, unit: str, curves: list[Curve]) -> Figure:
    """Two plots over the size of the weight, one for each dim."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for dim, axis in enumerate(axes):
        some = _curve(rows, dim)
        sizes = [row["bytes"] / ONE_MEGABYTE for row in some]
        for curve in curves:
            values = [curve.value(row) for row in some]
            axis.loglog(sizes, values, curve.line, color=curve.color, label=curve.label, markersize=3)
        axis.set_title(f"{title}, n = 2, dim {dim}", fontsize=10)
        axis.set_xlabel("weight, MiB of float32")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(unit)
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def pictures(sections: Sections) -> dict[str, Figure]:
    """The time of a first call, and the speed of norms as a share of a plain sum's."""
    call = [
        Curve("torch.nn.utils.prune", "o-", "tab:orange", lambda row: row["torch"] * 1e3),
        Curve("lnprune", "o-", "tab:blue", lambda row: row["lnprune"] * 1e3),
        Curve("w.sum(), a fill, w.clone()", "o:", "tab:gray", lambda row: row["floor"] * 1e3),
    ]
    share = [
        Curve("torch.norm", "o-", "tab:orange", lambda row: 1 / row["torch_over_sum"]),
        Curve("lnprune.channel_norms", "o-", "tab:blue", lambda row: 1 / row["over_sum"]),
        Curve("torch.sum", ":", "tab:gray", lambda _: 1.0),
    ]
    return {
        "cpu": _plot(sections["first"], "ln_structured", "ms", call),
        "cpu_norms": _plot(sections["norms"], "norms", "share of the speed of torch.sum", share),
    }
