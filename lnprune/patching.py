"""patch: lnprune in place of torch's pruning, for code that cannot be edited."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.utils.prune import LnStructured as StockLnStructured

from lnprune.errors import check_flags
from lnprune.prune import apply
from lnprune.steps.masks import compute_mask

_stock_methods = {name: vars(StockLnStructured)[name] for name in ("apply", "compute_mask")}
_depth = 0


def _apply(
    cls: Any, module: Any, name: Any, amount: Any, n: Any, dim: Any, importance_scores: Any = None
) -> Any:
    if cls is StockLnStructured:
        return apply(module, name, amount, n, dim, importance_scores)
    # A subclass is installed as itself, and may choose channels its own way.
    return _stock_methods["apply"].__func__(cls, module, name, amount, n, dim, importance_scores)


_native_methods = {"apply": classmethod(_apply), "compute_mask": compute_mask}


def _enter() -> None:
    global _depth
    _depth += 1
    if _depth == 1:
        for name, method in _native_methods.items():
            setattr(StockLnStructured, name, method)


def _exit() -> None:
    global _depth
    _depth -= 1
    if _depth == 0:
        for name, method in _stock_methods.items():
            setattr(StockLnStructured, name, method)


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    _enter()
    try:
        yield
    finally:
        _exit()


def patch(*, permanently: bool = False) -> contextlib.AbstractContextManager[None]:
    """Makes ``torch.nn.utils.prune.ln_structured`` and ``LnStructured`` prune as lnprune's do.

    For the whole process, all its threads: ``with lnprune.patch(): ...`` for the block, or
    ``lnprune.patch(permanently=True)`` once. The methods ``apply`` and ``compute_mask`` of torch's own
    class are exchanged, which torch's ``ln_structured`` calls too: what was imported before, and every
    subclass, is native as well, and no object or pickle differs from torch's.

    Args:
        permanently: patch now and for good, with no block.

    Returns:
        a context manager; with ``permanently`` one that does nothing.

    Example:
        >>> import lnprune
        >>> import torch
        >>> from torch.nn.utils.prune import ln_structured
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 1e-6]]).bfloat16()  # of equal norm to torch
        >>> module = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
        >>> module.weight = torch.nn.Parameter(weight)
        >>> with lnprune.patch():
        ...     ln_structured(module, "weight", amount=1, n=1, dim=0).weight_mask[:, 0]
        tensor([0., 1.], dtype=torch.bfloat16)
    """
    check_flags(permanently=permanently)
    if permanently:
        _enter()
        return contextlib.nullcontext()
    return _patched()
