"""Where choices of channels meet modules: masks and hooks, or zeros in place, all or nothing, and back."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lnprune.errors import named
from lnprune.modules.backup import Backup
from lnprune.modules.kept_zeros import keep_zeros
from lnprune.modules.layer_types import bias_part, known_weights
from lnprune.modules.masked import parameter_of
from lnprune.modules.parameters import Weight, current_tensor
from lnprune.modules.registration import ParameterState, Part, Pruning, Target, unregister
from lnprune.modules.sharded import check_is_sharded, check_takes_mask, kept_by_fsdp, parameters_at
from lnprune.modules.transaction import Transaction
from lnprune.steps import in_place, masks
from lnprune.steps.batches import Batch
from lnprune.steps.flags import Request
from lnprune.steps.local import held_here
from lnprune.steps.sharding import Agreement
from lnprune.torch_internals import own_parameters

__all__ = [
    "Application",
    "Batch",
    "Part",
    "Slices",
    "Target",
    "Weight",
    "agreement_about",
    "install",
    "prune_in_place",
    "unmask",
]


class Slices(NamedTuple):
    """Slices of a weight, or of a part of it, along a dim, with a flag for each of them that stays."""

    weight: Weight
    dim: int
    keep: Tensor  # bool; those of all matrices of a batch, one after another
    part: Part | None = None
    batch: Batch | None = None


def install(transaction: Transaction, targets: Iterable[Target], n: Any) -> list[Pruning]:
    """Gives every target its mask and its hook, as ``BasePruningMethod.apply`` does."""
    prunings: list[Pruning] = []
    kept = kept_by_fsdp()
    with named() as about:
        for target in targets:
            about.name = target[0]
            if kept:
                check_takes_mask(target[1], target[2], kept)
            transaction.touch(target[1])
            prunings.append(Pruning(target, n))
        requests = [pruning.request for pruning in prunings]
        if len(requests) > 1:
            _write_shared(requests, n, about)
        else:
            masks.write_masks(requests, n, about)
    for pruning in prunings:
        pruning.finish()
    return prunings


def _write_shared(requests: Sequence[Request], n: Any, about: named) -> None:
    """Masks and masked weights of all; one mask for places of a weight that prune the same of it."""
    owners: dict[tuple[int, int, int], Request] = {}
    shared = []
    for request in requests:
        owner = owners.setdefault((id(request.original), id(request.old_mask), id(request.keep)), request)
        if owner is not request:
            shared.append((request, owner))
    masks.write_masks(list(owners.values()), n, about)
    for request, owner in shared:
        request.mask = owner.mask
        request.weight = masks.masked(owner.mask, request.original)


def unmask(
    transaction: Transaction, places: Sequence[tuple[str, nn.Module, str]], keep_values: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Registers masked parameters, by name, module and attribute, as themselves, their values as they are.

    Returns:
        each parameter and its mask, to be multiplied; once where places share both.
    """
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    kept = kept_by_fsdp()
    for name, module, attribute in places:
        held = own_parameters(module).get(attribute + "_orig")
        if kept:
            with named(name):
                check_takes_mask(module, attribute, kept)
        if held is not None:
            held_here(held, name)
        transaction.touch(module)
        original, mask = unregister(module, attribute)
        if (id(original), id(mask)) in pairs:
            continue
        pairs[id(original), id(mask)] = original, mask
        if keep_values:
            here = held_here(original, name)
            is_copied = here is not original or in_place.multiplies_in_place(here)
            transaction.note(original, 0, copied=is_copied)
    return list(pairs.values())


def prune_in_place(
    transaction: Transaction,
    targets: Iterable[Target],
    n: Any,
    keep_values: bool = False,
    agree: Callable[[], None] = lambda: None,
) -> None:
    """Zeros in place; what is masked, or cannot be written in place, gets the values of ``remove``.

    ``agree`` is as for :func:`write_in_place`.
    """
    with_masks = []
    requests: dict[Any, Request] = {}
    parts: dict[int, tuple[Tensor, Part]] = {}  # by the identity of a view
    for target in targets:
        name, module, attribute, dim, amount, keep, scores, part, batch = target
        parameter = own_parameters(module).get(attribute)
        held = None if parameter is None else held_here(parameter, name)
        if (
            held is not None
            and held is not parameter
            and (part is not None or not in_place.is_writable(held))
        ):
            raise ValueError(
                f"{name}: expected all of a sharded parameter, with shards that can be written, got "
                f"{'shards that cannot' if part is None else 'a part of it'}"
            )
        if parameter is None or held is None or not in_place.is_writable(held):
            if part is not None:
                raise ValueError(f"{name}: expected a parameter that can be written, to prune a part of it")
            with_masks.append(target)
            continue
        written: Tensor = parameter
        if part is not None:
            written = parameter.detach().narrow(*part)
            parts[id(written)] = parameter, part
        request = Request(written if scores is None else scores, written, dim, amount, keep, name)
        request.batch = batch
        key = id(parameter) if keep is None else (id(parameter), dim, part, batch)
        other = requests.setdefault(key, request)
        if other is not request and keep is not None and other.keep is not None:
            # A bias that modules share is pruned by each of them.
            other.keep = other.keep & keep
    with in_place.outside_inference_mode():
        install(transaction, with_masks, n)
    places = [target[:3] for target in with_masks]
    pairs = unmask(transaction, places, keep_values)

    def before(tensor: Tensor, *values: Any) -> None:
        whole, part = parts.get(id(tensor), (tensor, None))
        transaction.note(whole, *values, part=part)

    in_place.write_in_place(list(requests.values()), pairs, n, before, keep_values, agree)


def agreement_about(slices: Sequence[Slices]) -> Agreement:
    """That of all ranks, where the weights are sharded over some, to prune them or to take it back."""
    return Agreement(parameters_at(place for each in slices for place in each.weight.places))


class Application:
    """What applying flags did to modules, and the way back."""

    def __init__(
        self,
        slices: Sequence[Slices],
        n: Any,
        permanent: bool,
        bias: bool,
        keep_backup: bool,
        agreement: Agreement,
    ):
        with Transaction() as transaction:
            if not permanent:
                _check_hold_masks(slices)
            targets = self._targets = _targets(slices, bias)
            self._names = [target.name for target in targets]
            self._is_permanent, self._has_values = permanent, keep_backup or not permanent
            self._before = [ParameterState(target.module, target.attribute) for target in targets]
            self._backups: list[Backup] = []
            self._handles: list[RemovableHandle] = []
            asked = [(*target[:1], target.dim, target.keep, *target[-2:]) for target in targets]
            agree = functools.partial(agreement.confirm, "apply", permanent, keep_backup, asked)
            if permanent:
                prune_in_place(transaction, targets, n, keep_backup, agree)
                if keep_backup:
                    self._backups = [Backup(values) for values in transaction.values]
            else:
                agree()
                for each in _rounds(targets):
                    install(transaction, each, n)
            self._after = [ParameterState(state.module, state.name) for state in self._before]

    def undo(self, agreement: Agreement) -> None:
        """As :meth:`Plan.undo`."""
        if not self._has_values:
            raise RuntimeError(
                "the plan was applied with permanent=True and without keep_backup=True: the values are gone"
            )
        self._check_is_current()
        agreement.confirm("undo", self._names)
        with Transaction() as transaction:
            for state in self._before:
                transaction.touch(state.module)
            for values in (backup.values for backup in self._backups):
                transaction.note(
                    values.tensor, values.dim, values.channels, True, values.batch, part=values.part
                )
            for backup in self._backups:
                backup.put_back()
            for state in reversed(self._before):
                state.restore()
        for handle in self._handles:
            handle.remove()

    def keep_zeros(self, optimizer: Any) -> RemovableHandle:
        """As :meth:`Plan.keep_zeros`."""
        if not self._is_permanent:
            raise RuntimeError("keep_zeros is for zeros without masks: masks keep theirs in every forward")
        self._handles.append(keep_zeros(self._targets, optimizer))
        return self._handles[-1]

    def _check_is_current(self) -> None:
        """Raises RuntimeError where parameters, or values that were overwritten, changed since."""
        named_states = list(zip(self._names, self._after, strict=True))
        check_is_sharded((name, state.module, state.name) for name, state in named_states)
        for name, state in named_states:
            if not state.is_current():
                raise RuntimeError(
                    f"{name}: its parameter, mask or hook is no longer the one that apply() left; undo "
                    "what came after it first"
                )
        names = {id(state.parameter): name for name, state in named_states}
        for backup in self._backups:
            backup.check(names[id(backup.values.tensor)])


def _check_hold_masks(slices: Sequence[Slices]) -> None:
    """Raises ValueError where a mask cannot say what is pruned, or no hook would renew it."""
    for weight, _, _, part, _ in slices:
        weight.check_holds_mask()
        if part is not None:
            raise ValueError(
                f"{weight.name}: a mask is of a whole weight: prune parts of weights with permanent=True"
            )


def _rounds(targets: Sequence[Target]) -> list[list[Target]]:
    """The targets such that none is there twice in a round: a second dim is a repeated pruning."""
    rounds: list[list[Target]] = []
    counts: Counter[tuple[int, str]] = Counter()
    for target in targets:
        place = id(target.module), target.attribute
        if counts[place] == len(rounds):
            rounds.append([])
        rounds[counts[place]].append(target)
        counts[place] += 1
    return rounds


def _targets(slices: Sequence[Slices], bias: bool) -> list[Target]:
    """All that flags are to prune, after the checks of names, shapes and biases."""
    targets: list[Target] = []
    seen: dict[int, tuple[str, Weight, int]] = {}
    for weight, along, keep, part, batch in slices:
        if not weight.places:
            raise RuntimeError(
                f"{weight.name}: the plan was made without a model: save it, and load_plan() it for one"
            )
        for name, (module, attribute) in zip(weight.names, weight.places, strict=True):
            tensor = current_tensor(module, attribute, name)
            if tuple(tensor.shape) != weight.shape:
                raise RuntimeError(
                    f"{name}: expected shape {weight.shape}, as it was ranked, got {tuple(tensor.shape)}"
                )
            if attribute in own_parameters(module):
                other, owner, dim = seen.setdefault(id(tensor), (name, weight, along))
                if owner is not weight and dim != along:
                    raise RuntimeError(
                        f"{name}: shares its weight with {other} now, so expected one dim for both, got "
                        f"{along} and {dim}: rank the model again"
                    )
            targets.append(Target(name, module, attribute, along, keep=keep, part=part, batch=batch))
    check_is_sharded((target.name, target.module, target.attribute) for target in targets)
    return targets + (_bias_targets(targets) if bias else [])


def _bias_targets(targets: Sequence[Target]) -> list[Target]:
    """The biases of the channels that targets prune, each once."""
    found: dict[tuple[int, str], Target] = {}
    shared: dict[tuple[int, int], Tensor] = {}  # places of a weight that share a bias share its mask too
    for target in targets:
        keep = _bias_flags(target)
        if keep is None:
            continue
        attribute = bias_part(target.module, target.attribute).attribute
        key = id(target.module), attribute
        if key in found:  # another part of the same bias
            keep = keep & found[key].keep  # type: ignore[operator]
        else:
            keep = shared.setdefault((id(target.keep), keep.numel()), keep)
        found[key] = Target(f"{target.name} (bias)", target.module, attribute, 0, keep=keep)
    return list(found.values())


def _bias_flags(target: Target) -> Tensor | None:
    """The keep flags of a module's bias, or None where it has none."""
    name, module, keep = target.name, target.module, target.keep
    assert keep is not None
    place = bias_part(module, target.attribute)
    if place.attribute == target.attribute or parameter_of(module, place.attribute) is None:
        return None
    bias = current_tensor(module, place.attribute, name)
    dims = known_weights(module).get(target.attribute)
    length = keep.numel() * place.repeats
    is_output = dims is None or target.dim == dims.out
    is_apart = target.part is not None or (target.batch is not None and target.batch.dim != target.dim)
    if not is_output or is_apart or bias.shape != (length * place.parts,):
        raise ValueError(
            f"{name}: bias=True needs channels that are outputs, got {keep.numel()} channels along dim "
            f"{target.dim} of {type(module).__name__} with a bias of shape {tuple(bias.shape)}"
        )
    if place.repeats > 1:
        keep = keep.repeat(place.repeats)
    if place.parts > 1:
        whole = torch.ones(place.parts, length, dtype=torch.bool, device=keep.device)
        whole[place.part] = keep
        keep = whole.flatten()
    return keep
