"""The CUDA kernels on the host: built against the emulation, and run in place of the CPU's."""

from __future__ import annotations

import functools
import os
import pathlib
import random
from typing import Any

import cases
import torch
from torch import Tensor
from torch.utils import cpp_extension

from lnprune import ops

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = (
    *("launches.cpp", "roots.cu", "topk.cu", "masks.cu"),
    *(f"rank_{name}.cu" for name in ("float64", "float32", "float16", "bfloat16", "float8")),
)
OPS = (
    *("channel_norms", "channel_sums", "scaled_norms", "norms_of_sums", "select_channels", "write_masks"),
    *("prune_channels", "zero_channels_", "prune_channels_"),
)


@functools.cache
def build(patched: pathlib.Path | None = None) -> Any:
    """The extension module of the emulated ops, which are registered as ``torch.ops.lnprune_emulated``.

    Kernels that lie in the folder ``patched``, under the names of the originals, take their places; the
    ordinary build must have left the rest. A process can load one build only.
    """
    name = "lnprune_emulated"
    folder = ROOT / "build" / f"{name}-{os.getuid()}-torch{torch.__version__}"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
    flags = sanitize if os.environ.get("LNPRUNE_SANITIZE") else []
    folder = folder.with_name(folder.name + ("-sanitized" if flags else ""))
    emulation = ROOT / "tests" / "cuda_emulation"
    originals = [emulation / "emulation.cpp", emulation / "ops_emulated.cpp"]
    originals += [ROOT / "csrc" / "cuda" / kernel for kernel in KERNELS]
    compiled, objects = originals, []
    if patched is not None:
        compiled = [patched / source.name for source in originals if (patched / source.name).exists()]
        names = {source.name for source in compiled}
        objects = [str(folder / f"{source.name}.o") for source in originals if source.name not in names]
        folder = patched
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for source in compiled:
        # Host compilers do not know the suffix .cu.
        wrapper = folder / f"{source.name}.cpp"
        text = f'#include "{source}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        sources.append(str(wrapper))
    module = cpp_extension.load(
        name,
        sources,
        extra_cflags=[
            "-DLNPRUNE_EMULATED_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            f"-I{emulation}",
            f"-I{ROOT / 'csrc' / 'cuda'}",
            "-O2" if patched is None else "-O0",
            "-ffp-contract=off",
            "-Wno-unknown-pragmas",
            *flags,
        ],
        extra_ldflags=[*objects, *flags],
        build_directory=str(folder),
    )
    library = torch.library.Library(name, "IMPL")
    for op in OPS:
        library.impl(op, torch.library.fallthrough_kernel, "Autograd")
    _libraries.append(library)
    return module


_libraries: list[torch.library.Library] = []
# Apart from all other random numbers: what is tested draws the same as on other devices.
_random = random.Random()


def manual_seed(seed: int) -> None:
    """Scheduling orders that are chosen at random repeat from here on."""
    _random.seed(seed)


def set_order(module: Any, schedule: int) -> None:
    """The order in which the next calls run."""
    module.set_schedule(schedule, _random.getrandbits(64))


def in_any_order(module: Any, op: Any) -> Any:
    """The op, each call in a scheduling order of threads and blocks chosen at random."""

    def run(*arguments: Any) -> Any:
        set_order(module, _random.randrange(module.schedules))
        return op(*arguments)

    return run


def in_every_order(module: Any, op: Any) -> Any:
    """The op, run once per scheduling order of threads and blocks; all must give the same bits.

    Tensors that it writes in place hold the same at the start of every run, and at the end of the last
    one what they held after the first.
    """
    places = [
        place
        for place, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def run(*arguments: Any) -> Any:
        in_place = [tensor for place in places for tensor in arguments[place]]
        before = [cases.bits(tensor) for tensor in in_place]
        results = []
        for schedule in range(module.schedules):
            if results:
                for tensor, held in zip(in_place, before, strict=True):
                    # Of no concern to autograd, nor to the counter of versions.
                    tensor.data.view(held.dtype).copy_(held)
            set_order(module, schedule)
            result = op(*arguments)
            results.append([cases.bits(tensor) for tensor in in_place] if places else result)
        for result in results[1:]:
            assert_same(result, results[0])
        return None if places else results[0]

    return run


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(actual, Tensor):
        if not actual.is_floating_point():
            assert torch.equal(actual, expected), "another scheduling order"
        else:
            cases.assert_same_bits(actual, expected, "another scheduling order")
        return
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


def replace_native_ops() -> None:
    """From here on, what goes through ``lnprune.ops`` runs on the emulated GPU, in any order."""
    module = build()
    for op in OPS:
        setattr(ops, f"_{op}", in_any_order(module, getattr(torch.ops.lnprune_emulated, op).default))
