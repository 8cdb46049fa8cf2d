"""Builds lnprune._C, the native library. Everything else stands in pyproject.toml."""

import os
import shutil

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# The oldest torch whose stable ABI the library needs: built against any newer one, it loads in all.
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11

COMPILE_FLAGS = [
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-O3",
    "-Wall",
    "-fvisibility=hidden",
    # The same bits on every processor: no multiplication and addition become one.
    "-ffp-contract=off",
    # sqrt as an instruction; nothing reads errno.
    "-fno-math-errno",
]
LINK_FLAGS = []
# For `make sanitize`.
if os.environ.get("LNPRUNE_SANITIZE"):
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
    COMPILE_FLAGS += [*SANITIZE, "-fno-omit-frame-pointer"]
    LINK_FLAGS += SANITIZE

SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu/instruction_sets.cpp",
    "csrc/cpu/loops_baseline.cpp",
    "csrc/cpu/loops_x86_64_v3.cpp",
    "csrc/cpu/loops_x86_64_v4.cpp",
    "csrc/cpu/masks.cpp",
    "csrc/cpu/norms.cpp",
    "csrc/cpu/topk.cpp",
]

COMPILER = os.environ.get("CXX", "c++")
if shutil.which(COMPILER) is None:
    raise SystemExit(
        f"lnprune is built from C++ source and found no compiler: {COMPILER} is not on the PATH. "
        "Install one that knows C++20 (Debian: apt-get install g++), or name one in CXX, and repeat."
    )

setup(
    ext_modules=[
        CppExtension(
            "lnprune._C",
            SOURCES,
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=LINK_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
