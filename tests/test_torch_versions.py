"""The library built here and the suite on other versions of torch: the oldest promised and the newest."""

import os
import pathlib

import environments
import pytest

import lnprune

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


def assert_the_suite_passes(python: pathlib.Path) -> None:
    """Its short run, on the library of this run, which has to load there."""
    ignored = [f"--ignore=tests/test_{name}.py" for name in LEFT_OUT]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *ignored]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(lnprune.__file__).parent.parent)}
    environments.run(command, cwd=environments.ROOT, env=environment)


def test_the_suite_passes_on_the_oldest_torch(oldest_torch):
    assert_the_suite_passes(oldest_torch)


def test_the_suite_passes_on_the_newest_torch(newest_torch):
    assert_the_suite_passes(newest_torch)
