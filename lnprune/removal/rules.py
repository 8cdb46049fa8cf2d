"""The table of operations: by the name of an ATen operation, what it does to label planes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from lnprune.removal.labels import Labels
from lnprune.removal.planes import Planes

# Of the labels of the run, what the operation returned and its arguments: the planes of its output, or of
# each of its outputs.
Function = Callable[..., "Planes | list[Planes]"]
Decorated = TypeVar("Decorated", bound=Function)


class Rule(NamedTuple):
    """What operations do to label planes.

    Attributes:
        says: the same in words, for the documentation.
        function: takes the labels, the output and the arguments; gives the planes of the output.
        reads_all: whether tensors that the function does not ask about are pinned.
        keeps_uniform: whether equal values stay equal values of a size that the code gives.
        makes_uniform: whether it makes such.
    """

    says: str
    function: Function
    reads_all: bool = True
    keeps_uniform: bool = False
    makes_uniform: bool = False


RULES: dict[str, Rule] = {}


def rule(
    names: str,
    says: str,
    *,
    reads_all: bool = True,
    keeps_uniform: bool = False,
    makes_uniform: bool = False,
) -> Callable[[Decorated], Decorated]:
    """Puts a function into the table under the names of operations, without their trailing underscores."""

    def put(function: Decorated) -> Decorated:
        for name in names.split():
            if name in RULES:
                raise ValueError(f"{name}: there is a rule for it")
            RULES[name] = Rule(says, function, reads_all, keeps_uniform, makes_uniform)
        return function

    return put


@rule(
    "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided "
    "new_empty_strided",
    "equal values: they have as many channels as what they meet",
    reads_all=False,
    makes_uniform=True,
)
def _uniform(labels: Labels, out: Any, *args: Any, **kwargs: Any) -> Planes:
    return []
