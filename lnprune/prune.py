"""ln_structured and LnStructured: validation, the choice of a path, registration, and rollback."""

from __future__ import annotations

import copyreg
import operator
import sys
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock
from torch.utils._python_dispatch import TorchDispatchMode

from lnprune import ops, reference

__all__ = ["LnStructured", "channel_mask", "channel_norms", "ln_structured"]

Amount = Union[int, float]
Order = Union[int, float, str, None]

# From this many bytes on, on the CPU, a masked weight written together with its mask saves more than it
# costs to hand it to autograd. On CUDA it saves a launch.
_FUSED_BYTES = 1 << 20


def _native_order(n: Any) -> float | None:
    """The order of the norm as a float, or None where plain torch is to judge it."""
    if type(n) is float or type(n) is int or isinstance(n, bool):
        try:
            p = float(n)
        except OverflowError:
            return None
        # NaN, and orders so small that their inverse is not finite, are left to torch.
        return p if p == 0 or abs(p) > sys.float_info.min else None
    if n is None or (isinstance(n, str) and n == "fro"):
        return 2.0
    if isinstance(n, str | complex):
        return None
    try:  # numpy scalars and 0-d tensors, where torch takes them
        torch.norm(torch.ones(1), p=n, dim=[0])
        return _native_order(float(n))
    except (TypeError, RuntimeError, ValueError):
        return None


def _pruned_count(tensor: Tensor, amount: Amount, dim: int) -> int:
    """How many channels to prune, after the reference's checks in the reference's order."""
    if tensor.dim() < 2:
        stock._validate_structured_pruning(tensor)
    stock._validate_pruning_dim(tensor, dim)
    channels = tensor.shape[dim]
    if type(amount) is float:
        return round(amount * channels)
    count = stock._compute_nparams_toprune(amount, channels)
    stock._validate_pruning_amount(count, channels)
    return int(count)


def _keep_flags(scores: Tensor, n: Any, dim: int, count: int) -> Tensor:
    """Rank and select: bool keep flags of shape ``(channels,)``."""
    if reference.ranks_like_torch():
        return reference.torch_keep_channels(scores, n, dim, count)
    p = _native_order(n)
    if p is not None and ops.is_native(scores):
        norms = ops.channel_norms([scores], [dim], p)
        return ops.select_channels(norms, [], [count], [0.0])[0]
    return reference.keep_channels(reference.channel_norms(scores, n, dim), count)


def _check_order(scores: Tensor, n: Any, dim: int) -> None:
    """Raises what the norm would raise, for calls that prune nothing and so need no norm."""
    if reference.ranks_like_torch():
        stock._compute_norm(scores.detach(), n, dim)
    elif _native_order(n) is None or not ops.is_native(scores):
        reference.channel_norms(scores, n, dim)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride())


def _has_standard_strides(tensor: Tensor) -> bool:
    """Whether the strides are those of a fresh contiguous tensor, in dims of size 1 too."""
    if 1 not in tensor.shape:
        return tensor.is_contiguous()
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _contiguous(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in a dtype, with the strides that a clone in contiguous format has."""
    mask = mask.detach().to(dtype)
    return mask if _has_standard_strides(mask) else mask.clone(memory_format=torch.contiguous_format)


def _product_keeps_strides(original: Tensor) -> bool:
    """Whether torch's ``mask * original``, of two tensors with these strides, has them as well."""
    if _has_standard_strides(original):
        return True
    # empty_like keeps the strides of dense tensors, and of no others; a product recomputes those of
    # dims of size 1.
    return (
        1 not in original.shape and original.stride() == torch.empty_like(original, device="meta").stride()
    )


def _fused_original(layout: Tensor, original: Tensor) -> list[Tensor]:
    """The original as the write step takes it, if the weight is worth writing there."""
    worth = (
        (original.is_cuda or original.numel() * original.element_size() >= _FUSED_BYTES)
        and ops.are_native(layout, original)
        and _same_layout(layout, original)
        and _product_keeps_strides(original)
    )
    return [original] if worth else []


def _first_mask(
    scores: Tensor, original: Tensor, amount: Amount, n: Any, dim: int
) -> tuple[Tensor, list[Tensor]]:
    """The mask of a first pruning, and the masked weight where the native code made it too."""
    if not ops.are_native(scores, original):
        # Before the checks, as in torch: what cannot have a mask of ones fails here.
        ones = torch.ones_like(original, requires_grad=False)
        method = LnStructured(amount, n, dim)
        return method.compute_mask(scores, ones), []
    count = _pruned_count(scores, amount, dim)
    if count == 0:
        _check_order(scores, n, dim)
        return torch.ones_like(original, requires_grad=False), []
    dim = operator.index(dim)
    originals = _fused_original(scores, original)
    p = None if reference.ranks_like_torch() else _native_order(n)
    if p is None:
        keep = _keep_flags(scores, n, dim, count)
        masks, weights = ops.write_masks([keep], [scores], [], originals, [dim])
    else:
        masks, weights = ops.prune_channels([scores], [], originals, [dim], p, [count], [0.0])
    return masks[0], weights


def _repeated_mask(
    scores: Tensor, old_mask: Tensor, original: Tensor, amount: Amount, n: Any, dim: int
) -> tuple[Tensor, list[Tensor]]:
    """The mask of a repeated pruning, over the channels that are not all zero yet."""
    p = None if reference.ranks_like_torch() else _native_order(n)
    dims = scores.dim()
    if (
        p is None
        or dims < 2
        or type(dim) is not int
        or not -dims <= dim < dims
        or not ops.are_native(scores, old_mask)
        or old_mask.shape != scores.shape
    ):
        method = LnStructured(amount, n, dim)
        method._tensor_name = ""  # the container asks only that its methods agree
        container = stock.PruningContainer(method)
        default_mask = old_mask.detach().clone(memory_format=torch.contiguous_format)
        return container.compute_mask(scores, default_mask), []

    mask = _contiguous(old_mask, scores.dtype)
    if type(amount) is float and amount == amount:
        count, fraction = -1, amount
    else:
        counts = ops.channel_norms([mask], [dim], 0.0)[0]
        alive = int(torch.count_nonzero(counts))
        count, fraction = stock._compute_nparams_toprune(amount, alive), 0.0
        stock._validate_pruning_amount(count, alive)
    originals = _fused_original(mask, original)
    masks, weights = ops.prune_channels([scores], [mask], originals, [dim], p, [int(count)], [fraction])
    return masks[0], weights


class _Product(TorchDispatchMode):
    """Answers the one multiplication inside with a product that is at hand.

    Autograd, above the dispatch mode, records the stock MulBackward0 all the same.
    """

    def __init__(self, product: Tensor):
        super().__init__()
        self.product = product

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch's wrapper around __torch_dispatch__ would import the whole compiler on the first call.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.mul.Tensor:
            return self.product
        return func(*args, **(kwargs or {}))


def _masked(mask: Tensor, original: Tensor, products: list[Tensor]) -> Tensor:
    """``mask.to(original.dtype) * original``, differentiable in the original."""
    if not products:
        return (mask if mask.dtype == original.dtype else mask.to(original.dtype)) * original
    if not (original.requires_grad and torch.is_grad_enabled()):
        return products[0]
    with _Product(products[0]):
        return mask * original


class _Snapshot:
    """What a pruning call may change in a module, to put it back when the call fails."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = attributes = module.__dict__.copy()
        self.parameters = attributes["_parameters"].copy()
        self.buffers = attributes["_buffers"].copy()
        self.transient = attributes["_non_persistent_buffers_set"].copy()
        self.hooks = attributes["_forward_pre_hooks"].copy()
        # Lists of parameters that a module of its own __setattr__ keeps beside them, as an RNN does.
        self.lists: list[tuple[list, list]] = []
        if type(module).__setattr__ is not nn.Module.__setattr__:
            self.lists = [(v, v.copy()) for v in attributes.values() if type(v) is list]
        self.methods: list[tuple[stock.PruningContainer, Any]] = [
            (hook, hook._pruning_methods)
            for hook in self.hooks.values()
            if isinstance(hook, stock.PruningContainer)
        ]

    def restore(self) -> None:
        attributes = self.attributes
        self.module.__dict__.clear()
        self.module.__dict__.update(attributes)
        for name, content in (
            ("_parameters", self.parameters),
            ("_buffers", self.buffers),
            ("_non_persistent_buffers_set", self.transient),
            ("_forward_pre_hooks", self.hooks),
        ):
            attributes[name].clear()
            attributes[name].update(content)
        for value, content in self.lists:
            value[:] = content
        for hook, pruning_methods in self.methods:
            hook._pruning_methods = pruning_methods


def _detach_hook(module: nn.Module, name: str) -> stock.BasePruningMethod | None:
    """Removes the parameter's pruning hook, if any, and returns it."""
    if not module._forward_pre_hooks:
        return None
    found = [
        (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, stock.BasePruningMethod) and hook._tensor_name == name
    ]
    if len(found) > 1:
        raise AssertionError(
            f"Avoid adding multiple pruning hooks to the "
            f"same tensor {name} of module {module}. Use a PruningContainer."
        )
    for key, hook in found:
        del module._forward_pre_hooks[key]
        return hook
    return None


def _install(
    module: nn.Module,
    name: str,
    amount: Amount,
    n: Any,
    dim: int,
    importance_scores: Tensor | None,
) -> Any:
    """``BasePruningMethod.apply`` for Ln norms, in its order of steps, so in its order of errors."""
    snapshot = _Snapshot(module)
    try:
        old = _detach_hook(module, name)
        new = stock.LnStructured(amount, n, dim)
        new._tensor_name = name
        method: Any = new
        if old is not None:
            method = old if isinstance(old, stock.PruningContainer) else stock.PruningContainer(old)
            method.add_pruning_method(new)
        current = module._parameters.get(name)
        if current is None:
            current = getattr(module, name)
        scores = current if importance_scores is None else importance_scores
        if importance_scores is not None and scores.shape != current.shape:
            raise AssertionError(
                f"importance_scores should have the same shape as parameter "
                f"{name} of {module}, got {scores.shape} vs {current.shape}"
            )
        if old is None:
            original = current
            module.register_parameter(name + "_orig", original)
            del module._parameters[name]
            mask, products = _first_mask(scores, original, amount, n, dim)
        else:
            old_mask = getattr(module, name + "_mask")
            original = getattr(module, name + "_orig")
            if type(method) is stock.PruningContainer:
                mask, products = _repeated_mask(scores, old_mask, original, amount, n, dim)
            else:  # a user's container combines masks its own way
                default_mask = old_mask.detach().clone(memory_format=torch.contiguous_format)
                mask, products = method.compute_mask(scores, default_mask=default_mask), []
        module.register_buffer(name + "_mask", mask)
        setattr(module, name, _masked(mask, original, products))
        module.register_forward_pre_hook(method)
    except BaseException:
        snapshot.restore()
        raise
    return method


def ln_structured(
    module: nn.Module,
    name: str,
    amount: Amount,
    n: Order,
    dim: int,
    importance_scores: Tensor | None = None,
) -> nn.Module:
    """Prunes the channels of a parameter with the smallest L\\ ``n`` norms along ``dim``.

    Does what :func:`torch.nn.utils.prune.ln_structured` does and leaves the module in the same state:
    the parameter moves to ``name + "_orig"``, the buffer ``name + "_mask"`` holds ones and zeros of the
    parameter's shape and dtype, the attribute ``name`` is their product with gradient flowing to
    ``name + "_orig"``, and a ``torch.nn.utils.prune.LnStructured`` hook renews it before every forward.
    Called again, it prunes among the channels whose mask is not all zero yet.

    Norms are summed in float64 for every dtype. NaN ranks highest, then the larger norm, then the lower
    index; :func:`reference_ranking` ranks as torch does instead.

    Args:
        module: the module to prune.
        name: the name of a parameter with two dims or more, on any device. Real floating-point
            parameters on the CPU and on CUDA take the native path, others plain torch.
        amount: channels to prune, an int, or the share of the channels, a float in [0, 1], rounded half
            to even.
        n: the order of the norm: any real number, ``inf``, ``-inf``, ``None`` or ``'fro'`` (both 2), or,
            where slices are matrices, ``'nuc'``.
        dim: the dim of the channels.
        importance_scores: a tensor of the parameter's shape that is ranked in its place.

    Returns:
        ``module``, changed in place.

    Raises:
        AttributeError: the module has no such attribute.
        TypeError: the attribute is no parameter, or ``amount`` is no real number.
        ValueError: ``amount`` is out of range, or the parameter has fewer than two dims.
        IndexError: ``dim`` is out of range.
        AssertionError: ``importance_scores`` has another shape.
        RuntimeError: ``n`` is no order of a norm for this parameter.

        After an error, the module is as it was.

    Example:
        >>> import lnprune
        >>> import torch
        >>> module = torch.nn.Conv2d(5, 3, 2)
        >>> _ = lnprune.ln_structured(module, "weight", amount=1, n=float("-inf"), dim=1)
        >>> [key for key, _ in module.named_buffers()]
        ['weight_mask']
        >>> int((module.weight_mask.sum(dim=(0, 2, 3)) == 0).sum())
        1

    The definition is that of :func:`torch.nn.utils.prune.ln_structured`.
    """
    _install(module, name, amount, n, dim, importance_scores)
    return module


class LnStructured(stock.LnStructured):
    """:class:`torch.nn.utils.prune.LnStructured` with native ``apply``, ``prune`` and ``compute_mask``.

    Usable wherever torch takes a ``BasePruningMethod``, in a ``PruningContainer`` too, and subclassable.
    Instances of this class itself pickle, and deep-copy, as torch's class, so that a model that holds one
    loads where lnprune is absent; ``apply`` installs torch's class.

    Args:
        amount: channels to prune, an int, or the share of the channels, a float in [0, 1].
        n: the order of the norm, as for :func:`ln_structured`.
        dim: the dim of the channels.

    Example:
        >>> import lnprune
        >>> import torch
        >>> method = lnprune.LnStructured(amount=1, n=2, dim=0)
        >>> method.prune(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[0., 0.],
                [3., 4.]])
    """

    amount: Amount
    n: Any
    dim: int

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask that zeroes the last-ranking channels of ``t``, on top of ``default_mask``.

        Args:
            t: scores, at least two dims.
            default_mask: a mask of the shape of ``t``, on the same device.

        Returns:
            ``default_mask`` itself if nothing is to be pruned, else a mask of the dtype and memory format
            of ``torch.zeros_like(t)``.

        Raises:
            As :func:`ln_structured`.
        """
        count = _pruned_count(t, self.amount, self.dim)
        if count == 0:
            _check_order(t, self.n, self.dim)
            return default_mask
        keep = _keep_flags(t, self.n, self.dim, count)
        if ops.are_native(t, default_mask) and _has_standard_strides(t) and default_mask.shape == t.shape:
            mask = _contiguous(default_mask, t.dtype)
            return ops.write_masks([keep], [t], [mask], [], [operator.index(self.dim)])[0][0]
        return reference.write_mask(keep, t, default_mask, self.dim)

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: Amount,
        n: Order,
        dim: int,
        importance_scores: Tensor | None = None,
    ) -> stock.BasePruningMethod:
        """Prunes as :func:`ln_structured` does and returns the hook that was installed."""
        if cls is LnStructured:
            return _install(module, name, amount, n, dim, importance_scores)
        snapshot = _Snapshot(module)
        try:
            return super().apply(module, name, amount, n, dim, importance_scores)
        except BaseException:
            snapshot.restore()
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is LnStructured:
            # Unpickled by the standard library and torch alone.
            rebuild = copyreg._reconstructor  # type: ignore[attr-defined]
            return rebuild, (stock.LnStructured, object, None), self.__dict__
        return super().__reduce_ex__(protocol)


def channel_norms(tensor: Tensor, n: Order, dim: int) -> Tensor:
    """The L\\ ``n`` norm of every slice of ``tensor`` along ``dim``, summed in float64.

    Args:
        tensor: two dims or more, any floating-point or complex dtype, any layout.
        n: the order of the norm, as for :func:`ln_structured`.
        dim: the dim of the channels.

    Returns:
        float64 norms of shape ``(tensor.shape[dim],)``, on the tensor's device, without gradient. A slice
        with a NaN has the norm NaN, but for ``n = 0``, where NaN counts as not zero.

    Raises:
        ValueError: ``tensor`` has fewer than two dims.
        IndexError: ``dim`` is out of range.
        RuntimeError: ``n`` is no order of a norm for this tensor.

    Example:
        >>> import lnprune
        >>> import torch
        >>> lnprune.channel_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), n=2, dim=0)
        tensor([5., 1.], dtype=torch.float64)

    The definition is that of :func:`torch.linalg.vector_norm`.
    """
    stock._validate_structured_pruning(tensor)
    stock._validate_pruning_dim(tensor, dim)
    tensor.shape[dim]  # raises where dim is below the range
    p = _native_order(n)
    if p is not None and ops.is_native(tensor):
        return ops.channel_norms([tensor], [operator.index(dim)], p)[0]
    return reference.channel_norms(tensor, n, dim)


def channel_mask(tensor: Tensor, amount: Amount, n: Order, dim: int) -> Tensor:
    """Which channels of ``tensor`` stay when ``amount`` of them, the last-ranking ones, are pruned.

    Args:
        tensor: two dims or more, any floating-point or complex dtype, any layout.
        amount: channels to prune, an int, or the share of the channels, a float in [0, 1].
        n: the order of the norm, as for :func:`ln_structured`.
        dim: the dim of the channels.

    Returns:
        bool keep flags of shape ``(tensor.shape[dim],)``, on the tensor's device.

    Raises:
        As :func:`ln_structured`.

    Example:
        >>> import lnprune
        >>> import torch
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
        >>> lnprune.channel_mask(weight, amount=1, n=2, dim=0)
        tensor([ True, False,  True])
    """
    stock._validate_pruning_amount_init(amount)
    count = _pruned_count(tensor, amount, dim)
    return _keep_flags(tensor, n, dim, count)
