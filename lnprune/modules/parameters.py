"""Which parameters a whole-model call is about: names, dims, and weights that modules share."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lnprune.errors import per_name, shown
from lnprune.modules.batching import UNSAID, batch_of, per_parameter
from lnprune.modules.expert_layers import expert_weights
from lnprune.modules.finding import Found, Patterns, find, named_modules, uncalled
from lnprune.modules.layer_types import KNOWN, bare_name, known_weights, never_called
from lnprune.modules.masked import is_masked
from lnprune.modules.sharded import check_is_sharded
from lnprune.steps.batches import Batch
from lnprune.torch_internals import own_buffers, own_modules, own_parameters

Parameters = Union[nn.Module, Iterable[tuple[nn.Module, str]]]
Word = Literal["out", "in"]
Dim = Union[int, Word, Sequence[Union[int, Word]], Mapping[str, Union[int, Word]]]


class Weight:
    """One weight, wherever it lives.

    ``names`` has an entry for each module that shares the weight, and so has ``places``, module and
    attribute; a weight that lives in no module has none. ``reader``, if any, is what reads the weight and
    goes past the module that has it.
    """

    __slots__ = ("names", "places", "reader", "shape")

    def __init__(
        self,
        names: Sequence[str],
        shape: Sequence[int],
        places: Sequence[tuple[nn.Module, str]] = (),
    ):
        self.names = list(names)
        self.shape = tuple(shape)
        self.places = list(places)
        self.reader: str | None = None

    @property
    def name(self) -> str:
        """What the weight is called: its name at the first of its places."""
        return self.names[0]

    def check_holds_mask(self) -> None:
        """Raises ValueError where no hook would renew a masked weight."""
        if self.reader is not None:
            raise ValueError(
                f"{self.name}: {self.reader} reads this weight itself, not through the module that has "
                "it, so that no hook would renew what a mask leaves of it: exclude the weight, or prune it "
                "with permanent=True"
            )


def check_is_eager(module: nn.Module) -> None:
    """Refuses what torch's pruning refuses: a module of TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        raise RuntimeError(
            "Can't add a new parameter after ScriptModule construction: expected a module to prune before "
            f"it is scripted or traced, got a {type(module).__name__}"
        )


def check_not_parametrized(module: nn.Module, attribute: str, name: str = "") -> None:
    """Refuses what torch refuses, without computing it: spectral norm changes when it is looked at."""
    if parametrize.is_parametrized(module, attribute):
        raise TypeError(
            f"{name or attribute}: is parametrized, so that it is no parameter to prune: exclude it, or "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {attribute!r}) first"
        )


def current_tensor(module: nn.Module, attribute: str, name: str) -> Tensor:
    """The parameter, or where it is pruned, the masked weight."""
    check_is_eager(module)
    parameter = own_parameters(module).get(attribute)
    if parameter is not None:
        return parameter
    if is_masked(module, attribute):
        return getattr(module, attribute)
    check_not_parametrized(module, attribute, name)
    known = []
    for key, value in own_parameters(module).items():
        stem = key.removesuffix("_orig")
        if value is not None:
            known.append(stem if is_masked(module, stem) else key)
    raise AttributeError(
        f"{name}: expected a parameter of {type(module).__name__} ({', '.join(known) or 'it has none'}), "
        f"got {attribute!r}{_what_it_is(module, attribute)}"
    )


def _what_it_is(module: nn.Module, attribute: str) -> str:
    """What a message says of an attribute that is no parameter. No property of the module is computed."""
    for registry in (own_parameters(module), own_buffers(module), own_modules(module)):
        if attribute in registry:
            return f", which is {type(registry[attribute]).__name__}"
    try:
        found = inspect.getattr_static(module, attribute)
    except AttributeError:
        return ""
    if inspect.isfunction(found):
        return ", which is a method"
    return f", which is {type(found).__name__}"


def _as_number(dim: Any, entry: Found) -> int:
    """The dim that is meant by a number or a word."""
    if isinstance(dim, str) and dim in ("out", "in"):
        return _named_dim(dim, entry)
    try:
        return operator.index(dim)
    except TypeError:
        kind = ValueError if isinstance(dim, str) else TypeError
        raise kind(f"{entry.name}: expected a number, 'out' or 'in' as its dim, got {shown(dim)}") from None


def _named_dim(word: str, entry: Found) -> int:
    if entry.dims is not None:
        return entry.dims.out if word == "out" else entry.dims.into
    kind = type(entry.module).__name__
    raise ValueError(
        f"{entry.name}: dim={word!r} is known for {KNOWN}, got {entry.attribute!r} of {kind}: give its dim "
        f"as a number, or teach it: include={{{kind}: {{'out': 0, 'in': 1}}}}"
    )


def repeatable(parameters: Any) -> Any:
    """The same, but a list of what can be read only once."""
    return list(parameters) if isinstance(parameters, Iterator) else parameters


def _listed(parameters: Iterable[tuple[nn.Module, str]]) -> list[Found]:
    """The place of each pair."""
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
            raise TypeError(f"parameter {i}: expected a pair (module, name), got {shown(entry)}")
        module, attribute = entry
        dims, batch = known_weights(module).get(attribute), None
        if dims is None:
            dims, batch = expert_weights(module).get(attribute, (None, None))
        found.append(Found(f"{i}.{attribute}", module, attribute, dims, batch=batch))
    return found


def _dims(dim: Any, found: list[Found]) -> list[Any]:
    """The dim of each parameter as it was given: a number or a word."""
    if isinstance(dim, str):
        if dim not in ("out", "in"):
            raise ValueError(f"dim: expected a number, 'out' or 'in', got {dim!r}")
        return [dim] * len(found)
    if isinstance(dim, Mapping):
        return per_name(dim, [entry.name for entry in found], "dim")
    if isinstance(dim, Sequence):
        if len(dim) != len(found):
            raise ValueError(f"dim: expected one per parameter, {len(found)}, got {len(dim)}")
        return list(dim)
    return [dim] * len(found)


class Collected(NamedTuple):
    """Weights, each once, and where their channels are."""

    weights: list[Weight]
    tensors: list[Tensor]  # the current ones
    dims: list[int]  # as given
    batches: list[Batch | None]


def collect(
    parameters: Parameters,
    dim: Any,
    include: Patterns = None,
    exclude: Patterns = None,
    batch_dim: Any = None,
    batch_size: Any = None,
) -> Collected:
    """The weights that a call is about, each once, and where their channels are."""
    readers: dict[int, str] = {}
    if isinstance(parameters, nn.Module):
        modules = named_modules(parameters)
        found = find(parameters, modules, include, exclude)
        readers = uncalled(module for _, module in modules)
    elif include is not None or exclude is not None:
        raise TypeError("include and exclude choose among the weights of a module, got a list")
    else:
        found = _listed(parameters)
        if not found:
            raise ValueError("expected a module or pairs (module, name), got an empty list")
    weights: list[Weight] = []
    tensors: list[Tensor] = []
    dims: list[int] = []
    batches: list[Batch | None] = []
    by_place: dict[tuple[int, str], str] = {}
    by_identity: dict[Any, tuple[Weight, int, Batch | None]] = {}
    asked = [entry for entry in found if entry.like is None]
    names = [entry.name for entry in asked]
    given = zip(
        _dims(dim, asked),
        per_parameter(batch_dim, names, "batch_dim"),
        per_parameter(batch_size, names, "batch_size"),
        strict=True,
    )
    said = list(given)
    said += [said[entry.like] for entry in found if entry.like is not None]
    for entry, (word, batch_word, size) in zip(found, said, strict=True):
        name, module, attribute = entry[:3]
        tensor = current_tensor(module, attribute, name)
        place = (id(module), attribute)
        if place in by_place:
            raise ValueError(
                f"{name}: expected every parameter once, got {attribute!r} of the same "
                f"{type(module).__name__} as {by_place[place]}"
            )
        by_place[place] = name
        _check_has_shape(tensor, name)
        if tensor.dim() < 2:
            raise ValueError(
                f"{name}: structured pruning needs two dims or more, got shape {tuple(tensor.shape)}"
            )
        like = entry if entry.like is None else found[entry.like]
        along = _as_number(word, like)
        if not -tensor.dim() <= along < tensor.dim():
            raise IndexError(f"{name}: dim {along} is out of range for shape {tuple(tensor.shape)}")
        given_dim, along = along, along % tensor.dim()
        batch = None
        if batch_word is not UNSAID or size is not UNSAID or like.batch is not None:
            batch = batch_of(name, tensor.shape, along, batch_word, size, like.batch)
        identity: Any = id(tensor)
        if attribute not in own_parameters(module):
            # Its masked weight is its own, its original may be shared.
            identity = (
                id(own_parameters(module)[attribute + "_orig"]),
                id(own_buffers(module)[attribute + "_mask"]),
            )
        weight, of_weight, its_batch = by_identity.get(identity, (None, along, batch))
        if weight is None:
            weight = Weight([name], tensor.shape, [(module, attribute)])
            by_identity[identity] = weight, along, batch
            weights.append(weight)
            tensors.append(tensor)
            dims.append(given_dim)
            batches.append(batch)
        elif of_weight == along and its_batch == batch:
            weight.names.append(name)
            weight.places.append((module, attribute))
        else:
            if along == of_weight:
                raise ValueError(
                    f"{name}: shares its weight with {weight.name}, so expected one batch_dim and one "
                    "batch_size for both"
                )
            raise ValueError(
                f"{name}: shares its weight with {weight.name}, so expected one dim for both, got {along} "
                f"and {of_weight}: exclude both, or pass dim={min(along, of_weight)} for both"
            )
        note_reader(weight, module, readers)
    check_is_sharded(entry[:3] for entry in found)
    return Collected(weights, tensors, dims, batches)


def note_reader(weight: Weight, module: nn.Module, readers: Mapping[int, str]) -> None:
    """Who reads the weight in place of the module that has it; ``readers`` of a model's modules."""
    reader = readers.get(id(module)) or never_called(module)
    if reader is not None:
        weight.reader = reader


def placed(weights: Sequence[Weight], parameters: Parameters) -> list[Weight]:
    """The weights of a plan from a file, in their places: those of their names in a model or in pairs."""
    names = [name for weight in weights for name in weight.names]
    places: dict[str, tuple[nn.Module, str]] = {}
    readers: dict[int, str] = {}
    if isinstance(parameters, nn.Module):
        owner = type(parameters).__name__
        modules = dict(named_modules(parameters, remove_duplicate=False))
        readers = uncalled(modules.values())
        for name in names:
            path, _, attribute = name.rpartition(".")
            if path not in modules:
                path = bare_name(name).rpartition(".")[0]
            if path not in modules:
                raise ValueError(f"{name}: {owner} has no module {path!r}: the plan is for another model")
            places[name] = (modules[path], attribute)
    else:
        owner = "the list"
        found = _listed(parameters)
        if len(found) != len(names):
            raise ValueError(f"expected the {len(names)} parameters that the plan is for, got {len(found)}")
        places = {entry.name: (entry.module, entry.attribute) for entry in found}
    shapes = {}
    for name, place in places.items():
        try:
            tensor = current_tensor(*place, name)
        except AttributeError as error:
            raise ValueError(f"{error}: the plan is for another model") from None
        _check_has_shape(tensor, name)
        shapes[name] = tuple(tensor.shape)
    check_shapes(weights, shapes, owner)
    here = []
    for weight in weights:
        here.append(Weight(weight.names, weight.shape, [places[name] for name in weight.names]))
        for module, _ in here[-1].places:
            note_reader(here[-1], module, readers)
    return here


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
