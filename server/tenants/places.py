"""Where the command line finds tenants: in the database, or behind a running server's API."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

from pydantic import ValidationError

from ..state.database import StateTaken, open_database, read_address
from .admin import TenantAdmin
from .cards import card_of, key_card
from .directory import TenantDirectory
from .errors import TenantsRefused
from .records import TenantRecords
from .settings import NewTenant, TenantChange, refusal

_SECONDS = 30

Card = dict[str, Any]
_Form = TypeVar("_Form", NewTenant, TenantChange)


class Tenants(Protocol):
    """What the command line does; answers are those of the HTTP API."""

    def create(self, fields: Mapping[str, Any]) -> Card:
        """Make a tenant or an administrator.

        Raises:
            TenantError: It cannot be made.
        """
        ...

    def list(self) -> list[Card]:
        """Everybody."""
        ...

    def add_key(self, name: str, overlap: float) -> Card:
        """Another key; those there are stay good for ``overlap`` seconds.

        Raises:
            TenantError: It cannot be made.
        """
        ...

    def change(self, name: str, fields: Mapping[str, Any]) -> Card:
        """Change what is named.

        Raises:
            TenantError: It cannot be changed.
        """
        ...


class LocalTenants:
    """Tenants of a database that no server has."""

    def __init__(self, admin: TenantAdmin) -> None:
        """Change them through ``admin``."""
        self._admin = admin

    def create(self, fields: Mapping[str, Any]) -> Card:
        """As ``Tenants.create``."""
        account, key = asyncio.run(self._admin.create(_parsed(NewTenant, fields)))
        return {**card_of(account, in_file=False), "key": key}

    def list(self) -> list[Card]:
        """As ``Tenants.list``."""
        return [card_of(each, in_file=False) for each in self._admin.directory.all()]

    def add_key(self, name: str, overlap: float) -> Card:
        """As ``Tenants.add_key``."""
        key, secret = asyncio.run(self._admin.add_key(name, overlap))
        return {**key_card(key), "key": secret}

    def change(self, name: str, fields: Mapping[str, Any]) -> Card:
        """As ``Tenants.change``."""
        change = _parsed(TenantChange, fields)
        return card_of(asyncio.run(self._admin.change(name, change)), in_file=False)


class RemoteTenants:
    """Tenants of a running server, asked over HTTP."""

    def __init__(self, url: str, admin_key: str | None) -> None:
        """Ask the server at ``url``."""
        self._url = url.rstrip("/") + "/v1/tenants"
        self._headers = {"Content-Type": "application/json"}
        if admin_key:
            self._headers["Authorization"] = f"Bearer {admin_key}"
        # An administrator's key goes to the server that was named and to no proxy.
        self._open = build_opener(ProxyHandler({})).open

    def create(self, fields: Mapping[str, Any]) -> Card:
        """As ``Tenants.create``."""
        return self._ask("POST", "", fields)

    def list(self) -> list[Card]:
        """As ``Tenants.list``."""
        cards: list[Card] = self._ask("GET", "")["data"]
        return cards

    def add_key(self, name: str, overlap: float) -> Card:
        """As ``Tenants.add_key``."""
        return self._ask("POST", f"/{quote(name, safe='')}/keys", {"overlap_seconds": overlap})

    def change(self, name: str, fields: Mapping[str, Any]) -> Card:
        """As ``Tenants.change``."""
        return self._ask("PATCH", f"/{quote(name, safe='')}", fields)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Card:
        content = None if body is None else json.dumps(body).encode()
        request = Request(self._url + path, content, self._headers, method=method)
        try:
            with self._open(request, timeout=_SECONDS) as answer:
                card: Card = json.load(answer)
                return card
        except HTTPError as error:
            with error:
                raise TenantsRefused(_message(error)) from error
        except (URLError, TimeoutError, ValueError) as error:
            raise TenantsRefused(
                f"the server at {self._url} cannot be asked: {error}; name it with --url"
            ) from error


@contextmanager
def find_tenants(state_dir: Path, url: str | None, admin_key: str | None) -> Iterator[Tenants]:
    """Those of the server at ``url``; without one of the database, or of the server that has it.

    Raises:
        StateError: The database cannot be used.
        TenantsRefused: A server has it and did not say where it is reached.
    """
    if url is not None:
        yield RemoteTenants(url, admin_key)
        return
    try:
        with open_database(state_dir) as database:
            records = TenantRecords(database)
            yield LocalTenants(TenantAdmin(records, TenantDirectory(), keeps_admin=False))
    except StateTaken as error:
        address = read_address(state_dir)
        if address is None:
            raise TenantsRefused(f"{error}; or name it with --url") from error
        yield RemoteTenants(address, admin_key)


def _parsed(form: type[_Form], fields: Mapping[str, Any]) -> _Form:
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        raise refusal("tenant", error) from error


def _message(error: HTTPError) -> str:
    """What the server said, if it was one of ours."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answered {error.code}"
