"""Installing: an empty environment, the oldest torch, no compiler, and a library that does not load."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

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


def new_environment(folder: pathlib.Path) -> pathlib.Path:
    """A virtual environment with nothing in it; returns its Python."""
    created = run([sys.executable, "-m", "venv", folder])
    assert created.returncode == 0, created.stderr
    return folder / "bin" / "python"


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
    (library,) = (pathlib.Path(lnprune.__file__).parent).glob("_C*.so")
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
def test_the_library_built_here_loads_in_the_oldest_torch(folder):
    oldest = re.search(r'dependencies = \["torch>=([\d.]+)"\]', (ROOT / "pyproject.toml").read_text())[1]
    python = new_environment(folder / "environment")
    installed = run([python, "-m", "pip", "install", f"torch=={oldest}.*", "numpy"])
    assert installed.returncode == 0, installed.stderr[-2000:]
    package = pathlib.Path(lnprune.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(package)}
    pruned = run([python, "-W", "ignore", "-c", PRUNE], cwd="/", env=environment)
    assert pruned.returncode == 0, pruned.stderr
    version, file = pruned.stdout.split()
    assert version.startswith(f"{oldest}.")
    assert version != torch.__version__
    assert pathlib.Path(file).samefile(lnprune.__file__)
