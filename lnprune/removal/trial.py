"""The trial of removal: half of every group is taken out of a copy, to see which groups really can go."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lnprune.plans.saved_groups import Attribute
from lnprune.removal.attributes import candidates, tries
from lnprune.removal.comparison import Subject
from lnprune.removal.cutting import cuts_of, settings_for
from lnprune.removal.groups import Group

_DRAWS, _DRAWS_OF_FEW, _MANY = 3, 16, 32  # few: fewer than many channels


class Trial:
    """Tries groups of a model on copies of it whose parameters are random."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        seconds: float,
    ):
        self.runs = 0
        self._draws = _DRAWS
        self._generator = torch.Generator().manual_seed(0)
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self.good: list[Group] = []  # what can go, all together
        self._known: list[tuple[str, ...]] = []  # names of attributes that made groups right
        self._doubtful: list[Group] = []  # what is like a group that failed
        self.bad: list[tuple[Group, str]] = []  # what cannot, and why
        self._subject = Subject(model, tensors, (args, kwargs))
        self._model, self._tensors = self._subject.model, self._subject.tensors

    def add(self, groups: Sequence[Group]) -> None:
        """Tries groups beside those that can go."""
        self.bad += [
            (g, "is one channel: without it nothing would be left") for g in groups if g.channels < 2
        ]
        groups = [group for group in groups if group.channels > 1]
        if not groups or self._accepted(groups, [[]] * len(groups)) is None:
            return
        # What the code moves by numbers is likelier to fail. One of each kind tells most.
        self._search([group for group in groups if not group.moved_by])
        kinds: dict[Any, list[Group]] = {}
        for group in groups:
            if group.moved_by:
                kinds.setdefault(self._kind(group), []).append(group)
        for group, *rest in kinds.values():
            self._search([group])
            if any(group is good for good in self.good):
                self._search(rest)
            else:
                self._doubtful += rest

    def replace(self, groups: Sequence[Group]) -> None:
        """Tries other groups in place of those that failed, where they overlap with none that can go."""
        taken = _slices(self.good)
        missed = _slices([group for group, _ in self.bad] + self._doubtful)
        bad, doubtful = self.bad, self._doubtful
        self.bad, self._doubtful = [], []
        self.add([g for g in groups if not taken & _slices([g]) and missed & _slices([g])])
        taken = _slices(self.good)
        self.bad = [(group, reason) for group, reason in bad if not taken & _slices([group])]
        self._doubtful = [group for group in doubtful if not taken & _slices([group])]

    def finish(self) -> None:
        """Tries what is like a group that failed, and all that can go once more."""
        doubtful, self._doubtful = self._doubtful, []
        self._search(doubtful, with_attributes=False)
        if not self.good or min(group.channels for group in self.good) >= _MANY:
            return
        # What is wrong can go well by chance where there are few channels: more draws, while there is time.
        for _ in range(_DRAWS_OF_FEW):
            if time.monotonic() > self._until - self._seconds / 2:
                return
            if self._drawn(self.good, _DRAWS) is not None:
                self._draws = _DRAWS_OF_FEW
                suspects, self.good = self.good, []
                self._search(suspects)
                return

    @property
    def has_failed(self) -> bool:
        """Whether groups failed that the code moves by numbers."""
        return any(group.moved_by for group, _ in self.bad)

    def _kind(self, group: Group) -> frozenset[tuple[str, str, int, bool]]:
        """The same for groups that modules of the same types make and read."""
        found = set()
        for member in group.members:
            path, _, attribute = member.name.rpartition(".")
            found.add(
                (type(self._model.get_submodule(path)).__name__, attribute, member.dim, member.is_input)
            )
        return frozenset(found)

    def _search(self, part: Sequence[Group], with_attributes: bool = True) -> None:
        """Adds to the good groups what can go beside them, by halves."""
        if not part:
            return
        if time.monotonic() > self._until:
            reason = f"was not tried within {self._seconds:g} seconds: give check= more of them"
            self.bad += [(group, reason) for group in part]
            return
        trouble = None
        for names in [(), *self._known]:
            found = [self._named(group, names) for group in part]
            if names and not all(found):
                continue
            trouble = self._accepted(part, found)
            if trouble is None:
                return
        if len(part) > 1:
            half = len(part) // 2
            self._search(part[:half], with_attributes)
            self._search(part[half:], with_attributes)
            return
        (group,) = part
        for names in tries(candidates(self._model, self._tensors, group)) if with_attributes else ():
            if time.monotonic() > self._until:
                break
            if names not in self._known and self._accepted(part, [self._named(group, names)]) is None:
                self._known.append(names)
                return
        where = f", in {group.moved_by}" if group.moved_by else ""
        self.bad.append((group, f"its size is written in the code{where}: {trouble}"))

    def _named(self, group: Group, names: Sequence[str]) -> list[Attribute]:
        found = candidates(self._model, self._tensors, group)
        return [attribute for attribute in found if attribute.name in names]

    def _accepted(self, part: Sequence[Group], attributes: Sequence[list[Attribute]]) -> str | None:
        """Takes groups with these attributes, if they can go beside the good ones; else the trouble."""
        for group, found in zip(part, attributes, strict=True):
            group.attributes = found
        trouble = self._difference([*self.good, *part])
        if trouble is None:
            self.good += part
        else:
            for group in part:
                group.attributes = []
        return trouble

    def _difference(self, groups: Sequence[Group]) -> str | None:
        """What is wrong when half of the channels of groups go; None: nothing."""
        for draw in range(self._draws):
            trouble = self._drawn(groups, draw)
            if trouble is not None:
                return trouble
        return None

    def _drawn(self, groups: Sequence[Group], draw: int) -> str | None:
        """The same for one draw of channels.

        In the first, the first half goes, so that all that stay move; in the second, the last half.
        In the third, more of the first channels go than of the last, or the other way round. So halves of
        what stays, as code may split it, are not halves of all. In others, any number goes.
        """
        self.runs += 1
        cuts, gone = [], []
        for group in groups:
            flags = torch.zeros(group.channels, dtype=torch.bool)
            count = group.channels // 2
            if draw > 2:
                count = int(torch.randint(1, group.channels, (), generator=self._generator))
            stays = torch.linspace(0, 1, group.channels)
            if draw == 1:
                stays = -stays
            elif draw:
                stays *= 0.5 - int(torch.randint(2, (), generator=self._generator))
                stays += torch.rand(group.channels, generator=self._generator)
            flags[stays.argsort()[:count]] = True
            cuts += cuts_of(group, flags)
            gone.append(count)
        reads = {(m.name, m.dim) for group in groups for m in group.members if m.is_input}
        return self._subject.trouble(cuts, reads, settings_for(self._model, groups, gone))


def _slices(groups: Sequence[Group]) -> set[tuple[str, int, int]]:
    return {(m.name, m.dim, i) for group in groups for m in group.members for i in m.slices.tolist()}
