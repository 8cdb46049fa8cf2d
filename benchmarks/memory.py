"""The peak memory of one call, for a process of its own: ``python -m benchmarks.memory lnprune 0``."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from benchmarks.calls import AMOUNT, bare_module
from benchmarks.shapes import MLP


def _prune(call: Callable[..., object], module: nn.Module, dim: int) -> None:
    call(module, "weight", amount=AMOUNT, n=2, dim=dim)


def _in_place(module: nn.Module, dim: int) -> None:
    lnprune.local_structured([(module, "weight")], AMOUNT, 2, dim, permanent=True)


CALLS = {
    "lnprune": partial(_prune, lnprune.ln_structured),
    "torch": partial(_prune, stock.ln_structured),
    "in place": _in_place,
}


def read_status(key: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def reset_peak() -> None:
    """Makes VmHWM, the highest VmRSS so far, the present one."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak(name: str, dim: int) -> float:
    """Bytes beyond what the process held before the call, in units of the weight."""
    call = CALLS[name]
    call(bare_module(torch.randn(1024, 1024)), dim)  # threads and imports are in place
    module = bare_module(torch.randn(MLP))
    weight_bytes = module.weight.numel() * module.weight.element_size()
    reset_peak()
    before = read_status("VmRSS")
    call(module, dim)
    return (read_status("VmHWM") - before) / weight_bytes


def measure(name: str, dim: int) -> float:
    """The peak of one call of ``name`` on a matrix of 180 MB in a fresh process, in units of the weight."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1], int(sys.argv[2]))))
