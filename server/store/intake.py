"""Any source -> a folder with a digest, staged to become a content of the store.

Blocks: called in worker threads only. A local folder is copied, so that what a version stands for
cannot change under it and the version can be gone back to; file systems that can let the copy
share its blocks. Where copying is off the folder stays where it is, its digest is checked whenever
it is read, and a version whose files have changed is gone.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...adapters.errors import AdapterCorrupt, AdapterTooLarge
from ...adapters.files import ADAPTER_FILES
from ...adapters.folder import covered_files, hash_folder, open_config, opened_file
from .archives import ARCHIVE_SUFFIXES, ArchiveLimits, unpack
from .contents import ContentStore
from .errors import FetchFailed
from .sources import Source, SourceKind

_FICLONE = 0x40049409
"""ioctl: make this file share the blocks of another (btrfs, XFS, ...)."""

_LIMITS = ArchiveLimits()

UPLOADED = "upload"
"""The source of an adapter that came in a request."""


@dataclass(frozen=True, slots=True)
class Staged:
    """An adapter whose files are here.

    Attributes:
        digest: SHA-256 (hex) over them.
        source: Where they came from, with a hub's revision pinned.
        fingerprint: Of a local source's files, else empty.
        folder: Where they are.
        copied: Whether that is a staged copy, or the source itself.
        file_bytes: Their size.
    """

    digest: str
    source: str
    fingerprint: str
    folder: Path
    copied: bool
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Intake:
    """Brings adapters here.

    Attributes:
        contents: Whose staging is used.
        limits: What an adapter may take on disk.
        copy_local: Whether local folders are copied.
    """

    contents: ContentStore
    limits: ArchiveLimits = _LIMITS
    copy_local: bool = True

    def stage(self, source: Source) -> Staged:
        """Bring the adapter at a source here.

        Raises:
            RegistryError: The source does not give it, or gives what is refused.
            AdapterError: Its files are refused.
        """
        if source.kind is SourceKind.LOCAL:
            return self._local(source.path)
        # Here and not above: not every server fetches, and the libraries for it are large.
        from .fetch import fetch_hub, fetch_url

        if source.kind is SourceKind.URL:
            return self._staged(source.text, lambda into: fetch_url(source, into, self.limits))
        folder, text = fetch_hub(source, self.limits.max_bytes)
        return self._staged(text, lambda into: self._copy_folder(folder, into))

    def stage_archive(self, archive: BinaryIO) -> Staged:
        """Bring the adapter in an archive here.

        Raises:
            ArchiveRefused: The archive is corrupt, hostile or too large.
            AdapterError: Its files are refused.
        """
        return self._staged(UPLOADED, lambda into: unpack(archive, into, self.limits))

    def _local(self, path: Path) -> Staged:
        before = fingerprint(path)
        if _is_archive(path):
            staged = self._staged(str(path), lambda into: self._unpack_file(path, into), before)
        elif self.copy_local:
            staged = self._staged(str(path), lambda into: self._copy_folder(path, into), before)
        else:
            staged = _measured(path, str(path), before, copied=False)
        if fingerprint(path) != before:
            if staged.copied:
                self.contents.discard(staged.folder)
            raise AdapterCorrupt(f"the files at {path} changed while they were read; try again")
        return staged

    def _unpack_file(self, path: Path, into: Path) -> None:
        with path.open("rb") as file:
            unpack(file, into, self.limits)

    def _staged(self, source: str, fill: Callable[[Path], None], known: str = "") -> Staged:
        into = self.contents.new_staging()
        try:
            fill(into)
            return _measured(into, source, known, copied=True)
        except BaseException as error:
            self.contents.discard(into)
            if isinstance(error, OSError):  # the disk is full, a file may not be read, ...
                raise FetchFailed(f"{source} cannot be copied here: {error}") from error
            raise

    def _copy_folder(self, folder: Path, into: Path) -> None:
        left = self.limits.max_bytes
        for name in covered_files(open_config(folder)):
            with opened_file(folder / name) as source, (into / name).open("xb") as target:
                if source is None:
                    raise AdapterCorrupt(f"{folder / name} vanished while it was read")
                left -= os.fstat(source.fileno()).st_size
                if left < 0:
                    raise AdapterTooLarge(f"{folder} has more than {self.limits.max_bytes} bytes")
                _copy_file(source, target)


def fingerprint(path: Path) -> str:
    """Names, sizes and times of a folder's files, or of an archive: while it stays, so do they.

    Nothing is read. What is not there has an empty one.
    """
    try:
        files = [path] if _is_archive(path) else [path / each for each in os.listdir(path)]
        stats = sorted((each.name, each.stat()) for each in files if _matters(each, path))
    except OSError:
        return ""
    return " ".join(f"{name}:{s.st_size}:{s.st_mtime_ns}:{s.st_ino}" for name, s in stats)


def _is_archive(path: Path) -> bool:
    return path.name.endswith(ARCHIVE_SUFFIXES) and os.path.isfile(path)


def _matters(file: Path, path: Path) -> bool:
    return file == path or file.name in ADAPTER_FILES


def _measured(folder: Path, source: str, known: str, copied: bool) -> Staged:
    digest = hash_folder(folder)
    size = sum((folder / name).stat().st_size for name in covered_files(open_config(folder)))
    return Staged(digest, source, known, folder, copied, size)


def _copy_file(source: BinaryIO, target: BinaryIO) -> None:
    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:  # another file system, or one that cannot
        shutil.copyfileobj(source, target, 1 << 20)
