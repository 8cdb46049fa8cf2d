"""What all tests share: fresh random inputs, one thread, and the choice to run on the emulated GPU."""

import os

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
