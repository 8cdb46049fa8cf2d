"""ln_structured, LnStructured, channel_norms, channel_mask: the drop-in, a list of one."""

from __future__ import annotations

import copyreg
import operator
from typing import Any

import torch.nn.utils.prune as stock
from torch import Tensor, nn
from torch.nn.utils.prune import LnStructured as StockLnStructured

from lnprune.modules.application import install
from lnprune.modules.masked import parameter_of
from lnprune.modules.registration import Target, check_not_in_inference_mode
from lnprune.modules.sharded import parameters_inside
from lnprune.modules.transaction import Snapshot, Transaction
from lnprune.steps import masks, norms
from lnprune.steps.flags import Amount, keep_flags, pruned_count
from lnprune.steps.norms import Order
from lnprune.steps.sharding import Agreement, has_ranks
from lnprune.torch_internals import (
    validate_pruning_amount_init,
    validate_pruning_dim,
    validate_structured_pruning,
)


def check_dim_is_no_word(dim: Any) -> None:
    """Names the calls that know what ``"out"`` and ``"in"`` are."""
    if isinstance(dim, str) and dim in ("out", "in"):
        raise TypeError(
            f"dim={dim!r} is a word of rank, local_structured and global_structured, which know the types "
            "of modules: expected a number here"
        )


def apply(
    module: nn.Module, name: str, amount: Amount, n: Any, dim: int, importance_scores: Tensor | None
) -> Any:
    """``BasePruningMethod.apply`` for Ln norms: all of it, or, where it raises, nothing."""
    check_dim_is_no_word(dim)
    target = Target("", module, name, dim, amount, None, importance_scores)
    with Transaction() as transaction:
        if has_ranks():
            with Agreement(parameters_inside(module)) as agreement:
                agreement.confirm("ln_structured", name, amount, n, dim, importance_scores)
        return install(transaction, [target], n)[0].method


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
    Called again, it prunes among the channels whose mask is not all zero yet, and ranks, as torch does, the
    attribute ``name`` as the last forward left it: after ``load_state_dict`` or an optimizer's step,
    :func:`renew_masked` or a forward renews it. :func:`rank` measures the values of now.

    Norms are summed in float64 for every dtype. NaN ranks highest, then the larger norm, then the lower
    index; :func:`reference_ranking` ranks as torch does instead.

    As with torch, a weight whose module is never called must not get a mask, since no hook would renew it:
    that of ``nn.MultiheadAttention.out_proj``. Whole-model calls refuse such masks.

    Args:
        module: the module to prune.
        name: the name of a parameter with two dims or more, on any device. Real floating-point
            parameters on the CPU and on CUDA take the native path, others plain torch. Of a sharded one
            (DTensor), which all ranks prune by the same call, mask and weight are DTensors too.
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
    apply(module, name, amount, n, dim, importance_scores)
    return module


class LnStructured(StockLnStructured):
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
        >>> method
        LnStructured(amount=1, n=2, dim=0)
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
        return True if cls is LnStructured and StockLnStructured in other.__mro__ else NotImplemented

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
        return masks.compute_mask(self, t, default_mask)

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
            return apply(module, name, amount, n, dim, importance_scores)
        snapshot = Snapshot(module)
        check_not_in_inference_mode(parameter_of(module, name))
        try:
            return super().apply(module, name, amount, n, dim, importance_scores)
        except BaseException:
            snapshot.restore()
            raise

    def __repr__(self) -> str:
        return f"{type(self).__name__}(amount={self.amount!r}, n={self.n!r}, dim={self.dim!r})"

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
        float64 norms of shape ``(tensor.shape[dim],)``, without gradient, on the tensor's device, or on the
        CPU where that has no float64. A slice with a NaN has the norm NaN, but for ``n = 0``, where NaN
        counts as not zero.

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
    if has_ranks():
        with Agreement([tensor]) as agreement:
            _check_slices(tensor, dim)
            agreement.confirm("channel_norms", n, dim, tensor)
    _check_slices(tensor, dim)
    return norms.channel_norms([tensor], n, [operator.index(dim)])[0]


def _check_slices(tensor: Tensor, dim: int) -> None:
    """Raises where the tensor has no slices along ``dim``."""
    check_dim_is_no_word(dim)
    validate_structured_pruning(tensor)
    validate_pruning_dim(tensor, dim)
    tensor.shape[dim]  # raises where dim is below the range


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
    if has_ranks():
        with Agreement([tensor]) as agreement:
            _checked_count(tensor, amount, dim)
            agreement.confirm("channel_mask", n, dim, amount, tensor)
    return keep_flags(tensor, n, dim, [_checked_count(tensor, amount, dim)])


def _checked_count(tensor: Tensor, amount: Amount, dim: int) -> int:
    """How many channels to prune."""
    check_dim_is_no_word(dim)
    validate_pruning_amount_init(amount)
    return pruned_count(tensor, amount, dim)
