"""Plan: which channels of which weights to prune. Data, which needs no model until it is applied."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from lnprune import plan_file, report
from lnprune.application import Application
from lnprune.errors import check_flags, shown
from lnprune.parameters import Parameters, Weight, placed
from lnprune.plan_file import PlanEntry

if TYPE_CHECKING:
    from lnprune.selection import Arrangement

__all__ = ["Plan", "PlanEntry", "load_plan"]


class Plan:
    """Which channels of which parameters to prune, from :meth:`Ranking.select` or :func:`load_plan`.

    ``print(plan)`` is a table, with rich if that is installed.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        flags: Tensor,  # bool, of the channels of all weights, one after another, on the CPU
        n: Any,
        selection: dict[str, Any],
        arrangement: Arrangement | None = None,
        entries: list[PlanEntry] | None = None,
        cut: float | None = None,
    ):
        self.n = n
        self.selection = selection
        self._weights = weights
        self._flags = flags
        self._arrangement = arrangement
        self._entries = entries
        self._saved_cut = cut
        self._application: Application | None = None

    @property
    def _cut(self) -> float | None:
        """Where a plan with ``scope="global"`` cuts the norms of all parameters."""
        if self._arrangement is None or self.selection["scope"] != "global":
            return self._saved_cut
        return self._arrangement.cut(self._flags)

    def _split(self) -> Sequence[Tensor]:
        """The flags of each weight, as views."""
        return self._flags.split([weight.channels for weight in self._weights])

    @property
    def entries(self) -> list[PlanEntry]:
        """One :class:`PlanEntry` per parameter, in order."""
        if self._entries is None:
            rows = zip(self._weights, self._split(), self._ranked(), strict=True)
            self._entries = [self._entry(*row) for row in rows]
        return self._entries

    def _ranked(self) -> list[Tensor]:
        """For each weight the norms of the groups that are left, as they were compared, largest first."""
        arrangement = self._arrangement
        assert arrangement is not None, "a plan without norms has entries"
        norms = list(arrangement.scores.split(arrangement.groups))
        if arrangement.alive is not None:
            alive = arrangement.alive.split(arrangement.groups)
            norms = [each[left] for each, left in zip(norms, alive, strict=True)]
        return [torch.sort(each, descending=True).values for each in norms]

    def _entry(self, weight: Weight, keep: Tensor, ranked: Tensor) -> PlanEntry:
        size = self.selection["group_size"]
        kept = int(keep[::size].sum())
        left = ranked.numel()
        channels = weight.channels
        elements = math.prod(weight.shape) // channels if channels else 0
        return PlanEntry(
            weight.name,
            weight.shape,
            weight.dim,
            channels,
            kept * size,
            float(ranked[kept - 1]) if kept else None,
            float(ranked[kept - 1] - ranked[kept]) if 0 < kept < left else None,
            (left - kept) * size * elements,
        )

    @property
    def keep(self) -> dict[str, Tensor]:
        """Bool keep flags by the name of the parameter, shape ``(channels,)``, on the CPU. Copies."""
        rows = zip(self._weights, self._split(), strict=True)
        return {weight.name: keep.clone() for weight, keep in rows}

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        kept, channels = int(self._flags.sum()), self._flags.numel()
        return f"Plan({len(self)} parameters, {kept} of {channels} channels kept)"

    def __str__(self) -> str:
        return report.table(self.n, self.selection, self.entries, self._cut)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the norms of each layer by rank with the cut, and the share of each layer that stays.

        In a plan with ``scope="global"`` they are the norms that were compared, divided as ``normalize``
        says, and a dashed line shows the cut that all layers have in common.

        Args:
            path: the picture's file, of any type that matplotlib writes.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: the plan was loaded from a file, which has no norms.
        """
        if self._arrangement is None:
            raise RuntimeError("plot needs the norms of a ranking, which a plan from a file does not have")
        size = self.selection["group_size"]
        kept = [int(keep.sum()) // size for keep in self._split()]
        ranked = list(zip(self._ranked(), kept, strict=True))
        report.plot(self.n, self.selection, self.entries, ranked, self._cut, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as numbers, strings, lists and dicts, as :meth:`save` writes it.

        ``pruned`` are the indices of all channels that are not kept, those pruned before among them;
        ``shared_with`` are the weight's other names.
        """
        names = [weight.names for weight in self._weights]
        pruned = [(~keep).nonzero().flatten().tolist() for keep in self._split()]
        return plan_file.document(self.n, self.selection, self.entries, names, pruned, self._cut)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, whole or not at all, to be read by :func:`load_plan`, without norms."""
        plan_file.write(path, self.to_dict())

    def apply(
        self,
        *_unexpected: NoReturn,
        permanent: bool = False,
        bias: bool = False,
        keep_backup: bool = False,
    ) -> Plan:
        """Prunes the model that was ranked: all parameters or, where one raises, none.

        Args:
            permanent: write zeros into the weights in place, +0.0 whatever was there, and leave no mask
                and no hook. Parameters that have a mask, or that cannot be written in place, get the values
                of torch's ``remove``. Otherwise masks and hooks are installed as by :func:`ln_structured`;
                modules that share a weight share its mask.
            bias: prune the biases of pruned output channels too, by the same means; the hook of a bias is
                torch's ``CustomFromMask``.
            keep_backup: only with ``permanent``, keep the values that are overwritten, for :meth:`undo`.
                Without them, an interrupt between the first write and the last leaves zeros behind.

        Returns:
            the plan itself.

        Raises:
            TypeError: there is an argument without its name, a model say, or one that is no bool.
            RuntimeError: the plan is applied already, or has no model; a parameter changed its shape since,
                or shares its memory with one that is pruned along another dim; or, with ``permanent``, its
                values lie in other tensors (DTensor) or in memory that cannot be written.
            ValueError: ``bias`` with channels that are not a module's outputs; ``keep_backup`` without
                ``permanent``; a mask for a weight whose module is never called, as that of
                MultiheadAttention's ``out_proj``, so that no hook would renew it.

        Example:
            >>> import lnprune
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            >>> plan = lnprune.rank(model, n=2, dim="out").select(0.5).apply(permanent=True, bias=True)
            >>> int((model[0].weight == 0).all(dim=1).sum()), int((model[0].bias == 0).sum())
            (2, 2)
        """
        if _unexpected:
            raise TypeError(
                f"apply takes no model, and its options by name, got {shown(_unexpected[0])}: a plan "
                "prunes the model that was ranked; to prune another one, save the plan and load_plan(path, "
                "model)"
            )
        check_flags(permanent=permanent, bias=bias, keep_backup=keep_backup)
        if keep_backup and not permanent:
            raise ValueError(
                "keep_backup=True keeps what permanent=True overwrites: masks overwrite nothing, and "
                "undo() takes them back without it"
            )
        if self._application is not None:
            raise RuntimeError("this plan is applied already: undo() it first, or select another")
        self._application = Application(self._weights, self._split(), self.n, permanent, bias, keep_backup)
        return self

    def undo(self) -> Plan:
        """Takes back what :meth:`apply` did: masks, hooks and, with ``keep_backup``, values, bit for bit.

        Values that were kept, and those of ``name_orig``, stay as they were trained since. What else
        changed in the modules since stays as it is; conversions of dtype and device are followed.

        Returns:
            the plan itself, which can be applied again.

        Raises:
            RuntimeError: the plan is not applied; it was applied with ``permanent`` and without
                ``keep_backup``; or a parameter was pruned, restored or replaced since, or, where zeros were
                written, what was zeroed has other values. Nothing is changed then.
        """
        if self._application is None:
            raise RuntimeError("this plan is not applied: there is nothing to undo")
        self._application.undo()
        self._application = None
        return self


def load_plan(path: str | os.PathLike[str], parameters: Parameters) -> Plan:
    """Reads a plan that :meth:`Plan.save` wrote, for a model with the same parameters.

    Args:
        path: the file.
        parameters: the model, wrapped (compiled, parallel, averaged) or not, or pairs ``(module, name)`` in
            the order in which they were ranked.

    Returns:
        the :class:`Plan`, without norms.

    Raises:
        ValueError: the file holds no plan, or one of a newer version, or one for another model: a
            parameter is missing or has another shape.

    Example:
        >>> import lnprune, pathlib, tempfile
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "plan.json"
        >>> lnprune.rank(model, n=2, dim="out").select(0.5).save(path)
        >>> lnprune.load_plan(path, model).apply()
        Plan(1 parameters, 2 of 4 channels kept)
    """
    plan = _read(path)
    plan._weights = placed(plan._weights, parameters)
    return plan


def _read(path: str | os.PathLike[str]) -> Plan:
    """The plan of a file, for no model yet."""
    saved = plan_file.read(path)
    weights, keep = [], [torch.empty(0, dtype=torch.bool, device="cpu")]
    for entry, names, pruned in zip(saved.entries, saved.names, saved.pruned, strict=True):
        weights.append(Weight(names, entry.shape, entry.dim))
        flags = torch.ones(entry.channels, dtype=torch.bool, device="cpu")
        flags[torch.tensor(pruned, dtype=torch.int64, device="cpu")] = False
        keep.append(flags)
    return Plan(weights, torch.cat(keep), saved.n, saved.selection, None, saved.entries, saved.cut)
