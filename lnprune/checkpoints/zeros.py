"""What a plan zeroes of a checkpoint: slices of stored tensors, found by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lnprune.checkpoints.channel_dims import Channels, LeftAlone, channel_dims
from lnprune.checkpoints.checkpoint import Checkpoint
from lnprune.checkpoints.expert_names import experts_of
from lnprune.checkpoints.failures import UnusableCheckpoint
from lnprune.checkpoints.stored import DTYPES, StoredTensor
from lnprune.modules.application import Part, Slices
from lnprune.plans.loading import slices_of, weights_of
from lnprune.plans.plan_file import SavedPlan
from lnprune.steps.batches import Batch
from lnprune.steps.in_place import write_zeros


class Zeros(NamedTuple):
    """Slices along a dim, with a flag for each that stays; as :class:`Slices`, of a stored tensor."""

    dim: int
    keep: Tensor
    part: Part | None = None
    batch: Batch | None = None

    def write(self, values: Tensor) -> None:
        """Writes +0.0 to the others."""
        write_zeros([self.of(values)], [self.keep], [self.dim], [self.batch])

    def of(self, values: Tensor) -> Tensor:
        """The part that it is about; a view."""
        return values if self.part is None else values.narrow(*self.part)

    def is_by_rows(self, rows: int) -> bool:
        """Whether blocks of a first dim of so many indices can be written each by itself."""
        is_along = self.part is None or (self.part.dim != 0 and self.dim != 0)
        return is_along and (self.batch is None or (self.batch == (0, rows) and self.dim != 0))

    def rows(self, first: int, count: int) -> Zeros:
        """Those of so many indices of the first dim."""
        if self.batch is not None:
            keep = self.keep.view(self.batch.size, -1)[first : first + count].flatten()
            return self._replace(keep=keep, batch=Batch(0, count))
        return self._replace(keep=self.keep[first : first + count]) if self.dim == 0 else self


class Job(NamedTuple):
    """A stored tensor, and what is zeroed of it."""

    tensor: StoredTensor
    zeros: list[Zeros]


def jobs_of(checkpoint: Checkpoint, saved: SavedPlan, bias: bool = False) -> list[Job]:
    """What a plan zeroes of a checkpoint.

    Args:
        checkpoint: whose tensors have the names of the plan; of a weight's names those that are there.
        saved: the plan, of this checkpoint or of a model that has its names.
        bias: also the biases beside weights whose channels are outputs.

    Raises:
        UnusableCheckpoint: it does not have a weight of the plan, or of another shape or dtype.
        ValueError: ``bias`` with channels that are no outputs, or with coupled channels.
    """
    if bias and saved.groups is not None:
        raise ValueError("--bias: the biases of coupled channels go with them")
    known = {name: tensor for tensor in checkpoint.tensors for name in tensor.names}
    dims = channel_dims(checkpoint.tensors, checkpoint.config) if bias else {}
    jobs: dict[StoredTensor, list[Zeros]] = {}
    for slices in slices_of(saved, weights_of(saved)):
        for tensor, zeros in _stored(slices, known, checkpoint):
            jobs.setdefault(tensor, []).append(zeros)
            if bias:
                for beside, flags in _biases(tensor, zeros, known, dims):
                    jobs.setdefault(beside, []).append(flags)
    return [Job(tensor, zeros) for tensor, zeros in jobs.items()]


def _stored(
    slices: Slices, known: Mapping[str, StoredTensor], checkpoint: Checkpoint
) -> list[tuple[StoredTensor, Zeros]]:
    """The tensors of a weight's names, each once; or those of each expert, of a weight that holds all."""
    weight = slices.weight
    there = dict.fromkeys(known[name] for name in weight.names if name in known)
    zeros = Zeros(slices.dim, slices.keep, slices.part, slices.batch)
    found = [(tensor, weight.shape, zeros) for tensor in there] or [
        (known[each.name], each.shape, Zeros(each.dim, each.keep))
        for each in experts_of(slices, known.keys())
    ]
    if not found:
        raise UnusableCheckpoint(
            f"{checkpoint.path}: has no {weight.name}, which the plan prunes: is it another model?"
        )
    for tensor, shape, _ in found:
        if tensor.shape != shape:
            raise UnusableCheckpoint(
                f"{checkpoint.path}: {tensor.name} has shape {tensor.shape}, the plan is for {shape}"
            )
        if tensor.dtype not in DTYPES:
            raise UnusableCheckpoint(
                f"{checkpoint.path}: {tensor.name} is of dtype {tensor.dtype}, expected one of "
                f"{', '.join(DTYPES)}"
            )
    return [(tensor, zeros) for tensor, _, zeros in found]


def _biases(
    tensor: StoredTensor,
    zeros: Zeros,
    known: Mapping[str, StoredTensor],
    dims: Mapping[StoredTensor, Channels | LeftAlone],
) -> Iterator[tuple[StoredTensor, Zeros]]:
    """The biases of the channels that go."""
    for name in tensor.names:
        beside = known.get(name.removesuffix("weight") + "bias") if name.endswith("weight") else None
        if beside is None or len(beside.shape) != 1:
            continue
        where = dims[tensor]
        where = where.channels if isinstance(where, LeftAlone) else where  # type: ignore[assignment]
        length, channels = beside.shape[0], zeros.keep.numel()
        if (
            not isinstance(where, Channels)
            or zeros.dim != where.out
            or zeros.batch is not None
            or length % max(1, channels)
        ):
            raise ValueError(
                f"{name}: --bias needs channels that are outputs, got {channels} along dim {zeros.dim} of "
                f"shape {tensor.shape}, with a bias of {length}"
            )
        yield beside, Zeros(0, zeros.keep.repeat(length // max(1, channels)))


def channels_of_jobs(jobs: Sequence[Job]) -> int:
    """How many slices go."""
    return sum(int((~zeros.keep).sum()) for job in jobs for zeros in job.zeros)
