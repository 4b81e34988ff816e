"""The tenants file: YAML, read at the start and again whenever it changes or SIGHUP comes."""

import asyncio
import logging
import signal
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError
from watchfiles import awatch

from .directory import Account, Key, TenantDirectory
from .errors import TenantsRefused
from .keys import key_id
from .settings import Form, TenantName, TenantSettings, refusal
from .tenant import Role, Tenant

logger = logging.getLogger(__name__)

_HASH = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _FileTenant(TenantSettings):
    name: TenantName
    keys: list[_HASH] = Field(default_factory=list)
    disabled: bool = False

    def account(self) -> Account:
        return Account(self.tenant(self.name, self.disabled), keys=tuple(map(Key, self.keys)))


class _File(Form):
    admin_keys: list[_HASH] = Field(default_factory=list)
    tenants: list[_FileTenant] = Field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would forget the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """The mapping, whose keys are all different."""
        names = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in names[:number]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def read_tenants(path: Path) -> list[Account]:
    """Who stands in the file; administrators are named by their keys' ids.

    Raises:
        TenantsRefused: It cannot be read, or says what it may not; naming the place.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        file = _File.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TenantsRefused(f"tenants file {path}: {error}") from error
    except ValidationError as error:
        raise refusal(f"tenants file {path}", error) from error
    names = [each.name for each in file.tenants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TenantsRefused(f"tenants file {path}: two tenants have the name {twice[0]!r}")
    admins = [
        Account(Tenant(f"admin:{key_id(each)}"), Role.ADMIN, (Key(each),))
        for each in file.admin_keys
    ]
    return [*admins, *(each.account() for each in file.tenants)]


class TenantsFile:
    """Has a directory say what the file says; belongs to the event loop's thread.

    Args:
        path: The file.
        directory: Who may call.
        every: Seconds after which it is looked at again at the latest.
    """

    def __init__(self, path: Path, directory: TenantDirectory, every: float = 5.0) -> None:
        """Read nothing yet."""
        self._path = path
        self._directory = directory
        self._every = every
        self._content = b""
        self._asked = asyncio.Event()

    def load(self) -> None:
        """Take what the file says.

        Raises:
            TenantsRefused: It is wrong; nothing has changed.
        """
        self._content = _content(self._path)
        self._directory.use_file(read_tenants(self._path))

    async def follow(self) -> None:
        """Take it again whenever it changes or SIGHUP comes, until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._asked.set)
        watching = asyncio.create_task(self._watch(), name="tenants-file")
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                if _content(self._path) != self._content:
                    await self._take()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            watching.cancel()

    async def _watch(self) -> None:
        # Its folder: editors put another file in its place, and Kubernetes another folder. Now and
        # then it is looked at without being told: not every file system tells.
        watched = awatch(
            self._path.parent,
            recursive=False,
            rust_timeout=int(self._every * 1000),
            yield_on_timeout=True,
        )
        async for _ in watched:
            self._asked.set()

    async def _take(self) -> None:
        self._content = _content(self._path)
        try:
            self._directory.use_file(await asyncio.to_thread(read_tenants, self._path))
        except TenantsRefused as error:
            logger.error("the tenants stay as they were: %s", error)
        else:
            logger.info("the tenants are now those of %s", self._path)


def _content(path: Path) -> bytes:
    """Empty where it cannot be read, which ``read_tenants`` then tells."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
