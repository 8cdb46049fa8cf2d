"""Other ways to do what the CUDA kernels do: built beside them, and timed against them in one process.

A variant is the kernels with a few texts replaced. It is a library of its own, with ops of its own names,
made from the objects that ``python setup.py build_ext --inplace`` left and from what is compiled with the
replaced texts.

    python -m benchmarks.cuda_variants --build           the libraries, on any machine with nvcc
    python -m benchmarks.cuda_variants --out build/gpu   those that are missing, and times, on a GPU
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import calls, cuda_report, report
from benchmarks.cuda_timing import Gpu
from benchmarks.program import BUILD
from benchmarks.report import Row
from benchmarks.shapes import RESNET50, TRANSFORMER_7B, Case, Shape
from benchmarks.timing import Peer

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
LIBRARIES = ROOT / "build" / "variants"
BUDGET = 0.3
DEVICE = "cuda"
# Sums in another order differ by this much at most.
LARGEST_DIFFERENCE = 1e-12
# As in setup.py.
COMMON_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-O3"]
CXX_FLAGS = [
    *COMMON_FLAGS,
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-g0",
    "-DUSE_CUDA",
]
NVCC_FLAGS = [*COMMON_FLAGS, "-fmad=false", "-Xcompiler=-fvisibility=hidden"]
# The ops of a variant have a name of their own.
OPS = "ops_cuda.cpp"
REGISTRATION = "STABLE_TORCH_LIBRARY_IMPL(lnprune, CUDA, library) {"

NORMS, PRUNE, MODEL = "channel_norms", "prune_channels", "prune_channels, a list"
HALF_GIGABYTE: Shape = (8192, 16384)
QUARTER: Shape = (8192, 8192)
MATRIX: Shape = (4096, 4096)
CONVOLUTIONS: Shape = (2048, 4096, 3, 3)
FLOAT8 = torch.float8_e4m3fn
# What is compiled for cases of float32 and of bfloat16, where all kernels change.
RANK = ("rank_float32.cu", "rank_bfloat16.cu")


class Timed(NamedTuple):
    """A call on tensors of these shapes."""

    call: str
    name: str
    cases: list[Case]


def one(call: str, shape: Shape, dim: int, dtype: torch.dtype = torch.float32) -> Timed:
    case = Case(shape, dtype, dim, 2)
    return Timed(call, report.case_row(case, None)["shape"], [case])


def model(name: str, shapes: list[tuple[int, Shape]], dtype: torch.dtype) -> Timed:
    return Timed(MODEL, name, [Case(shape, dtype, 0, 2) for count, shape in shapes for _ in range(count)])


RESNET = model("ResNet-50", RESNET50, torch.float32)
TRANSFORMER = model("7B transformer", TRANSFORMER_7B, torch.bfloat16)


class Variant(NamedTuple):
    """What is otherwise, as (file, text, replacement); what that is compiled into; and what to time."""

    title: str
    texts: tuple[tuple[str, str, str], ...]
    compiled: tuple[str, ...]
    timed: tuple[Timed, ...]


VARIANTS = {
    "one_fence": Variant(
        "one thread of a block fences for all",
        (
            (
                "rank_block.h",
                "  __threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) {\n    // The last",
                "  __syncthreads();\n  if (threadIdx.x == 0) {\n    __threadfence();\n    // The last",
            ),
            (
                "rank_block.h",
                "atomicInc(ticket, last) == last;\n  }\n  __syncthreads();\n  __threadfence();\n",
                "atomicInc(ticket, last) == last;\n    __threadfence();\n  }\n  __syncthreads();\n",
            ),
        ),
        RANK,
        (one(NORMS, QUARTER, 1), one(NORMS, CONVOLUTIONS, 1), one(NORMS, MATRIX, 0), RESNET),
    ),
    "tickets_in_scratch": Variant(
        "tickets in memory of the call, which a fill sets to zero",
        ((OPS, "if (capture != cudaStreamCaptureStatusNone) {", "if (true) {"),),
        (),
        (one(NORMS, MATRIX, 1), one(PRUNE, MATRIX, 1), RESNET),
    ),
    "large_tables_alone": Variant(
        "tables of 32 KB alone",
        (("launches.h", "if (tasks.size() > FewTasks::kCapacity) return", "if (true) return"),),
        (*RANK, "masks.cu", "topk.cu"),
        (one(NORMS, (64, 64), 0), one(PRUNE, (64, 64), 0), one(PRUNE, MATRIX, 0)),
    ),
    "small_tables_alone": Variant(
        "tables of 4 KB alone",
        (("launches.h", "Table<Task, kMostBytesOf<Task>>;", "Table<Task, kParameterBytes>;"),),
        (*RANK, "masks.cu", "topk.cu", "launches.cpp"),
        (RESNET, TRANSFORMER),
    ),
    "two_blocks_to_write_float8": Variant(
        "two blocks a multiprocessor write float8",
        (("masks.cu", "sizeof(T) == 1 ? 1 : 2;", "2;"),),
        ("masks.cu",),
        (one(PRUNE, (16384, 16384), 0, FLOAT8), one(PRUNE, (16384, 16384), 1, FLOAT8)),
    ),
    "three_blocks_to_write": Variant(
        "three blocks a multiprocessor write elements of 16 bits and more",
        (("masks.cu", "sizeof(T) == 1 ? 1 : 2;", "sizeof(T) == 1 ? 1 : 3;"),),
        ("masks.cu",),
        (
            one(PRUNE, HALF_GIGABYTE, 0, torch.bfloat16),
            one(PRUNE, HALF_GIGABYTE, 1, torch.bfloat16),
            one(PRUNE, QUARTER, 0, torch.float64),
        ),
    ),
    "half_the_rows_a_chunk": Variant(
        "chunks of columns with half the rows",
        (("launches.cpp", "kBytesPerPartial = 2 * 8 * 64;", "kBytesPerPartial = 8 * 64;"),),
        ("launches.cpp",),
        (one(NORMS, MATRIX, 1), one(NORMS, QUARTER, 1), one(NORMS, CONVOLUTIONS, 1)),
    ),
    "twice_the_rows_a_chunk": Variant(
        "chunks of columns with twice the rows",
        (("launches.cpp", "kBytesPerPartial = 2 * 8 * 64;", "kBytesPerPartial = 4 * 8 * 64;"),),
        ("launches.cpp",),
        (one(NORMS, MATRIX, 1), one(NORMS, QUARTER, 1), one(NORMS, CONVOLUTIONS, 1)),
    ),
}


# --- Building -------------------------------------------------------------------------------------------


def namespace(name: str) -> str:
    return f"lnprune_{name}"


def sources(name: str) -> dict[str, str]:
    """The texts of a variant's files, headers and what is compiled, by their names.

    Raises:
        ValueError: a text that is replaced is not once in its file.
    """
    variant = VARIANTS[name]
    files = [*(path.name for path in KERNELS.glob("*.h")), *variant.compiled, OPS]
    found = {file: (KERNELS / file).read_text() for file in files}
    registration = (
        OPS,
        REGISTRATION,
        f"STABLE_TORCH_LIBRARY({namespace(name)}, library) {{ lnprune::define_ops(library); }}\n"
        f"STABLE_TORCH_LIBRARY_IMPL({namespace(name)}, CUDA, library) {{",
    )
    for file, text, replacement in (*variant.texts, registration):
        if found[file].count(text) != 1:
            raise ValueError(
                f"{name}: expected once in {file}, found {found[file].count(text)} times: {text}"
            )
        found[file] = found[file].replace(text, replacement)
    return found


def library(name: str, folder: pathlib.Path = LIBRARIES) -> pathlib.Path:
    """Where a variant's library lies: in a folder of its own, another one when a source changes."""
    texts = {path.name: path.read_text() for path in sorted(KERNELS.parent.rglob("*.*"))} | sources(name)
    key = json.dumps([torch.__version__, texts], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return folder / f"{name}-{digest}" / f"{namespace(name)}.so"


def build(name: str) -> None:
    """Compiles what the variant changes and links it with the objects of the kernels as they are."""
    from torch.utils import cpp_extension

    built = sorted(ROOT.glob("build/temp*/csrc/cuda"), key=lambda path: path.stat().st_mtime)
    if not built:
        raise FileNotFoundError("expected build/temp*, which python setup.py build_ext --inplace leaves")
    rules = (built[-1].parent.parent / "build.ninja").read_text()
    if compiler := re.search(r"^nvcc = (.+)/bin/nvcc$", rules, re.MULTILINE):  # the one that setup.py found
        cpp_extension.CUDA_HOME = compiler[1]
    texts = sources(name)
    folder = library(name).parent
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        report.save_text(folder / file, text)
    compiled = [str(folder / file) for file in texts if not file.endswith(".h")]
    objects = [str(file) for file in sorted(built[-1].glob("*.o")) if not is_compiled(file, texts)]
    cpp_extension.load(
        namespace(name),
        compiled,
        extra_cflags=[*CXX_FLAGS, f"-I{KERNELS}"],
        extra_cuda_cflags=[*NVCC_FLAGS, f"-I{KERNELS}"],
        extra_ldflags=objects,
        build_directory=str(folder),
        with_cuda=True,
        is_python_module=False,
    )


def is_compiled(built: pathlib.Path, texts: dict[str, str]) -> bool:
    """Whether an object is replaced by one of the variant."""
    return any(file in texts for file in (f"{built.stem}.cu", f"{built.stem}.cpp"))


def build_missing(names: list[str]) -> dict[str, str]:
    """Builds the libraries that are not there, side by side. Returns what those say that fail."""
    missing = [name for name in names if not library(name).exists()]
    jobs = max(1, 2 * (os.cpu_count() or 1) // max(1, len(missing)))
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cuda_variants", "--build", name],
            cwd=ROOT,
            env={"MAX_JOBS": str(jobs), **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in missing
    }
    said = {name: process.communicate()[0] for name, process in running.items()}
    return {name: said[name] for name, process in running.items() if process.returncode != 0}


# --- Timing ---------------------------------------------------------------------------------------------


def peer(ops: Any, timed: Timed, weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    """The call, by ops of one name. Returns norms, or masks and masked weights."""
    dims = [case.dim for case in timed.cases]
    if timed.call == NORMS:
        return lambda: ops.channel_norms(weights, dims, 2.0)
    amounts = [-1] * len(dims), [calls.AMOUNT] * len(dims)

    def prune() -> list[Tensor]:
        masks, masked = ops.prune_channels(weights, [], weights, dims, 2.0, *amounts)
        return [*masks, *masked]

    return prune


def difference(timed: Timed, found: list[Tensor], expected: list[Tensor]) -> str | None:
    """What is wrong with the results of a variant, if anything."""
    for number, (tensor, wanted) in enumerate(zip(found, expected, strict=True)):
        if timed.call == NORMS:
            if (error := calls.norm_error(tensor, wanted)) > LARGEST_DIFFERENCE:
                return f"norms differ by {error:.1e}"
        elif not torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)):
            return f"tensor {number} differs"
    return None


def rows_of(name: str, ours: Any, theirs: Any, gpu: Gpu) -> Iterator[Row]:
    """Times of a variant's calls over those of the kernels as they are."""
    for timed in VARIANTS[name].timed:
        weights = [calls.random_weight(case, DEVICE, seed) for seed, case in enumerate(timed.cases)]
        here, there = peer(ours, timed, weights), peer(theirs, timed, weights)
        fault = difference(timed, there(), here())
        peers = {"lnprune": Peer(lambda _, run=here: run()), "variant": Peer(lambda _, run=there: run())}
        device, wall = gpu.interleaved(peers, BUDGET)
        row = report.case_row(timed.cases[0], fault) | {"shape": timed.name, "call": timed.call}
        yield {"variant": name, **row} | {
            "lnprune": device.seconds("lnprune"),
            "time": device.seconds("variant"),
            "over_lnprune": device.ratio("variant", "lnprune"),
            "wall_over_lnprune": wall.ratio("variant", "lnprune"),
        }


def measure(names: list[str], faults: dict[str, str], gpu: Gpu) -> Iterator[Row]:
    """All variants, those that were not built with the reason."""
    for name in names:
        if name in faults:
            yield {"variant": name, "fault": f"not built: {' '.join(faults[name].split())[-300:]}"}
            continue
        torch.ops.load_library(str(library(name)))
        yield from rows_of(name, torch.ops.lnprune, getattr(torch.ops, namespace(name)), gpu)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_variants")
    parser.add_argument("names", nargs="*", help=f"none: {', '.join(VARIANTS)}")
    parser.add_argument("--build", action="store_true", help="build only: needs nvcc, and no GPU")
    parser.add_argument("--out", type=pathlib.Path, default=BUILD, help="folder of variants.json")
    given = parser.parse_args()
    names = given.names or list(VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if given.build and len(names) == 1:
        build(names[0])
        return 0
    if not given.build and not torch.cuda.is_available():
        parser.error("no CUDA device: nothing was measured")
    faults = build_missing(names)
    if given.build:
        print("\n".join(f"{name}: {said}" for name, said in faults.items()) or f"built {', '.join(names)}")
        return 1 if faults else 0

    rows: list[Row] = []
    machine = cuda_report.environment()
    given.out.mkdir(parents=True, exist_ok=True)
    for row in measure(names, faults, Gpu()):
        rows.append(row)
        report.show(row)
        report.save_json(given.out / "variants.json", {"environment": machine}, [], {"variants": rows})
    return 1 if report.faults({"variants": rows}) else 0


if __name__ == "__main__":
    sys.exit(main())
