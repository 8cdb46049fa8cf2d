"""What all tests share: fresh random inputs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_seed():
    """Another seed in every run, printed where a test fails: fresh inputs, failures that repeat."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")
