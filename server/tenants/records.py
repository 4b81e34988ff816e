"""Tenants in the database. Every method is one transaction, and blocks."""

from collections import defaultdict
from collections.abc import Iterable
from time import time

from sqlalchemy import Engine, RowMapping, delete, insert, select, update

from ..state.schema import adapters, tenant_keys, tenants
from .directory import Account, Key
from .errors import TenantConflict, UnknownTenant
from .settings import TenantSettings
from .tenant import Role, Tenant


class TenantRecords:
    """Tenants, administrators and their keys as they are kept on disk."""

    def __init__(self, database: Engine) -> None:
        """Use the database."""
        self._database = database

    def load(self) -> list[Account]:
        """Everybody, with the keys that have not expired."""
        with self._database.connect() as connection:
            keys: defaultdict[str, list[Key]] = defaultdict(list)
            for row in connection.execute(select(tenant_keys).order_by(tenant_keys.c.created)):
                if row.expires is None or row.expires > time():
                    keys[row.tenant].append(Key(row.hash, row.expires))
            rows = connection.execute(select(tenants)).mappings().all()
        return [_account(row, keys[row["name"]]) for row in rows]

    def create(self, account: Account) -> None:
        """Add an account with its keys.

        Raises:
            TenantConflict: The name is taken, or was and left adapters behind.
        """
        with self._database.begin() as connection:
            taken = select(tenants.c.name).where(tenants.c.name == account.name)
            if connection.execute(taken).first() is not None:
                raise TenantConflict(f"The name {account.name!r} is taken.")
            left = select(adapters.c.name).where(adapters.c.owner == account.name)
            if name := connection.execute(left).scalar():
                raise TenantConflict(
                    f"An earlier tenant {account.name!r} left adapters behind, which the new one "
                    f"would have: remove {name!r} first, or choose another name."
                )
            row = {**_row(account.tenant), "role": account.role.value, "created": account.created}
            connection.execute(insert(tenants).values(row))
            for key in account.keys:
                connection.execute(insert(tenant_keys).values(_key_row(account.name, key)))

    def change(self, tenant: Tenant) -> None:
        """Replace all that is known of a tenant but its keys.

        Raises:
            UnknownTenant: There is none of that name.
        """
        statement = update(tenants).where(tenants.c.name == tenant.name).values(_row(tenant))
        with self._database.begin() as connection:
            if not connection.execute(statement).rowcount:
                raise unknown(tenant.name)

    def delete(self, name: str) -> None:
        """Forget an account and its keys.

        Raises:
            UnknownTenant: There is none of that name.
        """
        with self._database.begin() as connection:
            if not connection.execute(delete(tenants).where(tenants.c.name == name)).rowcount:
                raise unknown(name)

    def add_key(self, name: str, key: Key, expiring: Iterable[Key]) -> None:
        """Add a key, and give the ``expiring`` ones the times at which they end.

        Raises:
            UnknownTenant: There is no account of that name.
        """
        with self._database.begin() as connection:
            known = select(tenants.c.name).where(tenants.c.name == name)
            if connection.execute(known).first() is None:
                raise unknown(name)
            connection.execute(insert(tenant_keys).values(_key_row(name, key)))
            for each in expiring:
                of_key = update(tenant_keys).where(tenant_keys.c.hash == each.hash)
                connection.execute(of_key.values(expires=each.expires))

    def delete_key(self, key: Key) -> None:
        """Forget a key."""
        with self._database.begin() as connection:
            connection.execute(delete(tenant_keys).where(tenant_keys.c.hash == key.hash))


def unknown(name: str) -> UnknownTenant:
    """What is raised of a name that nobody has."""
    return UnknownTenant(f"There is no tenant {name!r}.")


def _account(row: RowMapping, keys: Iterable[Key]) -> Account:
    settings = TenantSettings.model_validate_json(row["settings"])
    tenant = settings.tenant(row["name"], row["disabled"])
    return Account(tenant, Role(row["role"]), tuple(keys), row["created"])


def _row(tenant: Tenant) -> dict[str, object]:
    settings = TenantSettings.of(tenant).model_dump_json().encode()
    return {"name": tenant.name, "disabled": tenant.disabled, "settings": settings}


def _key_row(name: str, key: Key) -> dict[str, object]:
    return {"hash": key.hash, "tenant": name, "created": time(), "expires": key.expires}
