"""Prunes the file of a real sentence encoder from the command line, and compares its embeddings."""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys

import torch
from torch import nn

try:
    from sentence_encoder import model_file
    from whole_model import SENTENCES, load_encoder, tokenize
except ImportError as error:
    raise SystemExit(
        f'This demo needs the package {error.name}, one of its extras: pip install "lnprune[demo]"'
    ) from error


def run(*words: str | pathlib.Path) -> None:
    """Shows a command of lnprune, and runs it."""
    print(f"\n$ lnprune {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "lnprune", *map(str, words)], check=True)


@torch.no_grad()
def main() -> None:
    """Ranks, plans, prunes and verifies, by files alone; then loads both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amount", default="0.05", help="the share of all channels that go")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("demo/checkpoint"))
    options = parser.parse_args()
    source = model_file().parent
    options.folder.mkdir(parents=True, exist_ok=True)
    pruned, plan = options.folder / "pruned", options.folder / "plan.json"
    ranking = options.folder / "ranking.safetensors"
    if pruned.exists():
        shutil.rmtree(pruned)
    run("rank", source / "model.safetensors", "--save", ranking, "-q")
    run("plan", ranking, "--amount", options.amount, "--scope", "global", "-o", plan)
    run("prune", source, "--plan", plan, "-o", pruned)
    run("verify", pruned, "--plan", plan)

    sentences = [sentence for about in SENTENCES.values() for sentence in about]
    inputs = tokenize(source, sentences)
    before, after = (load_encoder(folder)(*inputs) for folder in (source, pruned))
    cosines = nn.functional.cosine_similarity(before, after)
    print(f"\nCosine of embeddings before and after: {cosines.mean():.4f}, the least {cosines.min():.4f}")


if __name__ == "__main__":
    main()
