"""Checkpoints in one call: rank_checkpoint measures every channel of a file, to select from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lnprune.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lnprune.checkpoints.choice import Choice, StoredDim, StoredPatterns, choose
from lnprune.checkpoints.measurements import Measurements
from lnprune.checkpoints.memory import Progress
from lnprune.checkpoints.streaming import measure_stored
from lnprune.modules.scores import factors_of
from lnprune.plans.ranking import Ranking
from lnprune.plans.scales import scales_of
from lnprune.steps import reference
from lnprune.steps.norms import Order


def rank_checkpoint(
    path: str | os.PathLike[str],
    n: Order,
    dim: StoredDim = "out",
    *,
    batch_dim: Mapping[str, int] | None = None,
    scale: Mapping[str, Tensor] | None = None,
    element_scale: Mapping[str, Tensor] | None = None,
    include: StoredPatterns = None,
    exclude: StoredPatterns = None,
) -> Ranking:
    """Measures the L\\ ``n`` norm of every channel of a checkpoint, without its model, a tensor at a time.

    No more than one tensor is in memory, or a part of one. What comes out is a :class:`Ranking`, as
    :func:`rank` gives it for the loaded model: bit for bit its norms. A plan from it can be printed,
    plotted and saved. :func:`load_plan` applies it to the model, and ``python -m lnprune prune`` to files.

    Taken are the weights of linear layers and convolutions. Embeddings, output layers (``lm_head``), norms,
    adapters, routers, packed dtypes and the matrices of experts are left alone unless they are asked for;
    ``print(ranking)`` says so. Which dim has the output channels is found from names and shapes: by the
    length of the bias beside a weight, by its neighbours, or by ``config.json``.

    Args:
        path: a file of safetensors or of :func:`torch.save` (a state dict), an index of several files, or a
            folder with one or the other, as transformers saves them.
        n: the order of the norm, as for :func:`ln_structured`.
        dim: the dim of the channels: ``"out"``, ``"in"``, or a number; or a mapping from patterns of names
            to these, where ``"out"`` is for all others.
        batch_dim: a mapping from patterns to the dim along which a tensor holds many matrices, as
            ``[experts, out, in]`` does; such tensors need a ``dim`` too. Each matrix is ranked by itself.
        scale: by name, what the norms of channels are multiplied by, as for :func:`rank`.
        element_scale: by name, what elements are multiplied by before, as for :func:`rank`.
        include: patterns of the tensors to take, as in :mod:`fnmatch`, for their names or those of their
            modules. One that matches nothing that is taken otherwise is looked for among all tensors of two
            dims or more.
        exclude: patterns of those not to take.

    Returns:
        a :class:`Ranking` of the tensors, in natural order of their names or, of a file of
        :func:`torch.save`, in the order there.

    Raises:
        ImportError: the library safetensors is not installed: ``pip install "lnprune[cli]"``.
        ValueError: the checkpoint cannot be used, or changes while it is read; a pattern matches nothing; a
            dim is not known.
        IndexError: a dim is out of range.
        TypeError: a vector is none.
        RuntimeError: ``n`` is no order of a norm; or inside :func:`reference_ranking`.

    Example:
        >>> import lnprune, pathlib, tempfile
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt"
        >>> torch.save(model.state_dict(), path)
        >>> lnprune.rank_checkpoint(path, n=2).select(0.5)
        Plan(2 parameters, 3 of 6 channels kept)
    """
    checkpoint = open_checkpoint(path)
    return measured(
        checkpoint, choose(checkpoint, dim, batch_dim, include, exclude), n, scale, element_scale
    ).ranking()


def measured(
    checkpoint: Checkpoint,
    choice: Choice,
    n: Any,
    scale: Mapping[str, Tensor] | None = None,
    element_scale: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda _: None,
) -> Measurements:
    """The norms of the tensors that were chosen of a checkpoint."""
    if reference.ranks_like_torch():
        raise RuntimeError(
            "rank_checkpoint orders channels by float64 norms, ties by index: rank outside of "
            "reference_ranking()"
        )
    rows = [each.row for each in choice.chosen]
    members = [row.members[0] for row in rows]
    weights = [member.weight for member in members]
    # Of each weight the shape and the device, without memory.
    places = [torch.empty(1, device="cpu").expand(weight.shape) for weight in weights]
    scales = scales_of(rows, places, scale)
    factors = factors_of(
        weights,
        dict(zip(weights, places, strict=True)),
        {member.weight: member.dim for member in members},
        {member.weight: member.batch for member in members},
        element_scale,
    )
    with torch.no_grad():
        by_number = {i: factors[weight] for i, weight in enumerate(weights) if weight in factors}
        found = measure_stored(choice.chosen, n, by_number, progress, scales)
    return Measurements(
        rows,
        n,
        [each.norms * scales[i] if i in scales else each.norms for i, each in enumerate(found)],
        {i: each.counts for i, each in enumerate(found) if each.counts is not None},
        [f"{tensor.name}: {why}" for tensor, why in choice.left.items() if len(tensor.shape) > 1],
    )
