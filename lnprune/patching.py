"""patch: lnprune in place of torch's pruning, for code that cannot be edited."""

from __future__ import annotations

import contextlib
import copy
import copyreg
from collections.abc import Iterator
from typing import Any

from torch.nn.utils import prune as stock
from torch.nn.utils.prune import LnStructured as StockLnStructured
from torch.nn.utils.prune import ln_structured as stock_ln_structured

from lnprune.prune import LnStructured, ln_structured

__all__ = ["patch"]

_HOME = LnStructured.__module__
_depth = 0


def _reduce_stock(method: Any) -> Any:
    """Pickles torch's class by its name, under which, for now, lnprune's is found."""
    rebuild = copyreg._reconstructor  # type: ignore[attr-defined]
    return rebuild, (LnStructured, object, None), method.__dict__


def _deepcopy(method: Any, memo: dict[int, Any]) -> Any:
    """A copy of torch's class, which by the table of pickle would be one of lnprune's."""
    kind: Any = StockLnStructured if type(method) is LnStructured else type(method)
    copied = memo[id(method)] = kind.__new__(kind)
    copied.__dict__.update(copy.deepcopy(method.__dict__, memo))
    return copied


def _enter() -> None:
    global _depth
    if _depth == 0:
        stock.ln_structured = ln_structured
        stock.LnStructured = LnStructured  # type: ignore[misc]
        LnStructured.__module__ = stock.__name__
        copyreg.pickle(StockLnStructured, _reduce_stock)
        StockLnStructured.__deepcopy__ = _deepcopy  # type: ignore[attr-defined]
    _depth += 1


def _exit() -> None:
    global _depth
    _depth -= 1
    if _depth == 0:
        stock.ln_structured = stock_ln_structured
        stock.LnStructured = StockLnStructured  # type: ignore[misc]
        LnStructured.__module__ = _HOME
        del copyreg.dispatch_table[StockLnStructured]
        del StockLnStructured.__deepcopy__  # type: ignore[attr-defined]


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    _enter()
    try:
        yield
    finally:
        _exit()


def patch(permanently: bool = False) -> contextlib.AbstractContextManager[None]:
    """Makes ``torch.nn.utils.prune.ln_structured`` and ``LnStructured`` lnprune's.

    For the whole process, all its threads: ``with lnprune.patch(): ...`` for the block, or
    ``lnprune.patch(permanently=True)`` once. Torch's ``ln_structured`` looks for the class in its module,
    so where it was imported before it is native too; a class imported before stays torch's. Models that are
    pickled inside load without lnprune.

    Args:
        permanently: patch now and for good, with no block.

    Returns:
        a context manager; with ``permanently`` one that does nothing.

    Example:
        >>> import lnprune
        >>> import torch.nn.utils.prune
        >>> with lnprune.patch():
        ...     torch.nn.utils.prune.ln_structured is lnprune.ln_structured
        True
        >>> torch.nn.utils.prune.ln_structured is lnprune.ln_structured
        False
    """
    if permanently:
        _enter()
        return contextlib.nullcontext()
    return _patched()
