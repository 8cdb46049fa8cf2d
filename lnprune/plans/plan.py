"""Plan: which channels of which weights to prune. Data, which needs no model until it is applied."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lnprune.errors import check_flags, shown
from lnprune.modules.application import Application, Slices, agreement_about
from lnprune.plans import plan_file, report
from lnprune.plans.plan_file import PlanEntry
from lnprune.plans.saved_batches import SavedBatch
from lnprune.plans.saved_groups import Coupled

NOT_COUPLED = (
    "compact needs a plan that says what reads the channels, got one of single weights: make it from "
    "couple(model, example_inputs).rank(...)"
)


class Details(NamedTuple):
    """What a plan says of the choice that it holds.

    Attributes:
        entries: one for each parameter.
        names: all names of each parameter, that of its entry first.
        cut: where a plan with ``scope="global"`` cuts the norms of all parameters, if it does.
        ranked: of each parameter the norms that were compared, the largest first, and how many of them
            stay; None where the norms are gone.
        elements: of coupled channels, how many elements their parameters have; None: those of all shapes.
        batches: of each parameter, the matrix of it that its entry is about; empty: none is.
    """

    entries: list[PlanEntry]
    names: list[list[str]]
    cut: float | None
    ranked: list[tuple[Tensor, int]] | None = None
    elements: int | None = None
    batches: Sequence[SavedBatch | None] = ()


class Plan:
    """Which channels of which parameters to prune, from :meth:`Ranking.select` or :func:`load_plan`.

    ``print(plan)`` is a table, which needs rich: ``pip install "lnprune[table]"``.
    """

    def __init__(
        self,
        n: Any,
        selection: dict[str, Any],
        names: Sequence[str],
        flags: Sequence[Tensor],  # bool, of the channels of each parameter, on the CPU
        details: Callable[[], Details],  # asked once, when they are wanted
        slices: Callable[[], Sequence[Slices]],  # what the flags prune of the model's weights
        coupled: Callable[[], Coupled] | None = None,  # of coupled channels, where they are in it
    ):
        self.n = n
        self.selection = selection
        self._names = names
        self._flags = flags
        self._make_details = details
        self._slices = slices
        self._make_coupled = coupled
        self._application: Application | None = None

    @functools.cached_property
    def _details(self) -> Details:
        return self._make_details()

    @functools.cached_property
    def _coupled(self) -> Coupled | None:
        return None if self._make_coupled is None else self._make_coupled()

    @property
    def entries(self) -> list[PlanEntry]:
        """One :class:`PlanEntry` per parameter, in order."""
        return self._details.entries

    @property
    def keep(self) -> dict[str, Tensor]:
        """Bool keep flags by the name of the parameter, shape ``(channels,)``, on the CPU. Copies."""
        return {name: keep.clone() for name, keep in zip(self._names, self._flags, strict=True)}

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        kept, channels = sum(int(keep.sum()) for keep in self._flags), sum(map(len, self._flags))
        return f"Plan({len(self)} parameters, {kept} of {channels} channels kept)"

    def __str__(self) -> str:
        drawn = report.table(
            self.n, self.selection, self.entries, self._details.cut, self._details.elements
        )
        return f'{self!r}; as a table with rich: pip install "lnprune[table]"' if drawn is None else drawn

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
        entries, _, cut, ranked, *_ = self._details
        if ranked is None:
            raise RuntimeError("plot needs the norms of a ranking, which a plan from a file does not have")
        report.plot(self.n, self.selection, entries, ranked, cut, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as numbers, strings, lists and dicts, as :meth:`save` writes it.

        ``pruned`` are the indices of all channels that are not kept, those pruned before among them;
        ``shared_with`` are the weight's other names. Of coupled channels, ``members`` are the parameters
        and buffers that they are slices of, and ``attributes`` those of modules that hold their number.
        """
        entries, names, cut, _, elements, batches = self._details
        pruned = [(~keep).nonzero().flatten().tolist() for keep in self._flags]
        groups = None if self._coupled is None else self._coupled.groups
        return plan_file.document(
            self.n, self.selection, entries, names, pruned, cut, groups, elements, batches
        )

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

        Coupled channels are pruned in all parameters that have slices of them: in what makes them, their
        biases and the weights and biases of their norms, and in what reads them. What the model computes
        then is what it computes without these channels.

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
                values lie in other tensors, but for a DTensor's, or in memory that cannot be written; or
                its parameters are sharded, and another rank raises, or applies another plan.
            ValueError: ``bias`` with channels that are not a module's outputs, or with coupled channels,
                whose biases go with them; ``keep_backup`` without
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
        slices = self._slices()
        with agreement_about(slices) as agreement:
            if _unexpected:
                raise TypeError(
                    f"apply takes no model, and its options by name, got {shown(_unexpected[0])}: a plan "
                    "prunes the model that was ranked; to prune another one, save the plan and "
                    "load_plan(path, model)"
                )
            check_flags(permanent=permanent, bias=bias, keep_backup=keep_backup)
            if keep_backup and not permanent:
                raise ValueError(
                    "keep_backup=True keeps what permanent=True overwrites: masks overwrite nothing, and "
                    "undo() takes them back without it"
                )
            if bias and self._make_coupled is not None:
                raise ValueError("bias: the biases of coupled channels go with them, without bias=True")
            if self._application is not None:
                raise RuntimeError("this plan is applied already: undo() it first, or select another")
            self._application = Application(slices, self.n, permanent, bias, keep_backup, agreement)
        return self

    def compact(
        self, verify: bool = True, inplace: bool = False, *, example_inputs: Any = None
    ) -> nn.Module:
        """A model without the coupled channels that the plan prunes: smaller and faster.

        It computes what the model computes with zeros in four places: where the channels are made, in their
        biases, in what norms multiply and add, and where they are read. That is what :meth:`apply` leaves,
        so a plan may be applied before, and the model trained with its masks: these go with the channels.
        All else is as in the model: modes, ``requires_grad``, hooks, shared weights, dtypes, devices and
        memory formats. An optimizer has to be made anew, since the parameters are others.

        Args:
            verify: compare outputs with those of the model with zeros, in float64, in eval mode: on the
                example inputs and on random ones of another batch size, with the model's parameters and
                with random ones, behind which no zeros hide anything. They have to agree to 1e-9 of the
                largest output. Models that do not run in float64, or whose outputs change when their
                parameters are rounded otherwise, are compared more coarsely.
            inplace: change the model itself. Its modules, and parameters that keep their shapes, stay the
                objects that they are.
            example_inputs: what to verify with, as for :func:`couple`; None: what was given to it.

        Returns:
            the small model: a new one, or with ``inplace`` the model. Beside the large model that takes the
            memory of the small one and, to verify, of two copies of the large one and one of the small
            one in float64.

        Raises:
            RuntimeError: the plan is none of coupled channels; or outputs differ. The message says by how
                much, and from which groups. Or the model gives no finite numbers to compare with.
            ValueError: a group would keep no channels; there are no example inputs, as for a plan from a
                file; or the model has other shapes by now.

        In each case the model is as it was.

        Example:
            >>> import lnprune
            >>> import torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            >>> plan = lnprune.couple(model, torch.randn(2, 8)).rank(n=2).select(0.5)
            >>> plan.compact()
            Sequential(
              (0): Linear(in_features=8, out_features=8, bias=True)
              (1): ReLU()
              (2): Linear(in_features=8, out_features=4, bias=True)
            )
        """
        check_flags(verify=verify, inplace=inplace)
        if self._coupled is None:
            raise RuntimeError(NOT_COUPLED)
        return self._coupled.compact(verify, inplace, example_inputs)

    def keep_zeros(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Zeroes the channels that the plan has pruned again after every step of an optimizer.

        Momentum and weight decay move what a gradient moved before. With this, zeros that were written in
        place stay zeros, as those of masks do; what else the optimizer does is unchanged. It takes one
        native call for each device, and of sharded parameters each rank writes to its shard.

        Args:
            optimizer: one that steps the pruned parameters, which are looked up after each step.

        Returns:
            a handle whose ``remove()`` ends it; also a context manager. :meth:`undo` ends it too.

        Raises:
            RuntimeError: the plan is not applied, or with masks.
            TypeError: ``optimizer`` is none.
            ValueError: it steps none of the pruned parameters.

        Example:
            >>> import lnprune
            >>> import torch
            >>> model = torch.nn.Linear(8, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            >>> plan = lnprune.rank(model, n=2, dim="out").select(0.5).apply(permanent=True)
            >>> handle = plan.keep_zeros(optimizer)
            >>> model(torch.randn(2, 8)).sum().backward()
            >>> optimizer.step()
            >>> int((model.weight == 0).all(dim=1).sum())
            2
        """
        if self._application is None:
            raise RuntimeError("this plan is not applied: apply(permanent=True) it before keep_zeros")
        return self._application.keep_zeros(optimizer)

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
        with agreement_about(self._slices()) as agreement:
            if self._application is None:
                raise RuntimeError("this plan is not applied: there is nothing to undo")
            self._application.undo(agreement)
        self._application = None
        return self
