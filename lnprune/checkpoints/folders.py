"""A folder that is there whole or not at all: until then, what stood in its place stays as it was."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator

from lnprune.checkpoints.failures import RefusedTarget
from lnprune.checkpoints.system_calls import exchange


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
            try:
                exchange(temporary, path)
            except OSError as error:
                raise RefusedTarget(
                    f"{path}: cannot be replaced in one step here ({error.strerror}): name a new folder"
                ) from None
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
