"""What administrators are told of tenants and keys: everything but keys themselves."""

from typing import Any

from .directory import Account, Key
from .settings import TenantSettings
from .tenant import Role


def card_of(account: Account, in_file: bool) -> dict[str, Any]:
    """One tenant or administrator, which may stand in the tenants file."""
    card: dict[str, Any] = {
        "name": account.name,
        "object": "tenant",
        "role": account.role.value,
        "origin": "file" if in_file else "database",
        "created": account.created,
        "disabled": account.tenant.disabled,
        "keys": [key_card(each) for each in account.keys],
    }
    if account.role is Role.ADMIN:
        return card
    return card | TenantSettings.of(account.tenant).model_dump()


def key_card(key: Key) -> dict[str, Any]:
    """One key."""
    return {"id": key.id, "object": "tenant.key", "expires": key.expires}
