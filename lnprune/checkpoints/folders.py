"""A folder that is there whole or not at all: until then, what stood in its place stays as it was."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator

from lnprune.checkpoints.failures import RefusedTarget

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h


@contextlib.contextmanager
def replacing_folder(path: str) -> Iterator[str]:
    """The path of a new folder, which takes the place of ``path`` at the end of the block.

    What is filled lies beside it, and is renamed. A folder that is there is exchanged for it in one step
    of the kernel, and then goes; a process that is killed in between leaves it under a name of its own.

    Raises:
        RefusedTarget: the file system cannot exchange folders. What was there is untouched.
    """
    path = os.path.abspath(path)
    temporary = os.path.join(os.path.dirname(path), f".lnprune-{secrets.token_hex(8)}.tmp")
    os.mkdir(temporary)
    try:
        yield temporary
        if os.path.isdir(path):
            os.chmod(temporary, os.stat(path).st_mode & 0o7777)
        if os.path.isdir(path) and os.listdir(path):
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(first: str, second: str) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    try:
        failed = library.renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE)
    except AttributeError:
        failed = -1
        ctypes.set_errno(errno.ENOSYS)
    if failed:
        why = os.strerror(ctypes.get_errno())
        raise RefusedTarget(f"{second}: cannot be replaced in one step here ({why}): name a new folder")
