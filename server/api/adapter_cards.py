"""What the API tells of an adapter: where it stands in every tier, its versions and their use."""

from collections.abc import Set
from dataclasses import dataclass

from msgspec import to_builtins

from ..store.entries import Adapter, AdapterState, Version
from ..store.registry import AdapterRegistry
from .state import AppState


@dataclass(frozen=True, slots=True)
class Cards:
    """Makes cards of one moment.

    Attributes:
        registry: The adapters.
        on_device: What the engine calls those on the device.
    """

    registry: AdapterRegistry
    on_device: Set[int]

    @classmethod
    def now(cls, state: AppState) -> "Cards":
        """As things stand."""
        stats = state.engine.stats
        return cls(state.registry, frozenset() if stats is None else {*stats.device_adapters})

    def card(self, adapter: Adapter) -> dict[str, object]:
        """One adapter."""
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
