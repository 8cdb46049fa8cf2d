"""Torch-Pruning's pruners with the norms of lnprune.

Needs Torch-Pruning, which the extra ``torch-pruning`` brings: ``pip install "lnprune[torch-pruning]"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lnprune.steps.norms import channel_sums, native_order

try:
    import torch_pruning  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        "lnprune.integrations.torch_pruning needs Torch-Pruning, which the extra "
        '"torch-pruning" brings: pip install "lnprune[torch-pruning]"'
    ) from error

_OUTPUTS = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_linear_out_channels)
_INPUTS = (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)
_SCALES = (torch_pruning.prune_batchnorm_out_channels, torch_pruning.prune_layernorm_out_channels)


class LpImportance(torch_pruning.importance.GroupMagnitudeImportance):
    """Torch-Pruning's group importance by Lp norms, with all norms of a group in one native call.

    It stands in for ``torch_pruning.importance.GroupMagnitudeImportance`` and takes its arguments: every
    slice of a weight has the sum of the powers of its elements, and Torch-Pruning's own code reduces these
    over the layers of a group and normalizes them. What differs is how the sums are made: in float64
    whatever the dtype of the weights, and for any order of the norm. So a pruner chooses the same channels,
    but where rounding decides.

    Args:
        p: the order of the norm: a real number, ``inf`` or ``-inf``. Of 0, the sum counts the elements that
            are not zero; of the infinities, it is the largest or the smallest absolute value.
        group_reduction: how the sums of a group's layers become one: ``"mean"``, ``"sum"``, ``"max"``,
            ``"prod"``, ``"first"`` or ``"gate"``.
        normalizer: what a group's importances are divided by: ``"mean"``, ``"sum"``, ``"max"``,
            ``"standarization"``, ``"gaussian"``, ``"lamp"``, ``"sentinel_0.5"`` and the like, a function of
            them, or None.
        bias: whether biases count as well.
        target_types: the layers that count; None: convolutions, linear layers, batch and layer norms.

    Called with a ``torch_pruning.Group``, it returns one float32 importance for each of its channels, or
    None where no layer of the group counts.

    Raises:
        ValueError: the order is no real number.

    Source: the importance is that of Fang et al., `DepGraph: Towards Any Structural Pruning
    <https://arxiv.org/abs/2301.12900>`_, section 3.3, as Torch-Pruning 1.6.1 computes it.

    Example:
        >>> import torch
        >>> import torch_pruning
        >>> from lnprune.integrations.torch_pruning import LpImportance
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> pruner = torch_pruning.pruner.MetaPruner(
        ...     model,
        ...     torch.randn(1, 8),
        ...     importance=LpImportance(p=1),
        ...     pruning_ratio=0.5,
        ...     ignored_layers=[model[2]],
        ... )
        >>> pruner.step()
        >>> model[0].weight.shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        p: float = 2,
        group_reduction: str = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        bias: bool = False,
        target_types: Sequence[type[nn.Module]] | None = None,
    ) -> None:
        if p is None or isinstance(p, str) or native_order(p) is None:
            raise ValueError(f"expected p to be a real number, the order of the norm, got {p!r}")
        types = {} if target_types is None else {"target_types": target_types}
        super().__init__(p=p, group_reduction=group_reduction, normalizer=normalizer, bias=bias, **types)

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        tensors, dims, slices = [], [], []
        for item in group:
            if isinstance(item.dep.layer, tuple(self.target_types)):
                for tensor, dim, repeats in self._tensors(item.dep.layer, item.dep.pruning_fn):
                    tensors.append(tensor.detach() if tensor.dim() > 1 else tensor.detach().unsqueeze(-1))
                    dims.append(dim)
                    slices.append((repeats, item.idxs, item.root_idxs))
        if not tensors:
            return None
        sums = [
            each.repeat(repeats)[indices]
            for each, (repeats, indices, _) in zip(channel_sums(tensors, self.p, dims), slices, strict=True)
        ]
        return self._normalize(self._reduce(sums, [roots for _, _, roots in slices]), self.normalizer)

    def _tensors(self, layer: Any, prune: Any) -> Iterator[tuple[Tensor, int, int]]:
        """What counts of a layer: tensors, their dims of the channels, how often their slices repeat."""
        transposed = bool(getattr(layer, "transposed", False))
        if prune in _INPUTS:
            # A weight in groups has the slices of one group: the same ones for the channels of each.
            yield layer.weight, 0 if transposed else 1, getattr(layer, "groups", 1)
        elif prune in _OUTPUTS + _SCALES and layer.weight is not None:
            yield layer.weight, 1 if transposed else 0, 1
            if self.bias and layer.bias is not None:
                yield layer.bias, 0, 1
