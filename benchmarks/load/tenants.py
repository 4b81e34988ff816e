"""API keys by tenant. A key is sent and never shown."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import BenchmarkError


def read_keys(texts: Sequence[str]) -> Mapping[str, str]:
    """Key by tenant, of ``NAME=ENVVAR`` or ``NAME=@FILE`` each.

    Raises:
        BenchmarkError: One is neither, or there is no key where it says.
    """
    keys: dict[str, str] = {}
    for text in texts:
        name, _, source = text.partition("=")
        if not (name and source) or name in keys:
            raise BenchmarkError(f"--tenant {text}: give NAME=ENVVAR or NAME=@FILE, a name once")
        keys[name] = _read_key(text, source)
    return keys


def _read_key(text: str, source: str) -> str:
    try:
        file = source.startswith("@")
        key = Path(source[1:]).read_text("utf-8") if file else os.environ.get(source, "")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"--tenant {text}: the file cannot be read") from error
    key = key.strip()
    if not key:
        raise BenchmarkError(f"--tenant {text}: {source} is not set or empty")
    if not (key.isascii() and key.isprintable()):
        raise BenchmarkError(f"--tenant {text}: the key cannot be sent in a header")
    return key


def without_keys(text: str, keys: Mapping[str, str]) -> str:
    """The text, with stars where a server repeats a key."""
    for key in keys.values():
        text = text.replace(key, "***")
    return text
