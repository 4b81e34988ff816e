"""The index that requests are resolved in: names, versions and contents, in memory alone."""

from collections import defaultdict
from dataclasses import dataclass

from ..tenants.routing import DEFAULT, meaning, permits
from ..tenants.tenant import Caller
from .entries import Adapter, Version
from .errors import UnknownAdapter, UnknownModel
from .names import full_name, plain_name


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a request's ``model`` means: an adapter, and the version; None while it has none."""

    adapter: Adapter
    version: Version | None


class Catalog:
    """All adapters of one base, by name and by content; every look-up takes constant time."""

    def __init__(self, base_name: str) -> None:
        """Start with the base alone."""
        self.base_name = base_name
        self._adapters: dict[str, Adapter] = {}
        self._names: defaultdict[str, set[str]] = defaultdict(set)
        self._pinned: set[str] = set()

    def __len__(self) -> int:
        """Adapters."""
        return len(self._adapters)

    def all(self) -> list[Adapter]:
        """By name."""
        return [self._adapters[name] for name in sorted(self._adapters)]

    def find(self, name: str) -> Adapter | None:
        """The adapter that the registry calls so, None where there is none."""
        return self._adapters.get(name)

    def get(self, name: str) -> Adapter:
        """The adapter that the registry calls so.

        Raises:
            UnknownAdapter: There is none.
        """
        return _found(self._adapters.get(name), plain_name(name))

    def look_up(self, name: str, caller: Caller) -> Adapter:
        """The adapter that the caller calls so.

        Raises:
            UnknownAdapter: There is none that it may see.
        """
        return _found(self._seen(name, caller), name)

    def visible(self, caller: Caller) -> list[Adapter]:
        """What the caller may see, by the names it has for them."""
        if caller.tenant is None:
            return self.all()
        seen = {each.plain_name for each in self._adapters.values() if self._may_see(each, caller)}
        return [self.look_up(name, caller) for name in sorted(seen)]

    def owned(self, tenant: str) -> list[Adapter]:
        """The tenant's own adapters."""
        return [each for each in self.all() if each.owner == tenant]

    def put(self, adapter: Adapter) -> None:
        """Add the adapter, or replace the one of its name."""
        if adapter.name in self._adapters:
            self.remove(adapter.name)
        self._adapters[adapter.name] = adapter
        for version in adapter.versions:
            self._names[version.digest].add(adapter.name)
        if adapter.pinned:
            self._pinned.add(adapter.name)

    def remove(self, name: str) -> Adapter:
        """Forget the adapter.

        Raises:
            UnknownAdapter: There is none.
        """
        adapter = self.get(name)
        del self._adapters[name]
        self._pinned.discard(name)
        for version in adapter.versions:
            self._names[version.digest].discard(name)
            if not self._names[version.digest]:
                del self._names[version.digest]
        return adapter

    def with_content(self, digest: str) -> list[Adapter]:
        """Adapters that have a version of this content."""
        return [self._adapters[name] for name in sorted(self._names.get(digest, ()))]

    def digests(self) -> set[str]:
        """Of all contents."""
        return set(self._names)

    def pinned(self) -> list[Version]:
        """Default versions of the pinned adapters, each content once."""
        found = (self._adapters[name].default for name in sorted(self._pinned))
        return list({each.digest: each for each in found if each is not None}.values())

    def labels(self, digest: str) -> list[str]:
        """What a content is served as: names, and ``name@digest`` where it is not the default."""
        return [
            adapter.name if adapter.default_digest == digest else f"{adapter.name}@{digest[:12]}"
            for adapter in self.with_content(digest)
        ]

    def is_base(self, model: str, caller: Caller) -> bool:
        """Whether ``model`` names the base, whatever the caller's default is."""
        return model == self.base_name or (caller.tenant is not None and model == DEFAULT)

    def resolve(self, model: str, caller: Caller, sticky: str = "") -> Chosen | None:
        """The adapter and version a request's ``model`` means; None for the bare base.

        Forms: the base's name, ``adapter``, ``base:adapter``, the latter two with ``@`` and the
        beginning of a digest; of a tenant also its aliases, and ``default``. What a caller may not
        use does not exist for it.

        Args:
            model: As the caller wrote it.
            caller: Who wrote it.
            sticky: Requests of equal ones get the same target of a weighted alias.

        Raises:
            UnknownModel: Nothing has that name and version.
        """
        tenant = caller.tenant
        meant = model if tenant is None else meaning(model, tenant, self.base_name, sticky)
        if meant == self.base_name:
            return None
        name, at, version = meant.removeprefix(f"{self.base_name}:").partition("@")
        adapter = self._seen(name, caller)
        if adapter is None:
            raise UnknownModel(f"The model {model!r} does not exist.")
        if not at:
            return Chosen(adapter, adapter.default)
        found = adapter.version(version)
        if found is None:
            known = ", ".join(each.digest[:12] for each in adapter.versions) or "none"
            raise UnknownModel(
                f"The model {model!r} does not exist: {name!r} has the versions {known}."
            )
        return Chosen(adapter, found)

    def _seen(self, name: str, caller: Caller) -> Adapter | None:
        """What the caller means by an adapter's name: its own, else one it was given."""
        tenant = caller.tenant
        if tenant is None:
            return self._adapters.get(name)
        own = self._adapters.get(full_name(name, tenant.name))
        given = self._adapters.get(name) if permits(tenant, name) else None
        return own or given

    @staticmethod
    def _may_see(adapter: Adapter, caller: Caller) -> bool:
        tenant = caller.tenant
        if tenant is None or adapter.owner == tenant.name:
            return True
        return permits(tenant, adapter.name)


def _found(adapter: Adapter | None, name: str) -> Adapter:
    if adapter is None:
        raise UnknownAdapter(f"The adapter {name!r} cannot be found.")
    return adapter
