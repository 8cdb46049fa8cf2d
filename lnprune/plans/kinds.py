"""Kinds of layers, which keep equal numbers of channels: by their names, or as a mapping says."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from lnprune.errors import shown

Uniform = Union[Literal["kind"], Mapping[str, str], None]
# As in layers.3.weight, h.0.c_attn.weight [1], experts[2] and weight@1, the name on a rank.
_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])|(?<=\[)\d+(?=\])|(?<=@)\d+$")


def checked_uniform(uniform: Any) -> Uniform:
    """What says which layers are of a kind, as a selection keeps it."""
    if isinstance(uniform, Mapping):
        for pattern, kind in uniform.items():
            if not isinstance(pattern, str) or not isinstance(kind, str):
                raise TypeError(
                    "uniform: expected a mapping from names or patterns to words for kinds, got "
                    f"{shown(pattern)}: {shown(kind)}"
                )
        return dict(uniform)
    if uniform is None or uniform == "kind":
        return uniform
    raise ValueError(f"uniform: expected None, 'kind' or a mapping to kinds, got {shown(uniform)}")


def kinds_of(uniform: Uniform, names: Sequence[str], channels: Sequence[int]) -> list[int] | None:
    """For each layer the number of its kind, counted in the order of the layers; None: no kinds.

    With ``"kind"``, layers are of one kind whose names differ in numbers alone and that have as many
    channels. With a mapping, they are of the kind of the first pattern that their name fits, and others
    are each of their own.

    Raises:
        ValueError: a pattern fits no name; layers of one kind have different numbers of channels.
    """
    if uniform is None:
        return None
    if isinstance(uniform, str):
        return _numbered(
            [(_NUMBERS.sub("*", name), count) for name, count in zip(names, channels, strict=True)]
        )
    used: set[str] = set()
    keys: list[Any] = []
    first: dict[str, int] = {}  # layer of each kind
    for i, name in enumerate(names):
        fitting = [pattern for pattern in uniform if _fits(name, pattern)]
        used.update(fitting)
        if not fitting:
            keys.append(i)
            continue
        kind = uniform[fitting[0]]
        keys.append(kind)
        other = first.setdefault(kind, i)
        if channels[i] != channels[other]:
            raise ValueError(
                f"uniform: expected as many channels in all layers of the kind {kind!r}, got "
                f"{channels[other]} in {names[other]} and {channels[i]} in {name}"
            )
    for pattern in uniform:
        if pattern not in used:
            raise ValueError(f"uniform: {pattern!r} fits none of the {len(names)} names")
    return _numbered(keys)


def _numbered(keys: Sequence[Any]) -> list[int]:
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _fits(name: str, pattern: str) -> bool:
    path = name.rpartition(".")[0]
    return name == pattern or fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(path, pattern)
