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


def said_by(*command: str) -> str:
    """All that a command says, and nothing where it cannot be run."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ran.stdout + ran.stderr


def toolkits() -> dict[str, str]:
    """The folders of the CUDA toolkits here, and the version of each, such as "13.0"."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):  # it may be a wrapper, and says where it leads
        said = said_by(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
        folders += re.findall(r"_HERE_=(.+)/bin$", said, re.MULTILINE)
    found = {}
    for folder in filter(None, [*folders, "/usr/local/cuda"]):
        if os.path.exists(f"{folder}/include/cuda_runtime.h"):
            version = re.search(r"release (\d+\.\d+)", said_by(f"{folder}/bin/nvcc", "--version"))
            found.update({folder: version[1]} if version else {})
    return found


def architectures(nvcc: str) -> list[str]:
    """Flags for all GPUs from 7.5 on that this nvcc knows.

    Machine code runs on its own architecture and on later ones of the same major version. So the first of
    each is built, and PTX, from which drivers make machine code for GPUs to come, of the last.
    Jetsons are apart: TORCH_CUDA_ARCH_LIST names the one of a Jetson.
    """
    listed = re.findall(r"^sm_(\d+)$", said_by(nvcc, "--list-gpu-code"), re.MULTILINE)
    known = sorted({int(code) for code in listed}, reverse=True)
    first = {code // 10: code for code in known if code >= 75}
    built = sorted(first.values())
    flags = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in built]
    return [*flags, *(f"-gencode=arch=compute_{code},code=compute_{code}" for code in built[-1:])]


COMPILE_FLAGS = [
    # 2.11, the oldest torch whose stable ABI is needed: built against any newer one, they load in all.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *("-O3", "-Wall", "-fvisibility=hidden"),
    "-ffp-contract=off",  # the same bits on every processor: no multiplication and addition become one
    "-fno-math-errno",  # sqrt as an instruction; nothing reads errno
]
if not os.environ.get("LNPRUNE_DEBUG_INFO"):
    COMPILE_FLAGS.append("-g0")  # Python's own flags ask for it: five times the size
SANITIZE = []
if os.environ.get("LNPRUNE_SANITIZE"):  # for `make sanitize`
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
    SANITIZE.append("-fno-omit-frame-pointer")

# -fmad is nvcc's name for contraction.
NVCC_FLAGS = [COMPILE_FLAGS[0], "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden", "--threads=4"]

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
MISSING = ""
if torch.version.cuda is not None:
    found = toolkits()
    major = torch.version.cuda.split(".")[0]
    cpp_extension.CUDA_HOME = next((home for home in found if found[home].split(".")[0] == major), None)
    if home := cpp_extension.CUDA_HOME:
        named = os.environ.get("TORCH_CUDA_ARCH_LIST", "") not in ("", "native")
        if not named and torch.cuda.device_count() == 0:
            NVCC_FLAGS += architectures(f"{home}/bin/nvcc")
        # Headers that both compilers read hold pragmas of nvcc's.
        flags = {"cxx": [*COMPILE_FLAGS, "-DUSE_CUDA", "-Wno-unknown-pragmas"], "nvcc": NVCC_FLAGS}
        sources = sorted(glob.glob("csrc/cuda/*.c*"))
        EXTENSIONS.append(cpp_extension.CUDAExtension("lnprune._C_cuda", sources, extra_compile_args=flags))
    else:
        others = ", ".join(f"{version} in {home}" for home, version in found.items())
        MISSING = f"This torch has CUDA {torch.version.cuda}, but " + (
            f"the toolkit is another: {others}" if found else "no toolkit was found"
        )

done = setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": cpp_extension.BuildExtension})
if MISSING and done.have_run.get("build_ext"):
    sys.stderr.write(
        f"WARNING: lnprune was built for the CPU only. {MISSING}. Name the folder of one for CUDA {major}, "
        "which holds bin/nvcc and include/cuda_runtime.h, in CUDA_HOME, and repeat.\n"
    )
