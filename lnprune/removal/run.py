"""One run of a model under labels: every ATen operation of it goes through the table."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_hooks

from lnprune.removal.labels import Labels, Marks
from lnprune.removal.operations import RULES, Rule, pointwise
from lnprune.removal.planes import NONE, Planes, varying
from lnprune.removal.state import Before
from lnprune.torch_internals import OperatorMode, is_mutable, tree_leaves, tree_map

_UNKNOWN_CASE = "goes through a case of {name} that lnprune does not know in {{}}"
_POINTWISE = Rule("element by element: what meets is united", pointwise.pointwise, keeps_uniform=True)


class Run(OperatorMode):
    """Follows labels through the operations inside."""

    def __init__(
        self, model: nn.Module, tensors: Mapping[str, Tensor], before: Before, ties_views: bool = False
    ):
        super().__init__()
        self.labels = Labels(tensors, self.place, ties_views)
        self.unknown: Counter[str] = Counter()  # operations without a rule that labels entered
        self._before = before
        self._named = {id(module): (name, type(module).__name__) for name, module in model.named_modules()}
        self._stack: list[tuple[str, str]] = []
        self._model = type(model).__name__

    def place(self) -> str:
        """Where in the model the run is."""
        name, kind = self._stack[-1] if self._stack else ("", self._model)
        return f"the {kind} `{name}`" if name else f"the model's {kind}"

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Inside, modules that run are known by their names."""

        def enter(module: nn.Module, args: Any) -> None:
            known = self._stack[-1] if self._stack else ("", self._model)
            self._stack.append(self._named.get(id(module), known))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._stack:
                self._stack.pop()

        hooks = [
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._stack.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket.__name__
        writes = is_mutable(func)
        name = packet[:-1] if writes and packet.endswith("_") else packet
        rule = RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags and func.namespace == "aten":
            rule = _POINTWISE
        if func.namespace != "aten" or (writes and not packet.endswith("_") and "out" in kwargs):
            rule = None  # not torch's own, or written to an output that is given
        if rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if writes:
            self._before.save_written(func, args, kwargs)
        out = func(*args, **kwargs)
        full = name if func.namespace == "aten" else f"{func.namespace}::{name}"
        self._label(full, rule, writes, out, tensors, args, kwargs)
        return out

    def _label(
        self,
        name: str,
        rule: Rule | None,
        writes: bool,
        out: Any,
        tensors: Sequence[Tensor],
        args: Any,
        kwargs: Any,
    ) -> None:
        labels = self.labels
        outs = out if isinstance(out, (tuple, list)) else (out,)
        from_inputs = any(labels.is_from_inputs(tensor) for tensor in tensors)
        all_planes = self._planes(name, rule, out, tensors, args, kwargs)
        uniform = rule is not None and rule.keeps_uniform and not from_inputs
        uniform = uniform and all(labels.is_uniform(tensor) or not tensor.dim() for tensor in tensors)
        if rule is not None and rule.makes_uniform:
            uniform, from_inputs = True, False
        for each, planes in zip(outs, all_planes, strict=True):
            if isinstance(each, Tensor):
                fitting = self._fitting(name, each, planes)
                marks = labels.marks(each)
                if writes:
                    self._write(name, each, fitting)
                    if marks is not None:
                        marks.is_uniform = marks.is_uniform and uniform
                        marks.is_from_inputs = marks.is_from_inputs or from_inputs
                elif marks is None or not any(each is tensor for tensor in tensors):
                    labels.mark(each, Marks(fitting, uniform, from_inputs))

    def _planes(
        self, name: str, rule: Rule | None, out: Any, tensors: Sequence[Tensor], args: Any, kwargs: Any
    ) -> list[Planes]:
        """The planes of each output."""
        labels = self.labels
        outs = out if isinstance(out, (tuple, list)) else (out,)
        planes: Any = None
        if rule is not None:
            labels.read.clear()
            try:
                if rule is _POINTWISE:
                    planes = rule.function(labels, out, tensors)
                else:
                    planes = rule.function(labels, out, *args, **kwargs)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                rule = None
            else:
                missed = [each for each in tensors if id(each) not in labels.read] if rule.reads_all else []
                reason = f"is an operand of {name} that lnprune does not follow in {{}}"
                labels.pin([plane for tensor in missed for plane in labels.planes(tensor)], reason)
        if rule is None:
            entered = [plane for tensor in tensors for plane in labels.planes(tensor)]
            if entered:
                self.unknown[name] += 1
            reason = f"goes through the operation {name}, which lnprune does not know, in {{}}"
            labels.pin(entered, reason)
            return [[] for _ in outs]
        if not planes or not isinstance(planes[0], list):
            planes = [planes, *([] for _ in outs[1:])]
        return planes

    def _fitting(self, name: str, tensor: Tensor, planes: Planes) -> Planes:
        """The planes that say something and fit the tensor; what does not is pinned."""
        labels, found = self.labels, []
        for plane in planes:
            fits = plane.dim() == tensor.dim() and all(
                mine in (1, size) for mine, size in zip(plane.shape, tensor.shape, strict=True)
            )
            if not fits:
                self.unknown[name] += 1
                labels.pin([plane], _UNKNOWN_CASE.format(name=name))
            elif plane.numel() == 1:
                labels.pin([plane] if int(plane) > 0 else [], "is one channel taken by its number in {}")
            elif bool((plane != NONE).any()):
                found.append(plane)
        return found

    def _write(self, name: str, tensor: Tensor, planes: Planes) -> None:
        """Labels of what was written in place, where they differ from those that were there."""
        old = self.labels.planes(tensor)
        if len(old) == len(planes) and all(map(torch.equal, old, planes)):
            return
        if name not in ("copy", "fill", "zero") and list(map(varying, old)) == list(map(varying, planes)):
            return  # the operation united them
        if tensor.numel():
            self.labels.write(tensor, planes)


def followed(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    pinned: Mapping[str, str],
    ties_views: bool = False,
) -> Run:
    """Runs the model once and follows the labels of these tensors of it. The model is as before afterwards.

    ``pinned`` says of names of tensors why their channels cannot go; ``ties_views`` as in :class:`Labels`.
    """
    with Before(model, tensors) as before:
        run = Run(model, tensors, before, ties_views)
        try:
            args, kwargs = tree_map(_copied, (tuple(args), dict(kwargs)))
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    run.labels.mark(leaf, Marks([], is_from_inputs=True))
            for name, reason in pinned.items():
                run.labels.pin(run.labels.marks(tensors[name]).planes, reason)  # type: ignore[union-attr]
            model.eval()
            with (
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),
                _plain_recurrences(model),
                run.following(),
                run,
            ):
                out = _called(model, args, kwargs)
            found = list(outputs(out))
            if not found:
                raise TypeError(f"the model returned a {type(out).__name__}, in which there is no tensor")
            for tensor in found:
                run.labels.pin(run.labels.planes(tensor), "is part of the model's output")
        finally:
            run.labels.forget()
    return run


def _called(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"example_inputs: {type(model).__name__} raises on them: {what}") from error


@contextlib.contextmanager
def _plain_recurrences(model: nn.Module) -> Iterator[None]:
    """Inside, recurrent layers are products and element by element, not one operation of a library."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    with (
        torch.backends.mkldnn.flags(enabled=False, allow_tf32=False),
        torch.backends.cudnn.flags(enabled=False, allow_tf32=False),
    ):
        yield


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def outputs(out: Any) -> Iterable[Tensor]:
    """All tensors in what a model returned: in tuples, lists, dicts and the attributes of other objects."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Tensor]:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield leaf
            elif hasattr(leaf, "__dict__") and id(leaf) not in seen and not isinstance(leaf, nn.Module):
                seen.add(id(leaf))
                yield from walk(list(vars(leaf).values()))

    return list(walk(out))
