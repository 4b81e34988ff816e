"""The store's own copies of adapters, one folder a digest, whole or not there.

    <root>/contents/<digest>/    the files that the digest covers
    <root>/staging/<random>/     what is being fetched, unpacked or removed

A folder is filled under ``staging``, flushed to disk and renamed. What lies under ``staging`` when
a server starts was left by one that was killed, and so was a content that no version names.
"""

import os
import shutil
import tempfile
from pathlib import Path


class ContentStore:
    """Folders of adapters by digest. Every method blocks."""

    def __init__(self, root: Path) -> None:
        """Use this folder, which belongs to one server at a time."""
        self._contents = root / "contents"
        self._staging = root / "staging"
        for folder in (self._contents, self._staging):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the content of this digest is, or would be."""
        return self._contents / digest

    def new_staging(self) -> Path:
        """An empty folder that is gone after the next start, if not before."""
        return Path(tempfile.mkdtemp(dir=self._staging))

    def discard(self, staged: Path) -> None:
        """Remove a staged folder, if it is still there."""
        shutil.rmtree(staged, ignore_errors=True)

    def adopt(self, staged: Path, digest: str) -> Path:
        """Make the staged folder the content that it hashes to, where there is none of it yet."""
        final = self.path(digest)
        if final.is_dir():
            return final
        _flush(staged)
        staged.rename(final)
        _flush_folder(self._contents)
        return final

    def remove(self, digest: str) -> None:
        """Remove a content, at once as a whole."""
        if self.path(digest).is_dir():
            grave = self.new_staging()
            self.path(digest).rename(grave / digest)
            _flush_folder(self._contents)
            self.discard(grave)

    def clear_staging(self) -> None:
        """Remove whatever is staged; nobody may want it any more."""
        for left in self._staging.iterdir():
            self.discard(left)

    def sweep(self, known: set[str]) -> list[str]:
        """Remove what killed servers left behind: what is staged, and contents not ``known``."""
        self.clear_staging()
        unknown = [entry.name for entry in os.scandir(self._contents) if entry.name not in known]
        for digest in unknown:
            self.remove(digest)
        return unknown


def _flush(folder: Path) -> None:
    for entry in os.scandir(folder):
        _flush_file(entry.path)
    _flush_folder(folder)


def _flush_file(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
