"""Prunes a model in shards while it trains: FSDP2 over tensor parallelism, zeros that stay, one plan.

    torchrun --nproc-per-node 4 examples/sharded.py

with gloo on CPUs, and with NCCL where every process has a GPU. Each rank raises where something is not as
promised; the first one prints what happens.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lnprune

WIDTH, HIDDEN, BLOCKS, CLASSES = 64, 512, 4, 10
STEPS, BATCH = 60, 128
AMOUNT = 0.5  # of the hidden channels of all blocks together


class Block(nn.Module):
    """A residual block, whose hidden channels can go."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def whole_model() -> nn.Sequential:
    """The model as it is written, equal on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, CLASSES))


def make_mesh(device: str) -> DeviceMesh:
    """Two ranks for each tensor where there are enough, all others for data."""
    ranks = dist.get_world_size()
    tensor = 2 if ranks % 2 == 0 and ranks > 2 else 1
    return init_device_mesh(device, (ranks // tensor, tensor), mesh_dim_names=("data", "tensor"))


def distribute(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """The model in shards: hidden channels over the tensor ranks, and what is left over the data ranks."""
    for block in list(model)[:BLOCKS]:
        if mesh["tensor"].size() > 1:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh, teacher: nn.Module, seed: int
) -> float:
    """Some steps, with other data on each data rank; the last loss, averaged over the data ranks."""
    generator = torch.Generator().manual_seed(1000 * seed + mesh.get_local_rank("data"))
    for _ in range(STEPS):
        inputs = torch.randn(BATCH, WIDTH, generator=generator).to(mesh.device_type)
        with torch.no_grad():
            targets = teacher(inputs).argmax(dim=1)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    loss = loss.detach()
    dist.all_reduce(loss, group=mesh.get_group("data"))
    return loss.item() / mesh["data"].size()


def check_zeros(model: nn.Module, plan: lnprune.Plan) -> None:
    """Raises where a channel that the plan prunes is not zero, or another one is."""
    norms = lnprune.rank(model, n=2, dim="out", include="*.up").norms
    for name, keep in plan.keep.items():
        assert torch.equal(norms[name].cpu() != 0, keep), f"rank {dist.get_rank()}: {name}"


def say(text: str) -> None:
    """Prints on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = make_mesh(device)
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, CLASSES)).to(device)
    model = distribute(whole_model().to(device), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    up, down = model[0].up.weight, model[0].down.weight
    say(f"{mesh.shape} ranks for data and tensors; up {up.placements}, down {down.placements}")
    say(f"loss after training          {train(model, optimizer, mesh, teacher, 0):.3f}")

    with CommDebugMode() as traffic:
        ranking = lnprune.rank(model, n=2, dim="out", include="*.up")
    channels = sum(norms.numel() for norms in ranking.norms.values())
    say(f"rank                         {channels} channels, {traffic.get_total_counts()} collectives")
    plan = ranking.select(AMOUNT, scope="global", multiple_of=8, min_channels=64)
    with CommDebugMode() as traffic:
        plan.apply(permanent=True, bias=True)
    say(f"apply                        {plan!r}, {traffic.get_total_counts()} collectives")
    check_zeros(model, plan)

    handle = plan.keep_zeros(optimizer)
    say(f"loss after training pruned   {train(model, optimizer, mesh, teacher, 1):.3f}")
    check_zeros(model, plan)
    handle.remove()

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    path = pathlib.Path(folder[0])
    checkpoint.save(model.state_dict(), checkpoint_id=path / "checkpoint")
    if dist.get_rank() == 0:
        plan.save(path / "plan.json")
    dist.barrier()

    # The plan of the shards is one of the whole model too, which reads the shards' checkpoint.
    single = whole_model()
    state = single.state_dict()
    checkpoint.load(state, checkpoint_id=path / "checkpoint")
    single.load_state_dict(state)
    before = [parameter.detach().clone() for parameter in single.parameters()]
    lnprune.load_plan(path / "plan.json", single).apply(permanent=True, bias=True)
    assert all(torch.equal(*pair) for pair in zip(before, single.parameters(), strict=True))
    inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = (model(inputs.to(device)).cpu() - single(inputs)).abs().max().item()
    say(f"whole, from the checkpoint   the same zeros, outputs differ by {difference:.0e}")
    assert difference < 1e-4
    if dist.get_rank() == 0:
        shutil.rmtree(path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
