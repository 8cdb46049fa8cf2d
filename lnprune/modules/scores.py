"""What is ranked in place of weights: scores that a caller has, and factors of their elements."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lnprune.errors import shown
from lnprune.modules.parameters import Weight
from lnprune.steps.batches import Batch
from lnprune.steps.factors import Factors, checked_vector, length_of


def _index(weights: Sequence[Weight]) -> dict[Any, int]:
    """The number of each weight, by its names and places."""
    index: dict[Any, int] = {}
    for i, weight in enumerate(weights):
        index.update((name, i) for name in weight.names)
        index.update((place, i) for place in weight.places)
    return index


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
    index = _index(weights)
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


def factors_of(
    weights: Sequence[Weight],
    tensors: Mapping[Weight, Tensor],
    dims: Mapping[Weight, int],
    batches: Mapping[Weight, Batch | None],
    given: Mapping[Any, Tensor] | None,
) -> dict[Weight, Factors]:
    """What elements are multiplied by: for each index along the other dim than that of the channels.

    Args:
        weights: of a call.
        tensors: their values.
        dims: those of their channels, from the first.
        batches: those of their matrices.
        given: the vectors, by ``(module, name)`` or name.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            "element_scale: expected a mapping from (module, name) or a parameter's name to a vector, got "
            f"{shown(given)}"
        )
    index = _index(weights)
    found = {}
    for key, vector in given.items():
        if key not in index:
            raise ValueError(f"element_scale: {key!r} is none of the {len(weights)} parameters")
        weight = weights[index[key]]
        dim, batch = dims[weight], batches[weight]
        other = _other_dim(weight, dim, batch)
        length = length_of(tensors[weight], other, batch)
        lengths = [(length,)] + ([(batch.size, length)] if batch is not None else [])
        values = checked_vector(vector, lengths, tensors[weight], f"{weight.name}: element_scale")
        found[weight] = Factors(values.flatten().contiguous(), other)
    return found


def factors_along(
    weights: Sequence[Weight],
    tensors: Mapping[Weight, Tensor],
    dims: Mapping[Weight, Collection[int]],
    given: Mapping[Any, Tensor] | None,
) -> dict[Weight, Factors]:
    """The same where a weight may be measured along several dims, of which its factors can mean one."""
    index = _index(weights)
    for key in given if isinstance(given, Mapping) else ():
        along = dims[weights[index[key]]] if key in index else (0,)
        if len(along) > 1:
            raise ValueError(
                f"{key}: element_scale: expected a weight with channels along one dim, got one along "
                f"{' and '.join(map(str, sorted(along)))}: multiply importance_scores by the factors"
            )
    one = {weight: min(along) for weight, along in dims.items()}
    return factors_of(weights, tensors, one, dict.fromkeys(weights), given)


def _other_dim(weight: Weight, dim: int, batch: Batch | None) -> int:
    """The dim of the inputs where channels are outputs, and of the outputs where they are inputs."""
    is_whole = batch is not None and batch.size == weight.shape[batch.dim]
    others = [d for d in range(len(weight.shape)) if d != dim and not (is_whole and d == batch.dim)]  # type: ignore[union-attr]
    if len(others) == 1:
        return others[0]
    if batch is None and dim < 2:  # a convolution
        return 1 - dim
    raise ValueError(
        f"{weight.name}: element_scale: expected a matrix, matrices along batch_dim, or a convolution with "
        f"channels along dim 0 or 1, got shape {weight.shape} with channels along {dim}"
    )
