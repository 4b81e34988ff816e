"""What the API tells of an adapter: where it stands in every tier, its versions and their use.

A tenant is told less: nothing that depends on what others do, as where an adapter lies in memory
and how often it is used, and nothing of the server's files.
"""

from collections.abc import Set
from dataclasses import dataclass

from msgspec import to_builtins

from ..store.entries import Adapter, AdapterState, Version
from ..store.registry import AdapterRegistry
from ..tenants.tenant import Caller
from .state import AppState


@dataclass(frozen=True, slots=True)
class Cards:
    """Makes cards of one moment.

    Attributes:
        registry: The adapters.
        on_device: What the engine calls those on the device.
        caller: Who is told.
    """

    registry: AdapterRegistry
    on_device: Set[int]
    caller: Caller

    @classmethod
    def now(cls, state: AppState, caller: Caller) -> "Cards":
        """As things stand."""
        stats = state.engine.stats
        on_device = frozenset() if stats is None else {*stats.device_adapters}
        return cls(state.registry, on_device, caller)

    def name(self, adapter: Adapter) -> str:
        """What the caller calls it."""
        return adapter.name if self.caller.tenant is None else adapter.plain_name

    def card(self, adapter: Adapter) -> dict[str, object]:
        """One adapter."""
        tenant = self.caller.tenant
        if tenant is None:
            return self._whole(adapter)
        if adapter.owner == tenant.name:
            return self._shared(adapter) | self._own(adapter)
        return self._shared(adapter)

    def _shared(self, adapter: Adapter) -> dict[str, object]:
        """What a tenant is told of any adapter it may use."""
        default = adapter.default
        return {
            "name": adapter.plain_name,
            "object": "adapter",
            "state": self._availability(adapter),
            "owner": adapter.owner,
            "created": adapter.created,
            "digest": adapter.default_digest,
            "info": None if default is None else to_builtins(default.info),
            "versions": [
                {"digest": each.digest, "default": each.digest == adapter.default_digest}
                for each in adapter.versions
            ],
        }

    def _own(self, adapter: Adapter) -> dict[str, object]:
        """What it is told of its own beside that."""
        usage = self.registry.leases.usage.get(adapter.name)
        return {
            "error": self.registry.error(adapter),
            "source": adapter.source,
            "hits": 0 if usage is None else usage.hits,
            "last_used": None if usage is None else usage.last_used,
        }

    def _availability(self, adapter: Adapter) -> AdapterState:
        """Its state as far as it concerns those who use it: not where in memory it lies."""
        if self.registry.error(adapter) is not None:
            return AdapterState.FAILED
        arriving = adapter.default is None and self.registry.is_fetching(adapter.name)
        return AdapterState.FETCHING if arriving else AdapterState.REGISTERED

    def _whole(self, adapter: Adapter) -> dict[str, object]:
        default = adapter.default
        usage = self.registry.leases.usage.get(adapter.name)
        return {
            "name": adapter.name,
            "object": "adapter",
            "state": self.state(adapter),
            "error": self.registry.error(adapter),
            "source": adapter.source,
            "path": adapter.source if default is None else default.path,
            "origin": adapter.origin,
            "owner": adapter.owner,
            "created": adapter.created,
            "pinned": adapter.pinned,
            "hits": 0 if usage is None else usage.hits,
            "last_used": None if usage is None else usage.last_used,
            "digest": adapter.default_digest,
            "info": None if default is None else to_builtins(default.info),
            "versions": [self._version(adapter, each) for each in adapter.versions],
        }

    def state(self, adapter: Adapter) -> AdapterState:
        """Where the default version stands; a new one on its way does not change that."""
        default = adapter.default
        if default is not None:
            return self._state(default.digest)
        if self.registry.is_fetching(adapter.name):
            return AdapterState.FETCHING
        failed = self.registry.error(adapter) is not None
        return AdapterState.FAILED if failed else AdapterState.REGISTERED

    def _state(self, digest: str) -> AdapterState:
        residents = self.registry.residents
        if residents.is_in(digest, self.on_device):
            return AdapterState.ON_DEVICE
        if residents.is_on_host(digest):
            return AdapterState.ON_HOST
        if residents.is_loading(digest):
            return AdapterState.FETCHING
        failed = residents.failure(digest) is not None
        return AdapterState.FAILED if failed else AdapterState.REGISTERED

    def _version(self, adapter: Adapter, version: Version) -> dict[str, object]:
        return {
            "digest": version.digest,
            "default": version.digest == adapter.default_digest,
            "state": self._state(version.digest),
            "source": version.source,
            "registered": version.registered,
            "file_bytes": version.file_bytes,
            "host_bytes": version.info.num_bytes,
        }
