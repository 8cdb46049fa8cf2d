"""Prunes a real sentence encoder as a whole, and measures how far the embeddings of sentences drift."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import lnprune
from lnprune.plans.report import save_figure

try:
    import matplotlib
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError as error:
    raise SystemExit(
        f'This demo needs the package {error.name}, one of its extras: pip install "lnprune[demo]"'
    ) from error

from sentence_encoder import model_file

AMOUNTS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
SHOWN = 0.3, "global, of parameters"  # what is printed, drawn, saved, and applied for good
# Slices differ in size, so the same share of channels is not the same share of weights: global by both.
SELECTIONS: dict[str, dict[str, Any]] = {
    "local": {"scope": "local"},
    "global, of channels": {"scope": "global", "of": "channels"},
    "global, of parameters": {"scope": "global", "of": "parameters"},
}
COLORS = {"local": "tab:blue", "global, of channels": "tab:orange", "global, of parameters": "tab:red"}
# Sizes that fast kernels want, and no layer emptied. A group_size of 32 would prune whole heads, but it
# holds for all layers of a selection, and channels of intermediate.dense stand each for itself.
CONSTRAINTS = {"multiple_of": 8, "min_channels": 32}
SENTENCES = {
    "cooking": [
        "Simmer the tomatoes with garlic and basil for twenty minutes.",
        "Knead the dough until it is smooth, then let it rise in a warm place.",
        "A pinch of salt brings out the sweetness of the chocolate cake.",
        "She fried the onions slowly until they were golden and soft.",
    ],
    "astronomy": [
        "The telescope photographed a galaxy thirty million light years away.",
        "Jupiter's four largest moons can be seen with ordinary binoculars.",
        "A total solar eclipse happens when the moon covers the whole sun.",
        "The probe left the solar system and still sends faint radio signals.",
    ],
    "money": [
        "The central bank raised its interest rate by a quarter of a point.",
        "Inflation fell last month as the price of energy went down.",
        "Share prices dropped after the central bank warned of inflation.",
        "She took out a mortgage with her bank at a fixed interest rate.",
    ],
    "software": [
        "The program crashes because a pointer is used after it was freed.",
        "Reading freed memory made the program crash.",
        "Merge the branch once the reviewers have approved the code.",
        "The reviewers asked for one more test before the code is merged.",
    ],
}


class SelfAttention(nn.Module):
    """Attention of every token to every token that is no padding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            linear(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return mixed.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """What a sublayer adds to the tokens' vectors."""

    def __init__(self, inputs: int, width: int, epsilon: float):
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=epsilon)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden) + residual)


class Layer(nn.Module):
    """One layer of BERT."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, between, epsilon = (
            config[key] for key in ("hidden_size", "intermediate_size", "layer_norm_eps")
        )
        self.attention = nn.ModuleDict(
            {
                "self": SelfAttention(width, config["num_attention_heads"]),
                "output": Output(width, width, epsilon),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, between)})
        self.output = Output(between, width, epsilon)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = self.attention["output"](self.attention["self"](hidden, mask), hidden)
        return self.output(functional.gelu(self.intermediate["dense"](hidden)), hidden)


class Embeddings(nn.Module):
    """The vectors of the tokens by themselves."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
        self.LayerNorm = nn.LayerNorm(width, eps=config["layer_norm_eps"])

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: tokens.shape[1]]
        return self.LayerNorm(
            self.word_embeddings(tokens) + positions + self.token_type_embeddings.weight[0]
        )


class SentenceEncoder(nn.Module):
    """BERT with mean pooling: tokens to unit vectors, one for each sentence.

    The modules are called as in the checkpoint.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = [Layer(config) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embeddings(tokens)
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, mask)
        weights = mask[:, :, None].to(hidden.dtype)
        return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def load_encoder(folder: pathlib.Path) -> SentenceEncoder:
    """The published model, ready to embed."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    encoder = SentenceEncoder(config)
    loaded = encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    # The sentences are pooled by their mean, not by BERT's pooler, and positions are counted.
    extras = [
        key for key in loaded.unexpected_keys if not key.startswith(("pooler.", "embeddings.position_ids"))
    ]
    if loaded.missing_keys or extras:
        raise SystemExit(f"The checkpoint does not fit: lacks {loaded.missing_keys}, has {extras} beyond")
    return encoder.eval()


def tokenize(folder: pathlib.Path, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens, padded to the longest sentence, and which of them are no padding."""
    settings = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(settings["max_seq_length"])
    tokenizer.enable_padding()  # the file asks for a fixed length
    encodings = tokenizer.encode_batch(sentences)
    tokens = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
    return tokens, mask


def nearest(embeddings: Tensor) -> Tensor:
    """The index of each sentence's nearest other sentence."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(dim=1)


def pair_ranks(embeddings: Tensor) -> Tensor:
    """The rank of every pair of sentences by similarity."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings[first] * embeddings[second]).sum(dim=1).argsort().argsort().double()


@dataclass
class Drift:
    """What a plan took, and what became of the embeddings."""

    channels_pruned: float
    weights_pruned: float
    mean: float
    worst: float
    same_nearest: float
    rank_correlation: float


def drift(plan: lnprune.Plan, before: Tensor, after: Tensor) -> Drift:
    entries = plan.entries
    cosines = (before.double() * after.double()).sum(dim=1)
    return Drift(
        1 - sum(entry.kept for entry in entries) / sum(entry.channels for entry in entries),
        sum(entry.parameters_removed for entry in entries) / sum(math.prod(e.shape) for e in entries),
        float(cosines.mean()),
        float(cosines.min()),
        float((nearest(before) == nearest(after)).double().mean()),
        float(torch.corrcoef(torch.stack([pair_ranks(before), pair_ranks(after)]))[0, 1]),
    )


class Stopwatch:
    """Seconds of calls, by what they do."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments, **options)
        self.seconds.setdefault(what, []).append(time.perf_counter() - start)
        return result

    def __str__(self) -> str:
        """The medians."""
        return ", ".join(
            f"{what} {statistics.median(values) * 1e3:.1f} ms" for what, values in self.seconds.items()
        )


def show(console: Console, outcomes: dict[tuple[float, str], Drift], count: int) -> None:
    """A table with a line for each amount and way to select."""
    table = Table(
        title=f"Embeddings of {count} sentences, pruned against unpruned",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("amount", justify="right")
    table.add_column("selection")
    for header in (
        "channels\npruned",
        "weights\npruned",
        "cosine,\nmean",
        "cosine,\nworst",
        "same nearest\nneighbour",
        "pairs: rank\ncorrelation",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for amount in AMOUNTS:
        for name in SELECTIONS:
            outcome = outcomes[amount, name]
            table.add_row(
                f"{amount:g}" if name == "local" else "",
                name,
                f"{outcome.channels_pruned:.1%}",
                f"{outcome.weights_pruned:.1%}",
                f"{outcome.mean:.3f}",
                f"{outcome.worst:.3f}",
                f"{outcome.same_nearest * count:.0f} of {count}",
                f"{outcome.rank_correlation:.2f}",
            )
        table.add_section()
    console.print(table)


def compare(console: Console, outcomes: dict[tuple[float, str], Drift]) -> None:
    """At how many amounts the global selections do worse than the local one, and at how many better."""
    measures = {
        "cosine,\nmean": "mean",
        "cosine,\nworst": "worst",
        "same nearest\nneighbour": "same_nearest",
        "pairs: rank\ncorrelation": "rank_correlation",
    }
    table = Table(
        title=f"Against local: at how many of the {len(AMOUNTS)} amounts worse / better",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("selection")
    for header in measures:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column(f"weights pruned\nat {SHOWN[0]:g} (local)", justify="right", no_wrap=True)
    for name in SELECTIONS:
        if name == "local":
            continue
        cells = []
        for measure in measures.values():
            pairs = [
                (getattr(outcomes[amount, name], measure), getattr(outcomes[amount, "local"], measure))
                for amount in AMOUNTS
            ]
            cells.append(f"{sum(a < b for a, b in pairs)} / {sum(a > b for a, b in pairs)}")
        taken, local = (outcomes[SHOWN[0], which].weights_pruned for which in (name, "local"))
        table.add_row(name, *cells, f"{taken:.1%} ({local:.1%})")
    console.print(table)


def plot(path: pathlib.Path, outcomes: dict[tuple[float, str], Drift], unrelated: float) -> None:
    """Drift over amounts and over weights pruned, and what is left of the neighbours."""
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    for name, color in COLORS.items():
        drifts = [outcomes[amount, name] for amount in AMOUNTS]
        weights = [100 * one.weights_pruned for one in drifts]
        for axis, positions in ((axes[0], AMOUNTS), (axes[1], weights)):
            axis.plot(
                positions, [one.mean for one in drifts], color=color, marker="o", label=f"{name}: mean"
            )
            axis.plot(
                positions,
                [one.worst for one in drifts],
                color=color,
                linestyle=":",
                marker="v",
                label=f"{name}: worst",
            )
        axes[2].plot(AMOUNTS, [100 * one.same_nearest for one in drifts], color=color, marker="o")
    for axis in axes[:2]:
        axis.axhline(unrelated, color="tab:gray", linestyle="--", linewidth=1)
        axis.annotate(
            "two different sentences, unpruned: mean",
            (0.02, unrelated),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
            color="tab:gray",
        )
        axis.set_ylim(min(0, axis.get_ylim()[0]), 1)
        axis.set_ylabel("cosine to the unpruned embedding")
    axes[0].set_xlabel("amount")
    axes[1].set_xlabel("weights pruned, %")
    axes[2].set_xlabel("amount")
    axes[2].set_ylabel("sentences that keep their nearest neighbour, %")
    axes[2].set_ylim(0, 103)
    for axis, title in zip(axes, ("Drift by amount", "Drift by weights pruned", "Neighbours"), strict=True):
        axis.set_title(title, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("all-MiniLM-L6-v2 without retraining: what pruning its Linear layers does", fontsize=13)
    save_figure(figure, path, dpi=110)
    pyplot.close(figure)


def check(condition: bool, complaint: str) -> None:
    if not condition:
        raise SystemExit(complaint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=float, default=2.0, help="order of the norm, inf and -inf too")
    parser.add_argument(
        "--normalize",
        choices=("size", "layer", "none"),
        default="size",
        help="what a global ranking divides the norms of a layer by",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("demo"), help="folder of the files"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    console = Console()
    if not console.is_terminal:
        console.width = 132
    folder = model_file().parent
    encoder = load_encoder(folder)
    sentences = [sentence for sentences in SENTENCES.values() for sentence in sentences]
    topics = torch.tensor([i for i, listed in enumerate(SENTENCES.values()) for _ in listed])
    tokens, mask = tokenize(folder, sentences)

    @torch.no_grad()
    def embed() -> Tensor:
        return encoder(tokens, mask)

    first = embed()
    same_topic = int((topics[nearest(first)] == topics).sum())
    pairs = (first @ first.T)[torch.ones(len(first), len(first)).triu(1) == 1]

    # Only the Linear layers: a channel of the word embeddings is a feature of every layer's input, and half
    # of the model's weights would hang on 384 of them.
    stopwatch = Stopwatch()
    for _ in range(5):
        ranking = stopwatch("rank", lnprune.rank, encoder, n=options.n, dim="out", include=nn.Linear)
    channels = sum(norms.numel() for norms in ranking.norms.values())
    console.print(
        f"[bold]all-MiniLM-L6-v2[/] embeds {len(sentences)} sentences of {len(SENTENCES)} topics: "
        f"{same_topic} have their nearest neighbour in their own topic; the cosine of two different "
        f"sentences is {float(pairs.mean()):.3f} in the mean. Its {len(ranking)} Linear layers with "
        f"{channels} output channels are ranked once, n={options.n:g}. Every selection below is made from "
        "that ranking, applied as masks to weights and biases, measured, and undone. Nothing is retrained. "
        f"Selections are made with normalize={options.normalize!r}, "
        + ", ".join(f"{key}={value}" for key, value in CONSTRAINTS.items())
        + "."
    )

    outcomes = {}
    for amount in AMOUNTS:
        for name, selection in SELECTIONS.items():
            plan = stopwatch(
                "select", ranking.select, amount, normalize=options.normalize, **selection, **CONSTRAINTS
            )
            stopwatch("apply", plan.apply, bias=True)
            after = embed()
            stopwatch("undo", plan.undo)
            outcomes[amount, name] = drift(plan, first, after)
            if (amount, name) == SHOWN:
                shown, masked = plan, after
    check(torch.equal(embed(), first), "The embeddings after the last undo() are not the first ones")
    show(console, outcomes, len(sentences))
    compare(console, outcomes)
    console.print(
        "Of channels, global prunes as many channels as local; of parameters, as many weights; but for "
        "rounding. Both global selections cut one ranking, at different places. After "
        f"{len(outcomes)} times apply and undo the embeddings are the first ones, bit for bit."
    )

    amount, name = SHOWN
    console.print(f"\n[bold]The plan for amount={amount}, {name}[/]")
    console.print(str(shown), markup=False, highlight=False, soft_wrap=True)
    saved = options.out / "whole_model_plan.json"
    shown.save(saved)
    loaded = lnprune.load_plan(saved, encoder)
    check(
        loaded.keep.keys() == shown.keep.keys()
        and all(torch.equal(keep, shown.keep[key]) for key, keep in loaded.keep.items()),
        "The plan read from its file selects other channels",
    )
    stopwatch("permanent apply with keep_backup", loaded.apply, permanent=True, bias=True, keep_backup=True)
    check(not list(encoder.buffers()), "permanent=True left a mask")
    pruned = {key: encoder.get_parameter(key)[~keep] for key, keep in loaded.keep.items()}
    check(
        not any(rows.any() for rows in pruned.values()), "permanent=True left a weight of a pruned channel"
    )
    zero = sum(map(len, pruned.values()))
    difference = float((embed() - masked).abs().max())
    stopwatch("its undo", loaded.undo)
    check(torch.equal(embed(), first), "undo() of a permanent plan did not restore the embeddings")
    console.print(
        "\nThe plan, saved as JSON, read again and applied with permanent=True and keep_backup=True: "
        f"{zero} rows of zeros, no mask; largest difference from embeddings by masks: {difference:.1g}. "
        "After its undo() the embeddings are the first ones again, bit for bit."
    )
    console.print(f"Median times: {stopwatch}.")

    pictures = [options.out / "whole_model_drift.png", options.out / "whole_model_plan.png"]
    plot(pictures[0], outcomes, float(pairs.mean()))
    shown.plot(pictures[1])
    console.print(f"Plots: {pictures[0]}, {pictures[1]}; plan: {saved}")


if __name__ == "__main__":
    main()
