"""What all tests share: fresh random inputs, one thread, the emulated GPU, environments of other torch."""

import os
import pathlib
import tempfile

import environments
import pytest

# Before torch is imported, and for processes that tests start: what several threads do is tested where
# their number is set, and threads of processes side by side would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def pytest_addoption(parser):
    parser.addoption(
        "--emulated-cuda",
        action="store_true",
        help="run the CUDA kernels, emulated on the host, wherever lnprune would run those of the CPU",
    )


def pytest_configure(config):
    if config.getoption("--emulated-cuda"):
        import emulated_cuda

        emulated_cuda.replace_native_ops()


def pytest_collection_modifyitems(config, items):
    """Leaves out, on the emulated GPU, what varies only on a CPU."""
    if config.getoption("--emulated-cuda"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cpu")])
        items[:] = [item for item in items if not item.get_closest_marker("cpu")]


@pytest.fixture(autouse=True)
def _fresh_seed(request):
    """Another seed in every run, printed where a test fails: fresh inputs, failures that repeat."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    if request.config.getoption("--emulated-cuda"):
        import emulated_cuda

        emulated_cuda.manual_seed(seed)
    print(f"torch.manual_seed({seed})")


def _environment_with(torch_to_install):
    # Not tmp_path: pytest keeps its last three, and these hold gigabytes.
    with tempfile.TemporaryDirectory() as name:
        python = environments.environment_with(torch_to_install, pathlib.Path(name))
        if environments.version_of_torch(python) == torch.__version__:
            pytest.skip(f"torch {torch.__version__} is the one of this run")
        yield python


@pytest.fixture(scope="session")
def oldest_torch():
    """The Python of an environment with the oldest torch that is promised, and all that tests need."""
    yield from _environment_with(f"torch=={environments.OLDEST_TORCH}.*")


@pytest.fixture(scope="session")
def newest_torch():
    """The same with the newest torch that the index has."""
    yield from _environment_with("torch")
