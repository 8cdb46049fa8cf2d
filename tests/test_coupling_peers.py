"""The index maps of coupled channels against those of torch-pruning, where that is right."""

import pytest
import torch
from torch import nn

import lnprune
from tests.small_models import CASES
from tests.test_coupled_plans import joined
from tests.test_coupling import residual

torch_pruning = pytest.importorskip("torch_pruning")

NAMES = ["residual", "batch norm", "split in two", "cat", "depthwise", "flatten", "one dim", "transposed"]
MODELS = {name: (CASES[name].make, CASES[name].shape) for name in NAMES if name != "split in two"}
MODELS |= {"stream": (residual, (2, 3)), "joined": (joined, (2, 3, 8, 8))}


def ours(group, root):
    """By module and side, the slices of each channel; channels by their index in the root's weight."""
    (first,) = [m for m in group.members if m.name == f"{root}.weight" and not m.is_input]
    index = dict(zip(first.channels.tolist(), first.slices.tolist(), strict=True))
    found = {}
    for member in group.members:
        if len(member.shape) > 1:
            pairs = {
                (index[channel], slice_)
                for channel, slice_ in zip(member.channels.tolist(), member.slices.tolist(), strict=True)
            }
            found[member.name.rpartition(".")[0], member.is_input] = pairs
    return found


def theirs(graph, group, names):
    found = {}
    for item in group:
        name = names.get(id(item.dep.target.module))
        if name is not None:
            is_input = not graph.is_out_channel_pruning_fn(item.dep.handler)
            pairs = set(zip(item.root_idxs, item.idxs, strict=True))
            found.setdefault((name, is_input), set()).update(pairs)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_index_maps_are_those_of_torch_pruning(name):
    make, shape = MODELS[name]
    model, inputs = make().eval(), torch.randn(shape)
    groups = lnprune.couple(model, inputs).groups
    assert groups
    graph = torch_pruning.DependencyGraph().build_dependency(model, inputs, verbose=False)
    weights = (nn.Linear, nn.modules.conv._ConvNd)
    names = {id(module): path for path, module in model.named_modules() if isinstance(module, weights)}
    for group in groups:
        root = group.makers[0].rpartition(".")[0]
        layer = model.get_submodule(root)
        kind = graph.get_pruner_of_module(layer)
        channels = kind.get_out_channels(layer)
        their_group = graph.get_pruning_group(layer, kind.prune_out_channels, list(range(channels)))
        want = theirs(graph, their_group, names)
        depthwise = {path for path, side in want if getattr(model.get_submodule(path), "groups", 1) > 1}
        want = {key: pairs for key, pairs in want.items() if not (key[0] in depthwise and key[1])}
        assert ours(group, root) == want
