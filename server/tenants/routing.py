"""What a tenant means by a name, and which names it may use.

Pure functions of the tenant and the name: whether an adapter exists has no part in them, so that
asking for what exists and for what does not takes the same time.
"""

from fnmatch import fnmatchcase
from hashlib import blake2b

from .tenant import Alias, Tenant

DEFAULT = "default"
"""What tenants may call their default adapter, beside the base's name."""

_DRAWS = 2**64


def permits(tenant: Tenant, name: str) -> bool:
    """Whether the tenant was given the adapter; never one of another tenant's own."""
    return "/" not in name and any(fnmatchcase(name, each) for each in tenant.adapters)


def meaning(model: str, tenant: Tenant, base_name: str, sticky: str) -> str:
    """The name, or name and version, that ``model`` stands for: defaults and aliases resolved.

    Args:
        model: As the tenant wrote it.
        tenant: Who wrote it.
        base_name: The served name of the base, which is what it means without a default.
        sticky: Equal ones get the same target of a weighted alias.
    """
    name = model.removeprefix(f"{base_name}:")
    if model in (base_name, DEFAULT):
        model = name = tenant.default or base_name
    alias = tenant.aliases.get(name)
    return model if alias is None else draw(alias, f"{tenant.name}/{name}/{sticky}")


def draw(alias: Alias, key: str) -> str:
    """The target that ``key`` gets; over many keys each target gets its weight's part.

    A target that is given more weight keeps the keys it had, as long as the order stays.
    """
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    total = sum(weight for _, weight in alias.targets)
    left = int.from_bytes(digest) / _DRAWS * total
    for target, weight in alias.targets:
        left -= weight
        if left < 0:
            return target
    return alias.targets[-1][0]
