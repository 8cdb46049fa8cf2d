"""Copies of a model in float64: run without slices and with zeros in their place, and compared."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lnprune.removal.cutting import Cut, Setting, copied, without, zeroed
from lnprune.removal.run import outputs
from lnprune.torch_internals import tree_map

Inputs = tuple[Sequence[Any], Mapping[str, Any]]  # arguments and keywords

_TOLERANCE = 1e-9  # of the largest output, in float64
_OWN_TOLERANCE = (
    1e-4  # in the model's own dtype, where it does not run in float64; and where its rounding grows
)
_SCALES = 1.0, 0.5, 0.25  # of random weights: where layers multiply each other, rounding would grow
_NOISE = 1e-13


class Subject:
    """A copy of a model in eval mode: its outputs without slices are compared with those with zeros there.

    With ``random``, its parameters have random values. These matter: behind weights of zeros, as in layers
    that are initialised so, anything would look right.

    Attributes:
        fault: why outputs cannot be compared: the copy gives no numbers, in float64 and in its own dtype.
    """

    def __init__(
        self, model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, random: bool = True
    ):
        self._inputs = tuple(inputs[0]), dict(inputs[1])
        self._tolerance = _TOLERANCE
        self.fault: str | None = None
        scales: Sequence[float | None] = _SCALES if random else [None]
        for scale in scales:
            self._prepare(model, tensors, torch.float64, scale)
            # A copy, since the code may leave something in the model that it runs.
            found = self.ran(zeroed(self.model, self.tensors, []))
            if self._is_steady(found):
                return
        self.fault = fault_of(found)
        if self.fault:
            self._tolerance = _OWN_TOLERANCE
            self._prepare(model, tensors, None, None if scales[0] is None else 1.0)
            if fault_of(self.ran(zeroed(self.model, self.tensors, []))) is None:
                self.fault = None
        elif not random:
            self._tolerance = _OWN_TOLERANCE

    def _prepare(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        scale: float | None,
    ) -> None:
        """Makes the copy in a dtype; with random weights of a scale, if that is given."""

        def value(name: str, tensor: Tensor) -> Tensor:
            return converted(tensor, dtype) if scale is None else random_value(name, tensor, dtype, scale)

        self._dtype = dtype
        self.model = self.like(model, tensors, value)
        self.tensors = dict([*self.model.named_parameters(), *self.model.named_buffers()])

    def like(self, model: nn.Module, tensors: Mapping[str, Tensor], value: Any = None) -> nn.Module:
        """A copy of a model in the dtype and the mode of the comparison."""
        made = copied(model, tensors, value or (lambda _, tensor: converted(tensor, self._dtype)))
        made.eval()
        for module in made.modules():
            for name, held in list(vars(module).items()):
                if isinstance(held, Tensor):
                    setattr(module, name, converted(held, self._dtype))
        return made

    def _is_steady(self, found: list[Tensor] | str) -> bool:
        """Whether outputs hardly change when parameters hardly do, so that differences mean something."""
        if isinstance(found, str) or fault_of(found):
            return False
        generator = torch.Generator().manual_seed(0)

        def moved(_: str, tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            if not tensor.is_floating_point():
                return tensor
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return tensor * (1 + _NOISE * noise.to(tensor))

        other = self.ran(copied(self.model, self.tensors, moved))
        return not isinstance(other, str) and _compared(other, found, self._tolerance) is None

    def trouble(
        self,
        cuts: Sequence[Cut],
        reads: set[tuple[str, int]],
        settings: Sequence[Setting],
        small: nn.Module | None = None,
        inputs: Inputs | None = None,
    ) -> str | None:
        """What is wrong when slices are gone; None: nothing.

        Args:
            cuts: the slices.
            reads: the names and dims of what reads channels.
            settings: what attributes are set to.
            small: the model without the slices, in the dtype of :meth:`like`; None: it is made.
            inputs: others than those of the subject.
        """
        try:
            if small is None:
                small = without(self.model, self.tensors, cuts, settings)
        except Exception as error:  # whatever a module does when it is copied
            return _said(error)
        got = self.ran(small, inputs)
        if isinstance(got, str):
            return got
        want = self.ran(zeroed(self.model, self.tensors, cuts), inputs)
        if not isinstance(want, str) and not all(map(_is_finite, want)):
            # 0 / 0, as in a norm of weights: zeros where channels are read are enough.
            only = [cut for cut in cuts if (cut.name, cut.dim) in reads]
            want = self.ran(zeroed(self.model, self.tensors, only), inputs)
        if isinstance(want, str):
            return f"with zeros in place of channels {want}"
        return _compared(got, want, self._tolerance)

    def ran(self, model: nn.Module, inputs: Inputs | None = None) -> list[Tensor] | str:
        """The outputs of a model, or what went wrong."""
        try:
            with torch.no_grad(), torch.random.fork_rng([]):
                torch.manual_seed(0)
                args, kwargs = tree_map(lambda leaf: converted(leaf, self._dtype), inputs or self._inputs)
                return list(outputs(model(*args, **kwargs)))
        except Exception as error:  # whatever the model's code raises
            return _said(error)


def converted(leaf: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a tensor, in the dtype if it is one of real numbers."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().to(dtype if leaf.is_floating_point() else None, copy=True)


def fault_of(found: list[Tensor] | str) -> str | None:
    """Why what a model ran to is nothing to compare with; None: it is."""
    if isinstance(found, str):
        return f"raises {found}"
    return None if all(map(_is_finite, found)) else "gives numbers that are not finite"


def _said(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _compared(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> str | None:
    """What differs between outputs; None: nothing."""
    if [tuple(each.shape) for each in got] != [tuple(each.shape) for each in want]:
        return "the outputs have other shapes"
    for a, b in zip(got, want, strict=True):
        if not a.is_floating_point() and not a.is_complex():
            if not torch.equal(a, b):
                return "the outputs differ"
        elif a.numel():
            largest = float(b.abs().max())
            difference = float((a - b).abs().max()) / max(largest, 1e-300)
            if not difference <= tolerance:
                return f"the outputs differ, by {difference:.1g} of the largest"
    return None


def random_value(name: str, tensor: Tensor, dtype: torch.dtype | None, scale: float = 1.0) -> Tensor:
    """Random values in place of those of a parameter, or of the running statistics of a norm."""
    is_statistic = name.endswith(("running_mean", "running_var"))
    if not tensor.is_floating_point() or not (isinstance(tensor, nn.Parameter) or is_statistic):
        return converted(tensor, dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if tensor.dim() > 1:
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        values *= scale * math.sqrt(tensor.shape[0] / max(1, tensor.numel()))
    else:
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        if not name.endswith(("weight", "weight_g", "running_var")):
            values *= torch.randint(2, tensor.shape, generator=generator) * 2 - 1
    return values.to(tensor.device, dtype or tensor.dtype)
