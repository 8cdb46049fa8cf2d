"""What all tests share: fresh random inputs, and the choice to run on the emulated GPU."""

import pytest
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


@pytest.fixture(autouse=True)
def _fresh_seed():
    """Another seed in every run, printed where a test fails: fresh inputs, failures that repeat."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")
