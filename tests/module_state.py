"""What pruning may change in a module: comparing two modules, and one module with itself before a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import lnprune

DEVICES = cases.DEVICES


def _compares_with_torch(n: Any) -> bool:
    try:
        return bool(stock._compute_norm(torch.ones(2, 2), n, 0).dim() == 1)
    except RuntimeError:
        return True
    except TypeError:
        return False


# The pruning of torch 2.15 refuses an order of None. Before, None is 2, and here it is with every torch.
NONE_IS_2 = _compares_with_torch(None)
ORDER_OF_NONE = [None] if NONE_IS_2 else []

_REGISTRIES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def bits(tensor: Tensor) -> Tensor | None:
    """A copy of the bytes of the elements in logical order, or None for tensors without data."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    values = tensor.detach().resolve_conj().resolve_neg()
    flat = values.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).cpu() if flat.numel() else torch.empty(0, dtype=torch.uint8)


def describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """Everything about a tensor but its bits."""
    return {
        "type": type(tensor),
        "dtype": tensor.dtype,
        "shape": tuple(tensor.shape),
        "strides": tensor.stride() if tensor.layout is torch.strided else None,
        "layout": tensor.layout,
        "device": tensor.device,
        "requires_grad": tensor.requires_grad,
        "is_leaf": tensor.is_leaf,
        "is_inference": tensor.is_inference(),
        "grad_fn": type(tensor.grad_fn).__name__,
    }


def assert_same_tensor(actual: Tensor, expected: Tensor, where: str, *, with_bits: bool = True) -> None:
    """Same type, layout, place in the autograd graph and, unless told otherwise, same bits."""
    assert describe_tensor(actual) == describe_tensor(expected), where
    if with_bits and bits(expected) is not None:
        assert torch.equal(bits(actual), bits(expected)), where


def _assert_same_value(actual: Any, expected: Any, where: str, skipped_bits: tuple[str, ...]) -> None:
    assert type(actual) is type(expected), where
    if isinstance(expected, Tensor):
        with_bits = where.rpartition(".")[2] not in skipped_bits
        assert_same_tensor(actual, expected, where, with_bits=with_bits)
    elif isinstance(expected, stock.BasePruningMethod):
        assert list(actual.__dict__) == list(expected.__dict__), where
        for key, value in expected.__dict__.items():
            _assert_same_value(actual.__dict__[key], value, f"{where}.hook.{key}", skipped_bits)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key, value in expected.items():
            _assert_same_value(actual[key], value, f"{where}.{key}", skipped_bits)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for position, value in enumerate(expected):
            _assert_same_value(actual[position], value, f"{where}[{position}]", skipped_bits)
    elif isinstance(expected, nn.Module):
        assert_same_state(actual, expected, skipped_bits=skipped_bits)
    elif isinstance(expected, set):
        assert actual == expected, where
    elif callable(expected):  # references and functions have no equality of their own
        pass
    else:
        assert actual == expected, where


def _aliases(module: nn.Module) -> list[tuple[str, str]]:
    """Which names stand for one and the same tensor, those inside lists included."""
    named: list[tuple[str, Tensor]] = []
    for key, value in {**module.__dict__, **module._parameters, **module._buffers}.items():
        values = enumerate(value) if isinstance(value, list) else [("", value)]
        named += [(f"{key}{at}", entry) for at, entry in values if isinstance(entry, Tensor)]
    return [(a, b) for a, left in named for b, right in named if a < b and left is right]


def assert_same_state(
    actual: nn.Module, expected: nn.Module, *, skipped_bits: tuple[str, ...] = ()
) -> None:
    """Fails unless two modules are in the same state, in order; bits under ``skipped_bits`` may differ."""
    assert type(actual) is type(expected)
    assert list(actual.state_dict()) == list(expected.state_dict())
    for get in ("named_parameters", "named_buffers", "named_modules"):
        assert [key for key, _ in getattr(actual, get)()] == [key for key, _ in getattr(expected, get)()]
    for registry in _REGISTRIES:
        assert len(getattr(actual, registry)) == len(getattr(expected, registry)), registry
    assert set(actual.__dict__) == set(expected.__dict__)
    own = [key for key in expected.__dict__ if key not in _REGISTRIES]
    assert [key for key in actual.__dict__ if key not in _REGISTRIES] == own
    for key in own:
        _assert_same_value(actual.__dict__[key], expected.__dict__[key], key, skipped_bits)
    for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        _assert_same_value(getattr(actual, registry), getattr(expected, registry), registry, skipped_bits)
    hooks = zip(actual._forward_pre_hooks.values(), expected._forward_pre_hooks.values(), strict=True)
    for actual_hook, expected_hook in hooks:
        _assert_same_value(actual_hook, expected_hook, "_forward_pre_hooks", skipped_bits)
    assert _aliases(actual) == _aliases(expected)


class Snapshot:
    """A module's content by identity and order, its tensors' bits, and its hooks' attributes."""

    def __init__(self, module: nn.Module):
        self.content = _content(module)
        self.tensors = [
            (value, describe_tensor(value), value.grad_fn, bits(value))
            for value in _tensors(module)
            if not isinstance(value, nn.parameter.UninitializedTensorMixin)
        ]
        self.state_keys = list(module.state_dict())


def _content(module: nn.Module) -> list[tuple[str, list]]:
    """Every container of the module as (key, value) lists; the values are compared by identity."""
    content = [("module", list(module.__dict__.items()))]
    for key, value in module.__dict__.items():
        if isinstance(value, dict):
            content.append((key, list(value.items())))
        elif isinstance(value, list):
            content.append((key, list(enumerate(value))))
        elif isinstance(value, set):
            content.append((key, [(entry, None) for entry in sorted(value)]))
    for position, hook in enumerate(module._forward_pre_hooks.values()):
        if isinstance(hook, stock.BasePruningMethod):
            content.append((f"hook {position}", list(hook.__dict__.items())))
            for inner in hook if isinstance(hook, stock.PruningContainer) else ():
                content.append((f"hook in {position}", list(inner.__dict__.items())))
    return content


def _tensors(module: nn.Module) -> list[Tensor]:
    values = [*module.__dict__.values(), *module._parameters.values(), *module._buffers.values()]
    return [value for value in values if isinstance(value, Tensor)]


def assert_unchanged(module: nn.Module, snapshot: Snapshot) -> None:
    """Fails unless the module holds the very objects of the snapshot, in the same order, unchanged."""
    content = _content(module)
    assert [name for name, _ in content] == [name for name, _ in snapshot.content]
    for (name, now), (_, before) in zip(content, snapshot.content, strict=True):
        assert [key for key, _ in now] == [key for key, _ in before], name
        for (key, value), (_, old) in zip(now, before, strict=True):
            assert value is old, f"{name}: {key}"
    for tensor, description, grad_fn, old_bits in snapshot.tensors:
        assert describe_tensor(tensor) == description
        assert tensor.grad_fn is grad_fn
        assert old_bits is None or torch.equal(bits(tensor), old_bits)
    assert list(module.state_dict()) == snapshot.state_keys


Make = Callable[[], nn.Module]
Prune = Callable[[Any, nn.Module], Any]


def attempt(make: Make, prune_with: Prune, library: Any, seed: int) -> tuple[nn.Module, Exception | None]:
    """A fresh module that ``prune_with(library, module)`` has pruned, or the exception it raised."""
    torch.manual_seed(seed)
    module = make()
    snapshot = Snapshot(module)
    try:
        prune_with(library, module)
    except Exception as error:
        if library is lnprune:
            assert_unchanged(module, snapshot)
        return module, error
    return module, None


def assert_same_error(actual: Exception | None, expected: Exception | None) -> None:
    """Both None, or of one type with one message."""
    assert (type(actual), str(actual)) == (type(expected), str(expected))


def assert_same_outcome(
    make: Make, prune_with: Prune, *, skipped_bits: tuple[str, ...] = (), raises: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Runs torch and lnprune on equal modules; fails unless both leave one state, or raise one error."""
    seed = int(torch.randint(2**31, ()))
    expected, expected_error = attempt(make, prune_with, stock, seed)
    actual, actual_error = attempt(make, prune_with, lnprune, seed)
    assert_same_error(actual_error, expected_error)
    assert (expected_error is not None) == raises
    if not raises:
        assert_same_state(actual, expected, skipped_bits=skipped_bits)
    return actual, expected


def exact_norms(tensor: Tensor, n: Any, dim: int) -> Tensor:
    """Channel norms in float64, by torch."""
    others = [d for d in range(tensor.dim()) if d != dim % tensor.dim()]
    order = 2.0 if n is None or n == "fro" else float(n)
    return torch.linalg.vector_norm(tensor.detach().double(), ord=order, dim=others)


def assert_optimal(keep: Tensor, norms: Tensor, pruned: int, taking_part: Tensor | None = None) -> None:
    """Fails unless the flags prune ``pruned`` channels of those that take part, none above a kept one."""
    taking_part = torch.ones_like(keep) if taking_part is None else taking_part
    assert not (keep & ~taking_part).any()
    lost = taking_part & ~keep
    assert int(lost.sum()) == pruned
    ranks = norms.nan_to_num(nan=float("inf"), posinf=float("inf"))
    if lost.any() and keep.any():
        best_lost, worst_kept = ranks[lost].max(), ranks[keep].min()
        assert best_lost <= worst_kept * (1 + 1e-12)


def kept_channels(mask: Tensor, dim: int) -> Tensor:
    """Which channels of a mask hold anything but zeros."""
    others = [d for d in range(mask.dim()) if d != dim % mask.dim()]
    return (mask.to(torch.float32) != 0).sum(dim=others) != 0


def twins(make: Make) -> tuple[nn.Module, nn.Module]:
    """Two equal modules, by the same random numbers."""
    seed = int(torch.randint(2**31, ()))
    pair = []
    for _ in range(2):
        torch.manual_seed(seed)
        pair.append(make())
    return pair[0], pair[1]


class ModelSnapshot:
    """A :class:`Snapshot` of every module in a model."""

    def __init__(self, model: nn.Module):
        self.parts = [(module, Snapshot(module)) for module in model.modules()]

    def assert_unchanged(self) -> None:
        """Fails unless every module holds the very objects that it held, in the same order, unchanged."""
        for module, snapshot in self.parts:
            assert_unchanged(module, snapshot)
