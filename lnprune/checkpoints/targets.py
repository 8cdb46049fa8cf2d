"""Where a checkpoint may be written: what is refused before anything is written."""

from __future__ import annotations

import os
import shutil

from lnprune.checkpoints.checkpoint import Checkpoint
from lnprune.checkpoints.failures import RefusedTarget


def check_target(checkpoint: Checkpoint, target: str, force: bool) -> None:
    """Raises RefusedTarget where a checkpoint must not be written to a new place.

    Args:
        checkpoint: what is pruned.
        target: a file for a file, a folder for a folder.
        force: whether what is there may be replaced.
    """
    source = checkpoint.folder or checkpoint.path
    _check_is_no_link(target)
    parent = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(parent):
        raise RefusedTarget(f"{target}: its folder {parent} is not there")
    exists = os.path.exists(target)
    if exists and os.path.samefile(source, target):
        raise RefusedTarget(f"{target}: is the input: use --in-place")
    if exists and any(os.path.samefile(file, target) for file in checkpoint.files):
        raise RefusedTarget(f"{target}: is a file of the input: use --in-place")
    if checkpoint.folder is None:
        if os.path.isdir(target):
            raise RefusedTarget(f"{target}: is a folder, and the input a file: name a file")
        _check_is_file(target, exists)
        if not target.endswith(os.path.splitext(checkpoint.path)[1]):
            raise RefusedTarget(
                f"{target}: expected a name that ends as {os.path.basename(checkpoint.path)} does"
            )
    else:
        if exists and not os.path.isdir(target):
            raise RefusedTarget(f"{target}: is no folder, and the input is one: name a folder")
        inside, outside = os.path.realpath(target), os.path.realpath(source)
        if os.path.commonpath([inside, outside]) in (inside, outside):
            raise RefusedTarget(f"{target}: is inside of the input, or around it: name another folder")
    if exists and not force and (os.path.isfile(target) or os.listdir(target)):
        raise RefusedTarget(f"{target}: is there already: use --force to replace it")


def check_in_place(checkpoint: Checkpoint, files: list[str]) -> None:
    """Raises RefusedTarget where files of a checkpoint must not be replaced."""
    for part in os.path.abspath(checkpoint.folder or checkpoint.path).split(os.sep):
        if part.startswith(("models--", "datasets--")):
            raise RefusedTarget(f"{checkpoint.path}: is in the cache of a hub, which others share: use -o")
    if checkpoint.folder is not None and len(files) > 1:
        _check_is_no_link(checkpoint.folder)
    for file in files:
        _check_is_no_link(file)
        _check_is_file(file, True)
        links = os.stat(file).st_nlink
        if links > 1:
            raise RefusedTarget(f"{file}: has {links} names (hard links): never written through; use -o")
        if not os.access(file, os.W_OK):
            raise RefusedTarget(f"{file}: is not to be written: use -o")


def check_space(target: str, needed: int) -> None:
    """Raises RefusedTarget where so many bytes do not fit beside a target."""
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(target))).free
    if needed > free:
        raise RefusedTarget(
            f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB free: nothing written"
        )


def _check_is_no_link(path: str) -> None:
    if os.path.islink(path):
        raise RefusedTarget(f"{path}: is a link: never written through; use -o")


def _check_is_file(path: str, exists: bool) -> None:
    if exists and not os.path.isfile(path):
        raise RefusedTarget(f"{path}: is no file: never written to")
