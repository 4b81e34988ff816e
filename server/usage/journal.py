"""The journal of usage: files that are only appended to, and survive ``kill -9``.

What ``write`` took is the system's and outlives the process. A record is one ``write``: a header of
length, CRC-32 and number, and entries in msgpack. Numbers go up by one for ever; the database
keeps the last one it has taken in, so that a record counts once however often it is read. One that
was not written whole has a wrong checksum; nothing in its file comes after it.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import msgspec

from .counts import Entry

_HEADER = struct.Struct("<IIQ")
_NUMBER = struct.Struct("<Q")
_SUFFIX = ".journal"

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Entry])


@dataclass(frozen=True, slots=True)
class Record:
    """What one ``write`` put there.

    Attributes:
        number: Of the record.
        entries: What was counted.
    """

    number: int
    entries: list[Entry]


class Journal:
    """Appends records; each file of the folder is named by the number of its first record."""

    def __init__(self, folder: Path, last: int) -> None:
        """Go on after record ``last``; the folder has no file with a later one."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: int | None = None
        self.last = last
        """Number of the last record."""

    def append(self, entries: Sequence[Entry]) -> None:
        """Write one record.

        Raises:
            OSError: It is not written, or not whole; what follows goes to another file.
        """
        if self._file is None:
            self._file = self._new_file()
        record = _framed(self.last + 1, _encoder.encode(entries))
        try:
            _write_whole(self._file, record)
        except OSError:
            self.rotate()
            raise
        self.last += 1

    def rotate(self) -> None:
        """End the file; the next record begins another."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _new_file(self) -> int:
        # A record that was not written whole may have left a file of this name.
        path = _path(self._folder, self.last + 1)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)


def read(folder: Path) -> Iterator[Record]:
    """All whole records of the folder, in order."""
    for path in _files(folder):
        yield from _read_file(path.read_bytes())


def remove(folder: Path, last: int) -> None:
    """Remove the files that were ended when ``last`` was the last record."""
    for path in _files(folder):
        if int(path.stem) <= last:
            path.unlink()


def _framed(number: int, payload: bytes) -> bytes:
    checksum = crc32(payload, crc32(_NUMBER.pack(number)))
    return _HEADER.pack(len(payload), checksum, number) + payload


def _read_file(raw: bytes) -> Iterator[Record]:
    at = 0
    while at + _HEADER.size <= len(raw):
        length, _, number = _HEADER.unpack_from(raw, at)
        payload = raw[at + _HEADER.size : at + _HEADER.size + length]
        if _framed(number, payload) != raw[at : at + _HEADER.size + length]:
            return
        yield Record(number, _decoder.decode(payload))
        at += _HEADER.size + length


def _write_whole(file: int, record: bytes) -> None:
    written = os.write(file, record)
    if written < len(record):
        raise OSError(f"only {written} of {len(record)} bytes were written")


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:020}{_SUFFIX}"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_SUFFIX}"))
