"""Prunes a real sentence encoder by weights and by weights times activations, and measures the drift."""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

import lnprune
from lnprune.plans.report import save_figure

try:
    import matplotlib
    from rich import box
    from rich.console import Console
    from rich.table import Table

    matplotlib.use("agg")
    from matplotlib import pyplot
    from whole_model import SENTENCES, load_encoder, tokenize
except ImportError as error:
    raise SystemExit(
        f'This demo needs the package {error.name}, one of its extras: pip install "lnprune[demo]"'
    ) from error

from sentence_encoder import model_file

AMOUNTS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]


class InputNorms:
    """The norms of each input of linear layers over all that runs through a model; float64, O(channels)."""

    def __init__(self, model: nn.Module):
        self._squares: dict[str, Tensor] = {}
        self._handles = [
            module.register_forward_hook(functools.partial(self._add, f"{name}.weight"))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def _add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        squares = lnprune.channel_norms(inputs[0].detach().flatten(0, -2), n=2, dim=1).square()
        self._squares[name] = self._squares.get(name, 0) + squares

    def norms(self) -> dict[str, Tensor]:
        """By the name of the weight, shape ``(in_features,)``; the hooks are gone then."""
        for handle in self._handles:
            handle.remove()
        return {name: squares.sqrt() for name, squares in self._squares.items()}


@torch.no_grad()
def drift(model: nn.Module, ranking: lnprune.Ranking, amount: float, inputs: tuple[Tensor, ...]) -> float:
    """One minus the mean cosine between the embeddings of the whole model and of the pruned one."""
    before = model(*inputs)
    plan = ranking.select(amount).apply(permanent=True, keep_backup=True)
    after = model(*inputs)
    plan.undo()
    return 1 - float(nn.functional.cosine_similarity(before, after).mean())


def rankings(model: nn.Module, norms: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """By what is pruned: each way to rank it."""
    linear = {"include": nn.Linear}
    return {
        "inputs of layers": {
            "weights": lnprune.rank(model, 2, "in", **linear),
            "weights times activations (scale)": lnprune.rank(model, 2, "in", scale=norms, **linear),
        },
        "outputs of layers": {
            "weights": lnprune.rank(model, 2, "out", **linear),
            "weights times activations (element_scale)": lnprune.rank(
                model, 2, "out", element_scale=norms, **linear
            ),
        },
    }


def main() -> None:
    """Measures, prints a table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("demo/activations.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = model_file().parent
    model = load_encoder(folder)
    sentences = [sentence for about in SENTENCES.values() for sentence in about]
    inputs = tokenize(folder, sentences)

    collected = InputNorms(model)
    with torch.no_grad():
        for sentence in sentences:  # one by one: padding would count
            model(*tokenize(folder, [sentence]))
    found = rankings(model, collected.norms())

    console = Console(width=120)
    figure, axes = pyplot.subplots(1, len(found), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, (what, ways) in zip(axes, found.items(), strict=True):
        table = Table(title=f"{what}: 1 - cosine of embeddings", title_justify="left", box=box.SIMPLE)
        table.add_column("pruned")
        drifts = {}
        for way, ranking in ways.items():
            table.add_column(way, justify="right")
            drifts[way] = [drift(model, ranking, amount, inputs) for amount in AMOUNTS]
            axis.plot(AMOUNTS, drifts[way], marker="o", label=way)
        for i, amount in enumerate(AMOUNTS):
            table.add_row(f"{amount:.0%}", *(f"{values[i]:.4f}" for values in drifts.values()))
        console.print(table)
        axis.set_title(what, fontsize=10)
        axis.set_xlabel("share of channels pruned, in each layer")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("1 - cosine to the whole model")
    figure.suptitle("all-MiniLM-L6-v2, nothing retrained, 16 sentences that also gave the activations")
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.plot, dpi=120)
    console.print(f"The plot: {options.plot}")


if __name__ == "__main__":
    main()
