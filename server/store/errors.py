"""Why a name, a version, a source or an archive cannot be used as asked; the messages say it all.

RegistryError
├── NameRefused          not a name an adapter may have
├── AlreadyLoaded        the name is taken
├── UnknownAdapter       no adapter of that name
├── UnknownModel         no base, adapter or version of that name is being served
├── VersionRefused       the version that is asked for cannot become the default
├── QuotaExceeded        its owner may have no more
├── PinRefused           there is no room to pin it
├── AdapterUnavailable   it is registered and could not be loaded; it will be tried again
├── SourceRefused        no source, or written in a way that is refused
├── SourceForbidden      a source that this server may not use
├── FetchFailed          an allowed source did not give the adapter
├── ArchiveRefused       an archive that is corrupt, hostile or too large
├── StoreFull            its files exceed what the store may take of the disk
└── DigestMismatch       the files are not those the caller asked for
"""


class RegistryError(Exception):
    """A name that cannot be used as asked; the message says why."""


class NameRefused(RegistryError):
    """Not a name an adapter may have."""


class AlreadyLoaded(RegistryError):
    """The name is taken."""


class UnknownAdapter(RegistryError):
    """No adapter of that name."""


class UnknownModel(RegistryError):
    """No base, adapter or version of that name is being served."""


class VersionRefused(RegistryError):
    """The version that is asked for cannot become the default."""


class QuotaExceeded(RegistryError):
    """The owner may have no more adapters, or none of that size."""


class PinRefused(RegistryError):
    """There is no room to keep the adapter in memory for good."""


class AdapterUnavailable(RegistryError):
    """The adapter is registered and could not be loaded; it is tried again after some seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        """Hold the reason and the seconds until the next attempt."""
        super().__init__(message)
        self.retry_after = retry_after


class SourceRefused(RegistryError):
    """No source of adapters, or one written in a way that is refused."""


class SourceForbidden(RegistryError):
    """A source of adapters that this server is not allowed to use."""


class FetchFailed(RegistryError):
    """An allowed source did not give the adapter."""


class ArchiveRefused(RegistryError):
    """An archive that is corrupt, hostile or too large."""


class StoreFull(RegistryError):
    """The files exceed what the store may take of the disk."""


class DigestMismatch(RegistryError):
    """The files are not those whose digest the caller required."""
