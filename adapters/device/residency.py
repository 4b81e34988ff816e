"""Which adapters are on the device, and which must stay: reference counts over the pool.

Free of torch. An adapter that no sequence holds stays where it is until its room is needed; then
the one that has been idle longest goes first.
"""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

Adapter = TypeVar("Adapter")
Place = TypeVar("Place")
Adapter_contra = TypeVar("Adapter_contra", contravariant=True)


class ResidencyError(LookupError):
    """An adapter was asked for that is not resident or not held: a bug of the caller."""


class Pool(Protocol[Adapter_contra, Place]):
    """The device memory as residency sees it; ``pool.AdapterPool`` is one."""

    def evictions_for(self, adapter: Adapter_contra, candidates: Sequence[Place]) -> int | None:
        """How many of ``candidates``, in order, must go before the adapter fits."""
        ...

    def install(self, adapter: Adapter_contra) -> Place | None:
        """Copy the adapter to the device: its place, or None if there is no room."""
        ...

    def remove(self, place: Place, /) -> None:
        """Free a place."""
        ...

    def check_integrity(self) -> None:
        """Raise unless the pool's own books balance."""
        ...


class Residency(Generic[Adapter, Place]):
    """Reference-counted residency; what the scheduler knows as ``AdapterSlots``.

    Args:
        pool: The device memory.
        lowered: The adapter of an id, in host memory.
    """

    def __init__(self, pool: Pool[Adapter, Place], lowered: Callable[[int], Adapter]) -> None:
        """Start with nothing resident."""
        self._pool = pool
        self._lowered = lowered
        self._places: dict[int, Place] = {}
        self._holders: dict[int, int] = {}
        self._idle: dict[int, None] = {}  # insertion order: least recently used first

    def acquire(self, *adapter_ids: int) -> bool:
        """Hold all these adapters on the device for one more sequence, or none of them.

        Makes room by dropping the least recently used adapters that no sequence holds. False, with
        nothing held, where even that is not enough.
        """
        if self._hold_all(adapter_ids):
            return True
        if self._holders or not self._idle:
            return False
        # Nothing is in use, so what is in the way is where those that are there happen to lie.
        for other in list(self._idle):
            self._evict(other)
        return self._hold_all(adapter_ids)

    def release(self, adapter_id: int) -> None:
        """Give back one ``acquire``; the adapter stays resident until its room is needed.

        Raises:
            ResidencyError: Nothing holds the adapter.
        """
        if adapter_id not in self._holders:
            raise ResidencyError(f"adapter {adapter_id} is released, and nothing holds it")
        self._holders[adapter_id] -= 1
        if not self._holders[adapter_id]:
            del self._holders[adapter_id]
            self._idle[adapter_id] = None

    def place(self, adapter_id: int) -> Place:
        """Where a resident adapter is.

        Raises:
            ResidencyError: The adapter is not resident.
        """
        if adapter_id not in self._places:
            raise ResidencyError(f"adapter {adapter_id} is not on the device")
        return self._places[adapter_id]

    def resident(self) -> list[int]:
        """Ids of the adapters on the device."""
        return list(self._places)

    def drop(self, adapter_id: int) -> None:
        """Take the adapter off the device, if it is there.

        Raises:
            ResidencyError: A sequence holds it.
        """
        if adapter_id in self._holders:
            raise ResidencyError(
                f"adapter {adapter_id} cannot go: {self._holders[adapter_id]} sequences hold it"
            )
        if adapter_id in self._places:
            self._evict(adapter_id)

    def check_integrity(self) -> None:
        """Raise ResidencyError unless each resident adapter is held or idle, in its own slot."""
        self._pool.check_integrity()
        if self._holders.keys() & self._idle.keys():
            raise ResidencyError("an adapter is held and idle")
        if self._holders.keys() | self._idle.keys() != self._places.keys():
            raise ResidencyError("an adapter is held or idle without being resident, or neither")
        if len({id(place) for place in self._places.values()}) != len(self._places):
            raise ResidencyError("two adapters have one place")
        if any(count < 1 for count in self._holders.values()):
            raise ResidencyError("an adapter is held by no sequence")

    def _hold_all(self, adapter_ids: Sequence[int]) -> bool:
        for count, adapter_id in enumerate(adapter_ids):
            if adapter_id not in self._places and not self._bring_in(adapter_id, adapter_ids):
                for held in adapter_ids[:count]:
                    self.release(held)
                return False
            self._idle.pop(adapter_id, None)
            self._holders[adapter_id] = self._holders.get(adapter_id, 0) + 1
        return True

    def _bring_in(self, adapter_id: int, wanted: Sequence[int]) -> bool:
        """Install the adapter, dropping idle ones if need be, of those ``wanted`` too the last."""
        adapter = self._lowered(adapter_id)
        idle = sorted(self._idle, key=lambda other: other in wanted)
        evictions = self._pool.evictions_for(adapter, [self._places[other] for other in idle])
        if evictions is None:
            return False
        for other in idle[:evictions]:
            self._evict(other)
        place = self._pool.install(adapter)
        if place is None:
            raise ResidencyError(f"the room made for adapter {adapter_id} is not there")
        self._places[adapter_id] = place
        return True

    def _evict(self, adapter_id: int) -> None:
        self._pool.remove(self._places.pop(adapter_id))
        del self._idle[adapter_id]
