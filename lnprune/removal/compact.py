"""compact() and load_compact(): a model without channels, in one call, and once more from its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lnprune.errors import check_flags, named, shown
from lnprune.modules.finding import Patterns
from lnprune.plans import plan_file
from lnprune.plans.kinds import Uniform
from lnprune.plans.selection import Normalize, Of, Scope
from lnprune.removal.checks import checked_tensors
from lnprune.removal.coupling import couple
from lnprune.removal.removed import removed_of
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
    uniform: Uniform = None,
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
        uniform: which groups keep equal numbers of channels.
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
        amount, scope, of, normalize, min_channels, multiple_of, group_size, uniform=uniform
    )
    return plan.compact(verify, inplace)


def load_compact(
    path: str | os.PathLike[str], model: nn.Module, state_dict: Mapping[str, Any]
) -> nn.Module:
    """The small model that :meth:`Plan.compact` made, from the code of the large one.

    Args:
        path: where :meth:`Plan.save` wrote the plan.
        model: as the large model was when it was coupled. It is not changed, and its values are not
            needed: it may be on the device meta. Then the tensors of the small model are on the devices
            where ``state_dict`` has them.
        state_dict: that of the small model. Buffers that no state dict holds, and that are on the device
            meta, may be in it too, by their names.

    Returns:
        the small model, a new one.

    Raises:
        ValueError: the file holds no plan of coupled channels, or one for another model: a parameter or
            buffer is missing or has another shape. Or a tensor on the device meta is not in ``state_dict``.
        RuntimeError: as :meth:`torch.nn.Module.load_state_dict`, where ``state_dict`` is not that of the
            small model.

    Example:
        >>> import lnprune, pathlib, tempfile
        >>> import torch
        >>> from torch import nn
        >>> def make():
        ...     return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> model = make()
        >>> plan = lnprune.couple(model, torch.randn(2, 8)).rank(n=2).select(0.5)
        >>> small = plan.compact()
        >>> torch.save(small.state_dict(), folder / "small.pt")
        >>> plan.save(folder / "plan.json")
        >>> with torch.device("meta"):
        ...     large = make()
        >>> again = lnprune.load_compact(folder / "plan.json", large, torch.load(folder / "small.pt"))
        >>> torch.equal(again(torch.ones(1, 8)), small(torch.ones(1, 8)))
        True
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping from names to tensors, got {shown(state_dict)}")
    saved = plan_file.read(path)
    tensors = checked_tensors(model, may_be_meta=True)
    with named(str(path)):
        removed = removed_of(saved, model)
        choices = removed.choices(model, tensors)
    small = removed.small(model, tensors, choices)
    values = dict(state_dict)
    _leave_meta(small, values)
    small.load_state_dict(values)
    return small


def _leave_meta(small: nn.Module, values: dict[str, Any]) -> None:
    """Gives what is on the device meta memory where its values are, and buffers of no state dict these."""
    made: dict[int, Tensor] = {}
    in_state_dict = small.state_dict(keep_vars=True)
    for path, module in small.named_modules():
        start = f"{path}." if path else ""
        for key, held in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not held.is_meta:
                continue
            value = values.get(start + key)
            if not isinstance(value, Tensor) or value.is_meta:
                raise ValueError(
                    f"{start}{key}: expected values in state_dict for what is on the device meta, got "
                    f"{'none' if value is None else shown(value)}"
                )
            if id(held) not in made:
                new = torch.empty_like(held, device=value.device)
                if isinstance(held, nn.Parameter):
                    new = nn.Parameter(new, held.requires_grad)
                    vars(new).update(vars(held))
                made[id(held)] = new
            if start + key not in in_state_dict:
                made[id(held)].copy_(values.pop(start + key))
            setattr(module, key, made[id(held)])
