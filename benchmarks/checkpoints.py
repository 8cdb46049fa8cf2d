"""Checkpoints on disk: against cp with fsync and against reading every byte; memory of whole commands."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lnprune
from benchmarks import program, report
from benchmarks.program import BUILD, RECYCLED, Program, Sections
from benchmarks.report import Row, Verdict
from benchmarks.timing import Peer, interleaved
from lnprune.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lnprune.checkpoints.pruning import Target
from lnprune.checkpoints.zeros import Job, jobs_of
from lnprune.plans import plan_file

BYTES = 2.2e9
DTYPES = (torch.bfloat16, torch.float32)
WIDTH, INNER = 2048, 8192
AMOUNT = 0.5
RANK, PRUNE = "rank", "prune"
# Seconds over those of cp with fsync, by call and dim; and over those of reading.
MOST = {(RANK, 0): 1.0, (RANK, 1): 1.0, (PRUNE, 0): 1.5, (PRUNE, 1): 2.0}
MOST_OVER_READ = 2.5
MOST_MEMORY = 220e6 + 64e6  # beside the largest tensor
_BLOCK = 128 * 1024  # bytes that cat reads at once


def make(path: pathlib.Path, dtype: torch.dtype, size: float) -> pathlib.Path:
    """A file of linear layers, of so many bytes or a few more."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    total, layer = 0, 0
    while total < size:
        for name, shape in (
            ("o_proj", (WIDTH, WIDTH)),
            ("up_proj", (INNER, WIDTH)),
            ("down_proj", (WIDTH, INNER)),
        ):
            weight = torch.randn(shape).to(dtype)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
            total += weight.numel() * weight.element_size()
        layer += 1
    save_file(tensors, path, {"format": "pt"})
    return path


def read(path: pathlib.Path) -> None:
    """Every byte of a file, as cat reads it."""
    block = bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def copy(path: pathlib.Path, target: pathlib.Path) -> None:
    """cp, and fsync."""
    subprocess.run(["cp", path, target], check=True)
    with open(target, "r+b") as file:
        os.fsync(file.fileno())


def remove(*paths: pathlib.Path) -> None:
    """Both ways write new files: what a disk does with blocks that it had before is another matter.

    What is left to write, and to discard, is done before the clock runs.
    """
    for path in paths:
        path.unlink(missing_ok=True)
    os.sync()


def plan_of(checkpoint: Checkpoint, dim: int) -> list[Job]:
    plan = lnprune.rank_checkpoint(checkpoint.path, 2, dim).select(AMOUNT)
    return jobs_of(checkpoint, plan_file.parsed(plan.to_dict(), checkpoint.path))


def is_right(path: pathlib.Path, pruned: pathlib.Path, dim: int) -> bool:
    """Whether norms and zeros are bit for bit those of the loaded tensors, pruned by lnprune in memory."""
    ranking = lnprune.rank_checkpoint(path, 2, dim)
    keep = ranking.select(AMOUNT).keep
    found = load_file(pruned)
    for name, weight in load_file(path).items():
        if not torch.equal(ranking.norms[name], lnprune.channel_norms(weight, 2, dim)):
            return False
        lnprune.ops.zero_channels_([weight], [keep[name]], [dim])
        if not torch.equal(found[name], weight):
            return False
    return True


def time_files(budget: float, size: float = BYTES) -> list[Row]:
    """Ranking a file in the page cache, and writing it pruned, after the ranking."""
    rows = []
    for dtype in DTYPES:
        folder = BUILD / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        path, copied, out = (folder / f"{name}.safetensors" for name in ("source", "copy", "pruned"))
        try:
            make(path, dtype, size)
            checkpoint = open_checkpoint(path)
            targets = {}
            for dim in (0, 1):
                targets[dim] = Target(checkpoint, plan_of(checkpoint, dim), str(out), force=True)
            peers = {
                "cp": Peer(lambda _, p=path, c=copied: copy(p, c), partial(remove, copied, out)),
                "read": Peer(lambda _, p=path: read(p)),
            }
            right = {}
            for dim, target in targets.items():
                target.write()
                right[dim] = is_right(path, out, dim)
                peers[f"{RANK} {dim}"] = Peer(partial(rank, path, dim))
                peers[f"{PRUNE} {dim}"] = Peer(lambda _, t=target: t.write(), partial(remove, copied, out))
            timing = interleaved(peers, budget, partial(read, path))
            for call, dim in MOST:
                columns = report.timed_columns(
                    timing, over_cp=(f"{call} {dim}", "cp"), over_read=(f"{call} {dim}", "read")
                )
                name = f"{call}, {report.dtype_name(dtype)}, dim {dim}"
                row: Row = {"call": name, "correct": right[dim]}
                row["gigabytes"] = path.stat().st_size / 1e9
                row["lnprune"] = columns[f"{call} {dim}"]
                kept = ("cp", "read", "over_cp", "over_cp_quartiles", "over_read", "over_read_quartiles")
                row |= {key: columns[key] for key in kept if key in columns}
                rows.append(row)
                report.show(row)
        finally:
            shutil.rmtree(folder)
    return rows


def rank(path: pathlib.Path, dim: int, _: Any) -> None:
    lnprune.rank_checkpoint(path, 2, dim)


# Runs a command, and prints the most memory that the process had since it began, in kB.
_WATCHED = (
    "import re, sys\nfrom lnprune.commands.main import main\ncode = main(sys.argv[1:])\n"
    "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\nsys.exit(code)\n"
)


def memory_of(*words: str | pathlib.Path) -> int:
    """The peak resident memory of a command, in bytes."""
    command = [sys.executable, "-c", _WATCHED, *map(str, words), "-q"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024


def measure_memory(size: float = BYTES) -> list[Row]:
    """Of whole commands, which import torch too, on files of two sizes."""
    rows = []
    folder = BUILD / "checkpoints"
    for factor in (0.25, 1.0):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            path = make(folder / "source.safetensors", torch.float32, factor * size)
            largest = max(each.length for each in open_checkpoint(path).tensors)
            for call in (RANK, PRUNE):
                for dim in (0, 1):
                    words: list[str | pathlib.Path] = [call, path, "--dim", str(dim)]
                    if call == PRUNE:
                        words += ["--amount", str(AMOUNT), "--force", "-o"]
                        words.append(folder / "pruned.safetensors")
                    found = memory_of(*words)
                    row: Row = {"call": f"{call}, dim {dim}", "gigabytes": path.stat().st_size / 1e9}
                    row |= {"correct": True, "resident": found / 1e6, "largest": largest / 1e6}
                    rows.append(row)
                    report.show(row)
        finally:
            shutil.rmtree(folder)
    return rows


def verdicts(sections: Sections) -> list[Verdict]:
    """What was asked for, and what was found."""
    found = []
    for row in sections["files"]:
        name, call = row["call"], row["call"].partition(",")[0]
        most = MOST[call, int(name[-1])]
        shown = report.cell("over_cp", row)
        found.append(Verdict(f"{name}, cp with fsync", f"{most:g} at most", shown, row["over_cp"] <= most))
        if call == RANK:
            met = row["over_read"] <= MOST_OVER_READ
            shown = report.cell("over_read", row)
            found.append(Verdict(f"{name}, reading", f"{MOST_OVER_READ:g} at most", shown, met))
    for row in sections["memory"]:
        most = MOST_MEMORY / 1e6 + row["largest"]
        name = f"{row['call']}, {row['gigabytes']:.2f} GB"
        met = row["resident"] <= most
        found.append(Verdict(name, f"{most:.0f} MB at most", report.cell("resident", row), met))
    return found


def speed_lines(machine: dict[str, Any], sections: Sections) -> list[str]:
    """What the README says of the speed."""
    return report.table(sections["files"])


def markdown(machine: dict[str, Any], sections: Sections, seconds: float) -> str:
    """The page."""
    lines = [
        "# Checkpoints on disk",
        "",
        report.provenance(machine, seconds),
        report.cpu_of(machine),
        program.conditions(machine, sections),
        *report.fault_lines(sections),
        "",
        "A safetensors file of linear layers, in the page cache. `rank` is `rank_checkpoint`. `prune` "
        "writes the pruned file with fsync, half of the channels, after the ranking. Against `cp` to "
        "a new file with fsync, and against reading every byte in blocks, as `cat` does:",
        "",
        *speed_lines(machine, sections),
        "",
        "The most resident memory of whole commands, which import torch too (float32):",
        "",
        *report.table(sections["memory"]),
    ]
    return "\n".join([*lines, *program.warning(machine)]) + "\n"


PROGRAM = Program(
    module="benchmarks.checkpoints",
    description=__doc__,
    budget=100.0,  # disks are uneven: it takes many rounds
    sections={
        "files": lambda o: time_files(o.budget),
        "memory": lambda o: measure_memory(),
    },
    states={RECYCLED: ["files", "memory"]},
    verdicts=verdicts,
    markdown=markdown,
    speed_lines=speed_lines,
    pictures=lambda _: {},
)


if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
