"""What an adapter may be called."""

import re

from .errors import NameRefused

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def check_name(name: str, base_name: str) -> None:
    """Check that an adapter may have this name.

    Raises:
        NameRefused: It is malformed, or the base's.
    """
    if not _NAME.fullmatch(name):
        raise NameRefused(
            f"{name!r} is no adapter name: use 1 to 128 letters, digits, '.', '_' or '-', "
            "not starting with '.'."
        )
    if name == base_name:
        raise NameRefused(f"{name!r} is the name of the base model.")
