"""Virtual environments beside the one of this run: empty, or with another torch and all that tests need."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST_TORCH = re.search(r'dependencies = \["torch>=([\d.]+)"\]', PROJECT)[1]


def new_environment(folder: pathlib.Path) -> pathlib.Path:
    """A virtual environment with nothing in it; returns its Python."""
    run([sys.executable, "-m", "venv", folder])
    return folder / "bin" / "python"


def environment_with(torch: str, folder: pathlib.Path) -> pathlib.Path:
    """One in which tests can run and native code can be built on a torch such as ``torch==2.11.*``.

    It is for CUDA if the index has that one.
    """
    python = new_environment(folder)
    makefile = (ROOT / "Makefile").read_text()
    (pip,) = re.findall(r"pip==\S+", makefile)
    build = [re.search(rf"\b{name}==\S+", makefile)[0] for name in ("ninja", "pybind11", "setuptools")]
    run([python, "-m", "pip", "install", "--quiet", pip])
    run([python, "-m", "pip", "install", "--quiet", torch, *build, "--group", "dev"], cwd=ROOT)
    return python


def version_of_torch(python: pathlib.Path) -> str:
    """As torch says it."""
    return run([python, "-W", "ignore", "-c", "import torch; print(torch.__version__)"]).strip()


def run(command: list, **options) -> str:
    """What the command prints; if it fails, an error with the end of all that it said."""
    finished = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    said = (finished.stdout + finished.stderr)[-6000:]
    assert finished.returncode == 0, f"{command} exited with {finished.returncode}:\n{said}"
    return finished.stdout
