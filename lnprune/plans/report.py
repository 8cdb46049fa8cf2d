"""What a plan does, as a table and as a picture."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lnprune.atomic_file import replacing
from lnprune.plans.plan_file import PlanEntry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIVISORS = {"size": "their size", "layer": "the layer's mean"}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def table(
    n: Any,
    selection: Mapping[str, Any],
    entries: Sequence[PlanEntry],
    cut: float | None = None,
    elements: int | None = None,
) -> str | None:
    """A plan as a table of one line per parameter, which rich draws; None where rich is not installed.

    The last line has the totals and, of a global plan, the cut that all parameters have in common.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return None

    said = {key: "by name" if isinstance(value, dict) else repr(value) for key, value in selection.items()}
    amount = said.pop("amount")
    title = ", ".join([f"amount={amount}, n={n!r}", *(f"{key}={value}" for key, value in said.items())])
    kept, channels = sum(entry.kept for entry in entries), sum(entry.channels for entry in entries)
    zeroed = sum(entry.parameters_removed for entry in entries)
    if elements is None:
        elements = sum(math.prod(entry.shape) for entry in entries)
    columns = {
        "parameter": f"{len(entries)} parameters",
        "shape": f"{elements:,}",
        "dim": "",
        "kept": f"{kept} of {channels}",
        "share": f"{kept / max(1, channels):.1%}",
        "norm at cut": _number(cut),
        "margin": "",
        "zeroed": f"{zeroed:,} ({zeroed / max(1, elements):.1%})",
    }
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE, show_footer=True, pad_edge=False)
    for header, total in columns.items():
        drawn.add_column(header, total, justify="left" if header == "parameter" else "right", no_wrap=True)
    for entry in entries:
        drawn.add_row(
            entry.name,
            " x ".join(map(str, entry.shape)),
            str(entry.dim),
            f"{entry.kept} of {entry.channels}",
            f"{entry.kept / max(1, entry.channels):.1%}",
            _number(entry.norm_at_cut),
            _number(entry.margin),
            f"{entry.parameters_removed:,}",
        )
    # As wide as its content: a name that is cut off would be of no use, nor one that is read as markup.
    console = Console(file=io.StringIO(), width=1000, color_system=None, markup=False, emoji=False)
    console.print(drawn)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


# Inches.
_CELL_WIDTH, _CELL_HEIGHT = 1.9, 1.55
_SIDE, _HEAD, _FOOT = 0.65, 0.4, 0.2
_BARS = 1.6


def plot(
    n: Any,
    selection: Mapping[str, Any],
    entries: Sequence[PlanEntry],
    ranked: Sequence[tuple[Tensor, int]],
    cut: float | None,
    path: str | os.PathLike[str],
) -> None:
    """Draws the norms of each layer by rank with the cut, and the share of each layer that stays.

    Args:
        n: the order of the norms.
        selection: what the plan was asked for.
        entries: what the plan does to each parameter.
        ranked: of each parameter the norms from the largest on, and how many of them stay.
        cut: where all layers are cut, if they have a cut in common.
        path: the picture's file.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError as error:
        raise ImportError(
            'plot needs matplotlib, which the extra "plot" brings: pip install "lnprune[plot]"'
        ) from error

    cells = _cells(entries)
    names = _short([name for name, _ in cells])
    count = max(1, len(cells))
    columns = min(count, max(3, math.ceil(math.sqrt(2 * count))))
    lines = math.ceil(count / columns)
    font = 6 if len(names) > 20 else 8
    labels = max(map(len, names), default=0) * 0.62 * font / 72 + 0.15  # the longest name, turned
    width = max(7.0, _SIDE + _CELL_WIDTH * columns)
    height = _HEAD + lines * _CELL_HEIGHT + _FOOT + _BARS + labels
    # Places in inches of the figure's width and height: a layout engine takes seconds for many axes.
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    cell = (width - _SIDE) / columns
    groups = "groups of channels" if selection["group_size"] > 1 else "channels"
    for i, (_, rankings) in enumerate(cells):
        line, column = divmod(i, columns)
        left, bottom = _SIDE + column * cell, height - _HEAD - (line + 1) * _CELL_HEIGHT + 0.4
        axis = figure.add_axes((left / width, bottom / height, (cell - 0.45) / width, 0.95 / height))
        for norms, kept in (ranked[k] for k in rankings):
            ranks = range(1, len(norms) + 1)
            if len(rankings) > 1:  # of a batch: what stays of each matrix is drawn darker
                axis.plot(ranks, norms, color="tab:gray", linewidth=0.5, alpha=0.5)
                axis.plot(ranks[:kept], norms[:kept], color="tab:blue", linewidth=0.7, alpha=0.5)
                continue
            axis.plot(ranks, norms, color="tab:blue", linewidth=1.4)
            axis.axvspan(kept + 0.5, max(len(norms), kept) + 0.5, color="tab:gray", alpha=0.25, linewidth=0)
        if cut is not None and math.isfinite(cut):
            axis.axhline(cut, color="tab:red", linewidth=0.9, linestyle="--")
        axis.set_title(names[i], fontsize=6.5, pad=3)
        axis.tick_params(labelsize=6)
        axis.margins(x=0)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        norms = torch.cat([ranked[k][0] for k in rankings])
        finite = norms[norms.isfinite()]
        if len(finite):
            axis.set_ylim(bottom=min(0.0, float(finite.min())))
        if column == 0:
            axis.set_ylabel("norm", fontsize=7)
        if i + columns >= len(cells):
            axis.set_xlabel(f"{groups}, by rank", fontsize=7)
    normalize = selection["normalize"]
    divided = "" if normalize == "none" else f", divided by {_DIVISORS[normalize]}"
    common = "" if cut is None else "; dashed: the cut that all layers have in common"
    title = f"norms of order {n}{divided} (grey: pruned{common})"
    figure.suptitle(title, fontsize=9, y=1 - 0.15 / height, va="top")

    axis = figure.add_axes(
        (_SIDE / width, labels / height, (width - _SIDE - 0.15) / width, (_BARS - 0.2) / height)
    )
    shares = [
        sum(entries[k].kept for k in rankings) / max(1, sum(entries[k].channels for k in rankings))
        for _, rankings in cells
    ]
    axis.bar(range(len(shares)), shares, color="tab:blue")
    axis.set_ylim(0, 1)
    axis.margins(x=0.005)
    axis.set_ylabel("channels that stay", fontsize=8)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xticks(range(len(shares)))
    axis.set_xticklabels(names, rotation=90, fontsize=font)
    axis.tick_params(axis="y", labelsize=7)
    save_figure(figure, path, dpi=120)


def _cells(entries: Sequence[PlanEntry]) -> list[tuple[str, list[int]]]:
    """The parameters, each with its rankings by number: matrices of one parameter share a cell."""
    cells: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        cells.setdefault(re.sub(r"\[\d+\]$", "", entry.name), []).append(i)
    return list(cells.items())


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int) -> None:
    """Writes a picture, whole or not at all, in the format of its suffix; without one as a PNG."""
    root, suffix = os.path.splitext(os.fspath(path))
    kind = suffix[1:] or figure.canvas.get_default_filetype()
    with replacing(f"{root}.{kind}") as file:
        figure.savefig(file, format=kind, dpi=dpi)


def _short(names: Sequence[str]) -> list[str]:
    """The names, no longer than a title: where one is longer, all are without the beginning they share."""
    longest = 30
    parts = [name.split(".") for name in names]
    while any(len(".".join(part)) > longest for part in parts):
        if len({part[0] for part in parts}) > 1 or min(map(len, parts)) == 1 or len(parts) == 1:
            break
        parts = [part[1:] for part in parts]
    half = longest // 2
    joined = [".".join(part) for part in parts]
    return [name if len(name) <= longest else f"{name[:half]}…{name[1 - half :]}" for name in joined]
