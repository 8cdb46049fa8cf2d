"""compact(): a model without its smallest channels, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from lnprune.errors import check_flags
from lnprune.modules.finding import Patterns
from lnprune.plans.selection import Normalize, Of, Scope
from lnprune.removal.coupling import couple
from lnprune.steps.flags import Amount
from lnprune.steps.norms import Order


def compact(
    model: nn.Module,
    example_inputs: Any,
    amount: Amount | Mapping[str, Amount],
    n: Order,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    check: bool | float = True,
    members: Literal["all", "producers"] = "all",
    scope: Scope = "local",
    of: Of = "channels",
    normalize: Normalize = "size",
    min_channels: int = 1,
    multiple_of: int = 1,
    group_size: int = 1,
    verify: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """A model without its coupled channels of the smallest norms: smaller, faster, and verified.

    It stands for ``couple(model, example_inputs).rank(n).select(amount).compact()``.

    Args:
        model: an eager model. It is not changed, but with ``inplace``.
        example_inputs: what the model is called with, as for :func:`couple`.
        amount: how many channels go, as for :meth:`Ranking.select`: a share, a count, or one a group.
        n: the order of the norm, as for :func:`ln_structured`.
        include: as for :func:`couple`.
        exclude: as for :func:`couple`.
        check: as for :func:`couple`.
        members: as for :meth:`Coupling.rank`.
        scope: as for :meth:`Ranking.select`, and so are ``of``, ``normalize`` and the constraints.
        of: what ``amount`` counts.
        normalize: what norms are divided by.
        min_channels: keep at least so many channels of every group.
        multiple_of: keep a multiple of so many.
        group_size: so many adjacent channels are ranked as one.
        verify: as for :meth:`Plan.compact`.
        inplace: as for :meth:`Plan.compact`.

    Returns:
        the small model; its parameters have the model's dtypes and devices.

    Raises:
        what :func:`couple`, :meth:`Coupling.rank`, :meth:`Ranking.select` and :meth:`Plan.compact` raise.
        The model is as it was then.

    Example:
        >>> import lnprune
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> lnprune.compact(model, torch.randn(1, 3, 16, 16), amount=0.5, n=2)
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    check_flags(verify=verify, inplace=inplace)
    coupling = couple(model, example_inputs, include=include, exclude=exclude, check=check)
    plan = coupling.rank(n, members).select(
        amount, scope, of, normalize, min_channels, multiple_of, group_size
    )
    return plan.compact(verify, inplace)
