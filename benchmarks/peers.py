"""What others offer for the norms of ResNet-50, timed beside lnprune with the same result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import calls, report
from benchmarks.lists import LIST_BUDGETS, RESNET50_SHAPES, weights_of
from benchmarks.report import Row
from benchmarks.resnet50 import resnet50
from benchmarks.timing import Peer, interleaved
from lnprune import ops

try:
    import torch_pruning
except ImportError:
    torch_pruning = None

# A float32 result against one summed in float64.
LARGEST_ERROR = 1e-4

Norms = list[Tensor]


def _foreach_channels(weights: Norms, dim: int) -> Callable[[Any], Norms]:
    """``torch._foreach_norm`` of a view of every channel."""
    channels = [channel for weight in weights for channel in weight.unbind(dim)]
    return lambda _: torch._foreach_norm(channels, 2)


def _members(group: Any) -> list[tuple[Tensor, int]]:
    """The weights of which Torch-Pruning's importance adds up, and the dims of their channels."""
    targets = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    return [
        (item.dep.layer.weight.detach(), 0 if item.dep.pruning_fn.__name__ == "prune_out_channels" else 1)
        for item in group
        if isinstance(item.dep.layer, targets)
    ]


def group_importances(members: list[list[tuple[Tensor, int]]]) -> Norms:
    """The mean of the squared norms of the channels that go together, over the mean of the group."""
    tensors, dims = zip(*(pair for group in members for pair in group), strict=True)
    sums = iter(ops.channel_sums(tensors, dims, 2.0))
    means = [sum(next(sums) for _ in group) / len(group) for group in members]
    return [mean / mean.mean() for mean in means]


def torch_pruning_peers() -> tuple[Norms, dict[str, Peer]]:
    """The weights, and the importances of all groups of channels that go together, by both."""
    torch.manual_seed(0)
    model = resnet50()
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.zeros(1, 3, 64, 64))
    groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    members = [_members(group) for group in groups]
    peers = {
        "lnprune": Peer(lambda _: group_importances(members)),
        "peer": Peer(lambda _: [importance(group) for group in groups]),
    }
    return [weight.detach() for weight in model.parameters()], peers


def _fault(peers: dict[str, Peer], expected: Norms | None = None) -> str | None:
    """What keeps the two results from being the same."""
    ours, theirs = (torch.cat([t.double().flatten() for t in peer.run(None)]) for peer in peers.values())
    if ours.shape != theirs.shape:
        return f"{ours.numel()} values, the peer has {theirs.numel()}"
    error = calls.norm_error(theirs, ours)
    if error > LARGEST_ERROR:
        return f"relative difference to the peer {error:.1e}"
    if expected is not None:
        error = calls.norm_error(ours, torch.cat(expected))
        if error > calls.LARGEST_NORM_ERROR:
            return f"relative error {error:.1e}"
    return None


def _time(name: str, weights: Norms, peers: dict[str, Peer], fault: str | None, budget: float) -> Row:
    row: Row = {"call": name, "correct": fault is None} | ({} if fault is None else {"fault": fault})
    timing = interleaved(peers, LIST_BUDGETS * budget, partial(calls.read_all, weights))
    row |= report.timed_columns(timing, over_peer=("peer", "lnprune"))
    report.show(row)
    return row


def time_peers(budget: float) -> list[Row]:
    weights = weights_of(RESNET50_SHAPES)
    rows = []
    for dim in (0, 1):
        dims = [dim] * len(weights)
        peers = {
            "lnprune": Peer(lambda _, dims=dims: ops.channel_norms(weights, dims, 2.0)),
            "peer": Peer(_foreach_channels(weights, dim)),
        }
        expected = [w.double().transpose(0, dim).flatten(1).square().sum(1).sqrt() for w in weights]
        name = f"`torch._foreach_norm` of views of all channels, dim {dim}"
        rows.append(_time(name, weights, peers, _fault(peers, expected), budget))
    if torch_pruning is not None:
        weights, peers = torch_pruning_peers()
        name = "Torch-Pruning's `GroupMagnitudeImportance` of all groups"
        rows.append(_time(name, weights, peers, _fault(peers), budget))
    else:
        print("Torch-Pruning is not installed: left out", flush=True)
    return rows
