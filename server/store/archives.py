"""Uploaded archives, hostile until proven otherwise: tar, tar.gz and zip -> the adapter's files.

Every entry is looked at before anything is written: a path that leaves the archive, a link, a
device or a doubled name refuses the whole archive, and so do too many entries and too many bytes,
packed or unpacked, announced or real. Then only the files that an adapter consists of are written,
under their own last names, into one folder.
"""

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from ...adapters.files import ADAPTER_FILES, CONFIG_FILE, PLAIN_CONFIG_FILE
from .errors import ArchiveRefused

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")

_CHUNK = 1 << 20
_END_OF_ZIP = b"PK\x05\x06"
_ZIP64_LOCATOR = b"PK\x06\x07"
_END_BYTES, _LOCATOR_BYTES, _LONGEST_COMMENT = 22, 20, 1 << 16
_BYTES_PER_ENTRY = 1024


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may hold.

    Attributes:
        max_bytes: Unpacked, all entries together.
        max_entries: Files and folders.
    """

    max_bytes: int = 8 << 30
    max_entries: int = 1000


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    size: int
    open: Callable[[], IO[bytes]]

    @property
    def path(self) -> PurePosixPath:
        return PurePosixPath(self.name)


def unpack(archive: BinaryIO, into: Path, limits: ArchiveLimits) -> None:
    """Write the files of the one adapter in the archive to the folder ``into``.

    Raises:
        ArchiveRefused: The archive is corrupt, hostile or too large, or holds no or two adapters.
    """
    try:
        with _opened(archive, limits) as entries:
            for entry in _adapter_files(entries):
                _write(entry, into / entry.path.name)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        UnicodeError,
        ValueError,
    ) as error:
        raise ArchiveRefused(f"the archive cannot be read: {error}") from error


@contextmanager
def _opened(archive: BinaryIO, limits: ArchiveLimits) -> Iterator[list[_Entry]]:
    head = archive.read(4)
    archive.seek(0)
    if head[:2] == b"PK":
        _check_end(archive, limits)
        with zipfile.ZipFile(archive) as opened:
            yield _checked(_zip_entries(opened), limits)
        return
    packed = head[:2] == b"\x1f\x8b"
    raw: IO[bytes] = (
        cast(IO[bytes], gzip.GzipFile(fileobj=archive, mode="rb")) if packed else archive
    )
    bounded = _Bounded(raw, limits)
    with tarfile.open(fileobj=bounded, mode="r:") as opened_tar:
        yield _checked(_tar_entries(opened_tar), limits)


def _checked(entries: Iterator[_Entry], limits: ArchiveLimits) -> list[_Entry]:
    """All entries, counted while they are listed, so that a bomb of them is not listed whole."""
    found: list[_Entry] = []
    total = 0
    for number, entry in enumerate(entries, 1):
        total += entry.size
        if number > limits.max_entries:
            raise ArchiveRefused(f"the archive has more than {limits.max_entries} entries")
        if total > limits.max_bytes:
            raise _too_large(limits)
        found.append(entry)
    doubled = [name for name, times in Counter(each.path for each in found).items() if times > 1]
    if doubled:
        raise ArchiveRefused(f"the archive has two entries {str(doubled[0])!r}")
    return found


def _tar_entries(archive: tarfile.TarFile) -> Iterator[_Entry]:
    for member in archive:
        _check_path(member.name)
        if not (member.isreg() or member.isdir()):
            raise ArchiveRefused(
                f"{member.name!r} in the archive is a link or a device; only files and folders are "
                "taken"
            )
        tarfile.data_filter(member, "/adapter")
        if member.issparse():
            raise ArchiveRefused(f"{member.name!r} in the archive is a sparse file")
        yield _Entry(member.name, member.size, _opening(archive, member))


def _opening(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.extractfile(member) or io.BytesIO()


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[_Entry]:
    for member in archive.infolist():
        _check_path(member.orig_filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveRefused(
                f"{member.filename!r} in the archive is a link or a device; only files and folders "
                "are taken"
            )
        if member.flag_bits & 1:
            raise ArchiveRefused(f"{member.filename!r} in the archive is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveRefused(f"{member.filename!r} in the archive is not stored or deflated")
        yield _Entry(member.filename, member.file_size, partial(archive.open, member))


def _check_path(name: str) -> None:
    """Refuse what could be written outside, on any system."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ArchiveRefused(f"{name!r} in the archive leaves the folder it is unpacked in")


def _check_end(archive: BinaryIO, limits: ArchiveLimits) -> None:
    """Refuse a zip by what its last record announces, before its directory is read into memory."""
    size = archive.seek(0, io.SEEK_END)
    start = archive.seek(max(0, size - _END_BYTES - _LONGEST_COMMENT - _LOCATOR_BYTES))
    tail = archive.read()
    archive.seek(0)
    at = tail.rfind(_END_OF_ZIP)
    if at < 0 or len(tail) - at < _END_BYTES:
        raise ArchiveRefused("the archive is a zip file that is not complete")
    if tail[max(0, at - _LOCATOR_BYTES) : at].startswith(_ZIP64_LOCATOR):
        raise ArchiveRefused("the archive is a zip64 file: send it as .tar.gz")
    entries = int.from_bytes(tail[at + 10 : at + 12], "little")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little")
    most = limits.max_entries
    if entries > most or directory > min(start + at, most * _BYTES_PER_ENTRY):
        raise ArchiveRefused(f"the archive has more than {most} entries")


def _adapter_files(entries: Sequence[_Entry]) -> list[_Entry]:
    """The files of the one adapter, from the folder that holds its configuration."""
    configs = (CONFIG_FILE, PLAIN_CONFIG_FILE)
    folders = sorted({str(each.path.parent) for each in entries if each.path.name in configs})
    if len(folders) != 1:
        found = (
            f"{len(folders)} adapters, in {' and '.join(folders[:4])}"
            if folders
            else (f"no {CONFIG_FILE} and no {PLAIN_CONFIG_FILE}")
        )
        raise ArchiveRefused(f"the archive holds {found}; send one adapter")
    return [
        each
        for each in entries
        if str(each.path.parent) == folders[0] and each.path.name in ADAPTER_FILES
    ]


def _write(entry: _Entry, path: Path) -> None:
    """Write an entry, which may unpack to another size than it announces."""
    left = entry.size
    with entry.open() as source, path.open("xb") as target:
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise ArchiveRefused(f"{entry.name!r} in the archive is larger than it says")
            target.write(chunk)
    if left:
        raise ArchiveRefused(f"{entry.name!r} in the archive is cut short")


def _too_large(limits: ArchiveLimits) -> ArchiveRefused:
    return ArchiveRefused(f"the archive unpacks to more than {limits.max_bytes} bytes")


class _Bounded(io.RawIOBase):
    """A tar file's bytes: none beyond the limit, and no more at once than a file's chunk.

    tarfile reads a header's extensions whole, of whatever size they announce.
    """

    def __init__(self, raw: IO[bytes], limits: ArchiveLimits) -> None:
        self._raw = raw
        self._limits = limits
        # Headers and padding: two blocks and an extension for each entry.
        self._end = limits.max_bytes + limits.max_entries * 4096 + (1 << 20)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._raw.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and offset > self._end:
            raise _too_large(self._limits)
        return self._raw.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _CHUNK:
            raise ArchiveRefused("the archive has a header of more than 1 MiB")
        if self.tell() + size > self._end:
            raise _too_large(self._limits)
        return self._raw.read(size)
