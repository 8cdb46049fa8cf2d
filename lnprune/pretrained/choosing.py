"""Which channels and heads go of a model of transformers: equally many of every layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lnprune.errors import shown
from lnprune.plans.ranking import Ranking
from lnprune.pretrained.custom_code import sizes_without
from lnprune.pretrained.inputs import example_inputs
from lnprune.pretrained.model_types import Heads, ModelType, Part
from lnprune.pretrained.slices import Going
from lnprune.removal.coupling import Coupling, couple
from lnprune.removal.cutting import Cut, cuts_of, settings_for
from lnprune.removal.groups import Group
from lnprune.steps.flags import Amount
from lnprune.steps.norms import Order


@dataclass
class Measures:
    """What channels are measured by: the arguments of rank.

    Attributes:
        n: the order of the norm.
        importance_scores: by the name of a parameter.
        scale: by the name of a group or of a layer of experts.
        element_scale: by the name of a parameter.
    """

    n: Order
    importance_scores: Mapping[str, Tensor]
    scale: Mapping[str, Tensor]
    element_scale: Mapping[str, Tensor]
    _used: set[tuple[str, str]] = field(default_factory=set)

    def of(self, names: Sequence[str], parameters: Sequence[str]) -> dict[str, Any]:
        """Keywords for a ranking of groups of these names, in which these parameters are."""
        known = {"importance_scores": parameters, "scale": names, "element_scale": parameters}
        found = {}
        for argument, keys in known.items():
            values = getattr(self, argument)
            mine = {key: values[key] for key in keys if key in values}
            self._used.update((argument, key) for key in mine)
            if mine:
                found[argument] = mine
        return found

    def check_used(self, parameters: Collection[str]) -> None:
        """Raises where something is for nothing that was measured; scores may be of any parameter."""
        for argument, known in ("importance_scores", parameters), ("scale", ()), ("element_scale", ()):
            for key in getattr(self, argument):
                if (argument, key) not in self._used and key not in known:
                    raise ValueError(f"{argument}: {key!r} is nothing that is measured")


def choose_coupled(
    model: Any,
    model_type: ModelType,
    amount: Amount,
    heads: Amount | None,
    multiple_of: int,
    measures: Measures,
    custom_code: bool = False,
) -> list[Going]:
    """The intermediate channels and the heads that go.

    Args:
        model: a model of transformers.
        model_type: what is known of it.
        amount: how many intermediate channels of each layer.
        heads: how many attention heads of each layer; None: none.
        multiple_of: what the channels that stay are a multiple of.
        measures: what channels are measured by.
        custom_code: whether heads may go where no config says so.

    Raises:
        ValueError: the numbers do not fit; channels of the model cannot go.
    """
    names = [name for name, _ in model.named_parameters()]
    parts: list[Part | Heads] = [*(model_type.widths if amount else ())]
    if heads is not None:
        parts.append(_heads(model, model_type, custom_code))
    makers = {part: [name for name in names if fnmatchcase(name, part.weights)] for part in parts}
    wanted = [name for part in parts for name in makers[part]]
    inputs: Any = example_inputs(model)
    coupling = couple(model, inputs, include=wanted, check=False) if wanted else Coupling(model, [], [])
    found = []
    for part in parts:
        mine = [group for group in coupling.groups if set(group.makers) & set(makers[part])]
        if not mine and isinstance(part, Heads):
            raise ValueError(f"heads: {type(model).__name__} has no layers of attention heads")
        if not mine:
            continue
        members = sorted({member.name for group in mine for member in group.members})
        options = measures.of([group.name for group in mine], members)
        ranking = Coupling(model, mine, []).rank(measures.n, **options)
        if isinstance(part, Heads):
            assert heads is not None
            chosen, numbers = _of_heads(model.config, part, ranking, mine, heads)
        else:
            chosen, numbers = _of_width(model.config, part, ranking, mine, amount, multiple_of)
        cuts = [
            cut
            for group in mine
            for cut in cuts_of(group, ~chosen[group.name])
            if cut.slices.numel()  # of what is shared by layers, once
        ]
        _check_is_not_tied(model, {cut.name for cut in cuts})
        sizes = None
        if isinstance(part, Heads) and part.size is None:
            sizes = _sizes(model, inputs, makers[part], cuts, chosen)
        what = "attention heads" if isinstance(part, Heads) else part.what
        found.append(Going(what, cuts, [], [], numbers, sizes))
    return found


def _sizes(
    model: Any, inputs: Any, makers: Sequence[str], cuts: Sequence[Cut], chosen: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What no config says of heads that go: which attributes hold their number is found by trying."""
    coupling = couple(model, inputs, include=makers)
    names = [group.name for group in coupling.groups]
    if set(names) != set(chosen):
        raise ValueError(f"heads: the sizes of {sorted(set(chosen) - set(names))[0]} are not found")
    gone = [int((~chosen[name]).sum()) for name in names]
    return sizes_without(model, cuts, settings_for(model, coupling.groups, gone))


def _heads(model: Any, model_type: ModelType, custom_code: bool) -> Heads:
    name = type(model).__name__
    if model_type.heads is None:
        raise ValueError(
            f"heads: lnprune cannot take heads out of {name}: what they read crosses all of them"
        )
    if model_type.heads.size is None and not custom_code:
        raise ValueError(
            f"heads: {name} divides hidden_size by the number of heads to know how large a head is, so no "
            "config says that heads are gone: with custom_code=True a file of code says it, which "
            "from_pretrained loads with trust_remote_code=True; couple(model, example_inputs), "
            "Plan.compact() and load_compact() need no config"
        )
    return model_type.heads


def _of_width(
    config: Any, part: Part, ranking: Ranking, groups: Sequence[Group], amount: Amount, multiple_of: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Which channels of each group stay, and the numbers of the config."""
    (key,) = part.keys
    said = getattr(config, key)
    for group in groups:
        if said is not None and group.channels != said:
            raise ValueError(f"{group.name}: expected {key}={said} channels, found {group.channels}")
    keep = selected(ranking, amount, multiple_of)
    return keep, {key: kept_of_each(keep)}


def _of_heads(
    config: Any, part: Heads, ranking: Ranking, groups: Sequence[Group], heads: Amount
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The same of heads: a channel of a group is one head, or those that share keys and values."""
    first, *others = part.keys
    count = getattr(config, first)
    channels = {group.channels for group in groups}
    if len(channels) != 1 or count % min(channels):
        raise ValueError(f"heads: expected groups of {first}={count} heads, found {sorted(channels)}")
    (units,) = channels
    each = count // units
    if type(heads) is int:
        if heads % each:
            raise ValueError(
                f"heads: expected a multiple of {each}, as so many share keys and values, got {heads}"
            )
        heads //= each
    keep = selected(ranking, heads)
    kept = kept_of_each(keep)
    numbers = {first: kept * each}
    if part.size is not None:
        numbers[part.size] = getattr(config, part.size, None) or config.hidden_size // count
    for key in others:
        if getattr(config, key, None) is not None:
            numbers[key] = getattr(config, key) * kept // units
    return keep, numbers


def selected(ranking: Ranking, amount: Amount, multiple_of: int = 1) -> dict[str, Tensor]:
    """Which channels stay: equally many of all that is ranked."""
    kind = dict.fromkeys(ranking.names, "all")
    return ranking.select(amount, multiple_of=multiple_of, uniform=kind).keep


def kept_of_each(keep: Mapping[str, Tensor]) -> int:
    """How many channels stay of each."""
    (count,) = {int(flags.sum()) for flags in keep.values()}
    return count


def _check_is_not_tied(model: nn.Module, names: set[str]) -> None:
    """Raises where what loses slices is also something else in the model."""
    known: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = known.setdefault(id(parameter), name)
        if other != name and {other, name} & names:
            raise ValueError(
                f"{other} and {name} are one weight (tied): expected channels that go to be its alone"
            )


def amount_of(value: Any, name: str) -> Amount:
    """A count or a share, as an argument gives it."""
    if type(value) not in (int, float):
        raise TypeError(f"{name}: expected a count (int) or a share (float), got {shown(value)}")
    if value < 0 or (type(value) is float and not value <= 1):
        raise ValueError(f"{name}: expected a count, or a share in [0, 1], got {value}")
    return value
