"""ln_structured and LnStructured: validation, the choice of a path, and the mask by it."""

from __future__ import annotations

import copyreg
import operator
import sys
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock
from torch.nn.utils.prune import LnStructured as _StockLnStructured  # whatever patch() does to the module

from lnprune import ops, reference
from lnprune.registration import Pruning, Snapshot, masked

__all__ = [
    "LnStructured",
    "can_fuse",
    "channel_mask",
    "channel_norms",
    "contiguous_mask",
    "ln_mask",
    "ln_structured",
    "native_order",
    "pruned_count",
]

Amount = Union[int, float]
Order = Union[int, float, str, None]

# From this many bytes on, on the CPU, a masked weight written together with its mask saves more than it
# costs to hand it to autograd. On CUDA it saves a launch.
_FUSED_BYTES = 1 << 20


def native_order(n: Any) -> float | None:
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
        return native_order(float(n))
    except (TypeError, RuntimeError, ValueError):
        return None


def pruned_count(tensor: Tensor, amount: Amount, dim: int) -> int:
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
    p = native_order(n)
    if p is not None and ops.is_native(scores):
        norms = ops.channel_norms([scores], [dim], p)
        return ops.select_channels(norms, [], [count], [0.0])[0]
    return reference.keep_channels(reference.channel_norms(scores, n, dim), count)


def _check_order(scores: Tensor, n: Any, dim: int) -> None:
    """Raises what the norm would raise, for calls that prune nothing and so need no norm."""
    if reference.ranks_like_torch():
        stock._compute_norm(scores.detach(), n, dim)
    elif native_order(n) is None or not ops.is_native(scores):
        reference.channel_norms(scores, n, dim)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride())


def _has_standard_strides(tensor: Tensor) -> bool:
    """Whether the strides are those of a fresh contiguous tensor, in dims of size 1 too."""
    if 1 not in tensor.shape:
        return tensor.is_contiguous()
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def contiguous_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
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


def can_fuse(layout: Tensor, original: Tensor) -> bool:
    """Whether the native code can write the weight together with a mask of this layout."""
    return (
        ops.are_native(layout, original)
        and _same_layout(layout, original)
        and _product_keeps_strides(original)
    )


def _fused_original(layout: Tensor, original: Tensor) -> list[Tensor]:
    """The original as the write step takes it, if the weight is worth writing there."""
    worth = original.is_cuda or original.numel() * original.element_size() >= _FUSED_BYTES
    return [original] if worth and can_fuse(layout, original) else []


def _first_mask(
    scores: Tensor, original: Tensor, amount: Amount, n: Any, dim: int
) -> tuple[Tensor, list[Tensor]]:
    """The mask of a first pruning, and the masked weight where the native code made it too."""
    if not ops.are_native(scores, original):
        # Before the checks, as in torch: what cannot have a mask of ones fails here.
        ones = torch.ones_like(original, requires_grad=False)
        method = LnStructured(amount, n, dim)
        return method.compute_mask(scores, ones), []
    count = pruned_count(scores, amount, dim)
    if count == 0:
        _check_order(scores, n, dim)
        return torch.ones_like(original, requires_grad=False), []
    dim = operator.index(dim)
    originals = _fused_original(scores, original)
    p = None if reference.ranks_like_torch() else native_order(n)
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
    p = None if reference.ranks_like_torch() else native_order(n)
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

    mask = contiguous_mask(old_mask, scores.dtype)
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


def ln_mask(pruning: Pruning) -> tuple[Tensor, list[Tensor]]:
    """The new mask by an ``LnStructured``, and the masked weight where the native code made it too."""
    new = pruning.new
    if pruning.old_mask is None:
        return _first_mask(pruning.scores, pruning.original, new.amount, new.n, new.dim)
    if pruning.combines_as_torch():
        return _repeated_mask(
            pruning.scores, pruning.old_mask, pruning.original, new.amount, new.n, new.dim
        )
    default_mask = pruning.old_mask.detach().clone(memory_format=torch.contiguous_format)
    return pruning.method.compute_mask(pruning.scores, default_mask=default_mask), []


def _install(
    module: nn.Module,
    name: str,
    amount: Amount,
    n: Any,
    dim: int,
    importance_scores: Tensor | None,
) -> Any:
    """``BasePruningMethod.apply`` for Ln norms: all of it, or, where it raises, nothing."""
    snapshot = Snapshot(module)
    try:
        pruning = Pruning(module, name, lambda: _StockLnStructured(amount, n, dim), importance_scores)
        mask, products = ln_mask(pruning)
        pruning.finish(mask, masked(mask, pruning.original, products))
    except BaseException:
        snapshot.restore()
        raise
    return pruning.method


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


class LnStructured(_StockLnStructured):
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

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        # The hooks that apply() installs, torch's, are instances of this class too.
        return True if cls is LnStructured and _StockLnStructured in other.__mro__ else NotImplemented

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
        count = pruned_count(t, self.amount, self.dim)
        if count == 0:
            _check_order(t, self.n, self.dim)
            return default_mask
        keep = _keep_flags(t, self.n, self.dim, count)
        if ops.are_native(t, default_mask) and _has_standard_strides(t) and default_mask.shape == t.shape:
            mask = contiguous_mask(default_mask, t.dtype)
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
        snapshot = Snapshot(module)
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
    p = native_order(n)
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
    count = pruned_count(tensor, amount, dim)
    return _keep_flags(tensor, n, dim, count)
