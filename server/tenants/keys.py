"""API keys: random, shown once, kept as hashes.

A key has 256 random bits, so its plain SHA-256 tells nothing about it and needs no salt. Keys are
looked up by their hash: what a look-up's time could tell is about hashes that nobody can choose.
"""

import hashlib
import secrets

_PREFIX = "sk-deltamux-"
_HASH_SCHEME = "sha256:"
_ID_CHARACTERS = 16


def new_key() -> str:
    """A key that nobody has."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is kept of a key: ``sha256:`` and 64 hexadecimal digits."""
    return _HASH_SCHEME + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def key_id(key_hash: str) -> str:
    """What a key is called where it must not be shown: the beginning of its hash."""
    return key_hash.removeprefix(_HASH_SCHEME)[:_ID_CHARACTERS]
