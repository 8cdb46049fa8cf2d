"""The command info: what is installed, what runs, and a small computation on each device."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from lnprune.commands import output
from lnprune.import_report import installed
from lnprune.prune import channel_norms, ln_structured
from lnprune.steps import ops


def info(given: argparse.Namespace) -> int:
    """Says what is there; 1 where a device computes something else than it should."""
    found: dict[str, Any] = {"installed": installed(), "build": ops.build_info(), "cuda": _cuda()}
    if not given.no_test:
        found["devices"] = {device: _tested(device) for device in _devices()}
    works = all(each == "right" for each in found.get("devices", {}).values())
    found["works"] = works
    if given.json:
        output.say_json(found)
    else:
        rows = [(name, version or "not installed") for name, version in found["installed"].items()]
        rows += [(f"built: {key}", str(value)) for key, value in found["build"].items()]
        rows += [("CUDA", found["cuda"])]
        rows += [(f"test on {device}", result) for device, result in found.get("devices", {}).items()]
        for name, value in rows:
            output.say(f"{name:<24}{value}")
    return 0 if works else 1


def _cuda() -> str:
    """Whether kernels run on GPUs, or why not."""
    if torch.version.cuda is None:
        return "no: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"no: torch is built for CUDA {torch.version.cuda}, and finds no GPU or no driver"
    if ops.build_info()["cuda"].startswith("not "):
        return f"no: the kernels of lnprune are {ops.build_info()['cuda']}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"yes: {', '.join(names)}"


def _devices() -> list[str]:
    count = torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{i}" for i in range(count))]


def _tested(device: str) -> str:
    """Prunes random numbers, and compares with what torch computes of them in float64."""
    try:
        layer = torch.nn.Linear(48, 64, device=device)
        weight = layer.weight.detach().cpu()
        expected = weight.double().square().sum(1).sqrt()
        if not torch.allclose(channel_norms(layer.weight, 2, 0).cpu(), expected, rtol=1e-12, atol=0):
            return "norms differ from those of torch"
        ln_structured(layer, "weight", amount=16, n=2, dim=0)
        keep = torch.ones(64, 1, device="cpu")
        keep[expected.topk(16, largest=False).indices] = 0
        if not torch.equal(layer.weight.detach().cpu(), weight * keep):
            return "what is pruned differs from what torch chooses"
    except Exception as error:
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())}"
    return "right"
