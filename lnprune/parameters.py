"""Which parameters a whole-model call is about: names, dims, and weights that modules share."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn

__all__ = [
    "NAMED_ERRORS",
    "Parameters",
    "Patterns",
    "Weight",
    "add_name",
    "check_is_eager",
    "check_shapes",
    "collect",
    "current_tensor",
    "output_dim",
    "per_weight",
    "placed",
]

Pattern = Union[str, type]
Patterns = Union[Pattern, Iterable[Pattern], None]
Parameters = Union[nn.Module, Iterable[tuple[nn.Module, str]]]

# The types whose weights a model is asked for, with the dims of their outputs and inputs.
_DIMS: tuple[tuple[tuple[type, ...], int, int], ...] = (
    ((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 0, 1),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding), 1, 0),
)
_TYPES = tuple(kind for kinds, _, _ in _DIMS for kind in kinds)


class Weight:
    """One weight, wherever it lives, and the dim of its channels.

    ``names`` has an entry for each module that shares the weight, and so has ``places``, module and
    attribute; a weight that lives in no module has none. ``given_dim`` can count from the last dim.
    """

    __slots__ = ("dim", "given_dim", "names", "places", "shape")

    def __init__(
        self,
        names: Sequence[str],
        shape: Sequence[int],
        dim: int,
        places: Sequence[tuple[nn.Module, str]] = (),
        given_dim: int | None = None,
    ):
        self.names = list(names)
        self.shape = tuple(shape)
        self.dim = dim
        self.places = list(places)
        self.given_dim = dim if given_dim is None else given_dim

    @property
    def name(self) -> str:
        """What the weight is called: its name at the first of its places."""
        return self.names[0]

    @property
    def channels(self) -> int:
        return self.shape[self.dim]


# What a call on one of many parameters raises about it, as a rule.
NAMED_ERRORS = (TypeError, ValueError, IndexError, RuntimeError)


def add_name(error: Exception, name: str) -> None:
    """Puts the name, where there is one, before the error's message."""
    # In place, since not every type of exception can be made from a message alone.
    if name and error.args and isinstance(error.args[0], str):
        error.args = f"{name}: {error.args[0]}", *error.args[1:]


def _is_pruned(module: nn.Module, attribute: str) -> bool:
    """Whether the attribute is a masked weight. Spectral norm has an ``_orig`` too, but no mask."""
    return attribute + "_orig" in module._parameters and attribute + "_mask" in module._buffers


def check_is_eager(module: nn.Module) -> None:
    """Refuses what torch's pruning refuses: a module of TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        raise RuntimeError(
            "Can't add a new parameter after ScriptModule construction: expected a module to prune before "
            f"it is scripted or traced, got a {type(module).__name__}"
        )


def current_tensor(module: nn.Module, attribute: str, name: str) -> Tensor:
    """The parameter, or where it is pruned, the masked weight."""
    check_is_eager(module)
    parameter = module._parameters.get(attribute)
    if parameter is not None:
        return parameter
    if _is_pruned(module, attribute):
        return getattr(module, attribute)
    known = []
    for key, value in module._parameters.items():
        stem = key.removesuffix("_orig")
        if value is not None:
            known.append(stem if _is_pruned(module, stem) else key)
    found = type(getattr(module, attribute, None)).__name__
    raise AttributeError(
        f"{name}: expected a parameter of {type(module).__name__} ({', '.join(known) or 'it has none'}), "
        f"got {attribute!r}" + (f", which is {found}" if hasattr(module, attribute) else "")
    )


def output_dim(module: nn.Module) -> int | None:
    """The dim of a module's weight whose channels are its outputs, where its type says so."""
    return next((out for kinds, out, _ in _DIMS if isinstance(module, kinds)), None)


def _as_number(dim: Any, module: nn.Module, name: str) -> int:
    """The dim that is meant by a number or a word."""
    if isinstance(dim, str) and dim in ("out", "in"):
        return _named_dim(dim, module, name)
    try:
        return operator.index(dim)
    except TypeError:
        kind = ValueError if isinstance(dim, str) else TypeError
        raise kind(f"{name}: expected a number, 'out' or 'in' as its dim, got {dim!r}") from None


def _named_dim(word: str, module: nn.Module, name: str) -> int:
    for kinds, out, into in _DIMS:
        if isinstance(module, kinds):
            return out if word == "out" else into
    raise ValueError(
        f"{name}: dim={word!r} is known for Linear, convolutions and Embedding, got "
        f"{type(module).__name__}: give its dim as a number"
    )


def _matches(patterns: Sequence[Pattern], matched: set[int], name: str, module: nn.Module) -> bool:
    """Whether any pattern is the module's type or matches the name; notes which ones did."""
    any_match = False
    for i, pattern in enumerate(patterns):
        if isinstance(pattern, str):
            path = name.rpartition(".")[0]
            hit = fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(path, pattern)
        else:
            hit = isinstance(module, pattern)
        if hit:
            matched.add(i)
            any_match = True
    return any_match


def _patterns(given: Patterns, what: str) -> list[Pattern]:
    if given is None:
        return []
    patterns = list(given) if isinstance(given, Iterable) and not isinstance(given, str | type) else [given]
    for pattern in patterns:
        if not isinstance(pattern, str | type):
            raise TypeError(f"{what}: expected name patterns and module types, got {pattern!r}")
    return patterns


def _in_model(
    model: nn.Module,
    include: Patterns,
    exclude: Patterns,
) -> list[tuple[str, nn.Module, str]]:
    included, excluded = _patterns(include, "include"), _patterns(exclude, "exclude")
    types = _TYPES + tuple(pattern for pattern in included if isinstance(pattern, type))
    modules: Iterable[tuple[str, nn.Module]] = model.named_modules()
    found = [
        (f"{path}.weight" if path else "weight", module, "weight")
        for path, module in modules
        if isinstance(module, types)
    ]
    for patterns, what in ((included, "include"), (excluded, "exclude")):
        if not patterns:
            continue
        matched: set[int] = set()
        wanted = what == "include"
        kept = [entry for entry in found if _matches(patterns, matched, *entry[:2]) is wanted]
        for i, pattern in enumerate(patterns):
            if i not in matched:
                shown = pattern if isinstance(pattern, str) else pattern.__name__
                names = ", ".join(name for name, _, _ in found[:3]) or "none"
                raise ValueError(
                    f"{what}: {shown!r} matches nothing among the {len(found)} weights of "
                    f"{type(model).__name__} ({names}{', ...' if len(found) > 3 else ''})"
                )
        found = kept
    return found


def _listed(parameters: Iterable[tuple[nn.Module, str]]) -> list[tuple[str, nn.Module, str]]:
    """Name, module and attribute of each pair."""
    if not isinstance(parameters, Iterable):
        raise TypeError(f"expected a module or pairs (module, name), got {type(parameters).__name__}")
    found = []
    for i, entry in enumerate(parameters):
        if not (
            isinstance(entry, tuple)
            and len(entry) == 2
            and isinstance(entry[0], nn.Module)
            and isinstance(entry[1], str)
        ):
            raise TypeError(f"parameter {i}: expected a pair (module, name), got {entry!r}")
        found.append((f"{i}.{entry[1]}", *entry))
    return found


def _dims(dim: Any, found: list[tuple[str, nn.Module, str]]) -> list[Any]:
    """The dim of each parameter as it was given: a number or a word."""
    if isinstance(dim, str):
        if dim not in ("out", "in"):
            raise ValueError(f"dim: expected a number, 'out' or 'in', got {dim!r}")
        return [dim] * len(found)
    if isinstance(dim, Mapping):
        return per_weight(dim, [name for name, _, _ in found], "dim")
    if isinstance(dim, Sequence):
        if len(dim) != len(found):
            raise ValueError(f"dim: expected one per parameter, {len(found)}, got {len(dim)}")
        return list(dim)
    return [dim] * len(found)


def per_weight(given: Any, names: Sequence[str], what: str) -> list[Any]:
    """One value for each name: the same for all, or by name."""
    if not isinstance(given, Mapping):
        return [given] * len(names)
    unknown = [name for name in given if name not in set(names)]
    missing = [name for name in names if name not in given]
    if unknown or missing:
        trouble = f"got one for {unknown[0]!r}" if unknown else f"got none for {missing[0]!r}"
        raise ValueError(f"{what}: expected one for each of {len(names)} parameters, {trouble}")
    return [given[name] for name in names]


def collect(
    parameters: Parameters,
    dim: Any,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[list[Weight], list[Tensor]]:
    """The weights that a call is about, each once, and their current tensors."""
    if isinstance(parameters, nn.Module):
        found = _in_model(parameters, include, exclude)
    elif include is not None or exclude is not None:
        raise TypeError("include and exclude choose among the weights of a module, got a list")
    else:
        found = _listed(parameters)
    weights: list[Weight] = []
    tensors: list[Tensor] = []
    by_place: dict[tuple[int, str], str] = {}
    by_identity: dict[Any, Weight] = {}
    for (name, module, attribute), given in zip(found, _dims(dim, found), strict=True):
        tensor = current_tensor(module, attribute, name)
        place = (id(module), attribute)
        if place in by_place:
            raise ValueError(
                f"{name}: expected every parameter once, got {attribute!r} of the same "
                f"{type(module).__name__} as {by_place[place]}"
            )
        by_place[place] = name
        _check_has_shape(tensor, name)
        dims = tensor.dim()
        if dims < 2:
            raise ValueError(
                f"{name}: structured pruning needs two dims or more, got shape {tuple(tensor.shape)}"
            )
        along = _as_number(given, module, name)
        if not -dims <= along < dims:
            raise IndexError(f"{name}: dim {along} is out of range for shape {tuple(tensor.shape)}")
        given_dim, along = along, along % dims
        identity: Any = id(tensor)
        if attribute not in module._parameters:  # its masked weight is its own, its original may be shared
            identity = (
                id(module._parameters[attribute + "_orig"]),
                id(module._buffers[attribute + "_mask"]),
            )
        shared = by_identity.get(identity)
        if shared is None:
            weight = Weight([name], tensor.shape, along, [(module, attribute)], given_dim)
            by_identity[identity] = weight
            weights.append(weight)
            tensors.append(tensor)
        elif shared.dim == along:
            shared.names.append(name)
            shared.places.append((module, attribute))
        else:
            raise ValueError(
                f"{name}: shares its weight with {shared.name}, so expected one dim for both, got {along} "
                f"and {shared.dim}: exclude one, or give the dims"
            )
    return weights, tensors


def placed(weights: Sequence[Weight], parameters: Parameters) -> list[Weight]:
    """The weights, which live in no module yet, where a model, or a list of pairs, has their names."""
    names = [name for weight in weights for name in weight.names]
    places: dict[str, tuple[nn.Module, str]] = {}
    if isinstance(parameters, nn.Module):
        owner = type(parameters).__name__
        modules = dict(parameters.named_modules(remove_duplicate=False))
        for name in names:
            path, _, attribute = name.rpartition(".")
            if path not in modules:
                raise ValueError(f"{name}: {owner} has no module {path!r}: the plan is for another model")
            places[name] = (modules[path], attribute)
    else:
        owner = "the list"
        found = _listed(parameters)
        if len(found) != len(names):
            raise ValueError(f"expected the {len(names)} parameters that the plan is for, got {len(found)}")
        places = {name: (module, attribute) for name, module, attribute in found}
    shapes = {}
    for name, place in places.items():
        try:
            tensor = current_tensor(*place, name)
        except AttributeError as error:
            raise ValueError(f"{error}: the plan is for another model") from None
        _check_has_shape(tensor, name)
        shapes[name] = tuple(tensor.shape)
    check_shapes(weights, shapes, owner)
    return [
        Weight(weight.names, weight.shape, weight.dim, [places[name] for name in weight.names])
        for weight in weights
    ]


def check_shapes(weights: Sequence[Weight], shapes: Mapping[str, Sequence[int]], owner: str) -> None:
    """Raises ValueError where ``owner``, a model or a file, has not all of the weights in their shapes."""
    for weight in weights:
        for name in weight.names:
            if name not in shapes:
                raise ValueError(f"{name}: {owner} has no such parameter: the plan is for another model")
            if tuple(shapes[name]) != weight.shape:
                raise ValueError(
                    f"{name}: the plan is for shape {weight.shape}, {owner} has {tuple(shapes[name])}"
                )


def _check_has_shape(tensor: Tensor, name: str) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name}: expected a parameter with a shape, got one not initialised yet")
