"""Builds the native libraries, lnprune._C and, for a torch with CUDA, lnprune._C_cuda."""

import glob
import os
import re
import shutil
import subprocess
import sys

import torch
from setuptools import setup
from torch.utils import cpp_extension

try:
    import pybind11

    INCLUDES = [pybind11.get_include()]
except ImportError:
    INCLUDES = []  # torch brings the headers too


def cuda_home() -> str | None:
    """The folder of the CUDA toolkit. The nvcc on the PATH may be a wrapper, and says where it leads."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        folders += re.findall(r"_HERE_=(.+)/bin$", said, re.MULTILINE)
    for folder in filter(None, [*folders, "/usr/local/cuda"]):
        if all(os.path.exists(f"{folder}/{name}") for name in ("bin/nvcc", "include/cuda_runtime.h")):
            return folder
    return None


cpp_extension.CUDA_HOME = cuda_home()  # torch's own guess knows no wrappers

COMPILE_FLAGS = [
    # 2.11, the oldest torch whose stable ABI is needed: built against any newer one, they load in all.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *("-O3", "-Wall", "-fvisibility=hidden"),
    "-ffp-contract=off",  # the same bits on every processor: no multiplication and addition become one
    "-fno-math-errno",  # sqrt as an instruction; nothing reads errno
]
SANITIZE = []
if os.environ.get("LNPRUNE_SANITIZE"):  # for `make sanitize`
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
    SANITIZE.append("-fno-omit-frame-pointer")

# -fmad is nvcc's name for contraction.
NVCC_FLAGS = [COMPILE_FLAGS[0], "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]

COMPILER = os.environ.get("CXX", "c++")
if shutil.which(COMPILER) is None:
    raise SystemExit(
        f"lnprune is built from C++ source and found no compiler: {COMPILER} is not on the PATH. "
        "Install one that knows C++17 (Debian: apt-get install g++), or name one in CXX, and repeat."
    )

EXTENSIONS = [
    cpp_extension.CppExtension(
        "lnprune._C",
        sorted([*glob.glob("csrc/*.cpp"), *glob.glob("csrc/cpu/*.cpp")]),
        include_dirs=INCLUDES,
        extra_compile_args=[*COMPILE_FLAGS, *SANITIZE],
        extra_link_args=SANITIZE,
    )
]
if torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None:
    flags = {"cxx": [*COMPILE_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS}
    sources = sorted(glob.glob("csrc/cuda/*.c*"))
    EXTENSIONS.append(cpp_extension.CUDAExtension("lnprune._C_cuda", sources, extra_compile_args=flags))

done = setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": cpp_extension.BuildExtension})
if torch.version.cuda is not None and len(EXTENSIONS) == 1 and done.have_run.get("build_ext"):
    sys.stderr.write(
        "WARNING: lnprune was built for the CPU only. This torch has CUDA, but no toolkit was found: name "
        "the folder that holds bin/nvcc and include/cuda_runtime.h in CUDA_HOME, and repeat.\n"
    )
