"""Plan: which channels of which parameters to prune; to look at, save, apply and undo."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import CustomFromMask, LnStructured

from lnprune import plan_file, report
from lnprune.batch import Transaction, Values, bake, finish_all, flag_masks, is_writable, zero
from lnprune.parameters import Parameters, Weight, current_tensor, listed, output_dim
from lnprune.plan_file import PlanEntry
from lnprune.registration import ParameterState, Pruning
from lnprune.selection import group_norms

if TYPE_CHECKING:
    from lnprune.selection import Layers

__all__ = ["Plan", "PlanEntry", "load_plan"]


class Layer(NamedTuple):
    """One parameter of a plan and its bool keep flags, on the CPU."""

    name: str
    shape: tuple[int, ...]
    dim: int
    keep: Tensor


class _Applied:
    """What apply() did, for undo()."""

    def __init__(self, transaction: Transaction, names: list[str], before: list[ParameterState]):
        self.names = names
        self.before = before
        self.after = [ParameterState(state.module, state.name) for state in before]
        self.values = transaction.values


class Plan:
    """Which channels of which parameters to prune, from :meth:`Ranking.select` or :func:`load_plan`.

    ``print(plan)`` is a table, with rich if that is installed.
    """

    def __init__(
        self,
        weights: list[Weight],
        shapes: list[tuple[int, ...]],
        flags: Tensor,  # of the channels of all parameters, one after another
        n: Any,
        selection: dict[str, Any],
        measured: Layers | None,
        entries: list[PlanEntry] | None = None,
    ):
        self.n = n
        self.selection = selection
        self._weights = weights
        self._shapes = shapes
        self._flags = flags
        self._measured = measured
        if entries is not None:
            self.entries = entries
        self._applied: _Applied | None = None
        self._permanent_without_backup = False

    @functools.cached_property
    def _layers(self) -> list[Layer]:
        rows = list(zip(self._weights, self._shapes, strict=True))
        parts = self._flags.split([shape[weight.dim] for weight, shape in rows])
        return [
            Layer(weight.name, shape, weight.dim, keep)
            for (weight, shape), keep in zip(rows, parts, strict=True)
        ]

    @functools.cached_property
    def entries(self) -> list[PlanEntry]:
        """One :class:`PlanEntry` per parameter, in order."""
        assert self._measured is not None
        return [self._entry(layer, *part) for layer, part in zip(self._layers, self._parts(), strict=True)]

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Norms of the groups of each layer, and which of them were not pruned before."""
        measured = self._measured
        assert measured is not None
        counts = list(measured.channels)
        size = self.selection["group_size"]
        alive = torch.ones(measured.norms.numel(), dtype=torch.bool)
        if measured.alive is not None:
            alive = measured.alive
        return [
            (group_norms(norms, size, measured.p), left[::size])
            for norms, left in zip(measured.norms.split(counts), alive.split(counts), strict=True)
        ]

    def _entry(self, layer: Layer, norms: Tensor, alive: Tensor) -> PlanEntry:
        size = self.selection["group_size"]
        kept_groups = layer.keep[::size]
        ranked = torch.sort(norms[alive], descending=True, stable=True).values
        kept = int(kept_groups.sum())
        left = ranked.numel()
        channels = layer.keep.numel()
        elements = math.prod(layer.shape) // channels if channels else 0
        return PlanEntry(
            layer.name,
            layer.shape,
            layer.dim,
            channels,
            kept * size,
            float(ranked[kept - 1]) if kept else None,
            float(ranked[kept - 1] - ranked[kept]) if 0 < kept < left else None,
            (left - kept) * size * elements,
        )

    @property
    def keep(self) -> dict[str, Tensor]:
        """Bool keep flags by the name of the parameter, shape ``(channels,)``, on the CPU."""
        return {layer.name: layer.keep for layer in self._layers}

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        kept, channels = int(self._flags.sum()), self._flags.numel()
        return f"Plan({len(self)} parameters, {kept} of {channels} channels kept)"

    def __str__(self) -> str:
        return report.table(self.n, self.selection, self.entries)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the sorted norms of each layer with the cut, and the share of each that is kept.

        Args:
            path: the picture's file, of any type that matplotlib writes.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: the plan was loaded from a file, which has no norms.
        """
        if self._measured is None:
            raise RuntimeError("plot needs the norms of a ranking, which a plan from a file does not have")
        ranked = []
        for layer, (norms, alive) in zip(self._layers, self._parts(), strict=True):
            kept = int(layer.keep.sum()) // self.selection["group_size"]
            ranked.append((torch.sort(norms[alive], descending=True).values, kept))
        report.plot(self.n, self.entries, ranked, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as numbers, strings, lists and dicts, as :meth:`save` writes it.

        ``pruned`` are the indices of all channels that are not kept, those pruned before among them;
        ``shared_with`` are the weight's other names.
        """
        names = [weight.names for weight in self._weights]
        pruned = [(~layer.keep).nonzero().flatten().tolist() for layer in self._layers]
        return plan_file.document(self.n, self.selection, self.entries, names, pruned)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, to be read by :func:`load_plan`. Weights and norms are not in it."""
        plan_file.write(path, self.to_dict())

    def apply(self, permanent: bool = False, bias: bool = False, keep_backup: bool = False) -> Plan:
        """Prunes, all parameters or, where one raises, none.

        Args:
            permanent: write zeros into the weights in place, +0.0 whatever was there, and leave no mask
                and no hook. Parameters that have a mask, or that cannot be written in place, get the values
                of torch's ``remove``. Otherwise masks and hooks are installed as by :func:`ln_structured`;
                modules that share a weight share its mask.
            bias: prune the biases of pruned output channels too, by the same means; the hook of a bias is
                torch's ``CustomFromMask``.
            keep_backup: with ``permanent``, keep the values that are overwritten, for :meth:`undo`. Without
                them, an interrupt between the first write and the last leaves zeros behind.

        Returns:
            the plan itself.

        Raises:
            RuntimeError: the plan is applied already; or a parameter changed its shape since.
            ValueError: ``bias`` with channels that are not a module's outputs.

        Example:
            >>> import lnprune
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            >>> plan = lnprune.rank(model, n=2, dim="out").select(0.5).apply(permanent=True, bias=True)
            >>> int((model[0].weight == 0).all(dim=1).sum()), int((model[0].bias == 0).sum())
            (2, 2)
        """
        if self._applied is not None:
            raise RuntimeError("this plan is applied already: undo() it first, or select another")
        targets = self._targets(bias)
        states = [ParameterState(module, attribute) for _, module, attribute, _, _ in targets]
        with Transaction() as transaction:
            if permanent:
                self._prune_in_place(transaction, targets, keep_backup)
            else:
                self._install(transaction, targets)
            applied = _Applied(transaction, [target[0] for target in targets], states)
        self._permanent_without_backup = permanent and not keep_backup
        if not permanent or not keep_backup:
            applied.values = []
        self._applied = applied
        return self

    def _targets(self, bias: bool) -> list[tuple[str, nn.Module, str, Tensor, int]]:
        """Name, module, attribute, keep flags and dim of all that is to be pruned."""
        targets = []
        for weight, layer in zip(self._weights, self._layers, strict=True):
            for name, (module, attribute) in zip(weight.names, weight.places, strict=True):
                tensor = current_tensor(module, attribute, name)
                if tuple(tensor.shape) != layer.shape:
                    raise RuntimeError(
                        f"{name}: expected shape {layer.shape}, as it was ranked, got {tuple(tensor.shape)}"
                    )
                targets.append((name, module, attribute, layer.keep, layer.dim))
        if bias:
            for name, module, _, keep, dim in list(targets):
                flags = _bias_flags(name, module, keep, dim)
                if flags is not None:
                    targets.append((f"{name} (bias)", module, "bias", flags, 0))
        return targets

    def _install(
        self, transaction: Transaction, targets: Sequence[tuple[str, nn.Module, str, Tensor, int]]
    ) -> None:
        prunings = []
        for _, module, attribute, keep, dim in targets:
            transaction.touch(module)
            pruned = int(keep.numel() - keep.sum())
            prunings.append(
                Pruning(
                    module,
                    attribute,
                    functools.partial(CustomFromMask, keep)
                    if attribute == "bias"
                    else functools.partial(LnStructured, pruned, self.n, dim),
                )
            )
        # The places of a shared weight take its mask, and multiply it for themselves. The flags count too,
        # since modules may share a bias and no weight.
        first: dict[tuple[int, int, int], int] = {}
        owners = [
            first.setdefault((id(pruning.original), id(pruning.old_mask), id(target[3])), i)
            for i, (pruning, target) in enumerate(zip(prunings, targets, strict=True))
        ]
        unique = sorted(set(owners))
        found = dict(
            zip(
                unique,
                flag_masks(
                    [prunings[i] for i in unique],
                    [targets[i][3] for i in unique],
                    [targets[i][4] for i in unique],
                ),
                strict=True,
            )
        )
        results = [found[owner] if owner == i else (found[owner][0], []) for i, owner in enumerate(owners)]
        for pruning, (mask, _) in zip(prunings, results, strict=True):
            if isinstance(pruning.new, CustomFromMask):
                pruning.new.mask = mask
        finish_all(prunings, results)

    def _prune_in_place(
        self,
        transaction: Transaction,
        targets: Sequence[tuple[str, nn.Module, str, Tensor, int]],
        keep_backup: bool,
    ) -> None:
        with_masks = []
        tensors: dict[int, tuple[Tensor, Tensor, int]] = {}
        for target in targets:
            _, module, attribute, keep, dim = target
            parameter = module._parameters.get(attribute)
            if parameter is None or not is_writable(parameter):
                with_masks.append(target)
            else:
                # A bias that modules share is pruned by each of them.
                _, others, _ = tensors.get(id(parameter), (parameter, keep, dim))
                tensors[id(parameter)] = parameter, keep & others, dim
        self._install(transaction, with_masks)
        places = [(module, attribute) for _, module, attribute, _, _ in with_masks]
        multiply = bake(transaction, places, keep_backup)
        rows = list(tensors.values())
        zero(
            transaction,
            [tensor for tensor, _, _ in rows],
            [keep for _, keep, _ in rows],
            [dim for _, _, dim in rows],
            keep_backup,
        )
        multiply()

    def undo(self) -> Plan:
        """Takes back what :meth:`apply` did: masks, hooks and, with ``keep_backup``, values, bit for bit.

        Values of ``name_orig`` that were trained since stay trained. What else changed in the modules
        since stays as it is.

        Returns:
            the plan itself, which can be applied again.

        Raises:
            RuntimeError: the plan is not applied; it was applied with ``permanent`` and without
                ``keep_backup``; or a parameter was pruned, restored or replaced since. Nothing is changed
                then.
        """
        applied = self._applied
        if applied is None:
            raise RuntimeError("this plan is not applied: there is nothing to undo")
        if self._permanent_without_backup:
            raise RuntimeError(
                "the plan was applied with permanent=True and without keep_backup=True: the values are gone"
            )
        for name, state in zip(applied.names, applied.after, strict=True):
            if not state.is_current():
                raise RuntimeError(
                    f"{name}: its parameter, mask or hook is no longer the one that apply() left; undo "
                    "what came after it first"
                )
        with Transaction() as transaction:
            for state in applied.before:
                transaction.touch(state.module)
            # To be put back where a module refuses its old state.
            transaction.values = [Values(old.tensor, old.dim, old.channels) for old in applied.values]
            for values in applied.values:
                values.restore()
            for state in reversed(applied.before):
                state.restore()
        self._applied = None
        return self


def _bias_flags(name: str, module: nn.Module, keep: Tensor, dim: int) -> Tensor | None:
    """The keep flags of a module's bias, or None where it has none."""
    if "bias_orig" not in module._parameters and module._parameters.get("bias") is None:
        return None
    bias = current_tensor(module, "bias", name)
    output = output_dim(module)
    # A transposed convolution has a bias for each channel of each group.
    groups = module.groups if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
    if (output is not None and dim != output) or bias.shape != (keep.numel() * groups,):
        raise ValueError(
            f"{name}: bias=True needs channels that are outputs, got {keep.numel()} channels along dim "
            f"{dim} of {type(module).__name__} with a bias of shape {tuple(bias.shape)}"
        )
    return keep.repeat(groups) if groups > 1 else keep


def load_plan(path: str | os.PathLike[str], parameters: Parameters) -> Plan:
    """Reads a plan that :meth:`Plan.save` wrote, for a model with the same parameters.

    Args:
        path: the file.
        parameters: the model, or pairs ``(module, name)`` in the order in which they were ranked.

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
    saved = plan_file.read(path)
    weights = _weights_named(parameters, saved.entries, saved.names)
    keep = [torch.ones(entry.channels, dtype=torch.bool) for entry in saved.entries]
    for flags, pruned in zip(keep, saved.pruned, strict=True):
        flags[torch.tensor(pruned, dtype=torch.int64)] = False
    flags = torch.cat([torch.empty(0, dtype=torch.bool), *keep])
    shapes = [entry.shape for entry in saved.entries]
    return Plan(weights, shapes, flags, saved.n, saved.selection, None, saved.entries)


def _weights_named(
    parameters: Parameters, entries: list[PlanEntry], names: list[list[str]]
) -> list[Weight]:
    """The weights of the model that the entries of a plan are for."""
    if isinstance(parameters, nn.Module):
        owner = type(parameters).__name__
        modules = dict(parameters.named_modules(remove_duplicate=False))
        places = {}
        for name in (name for group in names for name in group):
            path, _, attribute = name.rpartition(".")
            if path not in modules:
                raise ValueError(f"{name}: {owner} has no module {path!r}: the plan is for another model")
            places[name] = (modules[path], attribute)
    else:
        owner = "the list"
        found = listed(parameters)
        count = sum(map(len, names))
        if len(found) != count:
            raise ValueError(f"expected the {count} parameters that the plan is for, got {len(found)}")
        places = {name: (module, attribute) for name, module, attribute in found}
    weights = []
    for entry, group in zip(entries, names, strict=True):
        for name in group:
            if name not in places:
                raise ValueError(f"{name}: {owner} has no such parameter: the plan is for another model")
            try:
                tensor = current_tensor(*places[name], name)
            except AttributeError as error:
                raise ValueError(f"{error}: the plan is for another model") from None
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(
                    f"{name}: the plan is for shape {entry.shape}, {owner} has {tuple(tensor.shape)}"
                )
        weight = Weight(group[0], places[group[0]], entry.dim, entry.dim)
        weight.names, weight.places = group, [places[name] for name in group]
        weights.append(weight)
    return weights
