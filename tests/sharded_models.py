"""Models that are sharded over ranks: by hand, in every layout, and as users do it."""

import math

import torch
from torch import nn

# By name: how many ranks each dim of the mesh has (-1: all the others), and the placements along each.
# "S0" shards dim 0, "R" replicates.
LAYOUTS = {
    "rows": ([-1], ["S0"]),
    "columns": ([-1], ["S1"]),
    "replicated": ([-1], ["R"]),
    "rows and columns": ([2, -1], ["S0", "S1"]),
    "rows twice": ([2, -1], ["S0", "S0"]),
    "replicas of rows": ([2, -1], ["R", "S0"]),
    "replicas of columns": ([-1, 2], ["S1", "R"]),
    "three dims": ([2, 1, -1], ["S1", "S0", "S0"]),
    "rows on one dim of two": ([1, -1], ["S0", "S1"]),
}


def make_mesh(sizes):
    """A mesh of all ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    known = math.prod(size for size in sizes if size > 0)
    others = torch.distributed.get_world_size() // known
    names = ("a", "b", "c")[: len(sizes)]
    return init_device_mesh("cpu", [size if size > 0 else others for size in sizes], mesh_dim_names=names)


def sharded(tensor, mesh, placements):
    """A DTensor of a tensor that all ranks have."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    made = [Replicate() if word == "R" else Shard(int(word[1:])) for word in placements]
    return distribute_tensor(tensor.detach().clone(), mesh, made, src_data_rank=None)


def layers():
    """Weights whose channels no number of ranks divides, fewer channels than ranks, and convolutions."""
    return nn.Sequential(
        nn.Linear(6, 13),
        nn.Linear(13, 5),
        nn.Conv2d(3, 7, 3),
        nn.Linear(5, 1),
        nn.Linear(1, 3),
        nn.ConvTranspose2d(4, 6, (1, 2)),
    )


def shard_weights(model, mesh, placements):
    """The model, with its weights as DTensors."""
    for layer in model:
        layer.weight = nn.Parameter(sharded(layer.weight, mesh, placements))
    return model


def whole(tensor):
    """A plain tensor with all values."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_bits(a, b):
    """Whether two lists of tensors, sharded or not, have the same bits."""
    for x, y in zip(a, b, strict=True):
        left, right = whole(x.detach()).contiguous(), whole(y.detach()).contiguous()
        if not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            return False
    return True


def blocks():
    """A model with an uneven number of channels."""
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 11), nn.ReLU(), nn.Linear(11, 7))


def parallel(model, kind):
    """The model as a user would distribute it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    count = torch.distributed.get_world_size()
    if kind == "fully_shard":
        mesh, split = make_mesh([count]), None
    elif kind == "replicated fully_shard":
        mesh, split = make_mesh([2, -1]), None
    elif kind == "tensor parallel":
        mesh, split = None, make_mesh([count])
    else:
        both = make_mesh([-1, 2])
        mesh, split = both["a"], both["b"]
    if split is not None:
        parallelize_module(model, split, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if mesh is not None:
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)  # the last layer is the root's
    return model


KINDS = [
    *((count, kind) for count in (2, 3, 4) for kind in ("fully_shard", "tensor parallel")),
    (4, "replicated fully_shard"),
    (4, "fully_shard over tensor parallel"),
]
