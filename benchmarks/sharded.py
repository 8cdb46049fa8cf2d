"""Sharded weights on the CPU, with gloo: what the ranks exchange, over what each measures of its shard."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import lnprune
from benchmarks import program, report
from benchmarks.program import RECYCLED, Options, Program, Sections
from benchmarks.report import Row, Verdict
from benchmarks.shapes import MLP, Shape, shape_name
from benchmarks.timing import Timing
from lnprune.steps import norms, sharding
from lnprune.steps.local import held_here

# The matrices of one layer of a transformer of 7 billion parameters.
LAYER_7B: list[Shape] = [*[(4096, 4096)] * 4, *[MLP[::-1]] * 2, MLP]
LAYERS = {"1 layer of 7 B": 1, "32 layers of 7 B": 32}
RANKS = (2, 4)
ROUNDS, QUICK_ROUNDS = 15, 3
VECTORS = (42_496, 339_968, 1_359_872)  # channels of 1, 8 and 32 such layers
ESTIMATED_RANKS = (8, 64, 512, 4096)
# Decoders by name: width, channels of keys and of values, width inside the MLP, layers.
DECODERS = {
    "7 B": (4096, 4096, 11_008, 32),
    "70 B": (8192, 1024, 28_672, 80),
    "400 B": (16_384, 1024, 53_248, 126),
}


def decoder_size(width: int, keys: int, inside: int, count: int) -> tuple[int, int]:
    """The weights of a decoder's matrices, and their channels along dim 0."""
    weights = 2 * width * width + 2 * width * keys + 3 * width * inside
    channels = 2 * width + 2 * keys + 2 * inside + width
    return count * weights, count * channels


def _on_ranks(
    count: int, work: Callable[..., dict[str, list[float]]], *args: Any
) -> dict[str, list[float]]:
    """Runs a function of this module on so many processes; returns what it returns on the first."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (count, folder, work.__name__, args), nprocs=count)
        return json.loads((pathlib.Path(folder) / "found.json").read_text())


def _rank(rank: int, count: int, folder: str, work: str, args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", count),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=120),
    )
    found = globals()[work](*args)
    if rank == 0:
        report.save_text(pathlib.Path(folder) / "found.json", json.dumps(found))
    dist.barrier()  # gloo aborts a process whose peers have left
    dist.destroy_process_group()


def _rounds(peers: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in turn, from when all ranks begin until the last one ends."""
    for run in peers.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(rounds):
        names = list(peers)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            peers[name]()
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            found[name].append(seconds.item())
    return found


def rank_layers(layers: int, dim: int, rounds: int) -> dict[str, list[float]]:
    """On each rank: the shards of matrices along dim 0, as ``fully_shard`` has them.

    All layers have the same memory, which no cache holds.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pairs, weights = [], []
    shards = []
    for rows, columns in LAYER_7B:
        shards.append(torch.randn(rows // dist.get_world_size(), columns).bfloat16())
    for shard in shards * layers:
        module = nn.Module()
        module.weight = nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)]), requires_grad=False)
        weights.append(module.weight)
        pairs.append((module, "weight"))
    held, dims = [held_here(weight) for weight in weights], [dim] * len(weights)
    sums = norms.channel_sums(held, 2, dims)
    folds = [sharding.ADD] * len(weights)
    peers = {
        "local": lambda: norms.channel_sums(held, 2, dims),
        "exchange": lambda: sharding.folded(weights, sums, dims, folds),
        "rank": lambda: lnprune.rank(pairs, 2, dim),
        "gather": lambda: weights[-1].full_tensor(),
    }
    return _rounds(peers, rounds)


def exchange_vectors(rounds: int) -> dict[str, list[float]]:
    """On each rank: vectors of sums of so many channels."""
    group = dist.group.WORLD
    peers = {}
    for length in VECTORS:
        vector = sharding.Vector(torch.rand(length, dtype=torch.float64), None, length, sharding.ADD)
        peers[str(length)] = lambda vector=vector: sharding.folded_over(
            group, [vector], torch.device("cpu")
        )
    return _rounds(peers, rounds)


def time_layers(options: Options) -> list[Row]:
    rows = []
    for count in RANKS:
        for name, layers in LAYERS.items():
            for dim in (0, 1):
                timing = Timing(_on_ranks(count, rank_layers, layers, dim, _count(options)))
                row = {"model": name, "ranks": count, "dim": dim}
                row |= report.timed_columns(timing, over_local=("exchange", "local"))
                rows.append({key: value for key, value in row.items() if key != "settled"})
                report.show(rows[-1])
    return rows


def time_vectors(options: Options) -> list[Row]:
    rows = []
    for count in RANKS:
        for length, seconds in _on_ranks(count, exchange_vectors, _count(options)).items():
            rows.append({"channels": int(length), "ranks": count, "exchange": statistics.median(seconds)})
            report.show(rows[-1])
    return rows


def _count(options: Options) -> int:
    return QUICK_ROUNDS if options.quick else ROUNDS


def constants(sections: Sections) -> tuple[float, float, float]:
    """Seconds for each other rank, seconds for each byte that a rank sends, bytes of weights per second.

    An exchange is taken to be linear in both; the last is that of a rank that ranks its shard along dim 0.
    """
    rows = sections["vectors"]
    columns = [(row["ranks"] - 1, sent_bytes(row["channels"], row["ranks"])) for row in rows]
    design = torch.tensor(columns, dtype=torch.float64)
    times = torch.tensor([row["exchange"] for row in rows], dtype=torch.float64)
    # Relative errors count, so that short exchanges matter too.
    solved = torch.linalg.lstsq(design / times[:, None], torch.ones_like(times)[:, None]).solution
    per_rank, per_byte = solved.flatten().clamp(min=1e-15).tolist()
    layer = 2 * sum(rows * columns for rows, columns in LAYER_7B)
    rates = [
        LAYERS[row["model"]] * layer / row["ranks"] / row["local"]
        for row in sections["layers"]
        if row["dim"] == 0
    ]
    return per_rank, per_byte, statistics.median(rates)


def sent_bytes(channels: int, ranks: int) -> float:
    """What a rank sends in the two collectives."""
    return 2 * 8 * channels * (ranks - 1) / ranks


def estimates(sections: Sections) -> list[Row]:
    """What larger models on more ranks would take, by the constants that were measured."""
    per_rank, per_byte, rate = constants(sections)
    rows = []
    for name, shape in DECODERS.items():
        weights, channels = decoder_size(*shape)
        for count in ESTIMATED_RANKS:
            local = 2 * weights / count / rate
            exchange = per_rank * (count - 1) + per_byte * sent_bytes(channels, count)
            rows.append(
                {"model": name, "ranks": count, "megabytes": 8 * channels / 1e6, "local": local}
                | {"exchange": exchange, "rank": local + exchange}
            )
    return rows


def verdicts(sections: Sections) -> list[Verdict]:
    """What was asked for, and what was found."""
    found = []
    for row in sections["layers"]:
        if row["ranks"] != max(RANKS):
            continue
        over = row["over_local"]
        text = (
            f"the exchange over the local ranking, {row['model']}, {row['ranks']} ranks, dim {row['dim']}"
        )
        found.append(Verdict(text, "at most 0.1", f"{over:.3f}", over <= 0.1))
    return found


def speed_lines(machine: dict[str, Any], sections: Sections) -> list[str]:
    """What the README says of the speed."""
    return report.table(sections["layers"])


def markdown(machine: dict[str, Any], sections: Sections, seconds: float) -> str:
    """The page: figures, and what they mean, on one screen."""
    per_rank, per_byte, rate = constants(sections)
    shapes = ", ".join(dict.fromkeys(map(shape_name, LAYER_7B)))
    measured = f"{1e6 * per_rank:.0f} us, {1e-9 / per_byte:.2f} GB/s, {rate / 1e9:.2f} GB/s"
    lines = [
        "# Sharded weights on the CPU, with gloo",
        "",
        report.provenance(machine, seconds),
        report.cpu_of(machine),
        "Every rank is a process with one thread, all of them on this machine: four share "
        f"{machine['cores']} cores. What is compared runs in turn; ratios are medians of those within one "
        "round. Times are those of the slowest rank.",
        "",
        f"The matrices of a transformer of 7 billion parameters ({shapes}) in bfloat16, sharded along dim "
        "0, n = 2. *Local*: each rank sums its shards. *Exchange*: what follows, eight bytes per channel, "
        "in two collectives, however many layers there are. *Rank*: `lnprune.rank`, with both, and a hash. "
        f"*Gather one*: `full_tensor()` of one {shape_name(MLP)}, which lnprune does not do.",
        "",
        *speed_lines(machine, sections),
        "",
        "The exchange alone, of vectors as long as 1, 8 and 32 such layers have channels:",
        "",
        *report.table(sections["vectors"]),
        "",
        "## An estimate for more ranks and larger models",
        "",
        "**Nothing in this table was run.** It takes an exchange to cost so much for each other rank and "
        "for each byte that a rank sends, and a ranking to read so many bytes per second, as measured "
        f"above: {measured}. Here four ranks wait for two cores, so the first is high: where ranks have "
        "cores of their own, an exchange over many of them takes less. On GPUs with NCCL all three are "
        "others; the bytes are the same. All matrices of a decoder in bfloat16, sharded over all ranks "
        "along dim 0.",
        "",
        *report.table(estimates(sections)),
        *program.warning(machine),
    ]
    return "\n".join(lines) + "\n"


PROGRAM = Program(
    module="benchmarks.sharded",
    description=__doc__,
    budget=1.0,
    sections={"layers": time_layers, "vectors": time_vectors},
    states={RECYCLED: ["layers", "vectors"]},
    verdicts=verdicts,
    markdown=markdown,
    speed_lines=speed_lines,
    pictures=lambda _: {},
)


if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
