"""rank: the norms of every channel of a model, measured once, and any number of selections from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lnprune import reference
from lnprune.flags import Amount
from lnprune.local import is_wrapper, on_cpu
from lnprune.masks import masked
from lnprune.norms import Order, channel_norms, native_order, nonzero_counts, zero_norms_are_zeros
from lnprune.parameters import Dim, Parameters, Patterns, Weight, collect, per_weight, scores_of
from lnprune.plan import Plan
from lnprune.selection import LEAST, WORDS, Arrangement, Layers, Normalize, Of, Scope
from lnprune.torch_internals import (
    own_buffers,
    own_parameters,
)

__all__ = ["Ranking", "rank"]

_TOO_MANY = 2**31  # channels: products of two such numbers fit 64 bits


def rank(
    parameters: Parameters,
    n: Order,
    dim: Dim,
    importance_scores: Mapping[Any, Tensor] | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Ranking:
    """Measures the L\\ ``n`` norm of every channel of many parameters, in one native call per device.

    No weight is changed, and none is read again by the selections that follow. A weight that modules
    share is measured once. Of a pruned parameter the product of mask and original is measured, as they are
    now, whatever the last forward left in the attribute. Channels that are gone take no part in what is
    selected: those that a mask empties, and those whose elements are all zero, whoever zeroed them.

    Args:
        parameters: pairs ``(module, name)``, as in torch's ``global_unstructured``; they are called
            ``"0.weight"``, ``"1.weight"``, ... Or a module: then the weights of every Linear, convolution,
            transposed convolution, Embedding, MultiheadAttention and Conv1D of transformers in it. Their
            names are those of the bare model, without what wrappers (compiled, parallel, averaged) add.
        n: the order of the norm, as for :func:`ln_structured`.
        dim: the dim of the channels: one number; ``"out"`` or ``"in"``, which is the right one for each
            type of module; or one per parameter, as a sequence or as a mapping by name.
        importance_scores: tensors to rank in place of some of the weights, by ``(module, name)`` or by
            the parameter's name, each of its parameter's shape.
        include: of a module, the weights to take: patterns as in :mod:`fnmatch` for the name of the
            parameter or of its module, and types of modules. A pattern that matches none of the weights
            above is looked for among all parameters of two dims or more, and a type beyond the ones above
            stands for all of these in its modules. A mapping also teaches what ``dim="out"`` and ``"in"``
            mean, as in ``include={MyLinear: {"out": 0, "in": 1}, nn.Linear: None}``.
        exclude: patterns and types of weights not to take. A weight that modules share is taken under all
            of its names or, where one of them is excluded, under none.

    Returns:
        a :class:`Ranking`. Its norms stay on the devices of the weights until the first selection.

    Raises:
        AttributeError: a module has no such parameter.
        ValueError: there is nothing to rank; a parameter is given twice, has fewer than two dims or no
            shape yet, shares its weight with one that has another ``dim``; a pattern matches nothing;
            scores have another shape.
        IndexError: ``dim`` is out of range.
        TypeError: ``parameters`` holds something else; a parameter is parametrized.
        RuntimeError: ``n`` is no order of a norm; or inside :func:`reference_ranking`, since a ranking
            across layers has no counterpart in torch.

    Example:
        >>> import lnprune
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))
        >>> ranking = lnprune.rank(model, n=2, dim="out")
        >>> {name: tuple(norms.shape) for name, norms in ranking.norms.items()}
        {'0.weight': (8,), '1.weight': (4,)}
    """
    if reference.ranks_like_torch():
        raise RuntimeError(
            "rank orders channels by float64 norms, ties by index: inside reference_ranking() use "
            "ln_structured or local_structured, or rank outside of it"
        )
    weights, tensors = collect(parameters, dim, include, exclude)
    dims = [weight.dim for weight in weights]
    names = [weight.name for weight in weights]
    masks: dict[int, Tensor] = {}
    for i, weight in enumerate(weights):
        module, attribute = weight.places[0]
        if attribute not in own_parameters(module):
            mask = own_buffers(module)[attribute + "_mask"]
            original = own_parameters(module)[attribute + "_orig"]
            masks[i] = mask  # type: ignore[assignment]
            with torch.no_grad():
                tensors[i] = masked(mask, original)  # type: ignore[arg-type]
    scores = scores_of(weights, tensors, importance_scores)
    norms = channel_norms(scores, n, dims, names)
    say_zeros = {dtype: zero_norms_are_zeros(dtype, n) for dtype in {tensor.dtype for tensor in tensors}}
    counted = [
        i
        for i, (tensor, score) in enumerate(zip(tensors, scores, strict=True))
        if score is not tensor or not say_zeros[tensor.dtype]
    ]
    counts = nonzero_counts(
        [*masks.values(), *(tensors[i].detach() for i in counted)], [dims[i] for i in (*masks, *counted)]
    )
    mask_counts, element_counts = counts[: len(masks)], counts[len(masks) :]
    return Ranking(
        weights,
        n,
        norms,
        dict(zip(masks, mask_counts, strict=True)),
        dict(zip(counted, element_counts, strict=True)),
    )


class Ranking:
    """The norms of the channels of many parameters, from :func:`rank`."""

    def __init__(
        self,
        weights: Sequence[Weight],
        n: Any,
        norms: Sequence[Tensor],  # float64, of the channels of each weight
        mask_counts: Mapping[int, Tensor] | None = None,  # of pruned weights: nonzero mask elements
        # Of weights whose norms are 0 for other channels than those of zeros: nonzero elements.
        element_counts: Mapping[int, Tensor] | None = None,
    ):
        self.n = n
        self._weights = weights
        self._norms = norms
        self._mask_counts = mask_counts or {}
        self._element_counts = element_counts or {}
        self._arrangements: dict[tuple[str, int, int, int], Arrangement] = {}

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in order."""
        return [weight.name for weight in self._weights]

    @property
    def norms(self) -> dict[str, Tensor]:
        """The float64 norms of each parameter's channels, shape ``(channels,)``, on its device."""
        return dict(zip(self.names, self._norms, strict=True))

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        channels = sum(norms.numel() for norms in self._norms)
        return f"Ranking({len(self)} parameters, {channels} channels, n={self.n!r})"

    @functools.cached_property
    def _layers(self) -> Layers:
        for weight, norms in zip(self._weights, self._norms, strict=True):
            if norms.is_meta:
                raise ValueError(f"{weight.name}: is on the device meta, where norms have no values")
            if is_wrapper(norms):
                raise RuntimeError(
                    f"{weight.name}: expected norms that hold their own values, to select by, got a "
                    f"{type(norms).__name__}: prune with ln_structured or local_structured"
                )
        channels = [norms.numel() for norms in self._norms]
        sizes = [
            math.prod(weight.shape) // count if count else 0
            for weight, count in zip(self._weights, channels, strict=True)
        ]
        norms = on_cpu(self._norms, torch.float64)
        unmasked = None
        if self._mask_counts:
            ones = torch.ones(max(channels), dtype=torch.float64, device="cpu")
            counts = [self._mask_counts.get(i, ones[:count]) for i, count in enumerate(channels)]
            unmasked = on_cpu(counts, torch.float64) != 0
        elements = norms
        if self._element_counts:
            counts = [self._element_counts.get(i, norms) for i, norms in enumerate(self._norms)]
            elements = on_cpu(counts, torch.float64)
        nonzero = elements != 0
        return Layers(
            self.names,
            channels,
            sizes,
            norms,
            unmasked,
            None if nonzero.all() else nonzero,
            native_order(self.n),
        )

    def select(
        self,
        amount: Amount | Mapping[str, Amount],
        scope: Scope = "local",
        of: Of = "channels",
        normalize: Normalize = "size",
        min_channels: int = 1,
        multiple_of: int = 1,
        group_size: int = 1,
    ) -> Plan:
        """Chooses the channels to prune. No weight is read or changed.

        The constraints hold exactly, and together. What is kept of a layer is always the first of its
        channels by rank: NaN, then larger norms, then lower indices. Channels that are gone take no
        part: an amount is one of those that are left.

        Args:
            amount: how much to prune: an int, channels or parameters as ``of`` says, or a share, a float in
                [0, 1], rounded half to even. For ``scope="local"`` also one per parameter, by name.
            scope: ``"local"``, as :func:`ln_structured` does for each parameter by itself; or ``"global"``,
                in one ranking of the channels of all parameters.
            of: what ``amount`` counts, ``"channels"`` or ``"parameters"``, that is elements of weights.
            normalize: for ``scope="global"``, what the norms of a layer are divided by: ``"size"``, the
                elements of a slice to the power 1/n (the elements themselves for n = 0), without which, as
                torch's documentation of ``global_unstructured`` says, norms of slices of different sizes do
                not compare; ``"layer"``, the mean of the layer's finite norms; or ``"none"``.
            min_channels: keep at least so many channels of every layer.
            multiple_of: keep a multiple of so many channels of every layer.
            group_size: so many adjacent channels are ranked as one, by the norm of all their elements, and
                kept or pruned together. Each weight is ranked by itself: the same heads in the weights of
                an attention take scores that these have in common (docs/models.md).

        Returns:
            a :class:`Plan`. With constraints not every total is possible: the plan has the possible total
            that is nearest to ``amount``, and of two that are equally near, the one that keeps more. For
            ``of="channels"`` a total is possible where the constraints of each layer allow it. For
            ``of="parameters"`` channels also stay in the order of the ranking, so a total is possible where
            it is that of the first channels of this order. With ``multiple_of`` and ``scope="global"``, the
            channels of each layer are put in order and cut into blocks of that many. The blocks of all
            layers are then ranked by the sum of their channels' norms. Ties go to the earlier parameter,
            then to the lower index. The plan knows of no pruning that came after the ranking.

        Raises:
            ValueError: no count of a layer's channels meets the constraints, or its channels make no whole
                number of groups; ``amount`` is out of range; a word is unknown; a parameter is on the
                device meta.
            TypeError: ``amount`` is no number, or a constraint no int.

        Example:
            >>> import lnprune
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 16))
            >>> ranking = lnprune.rank(model, n=2, dim="out")
            >>> plan = ranking.select(0.5, scope="global", min_channels=4, multiple_of=4)
            >>> kept = [entry.kept for entry in plan.entries]
            >>> sum(kept), [count % 4 for count in kept]
            (24, [0, 0])
        """
        words: dict[str, str] = {"scope": scope, "of": of, "normalize": normalize}
        for option, word in words.items():
            if word not in WORDS[option]:
                raise ValueError(
                    f"{option}: expected {' or '.join(map(repr, WORDS[option]))}, got {word!r}"
                )
        numbers = {"min_channels": min_channels, "multiple_of": multiple_of, "group_size": group_size}
        for option, number in numbers.items():
            if type(number) is not int:
                raise TypeError(f"{option}: expected an int, got {number!r}")
            if number < LEAST[option]:
                raise ValueError(f"{option}: expected {LEAST[option]} or more, got {number}")
            if number >= _TOO_MANY:
                raise ValueError(f"{option}: expected less than {_TOO_MANY}, got {number}")
        if scope == "local":
            words["normalize"] = "none"
        options = {**words, **numbers}
        key = (str(options["normalize"]), group_size, multiple_of, min_channels)
        arrangement = self._arrangements.get(key)
        if arrangement is None:
            arrangement = Arrangement(self._layers, key[0], group_size, multiple_of, min_channels)
            self._arrangements[key] = arrangement
        if scope == "local":
            flags = arrangement.select_local(per_weight(amount, self.names, "amount"), of)
        elif isinstance(amount, Mapping):
            raise TypeError("amount: expected one number for scope='global', got one per parameter")
        else:
            flags = arrangement.select_global(amount, of)
        return Plan(self._weights, flags, self.n, {"amount": amount, **options}, arrangement)
