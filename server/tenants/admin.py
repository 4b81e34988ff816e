"""Making, changing and removing tenants: what the command line and the HTTP API have in common.

A change is written to the database, then in force, then acknowledged.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from time import time

from .directory import Account, Key, TenantDirectory
from .errors import TenantConflict, TenantsRefused, UnknownTenant
from .keys import hash_key, new_key
from .records import TenantRecords, unknown
from .settings import NewTenant, TenantChange, TenantSettings
from .tenant import Role, Tenant


class TenantAdmin:
    """Manages the tenants of the database; belongs to the event loop's thread.

    Args:
        records: The database.
        directory: Who may call, which is kept up to date.
        keeps_admin: Whether to refuse what would leave nobody who can manage the server, as a
            running one must; on a stopped one the command line always can.
        now: Unix time.
    """

    def __init__(
        self,
        records: TenantRecords,
        directory: TenantDirectory,
        keeps_admin: bool = True,
        now: Callable[[], float] = time,
    ) -> None:
        """Put in force what the database says."""
        self._records = records
        self._keeps_admin = keeps_admin
        self._now = now
        self._lock = asyncio.Lock()
        self.directory = directory
        directory.use_database(records.load())

    def get(self, name: str) -> Account:
        """The account of that name, wherever it stands.

        Raises:
            UnknownTenant: There is none.
        """
        account = self.directory.find(name)
        if account is None:
            raise unknown(name)
        return account

    async def create(self, new: NewTenant) -> tuple[Account, str]:
        """A new account and its key, which is told this once.

        Raises:
            TenantsRefused: An administrator is given settings.
            TenantConflict: The name is taken, or nobody could manage the server any more.
        """
        key = new_key()
        await self._alone(self._create(new, key))
        return self.get(new.name), key

    async def change(self, name: str, change: TenantChange) -> Account:
        """The account as it is then.

        Raises:
            UnknownTenant: There is none.
            TenantsRefused: It is an administrator, which has no settings.
            TenantConflict: It stands in the tenants file, or is the last administrator.
        """
        await self._alone(self._change(name, change))
        return self.get(name)

    async def delete(self, name: str) -> None:
        """Forget the account; its keys are refused at once.

        Raises:
            UnknownTenant: There is none.
            TenantConflict: It stands in the tenants file, or is the last administrator.
        """
        await self._alone(self._delete(name))

    async def add_key(self, name: str, overlap: float | None) -> tuple[Key, str]:
        """Another key for the account, told this once.

        Args:
            name: Whose.
            overlap: Seconds for which the keys it has stay good; None: as long as they are.

        Raises:
            UnknownTenant: There is no such account.
            TenantConflict: It stands in the tenants file.
        """
        secret = new_key()
        key = Key(hash_key(secret))
        await self._alone(self._add_key(name, key, overlap))
        return key, secret

    async def delete_key(self, name: str, key_id: str) -> None:
        """Refuse the key from now on.

        Raises:
            UnknownTenant: There is no such account, or no such key of it.
            TenantConflict: It stands in the tenants file, or is the last administrator's last key.
        """
        await self._alone(self._delete_key(name, key_id))

    async def _alone(self, change: Coroutine[None, None, None]) -> None:
        """One change at a time, each up to where it is in force, whoever still waits for it."""
        await asyncio.shield(self._in_turn(change))

    async def _in_turn(self, change: Coroutine[None, None, None]) -> None:
        async with self._lock:
            await change
            self.directory.use_database(await asyncio.to_thread(self._records.load))

    async def _create(self, new: NewTenant, key: str) -> None:
        if self.directory.find(new.name) is not None:
            raise TenantConflict(f"The name {new.name!r} is taken.")
        tenant = new.tenant(new.name)
        _check_settings(tenant, new.role)
        if new.role is Role.USER:
            self._require_admin_beside(new.name)
        account = Account(tenant, new.role, (Key(hash_key(key)),), int(self._now()))
        await asyncio.to_thread(self._records.create, account)

    async def _change(self, name: str, change: TenantChange) -> None:
        account = self._changeable(name)
        tenant = change.applied(account.tenant)
        _check_settings(tenant, account.role)
        if tenant.disabled:
            self._require_admin_beside(name)
        await asyncio.to_thread(self._records.change, tenant)

    async def _delete(self, name: str) -> None:
        self._changeable(name)
        self._require_admin_beside(name)
        await asyncio.to_thread(self._records.delete, name)

    async def _add_key(self, name: str, key: Key, overlap: float | None) -> None:
        account = self._changeable(name)
        ending = [] if overlap is None else self._ending(account, self._now() + overlap)
        await asyncio.to_thread(self._records.add_key, name, key, ending)

    async def _delete_key(self, name: str, key_id: str) -> None:
        account = self._changeable(name)
        found = [each for each in account.keys if each.id == key_id]
        if not found:
            raise UnknownTenant(f"{name!r} has no key {key_id!r}.")
        if len(account.keys) == 1:
            self._require_admin_beside(name)
        await asyncio.to_thread(self._records.delete_key, found[0])

    @staticmethod
    def _ending(account: Account, end: float) -> list[Key]:
        """The account's keys that are good for longer, ending then."""
        longer = (each for each in account.keys if each.expires is None or each.expires > end)
        return [replace(each, expires=end) for each in longer]

    def _changeable(self, name: str) -> Account:
        if self.directory.is_in_file(name):
            raise TenantConflict(f"{name!r} stands in the tenants file; change it there.")
        return self.get(name)

    def _require_admin_beside(self, name: str) -> None:
        others = (each for each in self.directory.all() if each.name != name)
        left = any(each.role is Role.ADMIN and not each.tenant.disabled for each in others)
        if self._keeps_admin and not left:
            raise TenantConflict(
                "Nobody could manage the server then. Make an administrator first, with the role "
                "'admin', or name an admin key in the tenants file."
            )


def _check_settings(tenant: Tenant, role: Role) -> None:
    if role is Role.ADMIN and TenantSettings.of(tenant) != TenantSettings():
        raise TenantsRefused(f"{tenant.name!r} is an administrator and takes no settings.")
