"""The checksums of an archive of torch.save, which is a zip file, after bytes of its records changed.

The format: APPNOTE.TXT, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import BinaryIO

from lnprune.checkpoints.failures import UnusableCheckpoint
from lnprune.checkpoints.memory import PIECE

_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\3\4", b"PK\1\2", b"PK\7\x08"
_LOCAL_LENGTH, _CENTRAL_LENGTH = 30, 46
_HAS_DESCRIPTOR = 0x08  # a flag: the checksum stands behind the data too


def renew_checksums(file: BinaryIO, changed: Sequence[tuple[int, int]]) -> None:
    """Computes the checksums again of the records that have bytes in the changed places.

    Args:
        file: the archive, open for reading and writing. Its position is at its end afterwards.
        changed: first byte, and byte behind the last.
    """
    file.flush()
    with zipfile.ZipFile(file) as archive:
        records, directory = archive.infolist(), archive.start_dir
    position = directory
    for record in records:
        file.seek(position)
        head = file.read(_CENTRAL_LENGTH)
        if head[:4] != _CENTRAL:
            raise UnusableCheckpoint(f"{record.filename}: its entry in the archive is damaged")
        entry = position
        position += _CENTRAL_LENGTH + sum(struct.unpack("<3H", head[28:34]))
        file.seek(record.header_offset)
        local = file.read(_LOCAL_LENGTH)
        if local[:4] != _LOCAL:
            raise UnusableCheckpoint(f"{record.filename}: its header in the archive is damaged")
        first = record.header_offset + _LOCAL_LENGTH + sum(struct.unpack("<2H", local[26:30]))
        last = first + record.file_size
        if not any(start < last and first < end for start, end in changed):
            continue
        if record.compress_type != zipfile.ZIP_STORED:
            raise UnusableCheckpoint(f"{record.filename}: is compressed: torch.save it again")
        checksum = struct.pack("<I", _checksum(file, first, last))
        _write(file, entry + 16, checksum)
        if not record.flag_bits & _HAS_DESCRIPTOR:
            _write(file, record.header_offset + 14, checksum)
            continue
        if local[14:18] != bytes(4):
            _write(file, record.header_offset + 14, checksum)
        file.seek(last)
        has_signature = file.read(4) == _DESCRIPTOR
        _write(file, last + 4 * has_signature, checksum)
    file.seek(0, 2)


def _checksum(file: BinaryIO, first: int, last: int) -> int:
    file.seek(first)
    checksum = 0
    for start in range(first, last, PIECE):
        checksum = zlib.crc32(file.read(min(PIECE, last - start)), checksum)
    return checksum


def _write(file: BinaryIO, position: int, data: bytes) -> None:
    file.seek(position)
    file.write(data)
