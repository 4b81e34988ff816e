"""Where adapters come from, as text, and which of these places this server may use.

    a path, file:///a/path          a folder or an archive on this machine
    hf://org/name[/folder]@revision  a repository of the Hugging Face hub
    s3://..., gs://..., https://...  a folder or an archive, through fsspec

An allowed source begins with one of the server's patterns: ``local`` (any path), ``upload``, or the
beginning of a path or URL.
"""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import SourceForbidden, SourceRefused

LOCAL, UPLOAD = "local", "upload"
DEFAULT_PATTERNS = (LOCAL, UPLOAD)

_LONGEST = 4096


class SourceKind(Enum):
    """How a source is reached."""

    LOCAL = "local"
    HUB = "hub"
    URL = "url"


@dataclass(frozen=True, slots=True)
class Source:
    """A place of one adapter.

    Attributes:
        kind: How it is reached.
        text: An absolute path or a URL, in the one form that is compared and shown.
    """

    kind: SourceKind
    text: str

    @property
    def path(self) -> Path:
        """Of a local one."""
        return Path(self.text)


@dataclass(frozen=True, slots=True)
class HubSource:
    """``hf://org/name[/folder][@revision]``."""

    repository: str
    folder: str
    revision: str | None


def parse_source(text: str) -> Source:
    """The place that ``text`` names.

    Raises:
        SourceRefused: It names none, or in a way that could be misread or hold a secret.
    """
    if "\0" in text or not text.strip() or len(text) > _LONGEST:
        raise SourceRefused(f"{text[:100]!r} names no place of an adapter")
    if "://" not in text:
        return Source(SourceKind.LOCAL, str(Path(text).resolve()))
    try:
        url = urlsplit(text)
    except ValueError as error:
        # Neither text nor error is shown: both may hold a password.
        raise SourceRefused("the source is no URL: write scheme://host/path") from error
    if "::" in text:
        raise SourceRefused(f"{_shown(text)}: chained URLs are not fetched")
    if url.query or url.fragment or url.username or url.password:
        raise SourceRefused(
            f"{_shown(text)}: name adapters without credentials, query and fragment, which the "
            "registry would keep; give credentials to the server's environment"
        )
    if ".." in unquote(text).replace("\\", "/").split("/"):
        raise SourceRefused(f"{_shown(text)}: a source has no '..' in it")
    if url.scheme == "file":
        return Source(SourceKind.LOCAL, str(Path(unquote(url.path)).resolve()))
    if url.scheme == "hf":
        parse_hub(text)
        return Source(SourceKind.HUB, text)
    return Source(SourceKind.URL, text.rstrip("/"))


def parse_hub(text: str) -> HubSource:
    """The parts of an ``hf://`` source.

    Raises:
        SourceRefused: It has no organisation and name.
    """
    path, _, revision = text.removeprefix("hf://").partition("@")
    parts = [part for part in path.split("/") if part]
    if len(parts) < 2:
        raise SourceRefused(f"{text} names no repository: write hf://organisation/name@revision")
    return HubSource("/".join(parts[:2]), posixpath.join("", *parts[2:]), revision or None)


@dataclass(frozen=True, slots=True)
class SourcePolicy:
    """Which sources callers of the API may name; options of the command line may name any."""

    patterns: Sequence[str] = DEFAULT_PATTERNS

    def require(self, source: Source) -> None:
        """Check a source that a caller names.

        Raises:
            SourceForbidden: It is not allowed.
        """
        anywhere = source.kind is SourceKind.LOCAL and LOCAL in self.patterns
        if not anywhere and not any(_begins(source.text, each) for each in self.patterns):
            raise SourceForbidden(
                f"adapters may not be loaded from {source.text}: this server allows "
                f"{', '.join(self.patterns) or 'nothing'} (--adapter-source)"
            )

    def require_upload(self) -> None:
        """Check that adapters may be uploaded.

        Raises:
            SourceForbidden: They may not.
        """
        if UPLOAD not in self.patterns:
            raise SourceForbidden("adapters may not be uploaded to this server (--adapter-source)")


def _begins(text: str, pattern: str) -> bool:
    """Whether ``text`` is ``pattern`` or lies inside: s3://a does not allow s3://ab."""
    if pattern.endswith(("/", "@")):
        return text.startswith(pattern)
    return text == pattern or text.startswith((f"{pattern}/", f"{pattern}@"))


def _shown(text: str) -> str:
    """A URL without what may be secret in it."""
    url = urlsplit(text)
    return f"{url.scheme}://{url.hostname or ''}{url.path}"
