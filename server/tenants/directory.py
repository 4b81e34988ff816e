"""Who is behind a key: all tenants and keys of the moment, from the tenants file and the database.

Kept in memory, so that asking takes one look-up and a tenant that is disabled is so for the very
next request.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import time

from .errors import KeyRefused, TenantsRefused
from .keys import hash_key, key_id
from .tenant import OPERATOR, Caller, Role, Tenant


@dataclass(frozen=True, slots=True)
class Key:
    """A key that may be good.

    Attributes:
        hash: As ``hash_key`` makes it.
        expires: Unix time from which it is refused; None for never.
    """

    hash: str
    expires: float | None = None

    @property
    def id(self) -> str:
        """What it is called where it must not be shown."""
        return key_id(self.hash)


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who has keys: a tenant, or an administrator of the server.

    Attributes:
        tenant: Its name, and for a tenant all the rest.
        role: ADMIN keys act for the server, not for a tenant.
        keys: All of which are good.
        created: Unix time; 0 where it stands in the tenants file.
    """

    tenant: Tenant
    role: Role = Role.USER
    keys: tuple[Key, ...] = ()
    created: int = 0

    @property
    def name(self) -> str:
        """Unique."""
        return self.tenant.name


class TenantDirectory:
    """Maps keys to callers; belongs to the event loop's thread.

    A server is *open* until it is given tenants or administrators. It never opens again: removing
    the last of them leaves a server that lets nobody in.
    """

    def __init__(self, now: Callable[[], float] = time) -> None:
        """Start open, with nobody."""
        self._now = now
        self._of_file: dict[str, Account] = {}
        self._of_database: dict[str, Account] = {}
        self._keys: dict[str, tuple[Key, Account]] = {}
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether there are no tenants, so that everybody is the operator."""
        return self._is_open

    def use_file(self, accounts: Iterable[Account]) -> None:
        """What the tenants file says now; even one without tenants closes the server.

        Raises:
            TenantsRefused: A name or key is in the database too; nothing has changed.
        """
        self._is_open = False
        self._replace({each.name: each for each in accounts}, self._of_database)

    def use_database(self, accounts: Iterable[Account]) -> None:
        """What the database says now.

        Raises:
            TenantsRefused: A name or key is in the tenants file too; nothing has changed.
        """
        self._replace(self._of_file, {each.name: each for each in accounts})

    def caller(self, key: str | None) -> Caller:
        """Who asks with this key, None for none.

        Raises:
            KeyRefused: Nobody may.
        """
        if self._is_open:
            return OPERATOR
        if key is None:
            raise KeyRefused("No API key was given; send it as 'Authorization: Bearer KEY'.")
        found = self._keys.get(hash_key(key))
        if found is None or not self._is_good(*found):
            raise KeyRefused("The API key is not valid.")
        known, account = found
        tenant = None if account.role is Role.ADMIN else account.tenant
        return Caller(tenant, account.role, known.id)

    def all(self) -> list[Account]:
        """By name."""
        return sorted((self._of_file | self._of_database).values(), key=lambda each: each.name)

    def find(self, name: str) -> Account | None:
        """The account of that name, None where there is none."""
        return self._of_file.get(name) or self._of_database.get(name)

    def is_in_file(self, name: str) -> bool:
        """Whether the account stands in the tenants file."""
        return name in self._of_file

    def _is_good(self, key: Key, account: Account) -> bool:
        expired = key.expires is not None and self._now() >= key.expires
        return not expired and not account.tenant.disabled

    def _replace(self, of_file: dict[str, Account], of_database: dict[str, Account]) -> None:
        both = of_file.keys() & of_database.keys()
        if both:
            raise TenantsRefused(
                f"{min(both)!r} is in the tenants file and in the database; take it out of one"
            )
        accounts = [*of_file.values(), *of_database.values()]
        keys = {key.hash: (key, account) for account in accounts for key in account.keys}
        if len(keys) < sum(len(account.keys) for account in accounts):
            raise TenantsRefused("two tenants have the same key")
        self._of_file, self._of_database, self._keys = of_file, of_database, keys
        self._is_open = self._is_open and not accounts
