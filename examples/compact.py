"""Takes channels out of ResNet-50 and a real sentence encoder: what that saves, and what it moves."""

from __future__ import annotations

import argparse
import io
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
from sentence_encoder import model_file

from benchmarks.resnet50 import resnet50

AMOUNTS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
ROUNDS = 7  # of interleaved runs, for the latencies
CURVES = {  # what is drawn: measure, label, color, line
    "masked_time": ("with masks: time", "tab:gray", "--"),
    "masked_file": ("with masks: file", "tab:brown", "--"),
    "time": ("time", "tab:blue", "-"),
    "file": ("file and parameters", "tab:green", "-"),
    "multiply_adds": ("multiply-adds", "tab:red", "-"),
}


@dataclass
class Subject:
    """A model, what it is called with, and how its channels are selected."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    options: dict[str, Any]
    is_trained: bool
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass
class Outcome:
    """Shares of what the whole model has or takes, with masks and without the channels, and the drift."""

    amount: float
    parameters: float
    multiply_adds: float
    time: float
    file: float
    masked_time: float
    masked_file: float
    cosine: float  # of outputs to those of the whole model, the mean
    difference: float  # between masks and removal, over the largest output


def file_size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def multiply_adds(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(model: nn.Module, other: nn.Module, inputs: Sequence[Tensor]) -> float:
    """The time of a model over that of another: the median of pairs, one after the other."""
    pairs = [[seconds(lambda m=each: m(*inputs)) for each in (model, other)] for _ in range(ROUNDS + 1)]
    return statistics.median(first / second for first, second in pairs[1:])


@torch.no_grad()
def measure(subject: Subject) -> None:
    """Fills in the outcomes of a model."""
    model, inputs = subject.model, subject.inputs
    before = model(*inputs)
    whole = file_size(model), multiply_adds(model, inputs), sum(each.numel() for each in model.parameters())
    ranking = lnprune.couple(model, inputs).rank(n=2)
    for amount in AMOUNTS:
        plan = ranking.select(amount, **subject.options)
        # Verified once: the last column compares the others with the masks.
        small = plan.compact(verify=amount == max(AMOUNTS))
        after = small(*inputs)
        time_share = ratio(small, model, inputs)
        with_masks = ratio_with_masks(subject, plan)
        plan.apply()
        masked, masked_file = model(*inputs), file_size(model)
        plan.undo()
        subject.outcomes.append(
            Outcome(
                amount,
                sum(each.numel() for each in small.parameters()) / whole[2],
                multiply_adds(small, inputs) / whole[1],
                time_share,
                file_size(small) / whole[0],
                with_masks,
                masked_file / whole[0],
                float(nn.functional.cosine_similarity(before, after).mean()),
                float((masked - after).abs().max() / masked.abs().max()),
            )
        )


def ratio_with_masks(subject: Subject, plan: lnprune.Plan) -> float:
    """The time of the model with masks over that without."""
    times = []
    for _ in range(ROUNDS):
        bare = seconds(lambda: subject.model(*subject.inputs))
        plan.apply()
        times.append(seconds(lambda: subject.model(*subject.inputs)) / bare)
        plan.undo()
    return statistics.median(times)


def show(console: Console, subject: Subject) -> None:
    """A table with a line for each amount."""
    table = Table(
        title=f"{subject.name}: shares of the whole model, one thread",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        pad_edge=False,
    )
    headers = ["channels\npruned", "masks:\ntime", "masks:\nfile", "compact:\ntime", "compact:\nfile"]
    headers += ["parameters", "multiply-\nadds", "outputs: cosine\nto the whole", "masks against\ncompact"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for each in subject.outcomes:
        shares = (each.masked_time, each.masked_file, each.time, each.file)
        table.add_row(
            f"{each.amount:.0%}",
            *(f"{share:.2f}" for share in (*shares, each.parameters, each.multiply_adds)),
            f"{each.cosine:.3f}" if subject.is_trained else "not trained",
            f"{each.difference:.0e}",
        )
    console.print(table)


def plot(path: pathlib.Path, subjects: Sequence[Subject]) -> None:
    """What is left of each model, over the channels that are gone."""
    figure, axes = pyplot.subplots(1, len(subjects), figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, subject in zip(axes, subjects, strict=True):
        amounts = [100 * each.amount for each in subject.outcomes]
        for measured, (label, color, line) in CURVES.items():
            values = [100 * getattr(each, measured) for each in subject.outcomes]
            axis.plot(
                [0, *amounts], [100, *values], line, color=color, marker="o", markersize=3, label=label
            )
        if subject.is_trained:
            cosines = [100 * each.cosine for each in subject.outcomes]
            axis.plot([0, *amounts], [100, *cosines], ":", color="black", label="cosine of outputs x 100")
        axis.set_title(subject.name, fontsize=11)
        axis.set_xlabel("channels pruned, %")
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the whole model")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("demo"), help="folder of the picture"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    if not console.is_terminal:
        console.width = 132
    folder = model_file().parent
    sentences = [sentence for listed in SENTENCES.values() for sentence in listed]
    subjects = [
        Subject("ResNet-50", resnet50(), (torch.randn(1, 3, 224, 224),), {"multiple_of": 8}, False),
        Subject("all-MiniLM-L6-v2", load_encoder(folder), tokenize(folder, sentences), {}, True),
    ]
    for subject in subjects:
        measure(subject)
        show(console, subject)
        worst = max(each.difference for each in subject.outcomes)
        if worst > 1e-4:
            raise SystemExit(f"{subject.name}: masks and removal differ by {worst:.1g}")
    plot(options.out / "compact.png", subjects)
    console.print(f"The picture: {options.out / 'compact.png'}. Nothing is retrained.")


if __name__ == "__main__":
    main()
