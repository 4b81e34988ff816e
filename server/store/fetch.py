"""Remote sources -> a folder here. Blocks: called in worker threads only.

Of a folder elsewhere only the files that an adapter consists of are asked for, by name, so nothing
there chooses what is written here; of an archive, see ``archives.py``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import aiohttp
import fsspec
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import DryRunError

from ...adapters.errors import AdapterError
from ...adapters.files import (
    ADAPTER_FILES,
    ADAPTERHUB,
    CONFIG_FILE,
    HEAD_FILES,
    INTERFACE_FILE,
    OPTIONS_FILE,
    PLAIN_CONFIG_FILE,
    WEIGHT_FILES,
)
from ...adapters.folder import open_config
from .archives import ARCHIVE_SUFFIXES, ArchiveLimits, unpack
from .errors import FetchFailed, RegistryError
from .sources import HubSource, Source, parse_hub

_CHUNK = 1 << 20
_CONFIG_FILES = (CONFIG_FILE, PLAIN_CONFIG_FILE, OPTIONS_FILE, INTERFACE_FILE)
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def fetch_url(source: Source, into: Path, limits: ArchiveLimits) -> None:
    """Bring the adapter at a URL to the folder ``into``.

    Raises:
        FetchFailed: It cannot be had, or is larger than allowed.
        ArchiveRefused: It is an archive that is refused.
        AdapterError: Its configuration is refused.
    """
    with _explained(source.text):
        if source.text.endswith(ARCHIVE_SUFFIXES):
            with TemporaryFile(dir=into) as file:
                _copy(source.text, file, limits.max_bytes)
                file.seek(0)
                unpack(file, into, limits)
        else:
            _fetch_folder(source.text, into, limits.max_bytes)


def fetch_hub(source: Source, max_bytes: int) -> tuple[Path, str]:
    """The folder of a hub's adapter in the hub's cache, and the source with its commit.

    Without a connection, or with HF_HUB_OFFLINE, what the cache holds is used.

    Raises:
        FetchFailed: The hub does not give it, or it is larger than allowed.
    """
    hub = parse_hub(source.text)
    with _explained(source.text):
        snapshot = _snapshot(hub, max_bytes)
    inside = f"/{hub.folder}" if hub.folder else ""
    return snapshot / hub.folder, f"hf://{hub.repository}{inside}@{snapshot.name}"


def _snapshot(hub: HubSource, max_bytes: int) -> Path:
    inside = f"{hub.folder}/" if hub.folder else ""
    wanted = [f"{inside}{name}" for name in sorted(ADAPTER_FILES)]
    offline = constants.HF_HUB_OFFLINE
    revision = hub.revision
    if not offline:
        try:
            files = snapshot_download(
                hub.repository, revision=revision, allow_patterns=wanted, dry_run=True
            )
        except DryRunError:  # no connection: the cache may have it
            offline = True
        else:
            size = sum(file.file_size or 0 for file in files)
            if size > max_bytes:
                raise FetchFailed(f"hf://{hub.repository}: {size} bytes, more than {max_bytes}")
            revision = files[0].commit_hash if files else revision
    folder = snapshot_download(
        hub.repository, revision=revision, allow_patterns=wanted, local_files_only=offline
    )
    return Path(folder)


def _fetch_folder(url: str, into: Path, max_bytes: int) -> None:
    left = max_bytes
    for name in _CONFIG_FILES:
        left -= _fetch_file(url, into / name, left) or 0
    if not any((into / name).exists() for name in (CONFIG_FILE, PLAIN_CONFIG_FILE)):
        raise FetchFailed(f"{url} has no {CONFIG_FILE} and no {PLAIN_CONFIG_FILE}")
    library = open_config(into).library
    alternatives = [WEIGHT_FILES[library]]
    alternatives += [HEAD_FILES] if library == ADAPTERHUB else []
    for names in alternatives:
        sizes = (_fetch_file(url, into / name, left) for name in names)
        left -= next((size for size in sizes if size is not None), 0)


def _fetch_file(url: str, path: Path, max_bytes: int) -> int | None:
    """Bytes fetched, None where there is no such file."""
    try:
        with path.open("xb") as file:
            return _copy(f"{url}/{path.name}", file, max_bytes)
    except FileNotFoundError as error:
        if not _is_absence(error.__cause__):
            raise FetchFailed(f"{url} cannot be fetched: {error.__cause__}") from error
        path.unlink()
        return None


def _is_absence(cause: BaseException | None) -> bool:
    """Whether a file is not there: fsspec says so of web servers that do not answer, too."""
    if isinstance(cause, aiohttp.ClientResponseError):
        return cause.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
    return cause is None or isinstance(cause, FileNotFoundError)


def _copy(url: str, target: BinaryIO, max_bytes: int) -> int:
    copied = 0
    with fsspec.open(url, "rb") as file:
        while chunk := file.read(_CHUNK):
            copied += len(chunk)
            if copied > max_bytes:
                raise FetchFailed(f"{url} has more than the {max_bytes} bytes that are allowed")
            target.write(chunk)
    return copied


@contextmanager
def _explained(url: str) -> Iterator[None]:
    scheme = url.partition("://")[0]
    try:
        yield
    except (RegistryError, AdapterError):
        raise
    except ImportError as error:
        hint = f"pip install {_EXTRAS[scheme]}" if scheme in _EXTRAS else str(error)
        raise FetchFailed(f"{scheme}:// needs a package that is not installed: {hint}") from error
    except Exception as error:  # the hub and each file system have their own
        raise FetchFailed(f"{url} cannot be fetched: {type(error).__name__}: {error}") from error
