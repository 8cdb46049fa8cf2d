"""What is ranked in place of weights: scores that a caller has for some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lnprune.modules.parameters import Weight


def scores_of(
    weights: list[Weight], tensors: list[Tensor], importance_scores: Mapping[Any, Tensor] | None
) -> list[Tensor]:
    """What is ranked: the weights, or the scores that are given for some of them."""
    if importance_scores is None:
        return tensors
    if not isinstance(importance_scores, Mapping):
        raise TypeError(
            "importance_scores: expected a mapping from (module, name) or a parameter's name to a tensor, "
            f"got {type(importance_scores).__name__}"
        )
    index: dict[Any, int] = {}
    for i, weight in enumerate(weights):
        index[weight.name] = i
        index.update((place, i) for place in weight.places)
    scores = list(tensors)
    for key, score in importance_scores.items():
        if key not in index:
            raise ValueError(f"importance_scores: {key!r} is none of the {len(weights)} parameters")
        i = index[key]
        if not isinstance(score, Tensor):
            raise TypeError(
                f"{weights[i].name}: expected a tensor of importance_scores, got {type(score).__name__}"
            )
        if score.shape != tensors[i].shape:
            raise ValueError(
                f"{weights[i].name}: expected importance_scores of its shape {tuple(tensors[i].shape)}, "
                f"got {tuple(score.shape)}"
            )
        scores[i] = score
    return scores


def is_given(scores: Sequence[Tensor], values: Sequence[Tensor]) -> list[bool]:
    """For which weights scores were given."""
    return [score is not value for score, value in zip(scores, values, strict=True)]
