"""Builds the native libraries, lnprune._C and, for a torch with CUDA, lnprune._C_cuda."""

import os
import shutil

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

try:
    import pybind11

    INCLUDES = [pybind11.get_include()]
except ImportError:
    INCLUDES = []  # torch brings the headers too

# The oldest torch whose stable ABI the libraries need: built against any newer one, they load in all.
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

CPU_SOURCES = [
    *("csrc/ops.cpp", "csrc/cpu/instruction_sets.cpp", "csrc/cpu/loops_baseline.cpp"),
    *("csrc/cpu/loops_x86_64_v3.cpp", "csrc/cpu/loops_x86_64_v4.cpp"),
    *("csrc/cpu/masks.cpp", "csrc/cpu/memory.cpp", "csrc/cpu/norms.cpp", "csrc/cpu/topk.cpp"),
]
CUDA_SOURCES = ["ops_cuda.cpp", "launches.cpp", "norms.cu", "topk.cu", "masks.cu", "upload.cu"]
# -fmad is nvcc's name for contraction.
NVCC_FLAGS = [COMPILE_FLAGS[0], "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]

COMPILER = os.environ.get("CXX", "c++")
if shutil.which(COMPILER) is None:
    raise SystemExit(
        f"lnprune is built from C++ source and found no compiler: {COMPILER} is not on the PATH. "
        "Install one that knows C++17 (Debian: apt-get install g++), or name one in CXX, and repeat."
    )

EXTENSIONS = [
    CppExtension(
        "lnprune._C",
        CPU_SOURCES,
        include_dirs=INCLUDES,
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=LINK_FLAGS,
    )
]
# Where nvcc lies in a folder without its headers, CUDA_HOME has to name the one that holds both.
HAS_CUDA = os.path.exists(os.path.join(CUDA_HOME or "", "include", "cuda_runtime.h"))
if torch.version.cuda is not None and HAS_CUDA:
    flags = {"cxx": [*COMPILE_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS}
    sources = [f"csrc/cuda/{name}" for name in CUDA_SOURCES]
    EXTENSIONS.append(CUDAExtension("lnprune._C_cuda", sources, extra_compile_args=flags))
elif torch.version.cuda is not None:
    print(
        "lnprune: built for the CPU only. torch has CUDA, but no toolkit was found: "
        f"CUDA_HOME is {CUDA_HOME}, and has to be the folder that holds bin/nvcc, include and lib64"
    )

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExtension})
