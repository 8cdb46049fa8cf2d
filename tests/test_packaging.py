"""Installing: an empty environment, the oldest torch, no compiler, and a library that does not load."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch
from environments import new_environment

import lnprune

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "lnprune", "setup.py", "pyproject.toml", "README.md", "LICENSE")
PRUNE = """
import torch, lnprune
module = torch.nn.Linear(300, 70, dtype=torch.bfloat16)
norms = lnprune.channel_norms(module.weight, 2, 0)
lnprune.ln_structured(module, "weight", 0.5, 2, 0)
kept = module.weight_mask[:, 0] == 1
assert int(kept.sum()) == 35 and norms[kept].min() >= norms[~kept].max()
print(torch.__version__, lnprune.__file__)
"""


def copy_sources(folder: pathlib.Path) -> None:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder / name)


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def folder():
    # Not tmp_path: pytest keeps its last three, and these hold gigabytes.
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


def import_in(package: pathlib.Path) -> subprocess.CompletedProcess:
    # -S leaves out what an editable install hooks into the import system; torch is found by its path.
    paths = f"{package}{os.pathsep}{pathlib.Path(torch.__file__).parent.parent}"
    environment = os.environ | {"PYTHONPATH": paths}
    return run([sys.executable, "-S", "-c", "import lnprune"], cwd=package, env=environment)


def test_without_a_library_the_error_says_how_to_build_one(folder):
    copy_sources(folder)
    result = import_in(folder)
    assert result.returncode == 1
    assert "none has been built" in result.stderr
    assert f"running: torch {torch.__version__}" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_a_library_that_does_not_load_is_named(folder):
    copy_sources(folder)
    (library,) = (pathlib.Path(lnprune.__file__).parent).glob("_C.*so")
    (folder / "lnprune" / library.name).write_bytes(b"no library")
    result = import_in(folder)
    assert result.returncode == 1
    assert f"built: {library.name}" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_without_a_compiler_the_build_says_so(folder):
    copy_sources(folder)
    environment = os.environ | {"CXX": "no-such-compiler"}
    result = run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, env=environment)
    assert result.returncode != 0
    assert "found no compiler: no-such-compiler is not on the PATH" in result.stderr


@pytest.mark.slow
def test_pip_installs_into_an_empty_environment(folder):
    copy_sources(folder)
    python = new_environment(folder / "environment")
    # The build gets the torch of this run, so that the test does not depend on what is newest.
    constraint = folder / "constraint.txt"
    constraint.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    environment = os.environ | {
        "PIP_CONSTRAINT": str(constraint),
        "PIP_BUILD_CONSTRAINT": str(constraint),
    }
    installed = run([python, "-m", "pip", "install", "."], cwd=folder, env=environment)
    assert installed.returncode == 0, installed.stderr[-2000:]
    pruned = run([python, "-W", "ignore", "-c", PRUNE], cwd="/")
    assert pruned.returncode == 0, pruned.stderr
    assert "site-packages" in pruned.stdout


@pytest.mark.slow
def test_the_library_built_here_loads_in_the_oldest_torch(oldest_torch):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(lnprune.__file__).parent.parent)}
    pruned = run([oldest_torch, "-W", "ignore", "-c", PRUNE], cwd="/", env=environment)
    assert pruned.returncode == 0, pruned.stderr
    _, file = pruned.stdout.split()
    assert pathlib.Path(file).samefile(lnprune.__file__)


REGISTERED = """
import torch, lnprune
print(lnprune.ops.build_info()["cuda"], torch.version.cuda, lnprune.ops.has_cuda())
for name in ("channel_norms", "select_channels", "write_masks", "prune_channels"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lnprune::" + name, "CUDA"), name
"""


@pytest.mark.slow
def test_the_cuda_library_builds_loads_and_registers_without_a_gpu(oldest_torch, folder):
    cuda = run(
        [oldest_torch, "-W", "ignore", "-c", "import torch; print(torch.version.cuda)"]
    ).stdout.strip()
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    homes = [home for home in homes if home and pathlib.Path(home, "include", "cuda_runtime.h").exists()]
    if cuda == "None" or not homes:
        pytest.skip(f"torch for CUDA {cuda}, toolkits with headers: {homes or 'none'}")
    copy_sources(folder)
    environment = os.environ | {
        "CUDA_HOME": homes[0],
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "PYTHONPATH": str(folder),
    }
    build = [oldest_torch, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = run(build, cwd=folder, env=environment)
    assert built.returncode == 0, built.stderr[-2000:]
    registered = run([oldest_torch, "-W", "ignore", "-c", REGISTERED], cwd="/", env=environment)
    assert registered.returncode == 0, registered.stderr
    built_with, running, has_cuda = registered.stdout.split()
    assert built_with == running
    assert has_cuda == "True"
    pruned = run([oldest_torch, "-W", "ignore", "-c", PRUNE], cwd="/", env=environment)
    assert pruned.returncode == 0, pruned.stderr


def test_cuda_tensors_without_the_cuda_library_are_said_once_to_take_plain_torch(monkeypatch):
    class OnCuda:  # what is_native() asks a tensor
        dtype, layout, is_cpu, is_cuda = torch.float32, torch.strided, False, True

        def numel(self):
            return 1

        def is_neg(self):
            return False

    monkeypatch.setattr(lnprune.ops, "_PLAIN_TYPES", (OnCuda,))
    monkeypatch.setattr(lnprune.ops, "_HAS_CUDA", False)
    lnprune.ops._warn_of_plain_torch.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert [lnprune.ops.is_native(OnCuda()) for _ in range(2)] == [False, False]
    (warning,) = warned
    assert "no CUDA kernels here" in str(warning.message)
    assert f"running: torch {torch.__version__}" in str(warning.message)
    assert "pip install --no-build-isolation" in str(warning.message)
    monkeypatch.setattr(lnprune.ops, "_HAS_CUDA", True)
    assert lnprune.ops.is_native(OnCuda())
