"""Parameters of other shapes than a config can say, as those of models with fewer attention heads.

lnprune writes this file beside such models, for ``from_pretrained(..., trust_remote_code=True)``. Nothing
else is in it but the class of the model. What it does: parameters get the shapes, and attributes of modules
the numbers, that ``config.json`` lists as ``lnprune_sizes``.
"""

from typing import Any

import torch
from torch import nn


def resize_(model: nn.Module, sizes: dict[str, dict[str, Any]]) -> None:
    """Gives a model parameters and attributes of these sizes. What parameters hold is not kept."""
    for name, shape in sizes["shapes"].items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device)))
    for name, value in sizes["attributes"].items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, value)
