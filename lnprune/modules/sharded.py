"""Modules whose parameters are sharded over ranks: what FSDP2 keeps of them, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from torch import Tensor, nn

from lnprune.steps.sharding import has_ranks
from lnprune.torch_internals import fsdp_parameters, own_parameters, uses_fsdp

Places = Iterable[tuple[nn.Module, str]]


def check_is_sharded(places: Iterable[tuple[str, nn.Module, str]]) -> None:
    """Raises RuntimeError where FSDP2 has gathered a parameter, by name, module and attribute.

    After a forward without a backward, those of the root are gathered still. Values written to them would
    be lost at the next forward.
    """
    if not uses_fsdp():
        return
    gathered = {(id(each.module), each.name) for each in fsdp_parameters() if not each.is_sharded}
    for name, module, attribute in places:
        if not gathered.isdisjoint({(id(module), attribute), (id(module), attribute + "_orig")}):
            raise RuntimeError(
                f"{name}: expected a parameter that fully_shard() keeps in shards, got one that is "
                "gathered, as after a forward without a backward: call reshard() of each module that "
                "fully_shard() was called with, first"
            )


def kept_by_fsdp() -> Set[tuple[int, str]]:
    """Of the parameters that FSDP2 registers anew by itself: identities of modules, and names in them."""
    return {(id(each.module), each.name) for each in fsdp_parameters()} if uses_fsdp() else frozenset()


def check_takes_mask(module: nn.Module, attribute: str, kept: Set[tuple[int, str]]) -> None:
    """Raises RuntimeError for a parameter of FSDP2, which registers it at each forward."""
    if (id(module), attribute) in kept or (id(module), attribute + "_orig") in kept:
        raise RuntimeError(
            "fully_shard() registers this parameter anew at each forward, which no mask that comes or goes "
            "outlives: expected permanent=True (local_structured, global_structured, Plan.apply) for a "
            f"parameter without a mask, got {attribute!r} of {type(module).__name__} to mask or to unmask"
        )


def parameters_of(asked: Any) -> list[Tensor]:
    """The parameters that a call about a model, or about pairs of modules and names, may be about.

    The same on all ranks, even where the call is about to fail on one of them. None where no process group
    is there.
    """
    if not has_ranks():
        return []
    if isinstance(asked, nn.Module):
        return parameters_at(
            (module, attribute) for module in asked.modules() for attribute in own_parameters(module)
        )
    return parameters_at(pair for pair in asked if _is_place(pair)) if isinstance(asked, Iterable) else []


def parameters_inside(module: Any) -> list[Tensor]:
    """Those of one module, without what is inside it; as :func:`parameters_of`."""
    if not has_ranks() or not isinstance(module, nn.Module):
        return []
    return parameters_at((module, attribute) for attribute in own_parameters(module))


def parameters_at(places: Places) -> list[Tensor]:
    """The parameters at places, masked or not; of gathered ones, what they are sharded as."""
    if not has_ranks():
        return []
    pairs = list(places)
    found = parameters_now([*pairs, *((module, attribute + "_orig") for module, attribute in pairs)])
    return [parameter for parameter in found if parameter is not None]


def parameters_now(places: Places) -> list[Tensor | None]:
    """What modules have registered as parameters; of gathered ones, what they are sharded as."""
    sharded = {(id(each.module), each.name): each.sharded for each in fsdp_parameters()}
    return [sharded.get((id(module), name), own_parameters(module).get(name)) for module, name in places]


def _is_place(pair: Any) -> bool:
    return (
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], nn.Module)
        and isinstance(pair[1], str)
    )
