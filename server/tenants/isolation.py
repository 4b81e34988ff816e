"""What of a caller travels with its requests into the engine: whose share, and whose cache.

Cached prefixes are shared under equal salts. A hit shows in ``cached_tokens`` and in time, so a
salt that two tenants have in common would let one ask whether the other sent a prompt.
"""

from ..generation import Share
from .tenant import Caller

_SHARED, _ADMIN, _OWN = "shared:", "admin:", "tenant:"


def share_of(caller: Caller) -> Share:
    """Whose request it is, for fair scheduling."""
    tenant = caller.tenant
    return Share() if tenant is None else Share(tenant.name, tenant.weight)


def cache_salt(caller: Caller, salt: str | None) -> str | None:
    """The salt of a caller's request that asked for ``salt``; no other caller's is the same.

    ``tenant:NAME:salt``, where a name has no colon, so that a client's own salt cannot pass for
    another tenant's; ``shared:salt`` for tenants that share, ``admin:salt`` for administrators.
    A server without tenants leaves salts alone.
    """
    if not caller.key_id:
        return salt
    return _realm(caller) + (salt or "")


def _realm(caller: Caller) -> str:
    if caller.tenant is None:
        return _ADMIN
    return _SHARED if caller.tenant.shares_cache else f"{_OWN}{caller.tenant.name}:"
