"""What Linux offers and Python does not: folders that change places, and writes that begin early."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h


def exchange(first: str, second: str) -> None:
    """Two paths change places in one step; raises OSError where the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    failed = -1
    ctypes.set_errno(errno.ENOSYS)
    with contextlib.suppress(AttributeError):
        failed = library.renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE)
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), second)


def begin_writing(file: int, first: int, length: int) -> None:
    """Lets the kernel begin to write bytes of an open file to the disk, without waiting for it.

    A hint: fsync, which has to come anyway, finds less to do. Where there is no such call, nothing happens.
    """
    with contextlib.suppress(AttributeError):
        call = ctypes.CDLL(None).sync_file_range
        call.argtypes = ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
        call(file, first, length, _WRITE)
