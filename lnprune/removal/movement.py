"""What operations that move data do to label planes: the same movement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lnprune.removal.labels import Labels
from lnprune.removal.planes import (
    NONE,
    Planes,
    aligned,
    anything,
    has_channels,
    matching_dims,
    squashed,
    varying,
)
from lnprune.removal.pointwise import Operand, combined
from lnprune.removal.rules import rule

MOVES = "moves data: labels move with it"


@rule("view _unsafe_view reshape _reshape_alias unflatten", MOVES, keeps_uniform=True)
def view(labels: Labels, out: Tensor, x: Tensor, *shape: Any) -> Planes:
    old, new = list(x.shape), list(out.shape)
    planes = labels.planes(x)
    if old == new or not planes:
        return list(planes)
    pairs = matching_dims(old, new)
    found = []
    for plane in planes:
        before, after, touched = [], [], []
        for left, right in pairs:
            depends = any(plane.shape[dim] > 1 for dim in left)
            before += [old[dim] if depends else 1 for dim in left]
            after += [new[dim] if depends else 1 for dim in right]
            if depends and len(right) > 1:
                touched += list(right)
        moved = squashed(plane.expand(before).reshape(after), touched)
        split = [dim for dim in touched if moved.shape[dim] > 1]
        if len(split) > 1:
            for dim in split[:-1] if labels.ties_views else ():
                labels.unite(moved, moved.narrow(dim, 0, 1))
            labels.note([moved], f"`view({_shown(old)})` to `({_shown(new)})`")
        found.append(moved)
    return found


def _shown(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


@rule("permute", MOVES, keeps_uniform=True)
def permute(labels: Labels, out: Tensor, x: Tensor, dims: Sequence[int]) -> Planes:
    return [plane.permute(list(dims)) for plane in labels.planes(x)]


@rule("transpose", MOVES, keeps_uniform=True)
def transpose(labels: Labels, out: Tensor, x: Tensor, a: int, b: int) -> Planes:
    return [plane.transpose(a, b) for plane in labels.planes(x)]


@rule("t", MOVES, keeps_uniform=True)
def t(labels: Labels, out: Tensor, x: Tensor) -> Planes:
    return [plane.t() for plane in labels.planes(x)]


@rule(
    "clone alias detach _to_copy contiguous lift_fresh lift resolve_conj resolve_neg",
    MOVES,
    keeps_uniform=True,
)
def same(labels: Labels, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Planes:
    return list(labels.planes(x))


@rule("unsqueeze squeeze", MOVES, keeps_uniform=True)
def unsqueeze(labels: Labels, out: Tensor, x: Tensor, *dims: Any) -> Planes:
    # The dims that are longer than 1 stay in their order.
    long = [dim for dim, size in enumerate(x.shape) if size != 1]
    found = []
    for plane in labels.planes(x):
        sizes = iter([plane.shape[dim] for dim in long])
        found.append(plane.reshape([next(sizes) if size != 1 else 1 for size in out.shape]))
    return found


@rule("expand", MOVES, keeps_uniform=True)
def expand(labels: Labels, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Planes:
    found = [aligned(plane, out.dim()) for plane in labels.planes(x)]
    if labels.is_uniform(x):
        return found
    shape = aligned_shape(x, out.dim())
    return found + [
        anything(out.shape, dim) for dim in range(out.dim()) if out.shape[dim] > 1 and shape[dim] == 1
    ]


def aligned_shape(x: Tensor, dims: int) -> tuple[int, ...]:
    """The shape with sizes of 1 in front, as broadcasting adds them."""
    return (1,) * (dims - x.dim()) + tuple(x.shape)


@rule("repeat", MOVES, keeps_uniform=True)
def repeat(labels: Labels, out: Tensor, x: Tensor, repeats: Sequence[int]) -> Planes:
    shape, found = aligned_shape(x, len(repeats)), []
    for plane in labels.planes(x):
        whole = aligned(plane, len(repeats))
        found.append(whole.repeat([k if whole.shape[dim] > 1 else 1 for dim, k in enumerate(repeats)]))
    new = [dim for dim, k in enumerate(repeats) if k > 1 and shape[dim] == 1]
    return found + [anything(out.shape, dim) for dim in new]


@rule("slice", MOVES, keeps_uniform=True)
def slice_(
    labels: Labels, out: Tensor, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Planes:
    found = []
    labels.note(has_channels(labels.planes(x), dim), "a slice of channels")
    for plane in labels.planes(x):
        found.append(torch.ops.aten.slice(plane, dim, start, end, step) if plane.shape[dim] > 1 else plane)
    return found


@rule("select", MOVES, keeps_uniform=True)
def select(labels: Labels, out: Tensor, x: Tensor, dim: int, index: int) -> Planes:
    return [plane.select(dim, index if plane.shape[dim] > 1 else 0) for plane in labels.planes(x)]


@rule(
    "split split_with_sizes chunk unsafe_split unsafe_chunk unsafe_split_with_sizes",
    MOVES,
    keeps_uniform=True,
)
def split(
    labels: Labels, out: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0, **kwargs: Any
) -> list[Planes]:
    parts: list[Planes] = [[] for _ in out]
    labels.note(has_channels(labels.planes(x), dim), "a split of channels")
    for plane in labels.planes(x):
        at = 0
        for part, each in zip(parts, out, strict=True):
            size = each.shape[dim]
            part.append(plane.narrow(dim, at, size) if plane.shape[dim] > 1 else plane)
            at += size
    return parts


@rule("unbind", MOVES, keeps_uniform=True)
def unbind(labels: Labels, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> list[Planes]:
    planes = labels.planes(x)
    return [[p.select(dim, i if p.shape[dim] > 1 else 0) for p in planes] for i in range(len(out))]


@rule("flip", MOVES, keeps_uniform=True)
def flip(labels: Labels, out: Tensor, x: Tensor, dims: Sequence[int]) -> Planes:
    return [plane.flip([dim for dim in dims if plane.shape[dim] > 1]) for plane in labels.planes(x)]


@rule("roll", MOVES, keeps_uniform=True)
def roll(labels: Labels, out: Tensor, x: Tensor, shifts: Any, dims: Any = ()) -> Planes:
    if not dims:  # over all elements
        labels.pin(labels.planes(x), "its channels are rolled over all dims in {}")
        return []
    return [plane.roll(shifts, dims) for plane in labels.planes(x)]


def _joined(
    labels: Labels,
    shapes: Sequence[Sequence[int]],
    planes: Sequence[Planes],
    dim: int,
    uniform: Sequence[bool],
) -> Planes:
    """The planes of what is put side by side along a dim."""
    rest = []
    for shape, each, even in zip(shapes, planes, uniform, strict=True):
        if not even:
            across = [1 if d == dim else size for d, size in enumerate(shape)]
            rest.append(Operand(across, [plane for plane in each if plane.shape[dim] == 1]))
    found = combined(labels, rest)
    # Planes that depend on the same other dims are continued by each other, the first by the first.
    kinds: list[tuple[tuple[int, ...], int]] = []
    ordered: list[dict[tuple[tuple[int, ...], int], Tensor]] = []
    for each in planes:
        mine: dict[tuple[tuple[int, ...], int], Tensor] = {}
        for plane in has_channels(each, dim):
            others = tuple(d for d in varying(plane) if d != dim)
            kind = others, sum(1 for dims, _ in mine if dims == others)
            mine[kind] = plane
            if kind not in kinds:
                kinds.append(kind)
        ordered.append(mine)
    for kind in kinds:
        pieces = []
        for shape, mine in zip(shapes, ordered, strict=True):
            size = [length if d == dim or d in kind[0] else 1 for d, length in enumerate(shape)]
            known = mine.get(kind)
            pieces.append(torch.full(size, NONE) if known is None else known.expand(size))
        found.append(torch.cat(pieces, dim))
    return found


@rule("cat", MOVES, keeps_uniform=True)
def cat(labels: Labels, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Planes:
    tensors = [each for each in tensors if each.dim() == out.dim()]
    shapes = [list(each.shape) for each in tensors]
    planes = [labels.planes(each) for each in tensors]
    # Equal values take part along the dims that they are not joined along, as any size does.
    return _joined(labels, shapes, planes, dim % out.dim(), [labels.is_uniform(each) for each in tensors])


@rule("stack", MOVES, keeps_uniform=True)
def stack(labels: Labels, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Planes:
    dim %= out.dim()
    shapes = [[*each.shape[:dim], 1, *each.shape[dim:]] for each in tensors]
    planes = [[plane.unsqueeze(dim) for plane in labels.planes(each)] for each in tensors]
    return _joined(labels, shapes, planes, dim, [labels.is_uniform(each) for each in tensors])


@rule("constant_pad_nd", MOVES)
def constant_pad_nd(labels: Labels, out: Tensor, x: Tensor, pad: Sequence[int], value: Any = 0) -> Planes:
    found = []
    for plane in labels.planes(x):
        sides: list[int] = []
        for k in range(len(pad) // 2):
            sides += list(pad[2 * k : 2 * k + 2]) if plane.shape[x.dim() - 1 - k] > 1 else [0, 0]
        found.append(torch.constant_pad_nd(plane, sides, NONE))
    return found


def _shuffle(name: str) -> None:
    @rule(name, MOVES)
    def shuffled(labels: Labels, out: Tensor, x: Tensor, factor: int) -> Planes:
        found = []
        for plane in labels.planes(x):
            if plane.shape[-3] > 1 and "channel_shuffle" in name:
                labels.note([plane], f"`channel_shuffle` of {factor} groups")
                if labels.ties_views:
                    labels.unit(plane.unflatten(-3, (factor, -1)), [plane.dim() - 3])
            if any(size > 1 for size in plane.shape[-3:]):
                whole = plane.expand([*plane.shape[:-3], *x.shape[-3:]]).contiguous()
                # In float64, which holds all labels: the operation takes no integers.
                plane = squashed(getattr(torch.ops.aten, name)(whole.double(), factor).long())
            found.append(plane)
        return found


for _name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"):
    _shuffle(_name)


@rule("unfold", MOVES)
def unfold(labels: Labels, out: Tensor, x: Tensor, dim: int, size: int, step: int) -> Planes:
    found = []
    for plane in labels.planes(x):
        found.append(plane.unfold(dim, size, step) if plane.shape[dim] > 1 else plane.unsqueeze(-1))
    return found


@rule("im2col", MOVES)
def im2col(labels: Labels, out: Tensor, x: Tensor, *args: Any) -> Planes:
    found = []
    for plane in labels.planes(x):
        if varying(plane) == [x.dim() - 3] and x.dim() == 4:
            found.append(plane.reshape(1, -1, 1).repeat_interleave(out.shape[1] // x.shape[1], 1))
        else:
            labels.pin([plane], "is unfolded along positions in {}")
    return found


@rule("as_strided", MOVES)
def as_strided(labels: Labels, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Planes:
    return labels.through_memory(x, out)


@rule("tril triu", "positions stay as they are; channels in a triangle are pinned")
def triangle(labels: Labels, out: Tensor, x: Tensor, *args: Any) -> Planes:
    planes = labels.planes(x)
    labels.pin([p for p in planes if p.shape[-1] > 1 or p.shape[-2] > 1], "is cut to a triangle in {}")
    return list(planes)


@rule("copy", MOVES)
def copy(labels: Labels, out: Tensor, x: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Planes:
    labels.read.add(id(x))
    planes = labels.planes(source)
    if labels.is_uniform(source) or source.dim() == 0:
        return []
    return [aligned(plane, x.dim()) for plane in planes]


@rule("fill zero", "what is written has no labels", reads_all=False)
def fill(labels: Labels, out: Tensor, *args: Any, **kwargs: Any) -> Planes:
    return []


@rule("glu", "the two halves are united")
def glu(labels: Labels, out: Tensor, x: Tensor, dim: int = -1) -> Planes:
    dim %= x.dim()
    size = out.shape[dim]
    planes = labels.planes(x)
    halves = []
    for k in (0, 1):
        half = [plane.narrow(dim, k * size, size) if plane.shape[dim] > 1 else plane for plane in planes]
        halves.append(Operand(list(out.shape), half))
    return combined(labels, halves)
