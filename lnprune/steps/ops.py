"""The native ops: loading the library, typed wrappers, and fake kernels beside them."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import types
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lnprune.steps.local import PLAIN_TYPES

_FOLDER = pathlib.Path(__file__).parent.parent
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _load() -> types.ModuleType:
    try:
        from lnprune import _C
    except ImportError as error:
        libraries = sorted(path.name for path in _FOLDER.glob("_C.*so"))
        built = f"built: {', '.join(libraries)}" if libraries else "none has been built"
        raise ImportError(
            f"lnprune cannot load its native library ({built}; running: torch "
            f"{torch.__version__}, needed: torch 2.11 or newer; the loader says: {error}). "
            f"Build it for this torch and this Python, in the source folder: {_REBUILD}"
        ) from error
    return _C


def _load_cuda() -> str:
    """Registers the CUDA kernels where there are any; says which version of CUDA, or why not."""
    if torch.version.cuda is None:
        return "not loaded: this torch has no CUDA"
    libraries = sorted(_FOLDER.glob("_C_cuda*.so"))
    if not libraries:
        return "not built"
    try:
        torch.ops.load_library(str(libraries[0]))
        version = ctypes.CDLL(str(libraries[0])).lnprune_cuda_version()
    except OSError as error:
        return f"not loaded: {error}"
    return f"{version // 1000}.{version % 1000 // 10}"


_C = _load()
_BUILD_INFO = _C.build_info()
_BUILD_INFO["cuda"] = _load_cuda()
_HAS_CUDA = not _BUILD_INFO["cuda"].startswith("not ")


def build_info() -> dict[str, str]:
    """What the native libraries were built with, and the instruction set that the CPU's runs with.

    Example:
        >>> import lnprune
        >>> sorted(lnprune.ops.build_info())
        ['compiler', 'cuda', 'instruction_set', 'torch']
    """
    return dict(_BUILD_INFO)


def first_unwritable(addresses: list[int]) -> int:
    """The index of the first address that the process may not write to, or their number if there is none.

    Example:
        >>> import lnprune
        >>> import torch
        >>> lnprune.ops.first_unwritable([torch.zeros(4).data_ptr()])
        1
    """
    return _C.first_unwritable(addresses)


def has_cuda() -> bool:
    """Whether the CUDA kernels are loaded; without them, CUDA tensors go through plain torch.

    Example:
        >>> import lnprune
        >>> lnprune.ops.has_cuda() == (not lnprune.ops.build_info()["cuda"].startswith("not "))
        True
    """
    return _HAS_CUDA


@functools.cache
def _warn_of_plain_torch() -> None:
    warnings.warn(
        f"lnprune has no CUDA kernels here (CUDA: {_BUILD_INFO['cuda']}; library built with torch "
        f"{_BUILD_INFO['torch']}, running: torch {torch.__version__}): CUDA tensors go through plain "
        f"torch. To build them, with nvcc installed, in the source folder: {_REBUILD}",
        stacklevel=2,
    )


_NATIVE_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    }
)


def is_native(tensor: Tensor) -> bool:
    """Whether the native code takes this tensor; others go through :mod:`lnprune.reference`."""
    if not (
        type(tensor) in PLAIN_TYPES
        and tensor.dtype in _NATIVE_DTYPES
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and tensor.numel() > 0
    ):
        return False
    if tensor.is_cpu:
        return True
    if tensor.is_cuda and not _HAS_CUDA:
        _warn_of_plain_torch()
    return tensor.is_cuda and _HAS_CUDA


def are_native(a: Tensor, b: Tensor) -> bool:
    """Whether the native code takes these two together: both native, on one device."""
    return is_native(a) and (a is b or (is_native(b) and a.device == b.device))


# No op has a derivative: autograd is passed by, so that inputs need no detaching.
_library = torch.library.Library("lnprune", "IMPL")
_OPS = (
    *("channel_norms", "channel_sums", "scaled_norms", "norms_of_sums", "select_channels", "write_masks"),
    *("prune_channels", "zero_channels_", "prune_channels_"),
)
for _name in _OPS:
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

# Looked up once: an attribute chain per call costs as much as the smallest kernel.
_channel_norms = torch.ops.lnprune.channel_norms.default
_channel_sums = torch.ops.lnprune.channel_sums.default
_scaled_norms = torch.ops.lnprune.scaled_norms.default
_norms_of_sums = torch.ops.lnprune.norms_of_sums.default
_select_channels = torch.ops.lnprune.select_channels.default
_write_masks = torch.ops.lnprune.write_masks.default
_prune_channels = torch.ops.lnprune.prune_channels.default
_zero_channels_ = torch.ops.lnprune.zero_channels_.default
_prune_channels_ = torch.ops.lnprune.prune_channels_.default


def channel_norms(
    tensors: Sequence[Tensor], dims: Sequence[int], p: float, batches: Sequence[int] = ()
) -> list[Tensor]:
    """The norms of order ``p`` of every slice along ``dims[i]`` of ``tensors[i]``.

    ``batches`` is empty, or has for each tensor the dim of its batch and how many matrices are side by side
    along it (1: no batch), each with channels of its own. There is no room for all layouts: a batch has to
    lie outside of the other dims in memory, or of all that lies between it and the channels.

    Returns one float64 tensor of shape ``(channels,)``, or ``(matrices * channels,)``, per tensor. Not
    differentiable.

    Example:
        >>> import torch
        >>> from lnprune import ops
        >>> experts = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]])
        >>> ops.channel_norms([experts], [1], 2.0, batches=[0, 2])
        [tensor([5., 1., 2., 0.], dtype=torch.float64)]
    """
    if not tensors:  # the dispatcher finds no backend in an empty list
        return []
    return _channel_norms(tensors, dims, p, batches)


def channel_sums(
    tensors: Sequence[Tensor], dims: Sequence[int], p: float, batches: Sequence[int] = ()
) -> list[Tensor]:
    """What :func:`channel_norms` takes the root of: the sum of ``|x|**p`` of every slice.

    For ``p = 0`` the count of elements that are not zero, for infinite orders the largest or the smallest
    magnitude. The sums of parts of a slice, added (for infinite orders, the largest or the smallest of
    them), are the sum of the whole; NaN in a slice makes its sum NaN, except for ``p = 0``.

    Returns one float64 tensor of shape ``(channels,)`` per tensor. Not differentiable.

    Example:
        >>> import torch
        >>> from lnprune import ops
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
        >>> ops.channel_sums([weight], [0], 2.0)
        [tensor([25.,  4.], dtype=torch.float64)]
    """
    if not tensors:  # the dispatcher finds no backend in an empty list
        return []
    return _channel_sums(tensors, dims, p, batches)


def scaled_norms(
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    factors: Sequence[Tensor],
    factor_dims: Sequence[int],
    p: float,
    rooted: bool = True,
    batches: Sequence[int] = (),
) -> list[Tensor]:
    """:func:`channel_norms` of tensors whose elements are multiplied by a factor first; no product is made.

    ``factors[i]`` has one factor for each index along ``factor_dims[i]``, contiguous float64; where there
    is a batch, those of each matrix, or as many for each, one after another. With ``rooted=False`` it gives
    what :func:`channel_sums` does.

    Returns one float64 tensor of shape ``(channels,)``, or ``(matrices * channels,)``, per tensor. Not
    differentiable.

    Example:
        >>> import torch
        >>> from lnprune import ops
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
        >>> ops.scaled_norms([weight], [0], [torch.tensor([1.0, 0.0]).double()], [1], 2.0)
        [tensor([3., 0.], dtype=torch.float64)]
    """
    if not tensors:  # the dispatcher finds no backend in an empty list
        return []
    return _scaled_norms(tensors, dims, factors, factor_dims, p, rooted, batches)


def norms_of_sums(sums: Sequence[Tensor], p: float) -> list[Tensor]:
    """The norms of order ``p`` of slices with these sums, which are contiguous float64 with one dim.

    Of :func:`channel_sums`, exactly what :func:`channel_norms` gives. Sums are not negative; those of
    orders 0, 1 and infinity are the norms.

    Returns one new float64 tensor per tensor, of its shape. Not differentiable.

    Example:
        >>> import torch
        >>> from lnprune import ops
        >>> halves = torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [-2.0]])
        >>> left, right = ops.channel_sums(halves, [0, 0], 2.0)
        >>> ops.norms_of_sums([left + right], 2.0)
        [tensor([5., 2.], dtype=torch.float64)]
    """
    if not sums:  # the dispatcher finds no backend in an empty list
        return []
    return _norms_of_sums(sums, p)


def select_channels(
    norms: Sequence[Tensor],
    mask_counts: Sequence[Tensor],
    counts: Sequence[int],
    fractions: Sequence[float],
    rankings: Sequence[int] = (),
) -> list[Tensor]:
    """Which channels stay when the ones that rank last are pruned.

    Per tensor, ``counts[i]`` channels are pruned, or, where that is negative, the fraction
    ``fractions[i]`` of those that take part, rounded half to even. ``mask_counts`` is empty, or
    holds the norms of order 0 of the masks: channels with 0 take no part and do not stay. ``rankings`` is
    empty, or says how many rankings of equal length each tensor holds, one after another: then counts and
    fractions are those of all rankings.

    Returns one bool tensor of the shape of its norms per tensor.
    """
    if not norms:  # the dispatcher finds no backend in an empty list
        return []
    return _select_channels(norms, mask_counts, counts, fractions, rankings)


def write_masks(
    keep: Sequence[Tensor],
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    originals: Sequence[Tensor],
    dims: Sequence[int],
    batches: Sequence[int] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """The masks that keep the flagged channels, and the masked originals.

    ``masks`` is empty (ones), or holds the masks so far, of the shape and dtype of ``scores``:
    then ``new_mask = mask * keep``, contiguous. Otherwise a mask has the memory format that
    ``torch.zeros_like(score)`` has. ``originals`` is empty, and no weights are returned, or holds
    tensors of the dtype and strides of the new masks: then ``weight = new_mask * original``.
    """
    if not scores:  # the dispatcher finds no backend in an empty list
        return ([], [])
    return _write_masks(keep, scores, masks, originals, dims, batches)


def prune_channels(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    originals: Sequence[Tensor],
    dims: Sequence[int],
    p: float,
    counts: Sequence[int],
    fractions: Sequence[float],
    batches: Sequence[int] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`channel_norms`, :func:`select_channels` and :func:`write_masks` in one call.

    Where there are batches, every ranking of a tensor has its count and its fraction.
    """
    if not scores:  # the dispatcher finds no backend in an empty list
        return ([], [])
    return _prune_channels(scores, masks, originals, dims, p, counts, fractions, batches)


def zero_channels_(
    tensors: Sequence[Tensor], keep: Sequence[Tensor], dims: Sequence[int], batches: Sequence[int] = ()
) -> None:
    """Writes zeros in place, to the channels along ``dims[i]`` that are not flagged in ``keep[i]``.

    Always +0.0, where a mask times infinity would give NaN. Kept channels are not touched. The tensors
    are without gaps and overlaps.
    """
    if tensors:  # the dispatcher finds no backend in an empty list
        _zero_channels_(tensors, keep, dims, batches)
        increment_version(tensors)


def prune_channels_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    dims: Sequence[int],
    p: float,
    counts: Sequence[int],
    fractions: Sequence[float],
    batches: Sequence[int] = (),
) -> None:
    """:func:`channel_norms` of the scores, :func:`select_channels` and :func:`zero_channels_` in one call.

    ``scores[i]`` may be ``weights[i]`` itself.
    """
    if scores:  # the dispatcher finds no backend in an empty list
        _prune_channels_(scores, weights, dims, p, counts, fractions, batches)
        increment_version(weights)
