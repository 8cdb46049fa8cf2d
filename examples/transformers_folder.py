"""Makes a real sentence encoder smaller, from folder to folder; compares embeddings, size and time."""

from __future__ import annotations

import argparse
import pathlib
import shutil
import statistics
import sys
import time
import types
from typing import Any

import torch
from torch import Tensor

from lnprune.commands.main import main as lnprune

# The operators of torchvision, which no text model needs, do not load beside every torch.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("_meta_registrations"))
try:
    import transformers
    from sentence_encoder import model_file
    from whole_model import SENTENCES, tokenize
except ImportError as error:
    raise SystemExit(
        f'This demo needs the package {error.name}: pip install "lnprune[demo,transformers]"'
    ) from error

COMMANDS = {
    "MLP 25 %": ("--amount", "0.25"),
    "MLP 25 %, 2 of 12 heads": ("--amount", "0.25", "--heads", "2", "--custom-code"),
}
BATCH, TOKENS = 32, 128


def load(folder: pathlib.Path) -> Any:
    """The model of a folder, as anybody loads it."""
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def embeddings(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The means of token vectors, of length 1."""
    vectors = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1)
    return torch.nn.functional.normalize((vectors * weights).sum(1) / weights.sum(1), dim=1)


def seconds(models: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """The times of each model on one batch, taken in turns."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (BATCH, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    found: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            embeddings(model, ids, mask)
            if number:  # the first warms up
                found[name].append(time.perf_counter() - start)
    return found


@torch.no_grad()
def main() -> None:
    """Writes the smaller folders on the command line, loads them, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="how often each model is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("demo/transformers"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = model_file().parent
    folders = {"as it was": source}
    options.folder.mkdir(parents=True, exist_ok=True)
    for number, (name, words) in enumerate(COMMANDS.items()):
        folders[name] = options.folder / str(number)
        shutil.rmtree(folders[name], ignore_errors=True)
        print(f"\n$ lnprune compact {source} -o {folders[name]} {' '.join(words)}", flush=True)
        if lnprune(["compact", str(source), "-o", str(folders[name]), *words]):
            raise SystemExit(1)
    models = {name: load(folder) for name, folder in folders.items()}
    sentences = [sentence for about in SENTENCES.values() for sentence in about]
    ids, mask = tokenize(source, sentences)
    vectors = {name: embeddings(model, ids, mask) for name, model in models.items()}
    times = seconds(models, options.rounds)
    print(f"\nThreads: {options.threads}; {BATCH} x {TOKENS} tokens; medians of {options.rounds} rounds.\n")
    print("| model | parameters | MB | cosine to before, mean and least | ms | time / before |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, model in models.items():
        size = sum(each.numel() for each in model.parameters())
        megabytes = (folders[name] / "model.safetensors").stat().st_size / 1e6
        cosines = (vectors[name] * vectors["as it was"]).sum(1)
        ratios = [mine / whole for mine, whole in zip(times[name], times["as it was"], strict=True)]
        print(
            f"| {name} | {size:,} | {megabytes:.1f} | {cosines.mean():.3f}, {cosines.min():.3f} | "
            f"{statistics.median(times[name]) * 1e3:.0f} | {statistics.median(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
