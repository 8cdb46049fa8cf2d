"""The CUDA kernels on the host: building them against the emulation, and running them in place of the CPU's."""

from __future__ import annotations

import itertools
import os
import pathlib
import tempfile
from typing import Any

import cases
import torch
from torch import Tensor
from torch.utils import cpp_extension

from lnprune import ops

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ("launches.cpp", "norms.cu", "topk.cu", "masks.cu")
OPS = ("channel_norms", "select_channels", "write_masks", "prune_channels")


def build(name: str = "lnprune_emulated", kernels: pathlib.Path = ROOT / "csrc" / "cuda") -> Any:
    """The extension module of the emulated ops, which are registered as ``torch.ops.<name>``."""
    folder = pathlib.Path(tempfile.gettempdir()) if name != "lnprune_emulated" else ROOT / "build"
    folder = folder / f"{name}-{os.getuid()}-torch{torch.__version__}"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
    flags = sanitize if os.environ.get("LNPRUNE_SANITIZE") else []
    folder = folder.with_name(folder.name + ("-sanitized" if flags else ""))
    folder.mkdir(parents=True, exist_ok=True)
    emulation = ROOT / "tests" / "cuda_emulation"
    sources = [emulation / "emulation.cpp", emulation / "ops_emulated.cpp"]
    for kernel in KERNELS:
        # Host compilers do not know the suffix .cu.
        source = folder / f"{kernel.split('.')[0]}_emulated.cpp"
        text = f'#include "{kernels / kernel}"\n'
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        sources.append(source)
    module = cpp_extension.load(
        name,
        [str(source) for source in sources],
        extra_cflags=[
            "-DLNPRUNE_EMULATED_CUDA",
            f"-DLNPRUNE_EMULATED_NAMESPACE={name}",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            f"-I{emulation}",
            "-O2",
            "-ffp-contract=off",
            "-Wno-unknown-pragmas",
            *flags,
        ],
        extra_ldflags=flags,
        build_directory=str(folder),
    )
    library = torch.library.Library(name, "IMPL")
    for op in OPS:
        library.impl(op, torch.library.fallthrough_kernel, "Autograd")
    _libraries.append(library)
    return module


_libraries: list[torch.library.Library] = []
_seeds = itertools.count()


def in_every_order(module: Any, op: Any) -> Any:
    """The op, run once per scheduling order of threads and blocks; all must give the same bits."""

    def run(*arguments: Any) -> Any:
        results = []
        for schedule in range(module.schedules):
            module.set_schedule(schedule, next(_seeds))
            results.append(op(*arguments))
        for result in results[1:]:
            assert_same(result, results[0])
        return results[0]

    return run


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(actual, Tensor):
        if actual.dtype == torch.bool:
            assert torch.equal(actual, expected)
        else:
            cases.assert_same_bits(actual, expected, "another scheduling order")
        return
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


def replace_native_ops() -> None:
    """From here on, what goes through ``lnprune.ops`` runs on the emulated GPU, in every order."""
    module = build()
    for op in OPS:
        setattr(ops, f"_{op}", in_every_order(module, getattr(torch.ops.lnprune_emulated, op).default))
