"""Which adapters are in memory, under the names that requests have for them."""

from collections.abc import Iterable
from dataclasses import dataclass

from .registry import AdapterRegistry

DEVICE, HOST = "gpu", "cpu"
"""vLLM's words for the tiers, whatever the device is."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter in one tier.

    Attributes:
        name: Its name; of a version that is not the default, ``name@digest``.
        level: DEVICE or HOST.
        pinned: Whether it is to stay there.
    """

    name: str
    level: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Residency:
    """What is where, at one moment.

    Attributes:
        registry: The adapters.
        on_device: What the engine calls those on the device.
    """

    registry: AdapterRegistry
    on_device: Iterable[int]

    def loaded(self) -> list[Loaded]:
        """Every adapter in every tier that holds it."""
        residents = self.registry.residents
        tiers = ((DEVICE, residents.digests(self.on_device)), (HOST, residents.digests_on_host()))
        return [each for level, digests in tiers for each in self._in_tier(level, digests)]

    def counts(self) -> dict[str, int]:
        """Adapters in each tier, those that no name stands for any more too."""
        on_host = self.registry.residents.num_on_host
        return {DEVICE: len([*self.on_device]), HOST: on_host}

    def names(self, adapter_ids: Iterable[int]) -> list[str]:
        """Names of what the engine calls so."""
        digests = self.registry.residents.digests(adapter_ids)
        return sorted(name for each in digests for name in self.registry.catalog.labels(each))

    def _in_tier(self, level: str, digests: list[str]) -> list[Loaded]:
        catalog = self.registry.catalog
        pinned = {version.digest for version in catalog.pinned()}
        return [
            Loaded(name, level, digest in pinned)
            for digest in digests
            for name in catalog.labels(digest)
        ]
