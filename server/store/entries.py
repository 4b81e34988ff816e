"""What the registry knows of an adapter: immutable, replaced as a whole when it changes."""

import sys
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from ..engine.messages import AdapterInfo
from .names import plain_name

DIGEST_CHARACTERS = 64


class AdapterState(StrEnum):
    """Where an adapter stands."""

    REGISTERED = "registered"
    FETCHING = "fetching"
    ON_HOST = "on_host"
    ON_DEVICE = "on_device"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Version:
    """One content that a name stands or stood for.

    Attributes:
        digest: SHA-256 (hex) over its files.
        source: Where it came from.
        fingerprint: Sizes and times of a local source's files when they were read, else empty.
        path: The folder it is read from.
        copied: Whether that is the store's own copy, or the source itself.
        file_bytes: Size of its files.
        info: What the engine found in it.
        registered: Unix time it was last registered.
    """

    digest: str
    source: str
    fingerprint: str
    path: str
    copied: bool
    file_bytes: int
    info: AdapterInfo
    registered: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name and what it stands for.

    Attributes:
        name: What requests call it; with its owner's name in front, as ``tenant/name``.
        source: Where it was last asked for.
        origin: What keeps it registered: empty for the API, ``--adapter``, or a watched folder.
        created: Unix time the name was registered.
        default_digest: The version the bare name means; None while there is none.
        versions: Newest registration first.
        pinned: Whether the default version is to stay in memory.
        owner: The tenant whose own it is, which alone may use it; None for the server's.
        expected: The digest that was required of it, while it has no version.
    """

    name: str
    source: str
    origin: str
    created: int
    default_digest: str | None = None
    versions: tuple[Version, ...] = ()
    pinned: bool = False
    owner: str | None = None
    expected: str | None = None

    @property
    def plain_name(self) -> str:
        """What its owner calls it."""
        return plain_name(self.name)

    @property
    def default(self) -> Version | None:
        """The version the bare name means."""
        return next((each for each in self.versions if each.digest == self.default_digest), None)

    def version(self, prefix: str) -> Version | None:
        """The newest version whose digest begins like this."""
        digits = plain_digest(prefix)
        if not digits:
            return None
        return next((each for each in self.versions if each.digest.startswith(digits)), None)

    def earlier(self) -> Version | None:
        """The version that was registered last before the default one."""
        digests = [each.digest for each in self.versions]
        if self.default_digest not in digests:
            return None
        following = self.versions[digests.index(self.default_digest) + 1 :]
        return following[0] if following else None

    def with_info(self, digest: str, info: AdapterInfo) -> "Adapter":
        """This adapter, whose version of this content the engine found to be ``info``."""
        versions = (
            replace(each, info=info) if each.digest == digest else each for each in self.versions
        )
        return replace(self, versions=tuple(versions))

    def with_version(self, version: Version, keep: int) -> "Adapter":
        """This adapter with another default version, and the newest ``keep`` versions in all."""
        others = [each for each in self.versions if each.digest != version.digest]
        return replace(
            self,
            source=version.source,
            default_digest=version.digest,
            versions=(version, *others)[:keep],
            expected=None,
        )


@dataclass(slots=True)
class Usage:
    """How often and when an adapter was last asked for."""

    hits: int = 0
    last_used: float | None = None


_decoder = msgspec.json.Decoder(AdapterInfo)


def encode_info(info: AdapterInfo) -> bytes:
    """As the database keeps it."""
    return msgspec.json.encode(info)


def decode_info(raw: bytes) -> AdapterInfo:
    """As ``encode_info`` wrote it; names of modules, alike in most adapters, are kept once."""
    info = _decoder.decode(raw)
    return msgspec.structs.replace(info, targets=[*map(sys.intern, info.targets)])


def plain_digest(text: str) -> str:
    """A digest without its ``sha256:`` in front, in lower case."""
    return text.removeprefix("sha256:").lower()
