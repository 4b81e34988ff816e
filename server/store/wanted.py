"""What a registry is asked to register."""

from dataclasses import dataclass

from ..tenants.tenant import TenantLimits
from .intake import UPLOADED
from .names import full_name

_NO_LIMITS = TenantLimits()


@dataclass(frozen=True, slots=True)
class Wanted:
    """An adapter that is to be registered.

    Attributes:
        name: 1 to 128 of ``A-Z a-z 0-9 . _ -``, not starting with a dot.
        source: A path or a URL; empty for an upload.
        replace: Whether the name may be taken: its files become a new version then.
        expected: The digest that the files must have, None for any.
        origin: What keeps it registered: empty for the API, ``--adapter``, or a watched folder.
        owner: The tenant whose own it is to be.
        limits: How much the owner may have.
    """

    name: str
    source: str = UPLOADED
    replace: bool = False
    expected: str | None = None
    origin: str = ""
    owner: str | None = None
    limits: TenantLimits = _NO_LIMITS

    @property
    def full_name(self) -> str:
        """What the registry will call it."""
        return full_name(self.name, self.owner)
