"""Whether a checkpoint is what a plan leaves: zeros in all slices that it prunes, and whole archives."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence

import torch

from lnprune.checkpoints.checkpoint import Checkpoint
from lnprune.checkpoints.memory import Memory, Progress
from lnprune.checkpoints.stored import reading
from lnprune.checkpoints.zeros import Job, Zeros
from lnprune.steps.batches import taken
from lnprune.steps.bits import bits


def differences(
    checkpoint: Checkpoint, jobs: Sequence[Job], progress: Progress = lambda _: None
) -> list[str]:
    """What is not as the plan leaves it: a line for each tensor, or record of an archive."""
    found = []
    memory = Memory()
    for path in checkpoint.files:
        with reading(path) as file:
            for tensor, zeros in jobs:
                if tensor.file == path:
                    values = tensor.of(memory.read(file, tensor.offset, tensor.length))
                    count = sum(_nonzero(each.of(values), each) for each in zeros)
                    if count:
                        found.append(
                            f"{tensor.name}: {count} of the slices that the plan prunes are not +0.0"
                        )
                    progress(tensor.length)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                found.append(f"{path}: the checksum of {damaged} is wrong")
    return found


def _nonzero(values: torch.Tensor, zeros: Zeros) -> int:
    """How many slices that go have a bit that is set."""
    gone = (~zeros.keep).nonzero().flatten()
    numbers = bits(values)
    found = [bool(taken(numbers, zeros.dim, zeros.batch, each).any()) for each in gone.split(1)]
    return sum(found)
