"""What a plan does, as a table and as a picture."""

from __future__ import annotations

import importlib.util
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lnprune.atomic_file import replacing
from lnprune.plan_file import PlanEntry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot", "save_figure", "table"]

_HEADERS = ("parameter", "shape", "dim", "kept", "share", "norm at cut", "margin", "removed")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _rows(entries: Sequence[PlanEntry]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            entry.name,
            " x ".join(map(str, entry.shape)),
            str(entry.dim),
            f"{entry.kept} of {entry.channels}",
            f"{entry.kept / max(1, entry.channels):.1%}",
            _number(entry.norm_at_cut),
            _number(entry.margin),
            f"{entry.parameters_removed:,}",
        )
        for entry in entries
    ]
    kept, channels = sum(e.kept for e in entries), sum(e.channels for e in entries)
    removed = sum(entry.parameters_removed for entry in entries)
    elements = sum(math.prod(entry.shape) for entry in entries)
    footer = (
        *(f"{len(rows)} parameters", f"{elements:,}", "", f"{kept} of {channels}"),
        *(f"{kept / max(1, channels):.1%}", "", "", f"{removed:,} ({removed / max(1, elements):.1%})"),
    )
    return rows, footer


def table(n: Any, selection: Mapping[str, Any], entries: Sequence[PlanEntry]) -> str:
    """A plan as a table of one line per parameter, drawn by rich if that is installed."""
    rows, footer = _rows(entries)
    options = ", ".join(f"{key}={value!r}" for key, value in selection.items() if key != "amount")
    amount = selection["amount"]
    shown = "by name" if isinstance(amount, dict) else repr(amount)
    title = f"amount={shown}, n={n!r}, {options}"
    if importlib.util.find_spec("rich") is None:
        return _plain_table(title, rows, footer)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE, show_footer=True, pad_edge=False)
    for i, (header, total) in enumerate(zip(_HEADERS, footer, strict=True)):
        drawn.add_column(header, total, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    # As wide as its content: a name that is cut off would be of no use, nor one that is read as markup.
    console = Console(file=io.StringIO(), width=1000, color_system=None, markup=False, emoji=False)
    console.print(drawn)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _plain_table(title: str, rows: list[tuple[str, ...]], footer: tuple[str, ...]) -> str:
    lines = [_HEADERS, *rows, footer]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADERS))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([title, text[0], rule, *text[1:-1], rule, text[-1]])


def plot(
    n: Any,
    entries: Sequence[PlanEntry],
    ranked: Sequence[tuple[Tensor, int]],
    path: str | os.PathLike[str],
) -> None:
    """Draws the sorted norms of each layer with the cut, and the share of each that is kept.

    Args:
        n: the order of the norms.
        entries: what the plan does to each parameter.
        ranked: of each parameter the norms from the largest on, and how many of them are kept.
        path: the picture's file.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plot needs matplotlib, which the extra "plot" brings: pip install "lnprune[plot]"'
        ) from error

    names = _distinct([entry.name for entry in entries])
    count = max(1, len(ranked))
    columns = min(count, max(3, math.ceil(math.sqrt(2 * count))))
    lines = math.ceil(count / columns)
    width, norms_height, shares_height = max(7.0, 1.9 * columns), 1.5 * lines + 0.5, 4.2
    height = norms_height + shares_height
    # Places in inches, of the figure's height and width: a layout engine takes seconds for many axes.
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    for i, (norms, kept) in enumerate(ranked):
        line, column = divmod(i, columns)
        left, bottom = 0.45 + column * (width - 0.3) / columns, height - 0.5 - 1.5 * (line + 1) + 0.3
        cell = (width - 0.3) / columns
        axis = figure.add_axes((left / width, bottom / height, (cell - 0.5) / width, 0.95 / height))
        axis.plot(range(1, len(norms) + 1), norms, color="tab:blue", linewidth=1.4)
        axis.axvspan(kept + 0.5, max(len(norms), kept) + 0.5, color="tab:gray", alpha=0.25, linewidth=0)
        axis.set_title(names[i], fontsize=6.5, pad=3)
        axis.tick_params(labelsize=6)
        axis.margins(x=0)
        finite = norms[norms.isfinite()]
        if len(finite):
            axis.set_ylim(bottom=min(0.0, float(finite.min())))
    figure.suptitle(f"norms of order {n}, by rank (grey: pruned)", fontsize=10, y=1 - 0.2 / height)

    axis = figure.add_axes(
        (0.7 / width, 2.0 / height, (width - 0.9) / width, (shares_height - 2.3) / height)
    )
    shares = [entry.kept / max(1, entry.channels) for entry in entries]
    axis.bar(range(len(shares)), shares, color="tab:blue")
    axis.set_ylim(0, 1)
    axis.margins(x=0.005)
    axis.set_ylabel("kept share", fontsize=8)
    axis.set_xticks(range(len(shares)))
    axis.set_xticklabels(names, rotation=90, fontsize=6 if len(names) > 20 else 8)
    axis.tick_params(axis="y", labelsize=7)
    save_figure(figure, path, dpi=120)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int) -> None:
    """Writes a picture, whole or not at all, in the format of its suffix; without one as a PNG."""
    root, suffix = os.path.splitext(os.fspath(path))
    kind = suffix[1:] or figure.canvas.get_default_filetype()
    with replacing(f"{root}.{kind}") as file:
        figure.savefig(file, format=kind, dpi=dpi)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names without what all have in common at their beginning and end, and no longer than a title."""
    parts = [name.split(".") for name in names]
    if len(parts) > 1:
        while all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
            parts = [part[:-1] for part in parts]
        while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
            parts = [part[1:] for part in parts]
    joined = [".".join(part) for part in parts]
    half = 15
    return [name if len(name) <= 2 * half else f"{name[:half]}…{name[1 - half :]}" for name in joined]
