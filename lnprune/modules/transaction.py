"""All or nothing: what modules and tensors were before a call, and the way back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import prune as stock

from lnprune.modules.parameters import check_is_eager
from lnprune.steps.batches import Batch, put, taken
from lnprune.steps.bits import bits
from lnprune.steps.local import held_here
from lnprune.torch_internals import own_registries, pruning_methods, set_pruning_methods


class Snapshot:
    """What a pruning call may change in a module, to put it back when the call fails."""

    def __init__(self, module: nn.Module):
        check_is_eager(module)
        self.module = module
        self.attributes = attributes = module.__dict__.copy()
        parameters, buffers, transient, hooks = own_registries(module)
        # One by one: a loop takes longer than the copies.
        self.held = (
            (parameters, parameters.copy()),
            (buffers, buffers.copy()),
            (transient, transient.copy()),
            (hooks, hooks.copy()),
        )
        # Lists of parameters that a module of its own __setattr__ keeps beside them, as an RNN does.
        self.lists: list[tuple[list, list]] = []
        if type(module).__setattr__ is not nn.Module.__setattr__:
            self.lists = [(v, v.copy()) for v in attributes.values() if type(v) is list]
        self.methods: list[tuple[stock.PruningContainer, Any]] = [
            (hook, pruning_methods(hook))
            for hook in hooks.values()
            if isinstance(hook, stock.PruningContainer)
        ]

    def restore(self) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for held, content in self.held:
            held.clear()
            held.update(content)
        for value, content in self.lists:
            value[:] = content
        for hook, methods in self.methods:
            set_pruning_methods(hook, methods)


class Transaction:
    """Puts modules, and values noted before they are overwritten, back when its block raises."""

    def __init__(self) -> None:
        self._snapshots: dict[int, Snapshot] = {}
        self.values: list[Values] = []

    def touch(self, module: nn.Module) -> None:
        """To be called before a module is changed."""
        if id(module) not in self._snapshots:
            self._snapshots[id(module)] = Snapshot(module)

    def note(self, *values: Any, **options: Any) -> None:
        """To be called before values are overwritten; the arguments are those of :class:`Values`."""
        self.values.append(Values(*values, **options))

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None:
            for snapshot in self._snapshots.values():
                snapshot.restore()
            for values in reversed(self.values):
                values.restore()


class Values:
    """The values of a tensor, or of some of its channels, and a way to put them back, bit for bit.

    Of a sharded tensor, those that are here: ``channels`` counts those of the shard.

    With ``copied``, they are copied: the tensor is going to be overwritten in place. Without, the tensor is
    going to get new memory, so that its old memory, which keeps the values, only has to be remembered.
    """

    def __init__(
        self,
        tensor: Tensor,
        dim: int,
        channels: Tensor | None = None,
        copied: bool = True,
        batch: Batch | None = None,  # of the channels that are here
        part: tuple[int, int, int] | None = None,  # the arguments of narrow(); None: all of it
    ):
        self.tensor, self.dim, self.channels = tensor, dim, channels
        self.copied, self.batch, self.part = copied, batch, part
        self.data = held_here(tensor).data  # the memory of the values
        self.saved = self.now()
        if channels is None and copied:
            self.saved = self.saved.clone()

    def _whole(self) -> Tensor:
        whole = bits(held_here(self.tensor).data)
        return whole if self.part is None else whole.narrow(*self.part)

    def now(self) -> Tensor:
        """The bits that the tensor has now, where the values were."""
        whole = self._whole()
        if self.channels is None:
            return whole
        return taken(whole, self.dim, self.batch, self.channels)

    def write(self, values: Tensor) -> None:
        """Overwrites them with other bits, of the dtype that the tensor has now."""
        whole = self._whole()
        if self.channels is None:
            whole.copy_(values)
        else:
            put(whole, self.dim, self.batch, self.channels, values)
        increment_version(self.tensor)

    def restore(self) -> None:
        """Puts the values back, in the memory where they were."""
        if held_here(self.tensor) is self.tensor:
            self.tensor.data = self.data
        if self.copied:
            self.write(self.saved)
