"""The memory at the peak of compact(): that of the large model, the small one, and copies to verify."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch, lnprune
from torch import nn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def bytes_of(model):
    return sum(each.numel() * each.element_size() for each in model.parameters())

def plan_of(width):
    blocks = [(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) for _ in range(8)]
    model = nn.Sequential(*(layer for block in blocks for layer in block))
    return model, lnprune.couple(model, torch.randn(2, width), check=False).rank(2).select(0.5)

options = {"verify": sys.argv[1] == "verify", "inplace": sys.argv[2] == "inplace"}
plan_of(8)[1].compact(**options)  # what the first call loads
model, plan = plan_of(1024)
large, before = bytes_of(model), resident()  # making the model may have taken more for a moment
small = plan.compact(**options)
print(large, bytes_of(small), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("inplace", ["no", "inplace"])
@pytest.mark.parametrize("verify", ["no", "verify"])
def test_the_peak_is_the_large_model_the_small_one_and_the_copies_that_verify(verify, inplace):
    command = [sys.executable, "-c", MEASURE, verify, inplace]
    # Tensors have memory of their own, which goes back when they do: the heap would keep some of it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    large, small, more = map(int, printed.split())
    assert large > 250e6
    assert small < large / 3
    # In float64 a weight is twice as large: two copies of the large model, one of the small one.
    wanted = small + (2 * (2 * large + small) if verify == "verify" else 0)
    # Half of the small model is less than any copy of a model, and more than what else takes memory here.
    assert 0.8 * wanted < more < wanted + 0.5 * small, f"{more / wanted:.2f} of what the docs say"
