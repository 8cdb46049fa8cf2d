"""Every private name of torch that is used: what it is for, and what to do when it goes.

No other file of the package says one. A name that is gone fails here, when lnprune is imported, or in the
tests on the newest torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune as _prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "WRAPPED_CHILDREN",
    "FsdpParameter",
    "NonDynamicallyQuantizableLinear",
    "OperatorMode",
    "base_of",
    "compute_norm",
    "compute_nparams_toprune",
    "foreach_mul_",
    "fsdp_parameters",
    "is_compiled",
    "is_mutable",
    "load_without_data",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "own_pre_hooks",
    "own_registries",
    "own_transient_buffers",
    "place_in_file",
    "projects_apart",
    "pruned_name",
    "pruning_methods",
    "registrations_are_watched",
    "set_pruned_name",
    "set_pruning_methods",
    "tree_leaves",
    "tree_map",
    "uses_fsdp",
    "validate_pruning_amount",
    "validate_pruning_amount_init",
    "validate_pruning_dim",
    "validate_structured_pruning",
    "written_arguments",
]

# What a module holds itself, by name. Pruning moves a parameter from one name to another, and puts all back
# in its old order when a call fails. The public methods for it (register_parameter, register_buffer) look
# names up with hasattr, which takes longer than a small layer, and know no order. Pickled modules hold
# these dicts under their names, so they stay or are converted. When they go: the public methods, and an
# undo that changes the order.
own_parameters: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter("_parameters")
own_buffers: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_buffers")
own_modules: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter("_modules")
# The names of buffers that no state dict holds; a mask is none of them.
own_transient_buffers: Callable[[nn.Module], set[str]] = attrgetter("_non_persistent_buffers_set")
# Forward pre-hooks by their keys. Torch's own prune.remove finds and deletes its hooks in this dict.
own_pre_hooks: Callable[[nn.Module], dict[Hashable, Any]] = attrgetter("_forward_pre_hooks")
# All of these that pruning changes, in one step.
own_registries: Callable[[nn.Module], tuple[Any, ...]] = attrgetter(
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_forward_pre_hooks"
)


def registrations_are_watched() -> bool:
    """Whether someone asked to be told of every parameter or buffer that any module registers.

    Then masks are registered by the module's methods, which tell. When these go: always by the methods.
    """
    return bool(_module._global_parameter_registration_hooks or _module._global_buffer_registration_hooks)


# The parameter that a pruning hook is for, by its name. Pickled modules hold their hooks with it. When it
# goes: what took its place, since without it nobody, torch's prune.remove included, can tell two hooks of a
# module apart.
pruned_name: Callable[[_prune.BasePruningMethod], str] = attrgetter("_tensor_name")


def set_pruned_name(hook: _prune.BasePruningMethod, attribute: str) -> None:
    """As ``BasePruningMethod.apply`` does for a hook that it has made."""
    hook._tensor_name = attribute


# The methods of a container, which it changes when one is added. A failed call puts them back.
# When they go: a container is replaced by a copy of what it was.
pruning_methods: Callable[[_prune.PruningContainer], Any] = attrgetter("_pruning_methods")


def set_pruning_methods(container: _prune.PruningContainer, methods: Any) -> None:
    """Puts back what :func:`pruning_methods` gave."""
    container._pruning_methods = methods


# Torch's checks of arguments, so that errors are torch's own in type and words, and its count of channels
# for an amount. When they go: copies of a few lines each, held to torch's by the tests against it.
validate_pruning_amount_init = _prune._validate_pruning_amount_init
validate_pruning_amount = _prune._validate_pruning_amount
validate_structured_pruning = _prune._validate_structured_pruning
validate_pruning_dim = _prune._validate_pruning_dim
compute_nparams_toprune = _prune._compute_nparams_toprune
# Torch's norms, bit for bit, for reference_ranking() and for what native code does not take.
# When it goes: torch.norm over all dims but one, which is its whole body.
compute_norm = _prune._compute_norm


# tree_leaves and tree_map: the tensors inside tuples, lists, dicts and what libraries registered, as the
# outputs of models. When they go: the package optree, which torch recommends, or a walk of our own.


class OperatorMode(TorchDispatchMode):
    """Sees every operator inside, below autograd. The class is documented, its module is not.

    When it goes: a function of autograd, which takes as long and stays in the model as a class of lnprune.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch's wrapper around __torch_dispatch__ would import the whole compiler on the first call.
        # When it goes, that import is what it costs.
        return False


# The tensor that a view looks into, or None. When it goes: a note of each tensor that an operation makes.
base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called. When it goes: what took its place."""
    return module._compiled_call_impl is not None


def is_mutable(operation: Any) -> bool:
    """Whether an operation writes to arguments. When it goes: whether its name ends in an underscore."""
    return operation._schema.is_mutable


def written_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to. When it goes: all of its arguments."""
    found: list[Any] = []
    for i, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, (list, tuple)) else [value]
    return [value for value in found if isinstance(value, Tensor)]


# Many products in one launch. When it goes: a loop.
foreach_mul_ = torch._foreach_mul_


def projects_apart(attention: nn.MultiheadAttention) -> bool:
    """Whether it has one weight each for queries, keys and values.

    When the attribute goes: whether its ``in_proj_weight`` is None.
    """
    return not getattr(attention, "_qkv_same_embed_dim", True)


# The names of the wrapped module in what torch.compile, checkpoint_wrapper and FSDP return. When one
# changes: the new name beside it, since models that were pickled have the old one.
WRAPPED_CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class FsdpParameter(NamedTuple):
    """A parameter that ``fully_shard`` keeps, at one of its places."""

    module: nn.Module
    name: str
    sharded: nn.Parameter  # the DTensor that it is, whatever the module holds now
    is_sharded: bool  # whether the module holds that


# What fully_shard keeps of a module: its parameters and whether they are gathered. No public call tells.
# When it goes: type(parameter), which tells of all that are gathered but those on a smaller mesh.
if torch.distributed.is_available():
    from torch.distributed._composable_state import _module_state_mapping as _states
else:
    _states = {}  # type: ignore[assignment]


def uses_fsdp() -> bool:
    """Whether a module in this process may be one of FSDP2."""
    return len(_states) > 0


def fsdp_parameters() -> Iterator[FsdpParameter]:
    """Every parameter that FSDP2 keeps in this process, at every module that shares it."""
    seen = set()
    for reference in list(_states.values()):
        state: Any = reference()
        if state is None or id(state) in seen:
            continue
        seen.add(id(state))
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch 2.11
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in () if group is None else group.fsdp_params:
                place = parameter._module_info
                is_sharded = parameter.sharded_state.name == "SHARDED"
                for module, name in (
                    (place.module, place.param_name),
                    *zip(place.shared_modules, place.shared_param_names, strict=True),
                ):
                    yield FsdpParameter(module, name, parameter.sharded_param, is_sharded)


def load_without_data(path: str) -> Any:
    """What torch.save wrote into an archive, where it is tensors and containers: tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(path, map_location="cpu", weights_only=True)


def place_in_file(tensor: Tensor) -> int | None:
    """Where the storage of a tensor from :func:`load_without_data` begins in its file, in bytes."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
