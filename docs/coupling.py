"""Draws a residual block and the channels of its weights that go together: ``python docs/coupling.py``."""

from __future__ import annotations

import pathlib

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import lnprune
from lnprune.plans.report import save_figure
from lnprune.removal.coupling import Coupling

COLORS = ("tab:blue", "tab:orange")
GONE = (3, 1)  # of each group the channel that is shown as an example
STRIP = 0.8  # the width of the labels beside a matrix, in slices
GAP = 3.6  # between two weights
# What is drawn, and what the model computes behind it.
NAMES = {
    "first.weight": "",
    "inner.weight": "",
    "norm.weight": "relu",
    "outer.weight": "+ first",
    "last.weight": "",
}


class Block(nn.Module):
    """A layer, a residual block, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.inner = nn.Linear(6, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.outer = nn.Linear(4, 6, bias=False)
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        inner = torch.relu(self.norm(self.inner(x)))
        return self.last(x + self.outer(inner))


def main() -> None:
    torch.manual_seed(0)
    model = Block()
    coupling = lnprune.couple(model, torch.randn(2, 4))
    figure = Figure(figsize=(9.5, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    at = 0.0
    for name, after in NAMES.items():
        tensor = model.get_parameter(name).detach()
        rows, columns = tensor.shape if tensor.dim() > 1 else (len(tensor), 1)
        draw(axes, (at, -rows / 2), name, tensor, coupling)
        at += columns + GAP
        axes.text(at - (GAP + STRIP) / 2, 0, after, ha="center", va="center", fontsize=9)
    axes.set_xlim(-STRIP, at - GAP)
    axes.set_ylim(3.2, -4.8)
    axes.set_aspect("equal")
    axes.set_axis_off()
    save_figure(figure, pathlib.Path(__file__).with_suffix(".png"), dpi=110)


def draw(axes: Axes, at: tuple[float, float], name: str, tensor: Tensor, coupling: Coupling) -> None:
    """A weight as a grid, its labels above and to the left, and what goes with a channel of each group."""
    x, y = at
    rows, columns = tensor.shape if tensor.dim() > 1 else (len(tensor), 1)
    for row in range(rows):
        for column in range(columns):
            axes.add_patch(Rectangle((x + column, y + row), 1, 1, facecolor="0.93", edgecolor="white"))
    for dim in range(tensor.dim()):
        for i in range(tensor.shape[dim]):
            _label(axes, at, dim, i, "", "0.8")
    for group, color, gone in zip(coupling.groups, COLORS, GONE, strict=True):
        for member in group.members:
            if member.name != name:
                continue
            for i, channel in zip(member.slices.tolist(), member.channels.tolist(), strict=True):
                _label(axes, at, member.dim, i, str(channel), color)
                if channel == gone:
                    corner, size = (
                        ((x, y + i), (columns, 1)) if member.dim == 0 else ((x + i, y), (1, rows))
                    )
                    axes.add_patch(Rectangle(corner, *size, facecolor=(*to_rgb(color), 0.45)))
    axes.text(x + columns / 2, y - STRIP - 0.25, name, ha="center", va="bottom", fontsize=9)


def _label(axes: Axes, at: tuple[float, float], dim: int, i: int, text: str, color: str) -> None:
    x, y = (at[0] - STRIP, at[1] + i) if dim == 0 else (at[0] + i, at[1] - STRIP)
    width, height = (STRIP, 1) if dim == 0 else (1, STRIP)
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=8)


if __name__ == "__main__":
    main()
