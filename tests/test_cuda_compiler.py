"""What the real compiler makes of the CUDA kernels: resources, machine code, loads in flight.

``python tests/test_cuda_compiler.py`` prints the tables of resources and of instructions in docs/cuda.md.
"""

from __future__ import annotations

import concurrent.futures
import heapq
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import pytest
from torch.utils import cpp_extension

pytestmark = pytest.mark.slow

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ("-O3", "-fmad=false", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000")

NAMED_NORMS = ("NonzeroCount", "Sum", "SumOfSquares", "Maximum", "Minimum")  # p in {0, 1, 2, inf, -inf}
NORMS = (*NAMED_NORMS, "HalfIntegerPowerSum", "PowerSum")
ELEMENTS = ("float64", "float32", "float16", "bfloat16")
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
RANK = [f"rank {norm} {element}" for norm in NORMS for element in (*ELEMENTS, "float8")]
WRITE = [f"write {element}" for element in (*ELEMENTS, *FLOAT8)]
ROOT = [f"root {norm}" for norm in NORMS]
ZERO = [f"zero uint{bits}" for bits in (64, 32, 16, 8)]
FEW = [*RANK, *ROOT, "select", *WRITE, *ZERO]
SCALED = [
    f"scaled {norm} {element}" for norm in NORMS for element in (*ELEMENTS, "float8")
]  # few tasks alone


def with_many(kernels: list[str]) -> list[str]:
    """The kernels, and those of the same code whose tables hold many tasks."""
    return [*kernels, *(f"many {kernel}" for kernel in kernels)]


# What an H200 has, for cuda_occupancy.h; a line of input is "registers, bytes of shared memory, threads".
OCCUPANCY = """
#include <climits>
#include <cstdio>
#include <cuda_occupancy.h>

int main() {
  cudaOccDeviceProp h200{};
  h200.computeMajor = 9;
  h200.computeMinor = 0;
  h200.maxThreadsPerBlock = 1024;
  h200.maxThreadsPerMultiprocessor = 64 * 32;
  h200.regsPerBlock = 65536;
  h200.regsPerMultiprocessor = 65536;
  h200.warpSize = 32;
  h200.sharedMemPerBlock = 48 << 10;
  h200.sharedMemPerMultiprocessor = 228 << 10;
  h200.numSms = 132;
  h200.sharedMemPerBlockOptin = 227 << 10;
  h200.reservedSharedMemPerBlock = 1 << 10;
  const cudaOccDeviceState state;
  int registers, shared, threads;
  while (std::scanf("%d %d %d", &registers, &shared, &threads) == 3) {
    cudaOccFuncAttributes kernel{};
    kernel.maxThreadsPerBlock = INT_MAX;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = static_cast<size_t>(shared);
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.numBlockBarriers = 1;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &h200, &kernel, &state, threads, 0) !=
        CUDA_OCC_SUCCESS)
      return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


class Resources(NamedTuple):
    """What a block or a thread of a kernel takes, by the compiler's report."""

    registers: int
    shared: int  # bytes
    stack: int  # bytes, as are the spills
    spill_stores: int
    spill_loads: int


class Instruction(NamedTuple):
    """One instruction of a kernel's machine code."""

    address: int
    text: str

    @property
    def operation(self) -> str:
        """``LDG.E.128.CONSTANT`` of ``@!P3 LDG.E.128.CONSTANT R4, desc[UR6][R64.64]``."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]


Code = list[Instruction]

FLOAT64_SUM = r"D(?:FMA|MUL|ADD)\b"
MEMORY = r"(?:LD|LDG|LDL|LDS|LDSM|ST|STG|STL|STS|ATOM|ATOMG|ATOMS|RED)\b"


# --- The tools ------------------------------------------------------------------------------------------


def find_nvcc() -> pathlib.Path | None:
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [pathlib.Path(folder) / "bin" / "nvcc" for folder in folders]
    on_path = shutil.which("nvcc")
    candidates += [pathlib.Path(on_path)] if on_path else []
    candidates.append(pathlib.Path("/usr/local/cuda/bin/nvcc"))
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def find_cuobjdump(nvcc: pathlib.Path) -> pathlib.Path | None:
    """LNPRUNE_CUOBJDUMP, else triton's, else the one on the PATH, else nvcc's neighbour."""
    named = os.environ.get("LNPRUNE_CUOBJDUMP")
    if named:
        assert pathlib.Path(named).is_file(), f"LNPRUNE_CUOBJDUMP names no file: {named}"
        return pathlib.Path(named)
    triton = importlib.util.find_spec("triton")
    folders = [pathlib.Path(name) for name in (triton.submodule_search_locations or [])] if triton else []
    candidates = [folder / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in folders]
    on_path = shutil.which("cuobjdump")
    candidates += [pathlib.Path(on_path)] if on_path else []
    candidates.append(nvcc.with_name("cuobjdump"))
    return next((cuobjdump for cuobjdump in candidates if cuobjdump.is_file()), None)


def run(command: list, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done


# --- Reading what they print ----------------------------------------------------------------------------


def kernel_of(symbol: str) -> str:
    """``rank SumOfSquares float32`` for the mangled name of that kernel; of other kernels, their names."""

    def element(mangled: str) -> str:
        named = re.search(r"\d(Half|BFloat16|Float8\w*?)E$", mangled)
        names = {"d": "float64", "f": "float32", "Half": "float16"}
        name = named[1] if named else mangled
        return names.get(name, name.lower())

    # The first name in a mangled list of arguments, and where it matters the type after it.
    few = symbol.replace("Li32764E", "Li4096E")
    many = "many " if few != symbol else ""
    table = r"NS0_5TableI.*?Li4096EEE"
    scaled = re.search(rf"\d+scaled_rank_kernelINS\d?_\d+([A-Za-z]+?)E(\w+?){table}EEvT", few)
    if scaled:
        return f"{many}scaled {scaled[1]} {element(scaled[2])}"
    rank = re.search(rf"\d+rank_kernelINS\d?_\d+([A-Za-z]+?)E(\w+?){table}EEvT", few)
    if rank:
        return f"{many}rank {rank[1]} {element(rank[2])}"
    root = re.search(rf"\d+root_kernelINS\d?_\d+([A-Za-z]+?)E{table}EEvT", few)
    if root:
        return f"{many}root {root[1]}"
    write = re.search(rf"\d+write_kernelI(\w+?){table}EEvT", few)
    if write:
        return f"{many}write {element(write[1])}"
    zero = re.search(rf"\d+zero_kernelI(\w){table}EEvT", few)
    if zero:
        return f"{many}zero uint{ {'h': 8, 't': 16, 'j': 32, 'm': 64}[zero[1]] }"
    other = re.search(r"\d([a-z]+)_kernel", symbol)
    return f"{many}{other[1]}" if other else symbol


def read_report(report: str) -> dict[str, dict[str, Resources]]:
    """The resources of each kernel, by architecture."""
    resources: dict[str, dict[str, Resources]] = {architecture: {} for architecture in ARCHITECTURES}
    for part in report.split("Compiling entry function ")[1:]:
        symbol, architecture = re.match(r"'(\S+)' for '(\w+)'", part).groups()
        # More than one line of each where the kernel calls functions that are not part of it.
        stack, stores, loads = (
            sum(map(int, re.findall(rf"(\d+) bytes {what}", part)))
            for what in ("stack frame", "spill stores", "spill loads")
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", part)))
        kernels = resources.setdefault(architecture, {})
        kernels[kernel_of(symbol)] = Resources(registers, shared, stack, stores, loads)
    return resources


def read_machine_code(listing: str) -> dict[str, dict[str, Code]]:
    """The instructions of each kernel, by architecture."""
    kernels: dict[str, dict[str, Code]] = {architecture: {} for architecture in ARCHITECTURES}
    instruction = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;")
    architecture, code = "", []
    for line in listing.splitlines():
        found = instruction.match(line)
        if found:
            code.append(Instruction(int(found[1], 16), found[2]))
        elif "code for sm_" in line:
            architecture = line.split()[-1]
        elif "Function : " in line:
            code = kernels.setdefault(architecture, {})[kernel_of(line.split()[-1])] = []
    return kernels


def innermost_loops(code: Code) -> list[Code]:
    """From the target of each backward branch to the branch, where no other such range lies within."""
    ranges = set()
    for instruction in code:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", instruction.text)
        if target and int(target[1], 16) <= instruction.address:
            ranges.add((int(target[1], 16), instruction.address))
    innermost = [
        (begin, end)
        for begin, end in ranges
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in ranges)
    ]
    # A branch that waits forever, to itself, ends every kernel.
    return [[i for i in code if begin <= i.address <= end] for begin, end in innermost if begin < end]


def count(code: Code, pattern: str) -> int:
    return sum(re.match(pattern, instruction.operation) is not None for instruction in code)


def wide_load(kernel: str) -> str:
    """The loads of elements in a rank kernel: whole vectors, through the path for constant data."""
    return r"LDG\.E\.64\.CONSTANT" if kernel.endswith("float8") else r"LDG\.E\.128\.CONSTANT"


def hot_loops(kernel: str, code: Code) -> list[Code]:
    return [loop for loop in innermost_loops(code) if count(loop, wide_load(kernel)) > 0]


def loads_from_other_blocks(code: Code) -> int:
    """Eight bytes each, from the cache that all multiprocessors share."""
    return count(code, r"LDG\.E\.64\.STRONG\.GPU\b")


def fenced_tickets(code: Code) -> int:
    """Drawn between two fences for the whole device, each with a barrier between it and the ticket."""
    steps = (re.match(r"MEMBAR(?=\.\w+\.GPU)|BAR\b|ATOMG\.E\.INC\b", i.operation) for i in code)
    return " ".join(step[0] for step in steps if step).count("MEMBAR BAR ATOMG.E.INC BAR MEMBAR")


def loads_used_early(kernel: str, loop: Code) -> list[str]:
    """Instructions that need the result of one wide load before the last is under way."""
    loads = [at for at, i in enumerate(loop) if re.match(wide_load(kernel), i.operation)]
    width = 2 if kernel.endswith("float8") else 4
    early, loaded = [], set()
    for instruction in loop[: loads[-1] + 1]:
        registers = {int(number) for number in re.findall(r"\bR(\d+)\b", instruction.text)}
        if registers & loaded:
            early.append(instruction.text)
        if re.match(wide_load(kernel), instruction.operation):
            first = int(re.search(r"\bR(\d+)\b", instruction.text)[1])
            loaded |= set(range(first, first + width))
    return early


def fewest_instructions(code: Code, loads: int, stores: int) -> int:
    """On the shortest path through a kernel with so many loads and stores of vectors of 16 bytes.

    Whether the conditions on it can hold together is not asked. Calls are not followed.
    """
    places = {instruction.address: place for place, instruction in enumerate(code)}
    # Instructions so far, place, vectors loaded and stored, and where each barrier of branches leads.
    paths: list[tuple[int, int, int, int, tuple[tuple[str, int], ...]]] = [(0, 0, 0, 0, ())]
    seen = set()
    while paths:
        length, place, loaded, stored, barriers = heapq.heappop(paths)
        if (place, loaded, stored, barriers) in seen or loaded > loads or stored > stores:
            continue
        seen.add((place, loaded, stored, barriers))
        operation, text = code[place].operation, code[place].text
        kind = operation.split(".")[0]
        if kind == "EXIT" and (loaded, stored) == (loads, stores):
            return length + 1
        led, after = dict(barriers), place + 1
        if kind == "BSSY":
            led[re.search(r"\bB\d+", text)[0]] = int(text.split("0x")[1].rstrip(" ;"), 16)
        elif kind == "BSYNC":
            after = places[led.pop(re.search(r"\bB\d+", text)[0])]
        elif kind == "BRA":
            after = places[int(text.split("0x")[1].rstrip(" ;"), 16)]
        if kind not in ("EXIT", "CALL", "RET", "BRX"):
            wide = ".128" in operation
            now = loaded + (wide and kind == "LDG"), stored + (wide and kind == "STG")
            heapq.heappush(paths, (length + 1, after, *now, tuple(sorted(led.items()))))
        if re.match(r"@|BRA\S* !?U?P\d", text):
            heapq.heappush(paths, (length + 1, place + 1, loaded, stored, barriers))
    raise AssertionError(f"no path has {loads} loads and {stores} stores of vectors")


def issue_share(instructions: float, bytes_moved: int) -> float:
    """Of what an H200 can issue while an element's bytes move, by the assumptions of docs/cuda.md."""
    elements_per_cycle = 0.9 * 4.3e12 / (132 * 1.98e9) / bytes_moved
    return instructions * elements_per_cycle / (32 * 4)  # four warps in a cycle


# --- What is compiled, once -----------------------------------------------------------------------------


def compile_kernels(nvcc: pathlib.Path, sources: list[pathlib.Path], folder: pathlib.Path) -> str:
    """Objects of ``sources`` in ``folder``; returns the compiler's report."""
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]

    def compiled(source: pathlib.Path) -> str:
        command = [nvcc, *FLAGS, *includes, *targets, "-Xptxas", "-v", "-c", source, "-o"]
        done = run([*command, folder / f"{source.stem}.o"])
        return done.stdout + done.stderr

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return "".join(pool.map(compiled, sources))


def disassemble(cuobjdump: pathlib.Path, folder: pathlib.Path) -> str:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        listings = pool.map(lambda path: run([cuobjdump, "-sass", path]).stdout, sorted(folder.glob("*.o")))
        return "".join(listings)


@pytest.fixture(scope="module")
def nvcc():
    found = find_nvcc()
    if found is None:
        pytest.skip("no nvcc on this machine")
    return found


@pytest.fixture(scope="module")
def cuobjdump(nvcc):
    found = find_cuobjdump(nvcc)
    if found is None:
        pytest.skip("no cuobjdump on this machine (triton carries one; LNPRUNE_CUOBJDUMP names another)")
    return found


@pytest.fixture(scope="module")
def objects(nvcc):
    """A folder with the objects of all kernels, and the compiler's report on them."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        yield folder, compile_kernels(nvcc, sorted(KERNELS.glob("*.cu")), folder)


@pytest.fixture(scope="module")
def resources(objects):
    return read_report(objects[1])


@pytest.fixture(scope="module")
def machine_code(objects, cuobjdump):
    return read_machine_code(disassemble(cuobjdump, objects[0]))


def occupancy_of(nvcc: pathlib.Path, folder: pathlib.Path) -> Callable[[list[Resources], int], list[int]]:
    """How many blocks of so many threads an H200's multiprocessor holds of each kernel."""
    source, program = folder / "occupancy.cpp", folder / "occupancy"
    source.write_text(OCCUPANCY)
    # A plain host program; nvcc hands it to the host compiler and knows where the header is.
    run([nvcc, "--cudart=none", source, "-o", program])

    def blocks(kernels: list[Resources], threads: int) -> list[int]:
        lines = "".join(f"{kernel.registers} {kernel.shared} {threads}\n" for kernel in kernels)
        return [int(line) for line in run([program], input=lines).stdout.split()]

    return blocks


@pytest.fixture(scope="module")
def blocks_per_multiprocessor(nvcc, tmp_path_factory):
    return occupancy_of(nvcc, tmp_path_factory.mktemp("occupancy"))


def constant(file: str, name: str) -> int:
    """The value of ``constexpr int name`` in a kernel's source."""
    return int(re.search(rf"constexpr int {name} = (\d+);", (KERNELS / file).read_text())[1])


def element_bytes(element: str) -> int:
    return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}.get(element, 1)


def ways_to_rank(kernel: str) -> int:
    """Channels as runs and as columns, each for the norm and, where that is another, for p = 0."""
    return 2 if "NonzeroCount" in kernel else 4


def loads_in_flight(kernel: str, blocks: int) -> int:
    """Bytes that the threads of a multiprocessor ask for before they use any."""
    step, element = kernel.split()[0], kernel.split()[-1]
    if step == "write":  # of the weight; a mask that is there already doubles them
        return blocks * constant("launches.h", "kThreads") * constant("masks.cu", "kVectorsPerThread") * 16
    vector = 8 if element == "float8" else 16
    return blocks * constant("launches.h", "kThreads") * constant("rank_block.h", "kVectorLoads") * vector


# --- The tests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_compiled(resources, architecture):
    assert sorted(resources[architecture]) == sorted([*with_many(FEW), *SCALED])


def test_the_compiler_warns_of_nothing(objects):
    assert [line for line in objects[1].splitlines() if "warning" in line.lower()] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_registers_or_has_a_stack(resources, architecture):
    assert {
        kernel: used
        for kernel, used in resources[architecture].items()
        if (used.stack, used.spill_stores, used.spill_loads) != (0, 0, 0)
    } == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_instruction_uses_local_memory(machine_code, architecture):
    uses = {kernel: count(code, r"(?:LDL|STL)\b") for kernel, code in machine_code[architecture].items()}
    assert uses == dict.fromkeys([*with_many(FEW), *SCALED], 0)


@pytest.mark.parametrize("kernel", with_many(RANK))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranking_loops_load_whole_vectors(machine_code, architecture, kernel):
    code = machine_code[architecture][kernel]
    loops = hot_loops(kernel, code)
    assert len(loops) >= ways_to_rank(kernel)
    loads = [count(loop, wide_load(kernel)) for loop in loops]
    assert loads == [constant("rank_block.h", "kVectorLoads")] * len(loops)
    assert sum(loads) == count(code, wide_load(kernel))


@pytest.mark.parametrize("kernel", with_many(RANK))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loads_of_a_ranking_loop_are_in_flight_together(machine_code, architecture, kernel):
    loops = hot_loops(kernel, machine_code[architecture][kernel])
    assert loops
    assert [loads_used_early(kernel, loop) for loop in loops] == [[]] * len(loops)


@pytest.mark.parametrize("kernel", with_many(RANK))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranking_loops_touch_no_other_memory(machine_code, architecture, kernel):
    loops = hot_loops(kernel, machine_code[architecture][kernel])
    assert loops
    operations = {instruction.operation for loop in loops for instruction in loop}
    accesses = {
        name for name in operations if re.match(MEMORY, name) and not re.match(wide_load(kernel), name)
    }
    # What the bits of float8 stand for is looked up in a table of the block.
    assert accesses <= ({"LDS"} if kernel.endswith("float8") else set())


@pytest.mark.parametrize("kernel", with_many(RANK))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_other_blocks_stored_is_loaded_from_the_cache_of_all(machine_code, architecture, kernel):
    code = machine_code[architecture][kernel]
    # A partial of each way to rank; norms and counts to select from.
    assert loads_from_other_blocks(code) == ways_to_rank(kernel) + 2 * constant("launches.h", "kRankKeys")
    elements = {"float64": {"LDG.E.64"}, "float8": {"LDG.E.64.CONSTANT"}}.get(kernel.split()[-1], set())
    loads = {i.operation for i in code if re.match(r"LDG?\.E\.(?:\w+\.)*64\b", i.operation)}
    assert loads == elements | {"LDG.E.64.STRONG.GPU"}


@pytest.mark.parametrize("kernel", with_many(RANK))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tickets_are_drawn_between_fences(machine_code, architecture, kernel):
    code = machine_code[architecture][kernel]
    # One of a strip in each way to rank, and one of a tensor to select from.
    assert fenced_tickets(code) == count(code, r"ATOMG\b") == ways_to_rank(kernel) + 1


@pytest.mark.parametrize("kernel", with_many(WRITE))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_writing_loads_and_stores_whole_vectors(machine_code, architecture, kernel):
    code = machine_code[architecture][kernel]
    # Two tensors read and two written, for positions of 32 and of 64 bits.
    expected = 2 * 2 * constant("masks.cu", "kVectorsPerThread")
    assert count(code, r"LDG\.E\.(?:\w+\.)*128") >= expected
    assert count(code, r"STG\.E\.(?:\w+\.)*128") >= expected


# Where the elements of a vector are kept or pruned together, and there is no old mask.
def instructions_to_write(element: str, code: Code) -> float:
    vectors = constant("masks.cu", "kVectorsPerThread")
    return fewest_instructions(code, vectors, 2 * vectors) * element_bytes(element) / (16 * vectors)


@pytest.mark.parametrize("element", [*ELEMENTS, *FLOAT8])
def test_what_writing_takes_hides_under_its_bytes(machine_code, element):
    needed = instructions_to_write(element, machine_code["sm_90"][f"write {element}"])
    share = issue_share(needed, 3 * element_bytes(element))  # the mask, and the weight read and written
    assert 0.05 < share < (0.8 if element in FLOAT8 else 0.4)


@pytest.mark.parametrize("kernel", with_many(ZERO))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zeroing_stores_whole_vectors_and_loads_flags(machine_code, architecture, kernel):
    code = machine_code[architecture][kernel]
    # For positions of 32 and of 64 bits.
    assert count(code, r"STG\.E\.(?:\w+\.)*128") == 2 * constant("masks.cu", "kVectorsPerThread")
    loads = {instruction.operation for instruction in code if count([instruction], r"(?:LD|LDG)\b")}
    assert {name for name in loads if not re.match(r"LDG?\.E\.U8\b", name)} == set()


@pytest.mark.parametrize("kernel", with_many(ZERO))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flags_to_zero_by_are_in_flight_together(machine_code, architecture, kernel):
    stores = r"(?:ST|STG)\b"
    loops = [loop for loop in innermost_loops(machine_code[architecture][kernel]) if count(loop, stores)]
    assert len(loops) == 2  # of single elements: for positions of 32 and of 64 bits
    for loop in loops:
        elements = 128 // int(kernel.split("uint")[1])
        first = next(at for at, instruction in enumerate(loop) if count([instruction], stores))
        assert count(loop[:first], r"LDG?\.E\.U8\b") == count(loop[first:], stores) == elements
        assert count(loop[first:], r"(?:LD|LDG)\b") == 0


@pytest.mark.parametrize("element", [*ELEMENTS, "float8"])
def test_enough_loads_are_in_flight_on_an_h200(resources, blocks_per_multiprocessor, element):
    kernels = [f"rank {norm} {element}" for norm in NAMED_NORMS]
    used = [resources["sm_90"][kernel] for kernel in kernels]
    blocks = blocks_per_multiprocessor(used, constant("launches.h", "kThreads"))
    in_flight = {k: loads_in_flight(k, b) / 1024 for k, b in zip(kernels, blocks, strict=True)}
    # Vectors of float8 are half as long: there are registers for the sums of 8 elements, not of 16.
    assert min(in_flight.values()) >= (16 if element == "float8" else 32), in_flight


FAULTY = r"""
// Kernels with the faults that the tests of this file look for.
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* y) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = values[(i * 7) % 64] * values[i];
}

__global__ void indexing_kernel(const float* x, float* y, int n) {
  float values[32];
  for (int i = 0; i < n; ++i) values[(i * 5) % 32] = x[i];
  for (int i = 0; i < n; ++i) y[i] = values[(i * 3) % 32];
}

__global__ void sharing_kernel(const float4* x, float* y, const int* strides) {
  __shared__ volatile int stride;
  if (threadIdx.x == 0) stride = strides[blockIdx.x];
  __syncthreads();
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < 1000; ++i) {
    const float4 a = __ldg(x + i * stride);
    const float4 b = __ldg(x + i * stride + 1);
    sum += a.x * a.y + a.z * a.w + b.x * b.y + b.z * b.w;
  }
  *y = sum;
}

__global__ void waiting_kernel(const float4* x, float* y, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const float4 a = __ldg(x + i);
    sum += a.x;
    const float4 b = __ldg(x + static_cast<int>(a.y));
    sum += b.x * b.y * b.z * b.w * a.z * a.w;
  }
  *y = sum;
}

__global__ void narrow_kernel(const float* x, float* y, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += __ldg(x + i);
  *y = sum;
}

__global__ void racing_kernel(const double* partials, unsigned* tickets, double* sums) {
  __shared__ int last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(tickets, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (last != 0) sums[threadIdx.x] = partials[threadIdx.x];
}
"""


def test_the_readers_see_the_faults_they_look_for(nvcc, cuobjdump, tmp_path):
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    resources = read_report(compile_kernels(nvcc, [source], tmp_path))
    machine_code = read_machine_code(disassemble(cuobjdump, tmp_path))
    for architecture in ARCHITECTURES:
        used, code = resources[architecture], machine_code[architecture]
        assert used["spilling"].registers == 32
        assert min(used["spilling"].stack, used["spilling"].spill_stores, used["spilling"].spill_loads) > 0
        assert used["indexing"].stack > 0
        assert count(code["spilling"], r"(?:LDL|STL)\b") > 0
        assert count(code["indexing"], r"(?:LDL|STL)\b") > 0
        assert used["sharing"].shared == 4
        [sharing] = hot_loops("sharing", code["sharing"])
        assert count(sharing, r"LDS\b") > 0
        assert loads_used_early("sharing", sharing) == []
        [waiting] = hot_loops("waiting", code["waiting"])
        assert loads_used_early("waiting", waiting) != []
        assert innermost_loops(code["narrow"]) != []
        assert hot_loops("narrow", code["narrow"]) == []
        assert count(code["racing"], r"ATOMG\.E\.INC\b") == count(code["racing"], r"LDG\.E\.64\b") == 1
        assert fenced_tickets(code["racing"]) == loads_from_other_blocks(code["racing"]) == 0


# --- The host's side ------------------------------------------------------------------------------------

# The backend's check of an error, with a CUDA of its own: one launch has failed.
FAILED_LAUNCH = """
#include "ops_cuda.cpp"

static cudaError_t last_error = cudaErrorLaunchFailure;
extern "C" {
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "" : "it failed"; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) { return cudaSuccess; }

__attribute__((visibility("default"))) const char* message() {
  static std::string said;
  try {
    lnprune::check(last_error, "a launch");
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
__attribute__((visibility("default"))) int left_behind() { return cudaGetLastError(); }
}
"""

CALL_IT = """
import ctypes, os, sys, torch
library = ctypes.CDLL(sys.argv[1], os.RTLD_LAZY)
library.message.restype = ctypes.c_char_p
print(library.message().decode())
print(library.left_behind())
"""


def test_an_error_that_is_reported_is_not_left_to_the_next_check(nvcc, tmp_path):
    source, library = tmp_path / "failed.cpp", tmp_path / "failed.so"
    source.write_text(FAILED_LAUNCH)
    flags = ["--cudart=none", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-std=c++20", FLAGS[-1]]
    flags += ["-DUSE_CUDA", *(f"-I{path}" for path in (KERNELS, *cpp_extension.include_paths()))]
    # What only a torch with CUDA has is never called.
    linked = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    run([nvcc, *flags, source, "-Xlinker=--no-as-needed,-z,lazy", *linked, "-o", library])
    message, left = run([sys.executable, "-c", CALL_IT, library]).stdout.splitlines()
    assert message.endswith("lnprune: CUDA error in a launch: it failed")
    assert left == "0"


# --- The table of docs/cuda.md --------------------------------------------------------------------------


def spread(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def instruction_table(machine_code: dict[str, Code]) -> str:
    """Instructions per element of the rank step's loops, for p = 2 and to count what is not zero, and of
    the write step, as Markdown.
    """
    lines = [
        "| dtype | to rank | share of issue slots | to count | share of issue slots "
        "| to write | share of issue slots |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for element in (*ELEMENTS, *FLOAT8):
        size = element_bytes(element)
        rank = "rank SumOfSquares " + ("float8" if element in FLOAT8 else element)
        in_flight = constant("rank_block.h", "kVectorLoads") * (8 if element in FLOAT8 else 16) // size
        loops = hot_loops(rank, machine_code[rank])
        cells = [element]
        for sums in (True, False):  # of squares, which alone take arithmetic in float64
            lengths = [len(loop) / in_flight for loop in loops if sums == (count(loop, FLOAT64_SUM) > 0)]
            cells.append(" to ".join(sorted({f"{length:.1f}" for length in lengths})))
            cells.append(f"{issue_share(max(lengths), size):.2f}")
        written = instructions_to_write(element, machine_code[f"write {element}"])
        cells += [f"{written:.1f}", f"{issue_share(written, 3 * size):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def resource_table(nvcc: pathlib.Path, folder: pathlib.Path) -> str:
    """Registers, blocks and loads in flight of each family of kernels on sm_90, as Markdown."""
    threads_of_a_block = constant("launches.h", "kThreads")
    families: list[tuple[str, list[str], int]] = []
    for element in (*ELEMENTS, "float8"):
        others = [norm for norm in NORMS if norm not in NAMED_NORMS]
        for orders, norms in (("p in {0, 1, 2, inf, -inf}", NAMED_NORMS), ("other p", others)):
            families.append(
                (f"rank {element}, {orders}", [f"rank {n} {element}" for n in norms], threads_of_a_block)
            )
    families.append(("root", ROOT, threads_of_a_block))
    families.append(("select", ["select"], constant("launches.h", "kSelectThreads")))
    families += [(f"write {element}", [f"write {element}"], threads_of_a_block) for element in ELEMENTS]
    families.append(("write float8", [f"write {element}" for element in FLOAT8], threads_of_a_block))
    families.append(("zero, elements of 1, 2, 4 or 8 bytes", ZERO, threads_of_a_block))

    lines = [
        "| kernels | registers | shared, bytes | blocks | KiB in flight |",
        "|---|---:|---:|---:|---:|",
    ]
    used = read_report(compile_kernels(nvcc, sorted(KERNELS.glob("*.cu")), folder))["sm_90"]
    blocks_of = occupancy_of(nvcc, folder)
    for family, kernels, threads in families:
        rows = [used[kernel] for kernel in kernels]
        blocks = blocks_of(rows, threads)
        flight = [loads_in_flight(k, b) // 1024 for k, b in zip(kernels, blocks, strict=True)]
        cells = [spread([r.registers for r in rows]), spread([r.shared for r in rows]), spread(blocks)]
        cells.append("" if kernels[0] in ("select", *ROOT, *ZERO) else spread(flight))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    nvcc = find_nvcc()
    assert nvcc is not None, "no nvcc on this machine"
    cuobjdump = find_cuobjdump(nvcc)
    assert cuobjdump is not None, "no cuobjdump on this machine"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        print(resource_table(nvcc, folder), end="\n\n")
        print(instruction_table(read_machine_code(disassemble(cuobjdump, folder))["sm_90"]))


if __name__ == "__main__":
    main()
