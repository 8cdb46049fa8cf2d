"""Folders of the library transformers: smaller models that ``from_pretrained`` loads.

Calls need transformers, which the extra ``transformers`` brings: ``pip install "lnprune[transformers]"``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from lnprune.errors import check_flags
from lnprune.pretrained.choosing import Measures, amount_of
from lnprune.pretrained.pruning import Pruned, prune_folder
from lnprune.steps.flags import Amount
from lnprune.steps.norms import Order

__all__ = ["Pruned", "prune_pretrained"]


def prune_pretrained(
    folder_in: str | os.PathLike[str],
    folder_out: str | os.PathLike[str],
    amount: Amount,
    *,
    n: Order = 2,
    heads: Amount | None = None,
    experts: Amount | None = None,
    multiple_of: int = 1,
    importance_scores: Mapping[str, Tensor] | None = None,
    scale: Mapping[str, Tensor] | None = None,
    element_scale: Mapping[str, Tensor] | None = None,
    custom_code: bool = False,
    force: bool = False,
    verify: bool = True,
) -> Pruned:
    """Writes a smaller model from a folder of transformers, which ``from_pretrained`` loads as any other.

    The channels between the two halves of every MLP, and, where it is asked for, attention heads and whole
    experts leave the model. Of every layer go equally many, those of the smallest norm, since a config has
    one number for all. What was written is loaded again and compared, in float64, with the model that has
    zeros in place of what went: with its own weights, and with random ones. Only then does it take its
    place: ``folder_out`` is complete, or as it was.

    Args:
        folder_in: a folder with a ``config.json`` and weights, of one of the model types in
            docs/transformers.md. It is not changed.
        folder_out: a folder, which must not be there, or be empty, or with ``force`` is replaced. Weights
            are safetensors, in the dtype that they have; ``config.json`` has the new numbers; other files,
            as those of tokenizers, are copied.
        amount: how many intermediate channels of every MLP and of every expert go: an int, or a share, a
            float in [0, 1], rounded half to even. 0: none. Each expert loses channels of its own. As
            :meth:`Ranking.select` does, at least one stays, and the nearest number that ``multiple_of``
            allows.
        n: the order of the norm, as for :func:`ln_structured`. A channel is measured by all that makes and
            reads it, a head by its queries, keys, values and outputs, an expert by all its weights and its
            router's row.
        heads: how many attention heads of every layer go, with the keys and values that they share: an int,
            a multiple of how many share them; or a share. None: none.
        experts: how many whole experts of every layer go, an int or a share; of a router that chooses by
            groups, equally many of every group. None: none. The reference is the model whose router has
            logits of minus infinity for them.
        multiple_of: keep a multiple of so many intermediate channels.
        importance_scores: tensors to measure in place of some of the weights, each of its weight's shape,
            by the names that parameters have in the model that ``from_pretrained`` returns.
        scale: what the norms of channels are multiplied by: vectors of shape ``(channels,)``, by the name
            of the weight that makes the channels, as :func:`couple` names groups. Of the channels of
            experts, ``(experts, channels)`` by the name of the module that holds them, as for :func:`rank`;
            of whole experts, ``(experts,)`` by the name of their router.
        element_scale: what the elements of weights are multiplied by, as for :meth:`Coupling.rank` and, of
            the channels of experts, :func:`rank`. Whole experts are measured without.
        custom_code: where code divides the hidden size by the number of heads, as BERT and GPT-2 do, no
            config says that heads are gone. With this, they go all the same, and a short file of code is
            written beside the weights, which ``from_pretrained`` runs with ``trust_remote_code=True``.
        force: whether a folder that is there is replaced.
        verify: whether the result is compared, which needs the memory of two copies in float64. Sizes are
            looked at in any case.

    Returns:
        a :class:`Pruned`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the folder is not one that can be pruned: no config, an unknown model type, quantized or
            packed weights, weights that do not fit; the target is not written to; the numbers do not fit.
            Nothing is written.
        RuntimeError: the result computes something else. Nothing is left of it.

    Example::

        from lnprune.integrations.transformers import prune_pretrained

        pruned = prune_pretrained("llama", "llama-small", 0.25, heads=2, multiple_of=4)
        print(pruned.numbers["intermediate_size"])  # (48, 36)
        model = transformers.AutoModelForCausalLM.from_pretrained("llama-small")
    """
    check_flags(custom_code=custom_code, force=force, verify=verify)
    measures = Measures(n, importance_scores or {}, scale or {}, element_scale or {})
    return prune_folder(
        os.fspath(folder_in),
        os.fspath(folder_out),
        amount_of(amount, "amount"),
        None if heads is None else amount_of(heads, "heads"),
        None if experts is None else amount_of(experts, "experts"),
        multiple_of,
        measures,
        custom_code,
        force,
        verify,
    )
