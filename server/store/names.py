"""What an adapter may be called.

A tenant's own adapters lie in a namespace of its own: the registry calls them ``tenant/name``,
which is no name that anybody may give, and the tenant calls them ``name``. So two tenants can have
adapters of one name and never learn of each other's.
"""

import re

from ..tenants.routing import DEFAULT
from .errors import NameRefused

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def check_name(name: str, base_name: str, owner: str | None = None) -> None:
    """Check that an adapter may have this name.

    Raises:
        NameRefused: It is malformed, or the base's.
    """
    if not _NAME.fullmatch(name):
        raise NameRefused(
            f"{name!r} is no adapter name: use 1 to 128 letters, digits, '.', '_' or '-', "
            "not starting with '.'."
        )
    if name in (base_name, DEFAULT) and owner:
        raise NameRefused(f"{name!r} stands for the base model or your default adapter.")
    if name == base_name:
        raise NameRefused(f"{name!r} is the name of the base model.")


def full_name(name: str, owner: str | None) -> str:
    """What the registry calls the adapter that its owner calls ``name``; None: nobody's own."""
    return name if owner is None else f"{owner}/{name}"


def plain_name(full: str) -> str:
    """What the owner calls an adapter."""
    return full.rpartition("/")[2]
