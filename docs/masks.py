"""Draws what ln_structured does to a weight along dim 0 and dim 1: ``python docs/masks.py``."""

from __future__ import annotations

import pathlib

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import lnprune
from lnprune.plans.report import save_figure

AMOUNT = 0.5
OUTPUTS, INPUTS = 6, 10
TITLES = ("dim=0: rows, the output channels", "dim=1: columns, the input channels")


def main() -> None:
    torch.manual_seed(1)
    weight = torch.randn(OUTPUTS, INPUTS)
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    for dim, panel in enumerate(figure.subfigures(1, 2, wspace=0.06)):
        module = nn.Linear(INPUTS, OUTPUTS, bias=False)
        module.weight = nn.Parameter(weight.clone())
        norms = lnprune.channel_norms(weight, 2, dim)
        lnprune.ln_structured(module, "weight", amount=AMOUNT, n=2, dim=dim)
        kept = module.weight_mask.amax(dim=1 - dim) != 0
        axes = panel.subplots(
            2,
            2,
            width_ratios=(INPUTS, 2.2),
            height_ratios=(1.8, OUTPUTS),
            gridspec_kw={"hspace": 0.02, "wspace": 0.02},
        )
        image, beside = axes[1, 0], axes[1, 1] if dim == 0 else axes[0, 0]
        for axis in axes.flat:
            if axis not in (image, beside):
                axis.set_axis_off()
        shown = torch.where(module.weight_mask != 0, weight.abs(), torch.nan)
        image.imshow(shown, cmap="Blues", vmin=-0.3, vmax=float(weight.abs().max()), aspect="auto")
        image.set_facecolor("0.88")
        for row, column in (module.weight_mask == 0).nonzero().tolist():
            image.text(column, row, "0", ha="center", va="center", color="0.45", fontsize=9)
        image.set_xticks([i - 0.5 for i in range(INPUTS + 1)], labels=[])
        image.set_yticks([i - 0.5 for i in range(OUTPUTS + 1)], labels=[])
        image.grid(color="white", linewidth=1.5)
        image.tick_params(length=0)
        colors = ["tab:blue" if flag else "0.75" for flag in kept]
        draw = beside.barh if dim == 0 else beside.bar
        draw(range(len(norms)), norms, color=colors)
        beside.set_title("norms", fontsize=9, pad=3)
        beside.set_axis_off()
        if dim == 0:
            beside.set_ylim(image.get_ylim())
        else:
            beside.set_xlim(image.get_xlim())
        panel.suptitle(TITLES[dim], fontsize=11)
    save_figure(figure, pathlib.Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
