"""TFRecord files as one long row of records that can be read in any order.

In:  the paths of files.
Out: `Records`: how many there are, any of them by its number, and where it stands.

The format (tensorflow/core/lib/io/record_writer.h): a record is its length, uint64; the masked
CRC-32C of those eight bytes, uint32; the data; the masked CRC-32C of the data, uint32; all little
endian. There is no table of contents, so `index` goes from length to length, which proves that
every record is where it should be; the data is checked whenever it is read.

Shapes: F files, R records.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from albert_jax.data import compilation
from albert_jax.errors import UserError
from albert_jax.progress import Progress

_HEAD, _TAIL = 12, 4  # bytes around the data
_PORTION = 1 << 16  # records that are looked for at once
_WHOLE, _BROKEN, _CUT = 0, 1, 2
_GZIP = b"\x1f\x8b"


@dataclasses.dataclass(frozen=True)
class Records:
    """All records of some files, numbered through.

    Attributes:
        paths: F files, in order.
        first_F: int64 [F+1], number of each file's first record; the last entry is how many there
            are in all.
        offsets_F: for each file int64, where each of its records begins and the last one ends.
        checksums_R: uint32, what the files say of each record's data.
        lengths_R: int64, bytes of each record's data.
    """

    paths: tuple[Path, ...]
    first_F: np.ndarray
    offsets_F: tuple[np.ndarray, ...]
    checksums_R: np.ndarray
    lengths_R: np.ndarray
    _bytes_F: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return int(self.first_F[-1])

    def read(self, number: int) -> bytes:
        """The data of a record.

        Raises:
            UserError: it does not fit its checksum.
        """
        file, at = self._place(number)
        begin = at + _HEAD
        data = self._bytes_F[file][begin : begin + int(self.lengths_R[number])]
        if _masked_crc(data) != self.checksums_R[number]:
            raise UserError(
                f"{self.where(number)} does not fit its checksum: the file is damaged. "
                "Copy or make it again."
            )
        return data.tobytes()

    def where(self, number: int) -> str:
        """Where a record stands, for a message."""
        file, at = self._place(number)
        return f"{self.paths[file]}: the record at byte {at:,}"

    def _place(self, number: int) -> tuple[int, int]:
        """Its file, and the byte where it begins."""
        file = int(np.searchsorted(self.first_F, number, side="right")) - 1
        return file, int(self.offsets_F[file][number - self.first_F[file]])


def index(paths: Sequence[Path]) -> Records:
    """Finds the records of files; reads little more than their lengths.

    Raises:
        UserError: a file that cannot be read, is no TFRecord file, or ends inside a record.
    """
    bytes_F = tuple(_mapped(path) for path in paths)
    total = sum(len(data) for data in bytes_F)
    threads = min(len(paths), os.cpu_count() or 1)
    with (
        Progress("index", total, "B") as progress,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        # In order, so that of several damaged files always the same one is named.
        found = list(pool.map(lambda path, data: _index_file(path, data, progress), paths, bytes_F))
    offsets_F = tuple(offsets for offsets, _ in found)
    counts = [len(offsets) - 1 for offsets in offsets_F]
    return Records(
        paths=tuple(paths),
        first_F=np.cumsum([0, *counts], dtype=np.int64),
        offsets_F=offsets_F,
        checksums_R=np.concatenate([checksums for _, checksums in found]),
        lengths_R=np.concatenate([np.diff(offsets) - (_HEAD + _TAIL) for offsets in offsets_F]),
        _bytes_F=bytes_F,
    )


def _mapped(path: Path) -> np.ndarray:
    try:
        if not path.stat().st_size:
            return np.zeros(0, np.uint8)  # which cannot be mapped
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _index_file(path: Path, data: np.ndarray, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 [R+1] and checksums uint32 [R]."""
    offsets, checksums = [np.zeros(1, np.int64)], [np.zeros(0, np.uint32)]
    at = 0
    while at < len(data):
        ends, sums = np.empty(_PORTION, np.int64), np.empty(_PORTION, np.uint32)
        count, state = _walk(data, at, ends, sums)
        offsets.append(ends[:count])
        checksums.append(sums[:count])
        before, at = at, int(ends[count - 1]) if count else at
        progress.advance(at - before)
        if state == _BROKEN:
            raise UserError(_why_broken(path, data, at))
        if state == _CUT:
            raise UserError(
                f"{path} ends inside the record that begins at byte {at:,}: it was not written or "
                f"copied to its end ({len(data):,} bytes are there). Copy or make it again."
            )
    return np.concatenate(offsets), np.concatenate(checksums)


def _why_broken(path: Path, data: np.ndarray, at: int) -> str:
    if at == 0 and data[:2].tobytes() == _GZIP:
        return f"{path} is compressed; records are read in any order, so gunzip it first."
    if at == 0:
        return f"{path} is no TFRecord file: its first bytes are not the length of a record."
    return (
        f"{path}: the length at byte {at:,}, where a record should begin, does not fit its "
        "checksum: the file is damaged. Copy or make it again."
    )


def _crc_tables() -> np.ndarray:
    """int64 [8, 256]: what a byte does to a CRC-32C (Castagnoli) k bytes later.

    Source: Kounavis and Berry 2005, "A systematic approach to building high performance
    software-based CRC generators" (slicing by 8).
    """
    tables = np.zeros((8, 256), np.int64)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        tables[0, byte] = value
    for k in range(1, 8):
        tables[k] = tables[k - 1] >> 8 ^ tables[0, tables[k - 1] & 0xFF]
    return tables


_TABLES = _crc_tables()


@compilation.compiled
def _masked_crc(data: np.ndarray) -> np.int64:
    """As TFRecord files have it: a CRC of a CRC would be a bad one, so it is turned and shifted."""
    # In 64 bits, to which numba widens every shift anyway.
    crc = np.int64(0xFFFFFFFF)
    whole = len(data) // 8 * 8
    for i in range(0, whole, 8):
        crc ^= _number(data, i, 4)
        crc = (
            _TABLES[7, crc & 0xFF]
            ^ _TABLES[6, crc >> 8 & 0xFF]
            ^ _TABLES[5, crc >> 16 & 0xFF]
            ^ _TABLES[4, crc >> 24]
            ^ _TABLES[3, data[i + 4]]
            ^ _TABLES[2, data[i + 5]]
            ^ _TABLES[1, data[i + 6]]
            ^ _TABLES[0, data[i + 7]]
        )
    for i in range(whole, len(data)):
        crc = _TABLES[0, (crc ^ data[i]) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return np.int64((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF)


@compilation.compiled
def _number(data: np.ndarray, at: int, size: int) -> np.int64:
    """Little-endian; of eight bytes, a number that no length can be may come out negative."""
    value = np.int64(0)
    for i in range(size):
        value |= np.int64(data[at + i]) << (8 * i)
    return value


@compilation.compiled
def _walk(data: np.ndarray, at: int, ends: np.ndarray, checksums: np.ndarray) -> tuple[int, int]:
    """Goes over records from byte `at` on, as many as `ends` has room for.

    Returns:
        how many are whole, and what became of the next one.
    """
    size = len(data)
    for count in range(len(ends)):
        if at == size:
            return count, _WHOLE
        if size - at < _HEAD:
            return count, _CUT
        if _masked_crc(data[at : at + 8]) != _number(data, at + 8, 4):
            return count, _BROKEN
        length = _number(data, at, 8)
        if not 0 <= length <= size - at - _HEAD - _TAIL:
            return count, _CUT
        at += _HEAD + length + _TAIL
        checksums[count] = _number(data, at - _TAIL, 4)
        ends[count] = at
    return len(ends), _WHOLE
