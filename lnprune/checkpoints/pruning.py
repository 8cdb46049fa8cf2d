"""A pruned checkpoint on disk, all or nothing: beside the source, or in its place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence

from lnprune.atomic_file import replacing
from lnprune.checkpoints.checkpoint import INDEX, Checkpoint
from lnprune.checkpoints.failures import RefusedTarget
from lnprune.checkpoints.folders import replacing_folder
from lnprune.checkpoints.memory import Progress
from lnprune.checkpoints.targets import check_in_place, check_space, check_target
from lnprune.checkpoints.writing import write_file
from lnprune.checkpoints.zeros import Job

# Weights of other formats, which would not be pruned.
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
)
# What ends so, and holds no weights.
_NO_WEIGHTS = ("training_args.bin",)


class Target:
    """Where a pruned checkpoint goes, after all checks that need no data.

    Args:
        checkpoint: the source.
        jobs: what is zeroed.
        path: the new place; None: in place.
        force: whether what is there may be replaced.

    Raises:
        RefusedTarget: it must not be written, or does not fit.
    """

    def __init__(self, checkpoint: Checkpoint, jobs: Sequence[Job], path: str | None, force: bool = False):
        self.path = checkpoint.folder or checkpoint.path if path is None else path
        self._checkpoint, self._jobs, self._is_in_place = checkpoint, jobs, path is None
        touched = {job.tensor.file for job in jobs}
        self._files = [file for file in checkpoint.files if file in touched or path is not None]
        self._others = [] if checkpoint.folder is None or path is None else _others(checkpoint)
        self.size = sum(os.stat(file).st_size for file in self._files)  # bytes that are written
        if path is None:
            check_in_place(checkpoint, self._files)
        else:
            check_target(checkpoint, path, force)
        beside = sum(os.stat(file).st_size for file in self._others if os.path.isfile(file))
        check_space(self._files[0] if path is None and self._files else self.path, self.size + beside)

    @property
    def left_behind(self) -> list[str]:
        """Files of the source with weights that are not pruned, and not copied."""
        if self._checkpoint.folder is None or self._is_in_place:
            return []
        taken = {*self._others, *self._checkpoint.files, self._checkpoint.index}
        found = (entry for entry in os.scandir(self._checkpoint.folder) if entry.path not in taken)
        return sorted(entry.name for entry in found if entry.name.endswith((*_WEIGHTS, INDEX)))

    def write(self, progress: Progress = lambda _: None) -> None:
        """Writes it, whole or not at all.

        Raises:
            RefusedTarget: it does not fit after all.
            UnusableCheckpoint: the source changed meanwhile.
        """
        try:
            self._write(progress)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise RefusedTarget(f"{self.path}: {error.strerror}: nothing written") from None
            raise

    def _write(self, progress: Progress) -> None:
        folder = self._checkpoint.folder
        if folder is None or (self._is_in_place and len(self._files) < 2):
            for file in self._files:
                self._write_file(file, file if self._is_in_place else self.path, progress)
            return
        with replacing_folder(self.path) as new:
            if self._is_in_place:
                _link_others(folder, new, {os.path.basename(file) for file in self._files})
            else:
                for other in self._others:
                    _copy(other, new)
            for file in self._files:
                self._write_file(file, os.path.join(new, os.path.basename(file)), progress)
            if not self._is_in_place and self._checkpoint.index is not None:
                _copy(self._checkpoint.index, new)

    def _write_file(self, source: str, target: str, progress: Progress) -> None:
        jobs = [job for job in self._jobs if job.tensor.file == source]
        mode = os.stat(source).st_mode & 0o7777
        with replacing(target) as file:
            write_file(source, jobs, file, progress)
            os.fchmod(file.fileno(), mode)


def _others(checkpoint: Checkpoint) -> list[str]:
    """What lies beside the files of a checkpoint in its folder and goes with them."""
    found = []
    assert checkpoint.folder is not None
    for entry in os.scandir(checkpoint.folder):
        is_weight = entry.name.endswith((*_WEIGHTS, INDEX)) and entry.name not in _NO_WEIGHTS
        if not is_weight and not entry.name.startswith("."):
            found.append(entry.path)
    return sorted(found)


def _copy(path: str, folder: str) -> None:
    """A file, or all of a folder, as it is; links become what they lead to."""
    target = os.path.join(folder, os.path.basename(path))
    if os.path.isdir(path):
        shutil.copytree(path, target)
    elif os.path.isfile(path):
        shutil.copy2(path, target)


def _link_others(folder: str, new: str, without: set[str]) -> None:
    """All other things in a folder, as second names of the same files."""
    for entry in os.scandir(folder):
        target = os.path.join(new, entry.name)
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), target)
        elif entry.is_dir():
            shutil.copytree(entry.path, target, symlinks=True, copy_function=os.link)
        elif entry.name not in without:
            os.link(entry.path, target)
