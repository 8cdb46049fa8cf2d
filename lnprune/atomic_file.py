"""A file that is there whole or not at all: until then, what stood in its place stays as it was."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for bytes that takes the place of ``path`` at the end of the block, unless that raises.

    The bytes wait in a file beside it, so the folder has to be writable. A link stays a link, and the file
    that it leads to is replaced; a file keeps its mode. Devices and pipes are written directly.

    Raises:
        OSError: as :func:`open` does; or the bytes do not fit. What was there is untouched.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "text"
        >>> with replacing(path) as file:
        ...     count = file.write(b"whole")
        >>> path.read_text()
        'whole'
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb") as file:
            yield file
        return
    target = os.path.realpath(path)
    if mode is not None:
        with open(target, "r+b"):
            pass  # a file that must not be written must not be replaced either
    temporary = os.path.join(os.path.dirname(target), f".lnprune-{secrets.token_hex(8)}.tmp")
    try:
        new = open(temporary, "x+b")  # noqa: SIM115
    except OSError as error:  # of the folder, which the file's name tells
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    try:
        with new:
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))
            yield new
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
