"""The values that permanent pruning overwrote: kept, to be put back if nothing came since."""

from __future__ import annotations

import torch
from torch import Tensor

from lnprune.modules.transaction import Values
from lnprune.steps.bits import bits, from_bits, is_zero
from lnprune.steps.local import held_here
from lnprune.steps.norms import nonzero_counts


class Backup:
    """The values that permanent pruning overwrote in a tensor, to be put back if nothing came since."""

    def __init__(self, values: Values):
        self.values = values
        self.dtype = values.tensor.dtype
        # What the pruning wrote in their place; None: zeros.
        self.left = values.now().clone() if values.channels is None else None
        self.counts = self._counts()

    def _counts(self) -> Tensor:
        values = self.values
        return nonzero_counts(held_here(values.tensor).detach(), values.dim, values.batch)

    def _taken(self) -> Tensor:
        return self.values.saved != (0 if self.left is None else self.left)

    def _as_now(self, part: Tensor) -> Tensor:
        """Bits of that time in the dtype and on the device that the tensor has now."""
        tensor = self.values.tensor
        if tensor.dtype == self.dtype:
            return part.to(tensor.device)
        return bits(from_bits(part, self.dtype).to(tensor.device, tensor.dtype))

    def check(self, name: str) -> None:
        """Raises where the tensor was pruned since, or where what was pruned got other values since."""
        tensor = self.values.tensor
        if tensor.is_meta:
            return
        now = self.values.now()
        left = torch.zeros_like(now) if self.left is None else self._as_now(self.left)
        # A zero is a zero, whatever its sign.
        written = (now != left) & ~(is_zero(now) & is_zero(left)) & self._taken().to(tensor.device)
        if written.any():
            raise RuntimeError(
                f"{name}: {int(written.sum())} of the values that apply() pruned were replaced since, as "
                "by training or load_state_dict: undo() would lose them"
            )
        # A conversion to a narrower type makes zeros of its own.
        widened = tensor.dtype == self.dtype or _width(tensor.dtype) > _width(self.dtype)
        lost = int((self.counts.to(tensor.device) - self._counts()).clamp(min=0).sum()) if widened else 0
        if lost:
            raise RuntimeError(
                f"{name}: {lost} more of its values were pruned since: undo what came after it first"
            )

    def put_back(self) -> None:
        values, left = self.values, self.left
        now = values.now()
        untouched = left is not None and values.tensor.dtype == self.dtype and torch.equal(now, left)
        if untouched and not values.copied:
            values.tensor.data = values.data  # its own memory, which torch did not write to
        else:
            values.write(torch.where(self._taken().to(now.device), self._as_now(values.saved), now))


def _width(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
