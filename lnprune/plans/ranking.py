"""Ranking: the norms of every channel of many rows, and any number of selections from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lnprune.errors import per_name
from lnprune.modules.application import Weight
from lnprune.plans.group_ranking import Found, together
from lnprune.plans.kinds import Uniform, checked_uniform, kinds_of
from lnprune.plans.layers import Layers
from lnprune.plans.outcome import details_of, slices_that_go
from lnprune.plans.plan import Plan
from lnprune.plans.rows import Measured, Row, counted, flags_of_weights, joint_sizes, row_norms
from lnprune.plans.saved_groups import Coupled
from lnprune.plans.selection import LEAST, WORDS, Arrangement, Normalize, Of, Scope
from lnprune.steps.factors import Factors
from lnprune.steps.flags import Amount
from lnprune.steps.local import is_wrapper, on_cpu
from lnprune.steps.norms import native_order, zero_norms_are_zeros
from lnprune.steps.sharding import Group

_TOO_MANY = 2**31  # channels: products of two such numbers fit 64 bits


def measure(
    rows: Sequence[Row],
    n: Any,
    tensors: Mapping[Weight, Tensor],
    scores: Mapping[Weight, Tensor] | None = None,
    masks: Mapping[Weight, Tensor] | None = None,
    coupled: Callable[[Sequence[Tensor]], Coupled] | None = None,
    group: Group | None = None,
    left_out: Callable[[], list[str]] = list,
    scales: Mapping[int, Tensor] | None = None,
    factors: Mapping[Weight, Factors] | None = None,
) -> Ranking:
    """Measures the channels of rows.

    Args:
        rows: what is ranked.
        n: the order of the norms.
        tensors: the values of each weight as they are, wherever it lives.
        scores: what is ranked in their place; None: the values.
        masks: those of weights that have one.
        coupled: as for :class:`Ranking`.
        group: ranks whose rows are ranked with these.
        left_out: as for :class:`Ranking`.
        scales: of some rows, by their index, what the norms are multiplied by, float64.
        factors: of some weights, what the elements are multiplied by.
    """
    scores, masks = tensors if scores is None else scores, masks or {}
    scales, factors = scales or {}, factors or {}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    say_zeros = {dtype: zero_norms_are_zeros(dtype, n) for dtype in dtypes}
    unlike = set()  # weights whose norms do not say which channels are zeros
    for weight, tensor in tensors.items():
        if scores[weight] is not tensor or not say_zeros[tensor.dtype] or weight in factors:
            unlike.add(weight)
    masked, unsaid = [], []
    for i, row in enumerate(rows if masks or unlike or scales else ()):
        if all(member.weight in masks for member in row.members):
            masked.append(i)
        if i in scales or any(member.weight in unlike for member in row.members):
            unsaid.append(i)
    norms, mask_counts, element_counts = row_norms(
        Measured(rows, scores, n, factors),
        counted([rows[i] for i in masked], masks),
        counted([rows[i] for i in unsaid], tensors),
    )
    for i, scale in scales.items():
        norms[i] = norms[i] * scale.to(norms[i].device)
    found = Found(
        list(rows),
        norms,
        dict(zip(masked, mask_counts, strict=True)),
        dict(zip(unsaid, element_counts, strict=True)),
    )
    here = range(len(rows))
    if group is not None:
        for row, each in zip(rows, norms, strict=True):
            _check_has_values(row, each)
        found, here = together(found, n, group)
    counts = found.mask_counts, found.element_counts
    return Ranking(found.rows, n, found.norms, *counts, coupled, here, left_out)


def _check_has_values(row: Row, norms: Tensor) -> None:
    """Raises where norms cannot be compared."""
    if norms.is_meta:
        raise ValueError(f"{row.name}: is on the device meta, where norms have no values")
    if is_wrapper(norms):
        raise RuntimeError(
            f"{row.name}: expected norms that hold their own values, to select by, got a "
            f"{type(norms).__name__}: prune with ln_structured or local_structured"
        )


class Ranking:
    """The norms of the channels of many parameters, from :func:`rank`."""

    def __init__(
        self,
        rows: Sequence[Row],
        n: Any,
        norms: Sequence[Tensor],  # float64, of the channels of each row
        mask_counts: Mapping[int, Tensor] | None = None,  # of masked rows: nonzero mask elements
        # Of rows whose norms are 0 for other channels than those of zeros: nonzero elements.
        element_counts: Mapping[int, Tensor] | None = None,
        # Of coupled channels: from keep flags of all rows to where the channels that go are in the model.
        coupled: Callable[[Sequence[Tensor]], Coupled] | None = None,
        here: range | None = None,  # the rows of this process; None: all
        left_out: Callable[[], list[str]] = list,  # what is not ranked, and what would do it
    ):
        self.n = n
        self._rows = rows
        self._norms = norms
        self._mask_counts = mask_counts or {}
        self._element_counts = element_counts or {}
        self._left_out = left_out
        self._here = range(len(rows)) if here is None else here
        self._goes = functools.partial(slices_that_go, rows) if coupled is None else coupled
        self._arrangements: dict[tuple[Any, ...], Arrangement] = {}

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in order."""
        return [known[0] for row in self._rows for known in row.names]

    @property
    def norms(self) -> dict[str, Tensor]:
        """The float64 norms of each parameter's channels, shape ``(channels,)``, on its device."""
        norms = [
            each
            for row, norms in zip(self._rows, self._norms, strict=True)
            for each in (norms,) * (row.rankings == 1) or norms.view(row.rankings, -1)
        ]
        return dict(zip(self.names, norms, strict=True))

    def __len__(self) -> int:
        return sum(row.rankings for row in self._rows)

    def __repr__(self) -> str:
        channels = sum(norms.numel() for norms in self._norms)
        return f"Ranking({len(self)} parameters, {channels} channels, n={self.n!r})"

    def __str__(self) -> str:
        said = self._left_out()
        return "\n".join([repr(self), *(f"left out: {each}" for each in said)])

    @functools.cached_property
    def _layers(self) -> Layers:
        for row, each in zip(self._rows, self._norms, strict=True):
            _check_has_values(row, each)
        channels = [norms.numel() for norms in self._norms]
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
            [row.channels for row in self._rows for _ in range(row.rankings)],
            [size for row in self._rows for size in [row.size] * row.rankings],
            norms,
            unmasked,
            None if nonzero.all() else nonzero,
            native_order(self.n),
            joint_sizes(self._rows),
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
        *,
        uniform: Uniform = None,
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
            uniform: which layers keep equal numbers of channels, as code needs it that has one size for
                all: ``"kind"``: those whose names differ in numbers alone and that have as many channels;
                or a mapping from names or patterns to words: those with the same word. What is kept of each
                is still the first of its own channels.

        Returns:
            a :class:`Plan`. With constraints not every total is possible: the plan has the possible total
            that is nearest to ``amount``, and of two that are equally near, the one that keeps more. For
            ``of="channels"`` a total is possible where the constraints of each layer allow it. For
            ``of="parameters"`` channels also stay in the order of the ranking, so a total is possible where
            it is that of the first channels of this order. With ``multiple_of`` and ``scope="global"``, the
            channels of each layer are put in order and cut into blocks of that many. The blocks of all
            layers are then ranked by the sum of their channels' norms. Ties go to the earlier parameter,
            then to the lower index. With ``uniform``, the blocks of one rank within the layers of a kind
            stay or go together, and are ranked by the mean of their sums; a local choice takes what is
            nearest for the whole kind. The plan knows of no pruning that came after the ranking.

        Raises:
            ValueError: no count of a layer's channels meets the constraints, or its channels make no whole
                number of groups; ``amount`` is out of range; a word is unknown; a parameter is on the
                device meta; layers of a kind have different amounts or numbers of channels.
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
        uniform = checked_uniform(uniform)
        if uniform is not None:
            options["uniform"] = uniform
        kinds = kinds_of(uniform, self._layers.names, self._layers.channels)
        constraints = (words["normalize"], group_size, multiple_of, min_channels)
        key = (*constraints, None if kinds is None else tuple(kinds))
        arrangement = self._arrangements.get(key)
        if arrangement is None:
            arrangement = Arrangement(self._layers, *constraints, kinds)
            self._arrangements[key] = arrangement
        if scope == "local":
            flags = arrangement.select_local(per_name(amount, self._layers.names, "amount"), of)
        elif isinstance(amount, Mapping):
            raise TypeError("amount: expected one number for scope='global', got one per parameter")
        else:
            flags = arrangement.select_global(amount, of)
        selection = {"amount": amount, **options}
        keep = flags.split([row.rankings * row.channels for row in self._rows])
        return Plan(
            self.n,
            selection,
            self._layers.names,
            flags.split(self._layers.channels),
            functools.partial(details_of, self._rows, arrangement, flags, selection),
            functools.partial(
                flags_of_weights, [self._rows[i] for i in self._here], [keep[i] for i in self._here]
            ),
            None if self._layers.parameters is None else functools.partial(self._goes, keep),
        )
