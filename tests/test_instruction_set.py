"""The choice of the CPU's instruction set: its names, and compilers that know fewer of them."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from torch.utils import cpp_extension

SOURCES = pathlib.Path(__file__).resolve().parent.parent / "csrc" / "cpu"
FLAGS = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-fsyntax-only"]


def imported_with(instruction_set):
    """What an import of lnprune prints: the instruction set that runs, or how it fails."""
    environment = {**os.environ, "LNPRUNE_INSTRUCTION_SET": instruction_set}
    command = [sys.executable, "-c", "from lnprune import ops; print(ops.build_info()['instruction_set'])"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["x86-64-v5", "Baseline"])
def test_a_name_that_is_none_fails_the_import_and_says_which_there_are(name):
    assert imported_with(name) == (
        "RuntimeError: lnprune: expected LNPRUNE_INSTRUCTION_SET to be baseline, x86-64-v3 or x86-64-v4, "
        f"got {name}"
    )


def test_an_empty_name_is_the_best_instruction_set():
    best = imported_with("x86-64-v4")  # as far as the processor goes
    assert best in ("baseline", "x86-64-v3", "x86-64-v4")
    assert imported_with("") == best


def test_the_processor_is_asked_for_features_that_older_compilers_know():
    names = re.findall(r'__builtin_cpu_supports\("(.*?)"\)', (SOURCES / "instruction_sets.cpp").read_text())
    assert {"avx2", "f16c", "avx512vl"} <= set(names)
    # Whole levels are known by name from GCC 12 on.
    assert [name for name in names if name.startswith("x86-64")] == []


@pytest.mark.parametrize("compiler", ["g++-11", "g++-10"])
def test_older_compilers_take_the_choice_and_the_loops(compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    for source in ("instruction_sets.cpp", "loops_x86_64_v3.cpp", "loops_x86_64_v4.cpp"):
        command = [compiler, *FLAGS, *includes, str(SOURCES / source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
