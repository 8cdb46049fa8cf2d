"""The choice of channels from their norms: local or global, under constraints, with exact totals."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lnprune.errors import named
from lnprune.plans.layers import Layers, Parameters, alive_groups, group_norms, integers, owners
from lnprune.plans.normalizing import compared
from lnprune.steps import ops
from lnprune.torch_internals import compute_nparams_toprune, validate_pruning_amount_init

Scope = Literal["local", "global"]
Of = Literal["channels", "parameters"]
Normalize = Literal["size", "layer", "none"]
# The words that an option takes, and the least of the numbers.
WORDS = {"scope": get_args(Scope), "of": get_args(Of), "normalize": get_args(Normalize)}
LEAST = {"min_channels": 0, "multiple_of": 1, "group_size": 1}


def kept_of(amount: int | float, total: int, of: str) -> int:
    """How many of ``total`` channels or parameters stay, by torch's reading of an amount."""
    if type(amount) is float and 0 <= amount <= 1:
        return total - round(amount * total)
    if isinstance(amount, bool):
        raise TypeError(f"amount: expected a count, or a share from 0 to 1, got {amount}")
    validate_pruning_amount_init(amount)
    pruned = int(compute_nparams_toprune(amount, total))
    if pruned > total:
        raise ValueError(f"amount={amount} is more than the {total} {of} that are left to prune")
    return total - pruned


def _nearest_multiple(wanted: int, step: int, fewest: int, most: int) -> int:
    """The count of steps nearest to ``wanted``, the larger one where two are equally near."""
    if step == 0:
        return most
    return min(max((2 * wanted + step) // (2 * step), fewest), most)


def _sorted(indices: Tensor, keys: Tensor, descending: bool = True) -> Tensor:
    """The indices in the order of their keys; of equal keys, those that come first stay first."""
    return indices[torch.sort(keys[indices], descending=descending, stable=True).indices]


class Arrangement:
    """All that a selection needs but for its amount.

    Channels are taken in groups of ``group_size`` adjacent ones, and groups in blocks, so that a block
    has a multiple of ``multiple_of`` channels. Within a layer, groups are ranked by their norms, and the
    first block holds the first of them: whatever is kept of a layer is a number of its first blocks.
    All layers of a kind, given by its number, keep as many.
    """

    def __init__(
        self,
        layers: Layers,
        normalize: str,
        group_size: int,
        multiple_of: int,
        min_channels: int,
        kinds: Sequence[int] | None = None,
    ):
        self.layers = layers
        self.normalize = normalize
        self.group_size = group_size
        self._known_totals: dict[str, Tensor] = {}
        self.step = math.lcm(group_size, multiple_of)  # channels of a block
        for name, channels in zip(layers.names, layers.channels, strict=True):
            if channels % group_size:
                raise ValueError(
                    f"{name}: its {channels} channels are no whole number of groups of "
                    f"{group_size} (group_size)"
                )
        groups = integers(layers.channels) // group_size
        self.groups = groups.tolist()  # of each layer
        self.layer_of_group = owners(groups)
        self.norms = group_norms(layers.norms, group_size, layers.p)
        self.scores = compared(layers, self.norms, normalize, group_size, self.layer_of_group, self.alive)
        left = groups
        if self.alive is not None:
            left = torch.bincount(self.layer_of_group[self.alive], minlength=len(groups))
        self.left = (left * group_size).tolist()  # channels of each layer that are not gone
        self.most = [channels // self.step for channels in self.left]  # blocks
        fewest = -(-min_channels // self.step)
        self.fewest = [fewest if channels else 0 for channels in self.left]
        rows = zip(layers.names, self.left, self.most, layers.channels, strict=True)
        for name, channels, most, all_of_them in rows:
            if channels and most < fewest:
                asked = {"min_channels": min_channels, "multiple_of": multiple_of, "group_size": group_size}
                named = [f"{option}={number}" for option, number in asked.items() if number > 1]
                named = named or [f"min_channels={min_channels}"]
                together = ("", "it") if len(named) == 1 else (" together", "one of them")
                raise ValueError(
                    f"{name} has {channels} channels{' left' if channels < all_of_them else ''}: "
                    f"{' and '.join(named)} cannot be met{together[0]}; lower {together[1]} or exclude the "
                    "layer"
                )
        self._is_uniform = kinds is not None
        self._layers_of_kind: dict[int, list[int]] = {}  # those with channels left
        for layer, kind in enumerate(range(len(self.left)) if kinds is None else kinds):
            if self.left[layer]:
                self._layers_of_kind.setdefault(kind, []).append(layer)
        for members in self._layers_of_kind.values() if self._is_uniform else ():
            most = min(self.most[layer] for layer in members)
            for layer in members:
                self.most[layer] = most

    @functools.cached_property
    def alive(self) -> Tensor | None:
        """Which groups are not gone; None: all."""
        return alive_groups(self.layers, self.group_size)

    def costs(self, of: str) -> list[int]:
        """What a channel of each layer counts."""
        return [1] * len(self.left) if of == "channels" else list(self.layers.sizes)

    def select_local(self, amounts: Sequence[int | float], of: str) -> Tensor:
        """Bool keep flags of all channels, each layer or all of a kind by their own amount."""
        names, costs = self.layers.names, self.costs(of)
        wanted = []
        for name, amount, left, cost in zip(names, amounts, self.left, costs, strict=True):
            with named(name):
                wanted.append(kept_of(amount, left * cost, of))
        blocks = [0] * len(names)
        for layers in self._layers_of_kind.values():
            first = layers[0]
            for layer in layers[1:]:
                if (type(amounts[layer]), amounts[layer]) != (type(amounts[first]), amounts[first]):
                    raise ValueError(
                        f"amount: expected one for {names[first]} and {names[layer]}, which are of one "
                        f"kind (uniform), got {amounts[first]} and {amounts[layer]}"
                    )
            step = self.step * sum(costs[layer] for layer in layers)
            count = _nearest_multiple(
                sum(wanted[layer] for layer in layers), step, self.fewest[first], self.most[first]
            )
            for layer in layers:
                blocks[layer] = count
        return self._channels(self._first_blocks(blocks))

    def select_global(self, amount: int | float, of: str) -> Tensor:
        """Bool keep flags of all channels, the blocks of all layers in one ranking."""
        totals = self._totals(of)
        ranking, ends = self._ranking
        if ends is not None:
            totals = totals[ends]
        wanted = kept_of(amount, self.all_left(of), of)
        # The first total that is not below, or the one before it if that is nearer.
        length = int(torch.searchsorted(totals, wanted))
        if length == len(totals) or (
            length > 0 and wanted - int(totals[length - 1]) < int(totals[length]) - wanted
        ):
            length -= 1
        if ends is not None:
            length = int(ends[length])
        return self._channels(self._required.clone().index_fill_(0, ranking[:length].flatten(), True))

    def ranked(self) -> list[Tensor]:
        """For each layer the scores of the groups that are not gone, largest first."""
        scores = list(self.scores.split(self.groups))
        if self.alive is not None:
            alive = self.alive.split(self.groups)
            scores = [each[left] for each, left in zip(scores, alive, strict=True)]
        return [torch.sort(each, descending=True).values for each in scores]

    def cut(self, flags: Tensor) -> float | None:
        """Where a global choice cuts all layers: the smallest score of a block that stays.

        Blocks that stay only because of ``min_channels``, below one that goes, do not count. The score of a
        block is the mean of its groups. None where nothing goes, or nothing stays, or kinds of layers are
        cut as wholes.
        """
        if self._is_uniform:
            return None
        blocks, _ = self._blocks
        scores = self.scores[blocks.flatten()].view(blocks.shape).mean(dim=1).nan_to_num(nan=math.inf)
        kept = flags.view(-1, self.group_size)[:, 0][blocks[:, 0]]
        if kept.all():
            return None
        above = scores[kept & (scores >= scores[~kept].max())]
        return float(above.min()) if above.numel() else None

    def _first_blocks(self, blocks: Sequence[int]) -> Tensor:
        """Bool keep flags of all groups: so many blocks of each layer, the first by rank."""
        counts = [
            (left - kept * self.step) // self.group_size
            for left, kept in zip(self.left, blocks, strict=True)
        ]
        # Layers of one size that follow one another, as experts do, are the rankings of one tensor.
        rankings, sizes = [], []
        for groups, layers in itertools.groupby(self.groups):
            rankings.append(sum(1 for _ in layers))
            sizes.append(groups * rankings[-1])
        counts = [count for count, groups in zip(counts, self.groups, strict=True) if groups]
        rankings = [count for count, size in zip(rankings, sizes, strict=True) if size]
        sizes = [size for size in sizes if size]
        if not sizes:
            return torch.empty(0, dtype=torch.bool, device="cpu")
        alive = [] if self.alive is None else self.alive.double().split(sizes)
        flags = ops.select_channels(self.norms.split(sizes), alive, counts, [0.0] * len(counts), rankings)
        return torch.cat(flags)

    @functools.cached_property
    def _required(self) -> Tensor:
        """Which groups no amount prunes."""
        return self._first_blocks(self.fewest)

    def _by_rank(self) -> Tensor:
        """The groups that are not gone: NaN first, then larger scores, then by layer and index."""
        if self.alive is None:
            groups = torch.arange(self.scores.numel(), device="cpu")
            order = torch.sort(self.scores, descending=True, stable=True).indices
        else:
            groups = self.alive.nonzero().flatten()
            order = _sorted(groups, self.scores)
        if self.normalize == "none":
            return order
        scores, norms, layers = (of[order] for of in (self.scores, self.norms, self.layer_of_group))
        ties = (scores[1:] == scores[:-1]) & (layers[1:] == layers[:-1])
        if (ties & (norms[1:] > norms[:-1])).any():
            # The division made different norms of a layer equal: its larger ones go first all the same.
            groups = _sorted(groups, self.norms)
            groups = _sorted(groups, self.layer_of_group, descending=False)
            order = _sorted(groups, self.scores)
        return order

    @functools.cached_property
    def _blocks(self) -> tuple[Tensor, Tensor]:
        """The whole blocks by layer and by rank within it, as rows of their groups, and which may go."""
        per_block = self.step // self.group_size
        groups = _sorted(self._by_rank(), self.layer_of_group, descending=False)
        layers = self.layer_of_group[groups]
        left = integers(self.left) // self.group_size
        position = torch.arange(groups.numel(), device="cpu") - (left.cumsum(0) - left)[layers]
        whole = (position < (integers(self.most) * per_block)[layers]).nonzero().flatten()
        may_go = position >= (integers(self.fewest) * per_block)[layers]
        shape = (-1, per_block)
        return groups[whole].view(shape), may_go[whole].view(shape)[:, 0]

    @functools.cached_property
    def _ranking(self) -> tuple[Tensor, Tensor | None]:
        """The blocks that may be pruned, by rank, as rows of their groups, and where what stays may end.

        With kinds of layers that is before or after all of the blocks that stay or go together; None:
        anywhere.
        """
        scores = self.scores
        if self.step == self.group_size and not self._is_uniform:
            order = self._by_rank()
            optional = ~self._required[order]
            return order[optional.nonzero().flatten()].view(-1, 1), None
        blocks, may_go = self._blocks
        blocks = blocks[may_go]
        if blocks.numel() == 0:
            return blocks, None
        # One group after another, so that equal blocks have equal sums.
        sums = functools.reduce(torch.add, (scores[groups] for groups in blocks.unbind(1)))
        if not self._is_uniform:
            return blocks[torch.sort(sums, descending=True, stable=True).indices], None
        together = self._of_kinds()
        sizes = torch.bincount(together)
        means = torch.zeros(len(sizes), dtype=torch.float64, device="cpu").index_add_(0, together, sums)
        order = torch.sort(means / sizes, descending=True, stable=True).indices
        ends = torch.cat([integers([0]), sizes[order].cumsum(0)])
        return blocks[torch.sort(order.argsort()[together], stable=True).indices], ends

    def _of_kinds(self) -> Tensor:
        """For each block that may be pruned, by layer and rank, the number of those that go with it."""
        first, start = [0] * len(self.left), 0
        for layers in self._layers_of_kind.values():
            for layer in layers:
                first[layer] = start
            start += self.most[layers[0]] - self.fewest[layers[0]]
        free = [most - fewest for most, fewest in zip(self.most, self.fewest, strict=True)]
        return torch.cat(
            [torch.arange(at, at + count, device="cpu") for at, count in zip(first, free, strict=True)]
        )

    def all_left(self, of: str) -> int:
        """All channels or parameters that are left."""
        if of == "parameters" and self.layers.parameters is not None:
            gone = [all_ - left for all_, left in zip(self.layers.channels, self.left, strict=True)]
            return sum(each.left(gone.__getitem__) for each in self.layers.parameters)
        return sum(left * cost for left, cost in zip(self.left, self.costs(of), strict=True))

    def _joint_totals(self, parameters: Sequence[Parameters]) -> Tensor:
        """As :meth:`_totals`, of the parameters that coupled layers are slices of."""
        layers = self.layer_of_group[self._ranking[0][:, 0]]

        @functools.cache
        def gone(layer: int) -> Tensor:
            stay = torch.zeros(len(layers) + 1, dtype=torch.int64, device="cpu")
            torch.cumsum(layers == layer, 0, out=stay[1:])
            return self.layers.channels[layer] - (stay + self.fewest[layer]) * self.step

        # A parameter whose slices lie along one dim loses as much with each block, whichever go before it.
        costs = [0] * len(self.left)
        first = [
            every - fewest * self.step
            for every, fewest in zip(self.layers.channels, self.fewest, strict=True)
        ]
        required = 0
        totals = torch.zeros(len(layers) + 1, dtype=torch.int64, device="cpu")
        for each in parameters:
            if len(each.layers) > 1:
                totals += each.left(gone)
                continue
            required += each.left(first.__getitem__)
            for layer, cost in each.costs():
                costs[layer] += cost * self.step
        steps = integers(costs)[layers]
        return totals + torch.cat([integers([required]), steps]).cumsum(0)

    def _totals(self, of: str) -> Tensor:
        """What is kept in all when the first 0, 1, 2, ... blocks of the ranking stay."""
        if of == "parameters" and self.layers.parameters is not None and of not in self._known_totals:
            self._known_totals[of] = self._joint_totals(self.layers.parameters)
        if of not in self._known_totals:
            costs = self.costs(of)
            required = sum(
                fewest * self.step * cost for fewest, cost in zip(self.fewest, costs, strict=True)
            )
            layers = self.layer_of_group[self._ranking[0][:, 0]]
            steps = integers(costs)[layers]
            totals = torch.cat([integers([required]), steps * self.step])
            self._known_totals[of] = totals.cumsum(0)
        return self._known_totals[of]

    def _channels(self, groups: Tensor) -> Tensor:
        return groups.view(-1, 1).expand(-1, self.group_size).reshape(-1)
