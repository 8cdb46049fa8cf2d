"""The suite on other versions of torch: the oldest that is promised and the newest, built on each."""

import pathlib
import shutil
import tempfile

import environments
import pytest

pytestmark = pytest.mark.slow

# Files that another torch cannot change: they are about sources, builds, reports, and kernels on no torch.
LEFT_OUT = [
    "architecture",
    "benchmarks",
    "cuda_compiler",
    "cuda_emulation",
    "gpu_run",
    "packaging",
    "suite",
]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__")
# For the CPU alone, whatever the torch is for.
BUILD = """
import runpy, sys, torch
torch.version.cuda = None
sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def assert_the_suite_passes(python: pathlib.Path) -> None:
    """Its short run, in a copy of the sources that is built there."""
    with tempfile.TemporaryDirectory() as name:
        copy = pathlib.Path(name) / "sources"
        shutil.copytree(environments.ROOT, copy, ignore=NOT_COPIED)
        environments.run([python, "-W", "ignore", "-c", BUILD], cwd=copy)
        ignored = [f"--ignore=tests/test_{name}.py" for name in LEFT_OUT]
        options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", *ignored]
        environments.run([python, "-m", "pytest", *options], cwd=copy)


def test_the_suite_passes_on_the_oldest_torch(oldest_torch):
    assert_the_suite_passes(oldest_torch)


def test_the_suite_passes_on_the_newest_torch(newest_torch):
    assert_the_suite_passes(newest_torch)
