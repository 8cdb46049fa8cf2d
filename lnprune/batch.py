"""Pruning many parameters at once: all of them, or, where one raises, none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lnprune import ops, reference
from lnprune.prune import can_fuse, contiguous_mask
from lnprune.registration import Pruning, Snapshot, masked, masked_all, unregister

__all__ = [
    "Transaction",
    "bake",
    "finish_all",
    "flag_masks",
    "fuse",
    "is_writable",
    "takes_zeros",
    "to_devices",
    "zero",
]

# From this mean size on, on the CPU, masked weights of a list are worth writing together with their
# masks: what each then costs to hand to autograd is less than a second pass.
_FUSED_MEAN_BYTES = 1 << 17

Result = tuple[Tensor, list[Tensor]]


class Transaction:
    """Puts modules, and values noted before they are overwritten, back when its block raises."""

    def __init__(self) -> None:
        self._snapshots: dict[int, Snapshot] = {}
        self.values: list[Values] = []

    def touch(self, module: nn.Module) -> None:
        """To be called before a module is changed."""
        if id(module) not in self._snapshots:
            self._snapshots[id(module)] = Snapshot(module)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None:
            for snapshot in self._snapshots.values():
                snapshot.restore()
            for values in self.values:
                values.restore()


class Values:
    """What a tensor holds, or some of its channels, and the way back, bit for bit."""

    def __init__(self, tensor: Tensor, dim: int | None = None, channels: Tensor | None = None):
        self.tensor, self.dim, self.channels = tensor, dim, channels
        self.data = tensor.data  # where the values lie, should the tensor be given others
        self.bits: Tensor | None = None
        if dim is not None:
            self.bits = _bits(self.data).index_select(dim, channels)  # type: ignore[arg-type]
        elif _multiplies_in_place(tensor):
            self.bits = _bits(self.data).clone()

    def restore(self) -> None:
        self.tensor.data = self.data
        if self.bits is None:
            return
        if self.dim is None:
            _bits(self.data).copy_(self.bits)
        else:
            _bits(self.data).index_copy_(self.dim, self.channels, self.bits)  # type: ignore[arg-type]
        increment_version(self.tensor)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, which copy in any dtype and without a change of any bit."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds.get(tensor.element_size())
    lazy = tensor.is_conj() or tensor.is_neg()
    return tensor if kind is None or lazy else tensor.view(kind)


def fuse(groups: list[Pruning], layouts: list[Tensor]) -> list[list[int]]:
    """Which of these are written together with their weights, and which without.

    Returns:
        two lists of indices.
    """
    able = [
        i
        for i, (pruning, layout) in enumerate(zip(groups, layouts, strict=True))
        if can_fuse(layout, pruning.original)
    ]
    if able and not groups[able[0]].original.is_cuda:
        total = sum(groups[i].original.numel() * groups[i].original.element_size() for i in able)
        if total < _FUSED_MEAN_BYTES * len(able):
            able = []
    chosen = set(able)
    return [able, [i for i in range(len(groups)) if i not in chosen]]


def finish_all(prunings: Sequence[Pruning], results: Sequence[Result]) -> None:
    """Registers the masks, weights and hooks."""
    weights: list[Tensor | None] = [None] * len(prunings)
    fused = [i for i, (_, products) in enumerate(results) if products]
    found = masked_all(
        [results[i][0] for i in fused],
        [prunings[i].original for i in fused],
        [results[i][1][0] for i in fused],
    )
    for i, weight in zip(fused, found, strict=True):
        weights[i] = weight
    for pruning, (mask, _), product in zip(prunings, results, weights, strict=True):
        pruning.finish(mask, masked(mask, pruning.original, []) if product is None else product)


def to_devices(flags: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Flags on the CPU, moved with one transfer for each device."""
    moved = list(flags)
    for device in {device for device in devices if device.type != "cpu"}:
        indices = [i for i, other in enumerate(devices) if other == device]
        here = torch.cat([flags[i] for i in indices]).to(device)
        for i, part in zip(indices, here.split([flags[i].numel() for i in indices]), strict=True):
            moved[i] = part
    return moved


def flag_masks(prunings: Sequence[Pruning], flags: Sequence[Tensor], dims: Sequence[int]) -> list[Result]:
    """The masks, old mask times keep flags, and the weights where the native code made them too."""
    flags = to_devices(flags, [pruning.original.device for pruning in prunings])
    results: list[Result | None] = [None] * len(prunings)
    groups: dict[tuple[torch.device, bool], list[int]] = {}
    layouts: list[Tensor] = []
    for i, pruning in enumerate(prunings):
        original, old_mask = pruning.original, pruning.old_mask
        layouts.append(original)
        if not ops.is_native(original) or (
            old_mask is not None
            and not (ops.are_native(original, old_mask) and old_mask.shape == original.shape)
        ):
            results[i] = reference.write_mask(flags[i], original.detach(), old_mask, dims[i]), []
            continue
        if old_mask is not None:
            layouts[i] = contiguous_mask(old_mask, original.dtype)
        groups.setdefault((original.device, old_mask is not None), []).append(i)
    for (_, repeated), members in groups.items():
        parts = fuse([prunings[i] for i in members], [layouts[i] for i in members])
        for with_weights, part in zip((True, False), parts, strict=True):
            indices = [members[j] for j in part]
            masks, products = ops.write_masks(
                [flags[i] for i in indices],
                [prunings[i].original for i in indices],
                [layouts[i] for i in indices] if repeated else [],
                [prunings[i].original for i in indices] if with_weights else [],
                [dims[i] for i in indices],
            )
            for j, i in enumerate(indices):
                results[i] = masks[j], products[j : j + 1]
    return results  # type: ignore[return-value]


def is_writable(tensor: Tensor) -> bool:
    """Whether the tensor can be written in place, one element without another."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_inference()
        and (tensor.is_contiguous() or not _may_overlap(tensor))
    )


def _may_overlap(tensor: Tensor) -> bool:
    """Whether elements share memory, as far as strides tell: each must step over all smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def takes_zeros(tensor: Tensor) -> bool:
    """Whether native code writes zeros into a native tensor in place: it has neither gaps nor overlaps."""
    return not tensor.is_inference() and (
        tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    )


def zero(
    transaction: Transaction,
    tensors: Sequence[Tensor],
    flags: Sequence[Tensor],
    dims: Sequence[int],
    keep_backup: bool = False,
) -> None:
    """Writes zeros in place, to the channels of writable tensors that are not flagged.

    What plain torch writes is noted first, since it may raise between two tensors.
    """
    flags = to_devices(flags, [tensor.device for tensor in tensors])
    native: dict[torch.device, list[int]] = {}
    others: list[tuple[int, Tensor]] = []
    for i, tensor in enumerate(tensors):
        fast = ops.is_native(tensor) and takes_zeros(tensor)
        if fast:
            native.setdefault(tensor.device, []).append(i)
        if keep_backup or not fast:
            pruned = (~flags[i]).nonzero().flatten()
            transaction.values.append(Values(tensor, dims[i], pruned))
            if not fast:
                others.append((i, pruned))
    for i, pruned in others:
        _bits(tensors[i].data).index_fill_(dims[i], pruned, 0)
        increment_version(tensors[i])
    for indices in native.values():
        ops.zero_channels_(
            [tensors[i] for i in indices], [flags[i] for i in indices], [dims[i] for i in indices]
        )


def bake(
    transaction: Transaction, places: Sequence[tuple[nn.Module, str]], keep_backup: bool = False
) -> Callable[[], None]:
    """Registers masked parameters as themselves, as ``torch.nn.utils.prune.remove`` does.

    Returns:
        what multiplies their values by their masks, in place where torch can: to be called when nothing
        else can fail any more.
    """
    in_place: list[tuple[Tensor, Tensor]] = []
    products: dict[int, tuple[Tensor, Tensor]] = {}
    for module, name in places:
        transaction.touch(module)
        original, mask = unregister(module, name)
        mask = mask.to(original.dtype)
        if keep_backup:
            transaction.values.append(Values(original))
        if _multiplies_in_place(original):
            in_place.append((original, mask))
        else:
            _, values = products.get(id(original), (original, original.detach()))
            products[id(original)] = original, mask * values

    def multiply() -> None:
        left = in_place
        with torch.no_grad():
            while left:
                # A weight that modules share is multiplied by one of its masks at a time.
                now: dict[int, tuple[Tensor, Tensor]] = {}
                later = []
                for original, mask in left:
                    if now.setdefault(id(original), (original, mask))[1] is not mask:
                        later.append((original, mask))
                torch._foreach_mul_(
                    [original for original, _ in now.values()], [mask for _, mask in now.values()]
                )
                left = later
            for original, product in products.values():
                original.data = product

    return multiply


def _multiplies_in_place(original: Tensor) -> bool:
    """Whether torch multiplies the tensor in place; others are given new values."""
    return is_writable(original) and original.is_floating_point() and original.element_size() > 1
