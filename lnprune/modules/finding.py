"""Which parameters of a model are meant: names without wrappers, patterns, weights that modules share."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Union

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lnprune.errors import shown
from lnprune.modules.expert_layers import expert_weights, packed_experts
from lnprune.modules.layer_types import KNOWN, Dims, known_weights, uncalled_children, wrapped_child
from lnprune.modules.masked import is_masked, parameter_of
from lnprune.steps.batches import Batch
from lnprune.torch_internals import own_modules, own_parameters

Pattern = Union[str, type]
Patterns = Union[Pattern, Iterable[Pattern], Mapping[Any, Union[Mapping[str, int], None]], None]


class Found(NamedTuple):
    """One place of a parameter."""

    name: str
    module: nn.Module
    attribute: str
    dims: Dims | None = None  # of its outputs and inputs, where they are known
    like: int | None = None  # the index of the place through whose weight, which it shares, it was found
    batch: Batch | None = None  # of its experts, where the module is known to have them


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """As :meth:`torch.nn.Module.named_modules`, but that wrappers have no part in the names."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> None:
        if remove_duplicate:
            if id(module) in seen:
                return
            seen.add(id(module))
        child = wrapped_child(module)
        if child is not None:
            walk(child, path)
            return
        found.append((path, module))
        for name, child in own_modules(module).items():
            if child is not None:
                walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def _attribute(module: nn.Module, key: str) -> str:
    """The attribute of a parameter by its key: of a masked one the name that it had."""
    stem = key.removesuffix("_orig")
    return stem if stem != key and is_masked(module, stem) else key


def _has_channels(parameter: Tensor | None) -> bool:
    return parameter is not None and not nn.parameter.is_lazy(parameter) and parameter.dim() > 1


def uncalled(modules: Iterable[nn.Module]) -> dict[int, str]:
    """By identity, the modules whose hooks never run, and the types of parents that read their weights."""
    readers = {}
    for module in modules:
        for child in uncalled_children(module):
            readers[id(child)] = type(module).__name__
    return readers


def _is_known(module: nn.Module, attribute: str) -> bool:
    """Whether to list a weight that the module's type should have.

    A ``weight`` is listed even if it is missing, so that the call says so; others only if they are there.
    """
    return (
        attribute == "weight"
        or parameter_of(module, attribute) is not None
        or parametrize.is_parametrized(module, attribute)
    )


class Choice:
    """The patterns of ``include`` or ``exclude``, and which of them have matched something."""

    def __init__(self, given: Patterns, what: str):
        self.what = what
        self.dims: dict[int, Dims] = {}  # what "out" and "in" mean, by the pattern's index
        if given is None:
            self.patterns: list[Any] = []
        elif isinstance(given, str | type) or not isinstance(given, Iterable):
            self.patterns = [given]
        else:
            self.patterns = list(given)
        for i, pattern in enumerate(self.patterns):
            if not isinstance(pattern, str | type):
                raise TypeError(f"{what}: expected name patterns and module types, got {shown(pattern)}")
            if isinstance(given, Mapping) and given[pattern] is not None:
                self.dims[i] = self._taught(given[pattern], _shown_pattern(pattern))
        self.matched: set[int] = set()

    def _taught(self, dims: Any, pattern: str) -> Dims:
        """What a mapping says about a pattern: which dims are ``"out"`` and ``"in"``."""
        if (
            not isinstance(dims, Mapping)
            or set(dims) != {"out", "in"}
            or any(type(dim) is not int for dim in dims.values())
        ):
            raise ValueError(
                f"{self.what}: expected the dims of {pattern} as {{'out': 0, 'in': 1}}, got {shown(dims)}"
            )
        return Dims(dims["out"], dims["in"])

    def match(self, entry: Found, only: Iterable[int] | None = None) -> int | None:
        """The index of the first pattern that matches; all that match count as matched."""
        first = None
        for i, pattern in enumerate(self.patterns):
            if only is not None and i not in only:
                continue
            if isinstance(pattern, str):
                path = entry.name.rpartition(".")[0]
                hit = fnmatch.fnmatchcase(entry.name, pattern) or fnmatch.fnmatchcase(path, pattern)
            else:
                hit = isinstance(entry.module, pattern)
            if hit:
                self.matched.add(i)
                first = i if first is None else first
        return first

    def check_all_matched(self, model: nn.Module, among: Sequence[Found]) -> None:
        for i, pattern in enumerate(self.patterns):
            if i not in self.matched:
                names = ", ".join(entry.name for entry in among[:3]) or "none"
                raise ValueError(
                    f"{self.what}: {_shown_pattern(pattern)} matches nothing among the {len(among)} "
                    f"weights of {type(model).__name__} ({names}{', ...' if len(among) > 3 else ''})"
                )


def _shown_pattern(pattern: Pattern) -> str:
    return repr(pattern if isinstance(pattern, str) else pattern.__name__)


def find(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], include: Patterns, exclude: Patterns
) -> list[Found]:
    """The weights of a model that are meant: a tensor under all of its names, or not at all.

    Of several names those come last that it was not found by. ``modules`` are the model's, by name.
    """
    included, excluded = Choice(include, "include"), Choice(exclude, "exclude")
    found: list[Found] = []
    for path, module in modules:
        for attribute, dims in known_weights(module).items():
            if _is_known(module, attribute):
                found.append(_found(path, module, attribute, dims))
        for attribute, (dims, batch) in expert_weights(module).items():
            found.append(_found(path, module, attribute, dims)._replace(batch=batch))
    if included.patterns:
        found = _included(model, modules, included, found)
    if not found:
        raise ValueError(_nothing_found(model, _others(modules, found)))
    places = _places(modules, found)

    def places_of(entry: Found) -> list[Found]:
        return places.get(id(parameter_of(entry.module, entry.attribute)), [entry])

    if excluded.patterns:
        left = []
        for entry in found:
            # All are matched, so that each pattern is known to match something.
            hits = [excluded.match(place) for place in places_of(entry)]
            if all(hit is None for hit in hits):
                left.append(entry)
        excluded.check_all_matched(model, found)
        if not left:
            raise ValueError(
                f"exclude: leaves none of the {len(found)} weights of {type(model).__name__} to prune"
            )
        found = left
    there = {(id(entry.module), entry.attribute) for entry in found} if places else set()
    for i, entry in enumerate(list(found) if places else ()):
        for other in places_of(entry):
            if (id(other.module), other.attribute) not in there:
                there.add((id(other.module), other.attribute))
                found.append(other._replace(like=i))
    return found


def _places(modules: Sequence[tuple[str, nn.Module]], found: Sequence[Found]) -> dict[int, list[Found]]:
    """All places of each parameter that has more than one, by its identity; those that were found first."""
    seen: set[int] = set()
    places: dict[int, list[Found]] = {}
    for _, module in modules:
        for parameter in own_parameters(module).values():
            if id(parameter) in seen and parameter is not None:
                places[id(parameter)] = []
            seen.add(id(parameter))
    if not places:
        return places
    there = set()
    for entry in found:
        there.add((id(entry.module), entry.attribute))
        held = parameter_of(entry.module, entry.attribute)
        if id(held) in places:
            places[id(held)].append(entry)
    for path, module in modules:
        for key, parameter in own_parameters(module).items():
            if id(parameter) in places:
                attribute = _attribute(module, key)
                if (id(module), attribute) not in there:
                    places[id(parameter)].append(_found(path, module, attribute))
    return places


def _others(modules: Sequence[tuple[str, nn.Module]], known: Sequence[Found]) -> list[Found]:
    """The parameters of two dims or more that are no known weights."""
    there = {(id(entry.module), entry.attribute) for entry in known}
    others = []
    for path, module in modules:
        for key, parameter in own_parameters(module).items():
            if not _has_channels(parameter):
                continue
            attribute = _attribute(module, key)
            if (id(module), attribute) not in there:
                others.append(_found(path, module, attribute))
    return others


def left_out(model: nn.Module, names: Collection[str]) -> list[str]:
    """What may hold experts and is none of these parameters: a sentence for each, with what would do it."""
    modules = named_modules(model)
    found = []
    for path, module in modules:
        for attribute, tensor in packed_experts(module).items():
            entry = _found(path, module, attribute)
            dtype = str(tensor.dtype).removeprefix("torch.")
            found.append(f"{entry.name}: is packed or scaled, {dtype}: convert the model to rank it")
    for entry in _others(modules, []):
        held = parameter_of(entry.module, entry.attribute)
        if held is None or held.dim() < 3 or entry.name in names or not held.is_floating_point():
            continue
        if entry.attribute not in known_weights(entry.module):
            found.append(
                f"{entry.name}: is not known, shape {tuple(held.shape)}: include={entry.name!r} takes "
                "it, with its dim and, for experts, batch_dim"
            )
    return found


def _found(path: str, module: nn.Module, attribute: str, dims: Dims | None = None) -> Found:
    return Found(f"{path}.{attribute}" if path else attribute, module, attribute, dims)


def _included(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], included: Choice, known: list[Found]
) -> list[Found]:
    """What patterns take: known weights, and of those that match none, any parameters of two dims or more.

    A type takes the known weights of its modules, and all parameters of two dims or more of other modules.
    """
    hits = {id(entry): included.match(entry) for entry in known}
    with_known = {id(entry.module) for entry in known}
    further = [i for i in range(len(included.patterns)) if i not in included.matched]
    types = [i for i, pattern in enumerate(included.patterns) if isinstance(pattern, type)]
    others = _others(modules, known)
    for entry in others:
        only = further if id(entry.module) in with_known else sorted({*further, *types})
        hits[id(entry)] = included.match(entry, only)
    included.check_all_matched(model, known)
    order = {id(module): i for i, (_, module) in enumerate(modules)}
    taken = [entry for entry in (*known, *others) if hits[id(entry)] is not None]
    taken.sort(key=lambda entry: order[id(entry.module)])
    return [entry._replace(dims=included.dims.get(hits[id(entry)], entry.dims)) for entry in taken]  # type: ignore[arg-type]


def _nothing_found(model: nn.Module, others: list[Found]) -> str:
    kinds = Counter(type(entry.module).__name__ for entry in others)
    said = f"{type(model).__name__} has no weights of the types that are taken by themselves ({KNOWN})"
    if not kinds:
        return f"{said}, and no other parameters of two dims or more: there is nothing to prune"
    there = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(5))
    more = f" and {len(kinds) - 5} more types" if len(kinds) > 5 else ""
    entry = others[0]
    return (
        f"{said}, but parameters of two dims or more in {there}{more}: include them by type or by name, as "
        f"in include={type(entry.module).__name__} or include={entry.name!r}"
    )
