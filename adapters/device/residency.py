"""Which adapters are on the device, and which must stay: reference counts over the pool.

Free of torch. An adapter that no sequence holds stays where it is until its room is needed. Then
those go first that nobody who waits has asked for, the one that has been idle longest before the
others; of those that are expected, the one that is needed last. A *pinned* adapter stays. Only
where nothing else is in use and one still finds no room does it make way, for a while.
"""

from collections.abc import Callable, Collection, Sequence
from functools import reduce
from typing import Generic, NamedTuple, Protocol, TypeVar

Adapter = TypeVar("Adapter")
Place = TypeVar("Place")
Adapter_contra = TypeVar("Adapter_contra", contravariant=True)


class ResidencyError(LookupError):
    """An adapter was asked for that is not resident or not held: a bug of the caller."""


class PoolSize(NamedTuple):
    """What adapters take of a pool.

    Attributes:
        num_bytes: Of its memory.
        parts: Of its adapter slots.
    """

    num_bytes: int = 0
    parts: int = 0

    def beside(self, other: "PoolSize") -> "PoolSize":
        """Both together."""
        return PoolSize(self.num_bytes + other.num_bytes, self.parts + other.parts)

    def within(self, room: "PoolSize") -> bool:
        """Whether there is room for this."""
        return self.num_bytes <= room.num_bytes and self.parts <= room.parts


class Pool(Protocol[Adapter_contra, Place]):
    """The device memory as residency sees it; ``pool.AdapterPool`` is one."""

    @property
    def free(self) -> PoolSize:
        """What another adapter may take."""
        ...

    def size(self, adapter: Adapter_contra) -> PoolSize:
        """What an adapter takes."""
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


class Neighbour(Protocol):
    """Who shares the memory: the cache's blocks."""

    @property
    def now(self) -> int:
        """The number of the step, by which ages are told."""
        ...

    @property
    def lendable_bytes(self) -> int:
        """What it could give the pool at most."""
        ...

    def lend(self, num_bytes: int, rival: int | None, /) -> bool:
        """Come nearer to giving the pool so many bytes more.

        False, with nothing done, if it can give nothing, or only what is worth more than an adapter
        that was last used in the step ``rival``; there is none if that is None.
        """
        ...

    def blocks_for(self, num_bytes: int, /) -> int:
        """Blocks that are lost to the cache if so many bytes more must stay on the device."""
        ...

    def blocks_of(self, num_bytes: int, /) -> int:
        """Blocks in whose place so many bytes lie."""
        ...


class NoNeighbour:
    """A pool of its own."""

    now = 0
    lendable_bytes = 0

    def lend(self, _num_bytes: int, _rival: int | None) -> bool:
        """Nothing can be had."""
        return False

    def blocks_for(self, _num_bytes: int) -> int:
        """Nothing is lost."""
        return 0

    def blocks_of(self, _num_bytes: int) -> int:
        """No block's."""
        return 0


_NOTHING = PoolSize()


class Residency(Generic[Adapter, Place]):
    """Reference-counted residency; what the scheduler knows as ``AdapterSlots``.

    Args:
        pool: The device memory.
        lowered: The adapter of an id, in host memory.
        pin_room: What pinned adapters may take of the pool; more of them are treated like others.
    """

    def __init__(
        self,
        pool: Pool[Adapter, Place],
        lowered: Callable[[int], Adapter],
        pin_room: PoolSize = _NOTHING,
    ) -> None:
        """Start with nothing resident."""
        self._pool = pool
        self._lowered = lowered
        self._pin_room = pin_room
        self._neighbour: Neighbour = NoNeighbour()
        self._places: dict[int, Place] = {}
        self._sizes: dict[int, PoolSize] = {}
        self._holders: dict[int, int] = {}
        self._idle: dict[int, int] = {}
        """In which step each was last used, in this order."""
        self._pinned: dict[int, PoolSize] = {}
        self._expected: dict[int, int] = {}
        """The turn of each that those who wait will acquire."""

    def share_with(self, neighbour: Neighbour) -> None:
        """Share the pool's memory from now on."""
        self._neighbour = neighbour

    @property
    def num_bytes(self) -> int:
        """What the adapters on the device take."""
        return sum(size.num_bytes for size in self._sizes.values())

    @property
    def staying_bytes(self) -> int:
        """What those of them take that are held or pinned."""
        return sum(
            size.num_bytes
            for one, size in self._sizes.items()
            if one in self._holders or one in self._pinned
        )

    @property
    def oldest(self) -> int | None:
        """The step in which the one that would go next was last used: now, if it is expected."""
        return next(map(self._last_use, self._victims()), None)

    def evict(self) -> None:
        """Take the one that goes next off the device."""
        self._evict(self._victims()[0])

    def acquire(self, *adapter_ids: int) -> bool:
        """Hold all these adapters on the device for one more sequence, or none of them.

        Makes room by dropping adapters that no sequence holds. False, with nothing held, where even
        that is not enough.
        """
        if self._hold_all(adapter_ids):
            return True
        if self._holders or self._pinned.keys().isdisjoint(self._places):
            return False
        for other in self._pinned.keys() & self._places.keys():
            self._evict(other)
        return self._hold_all(adapter_ids)

    def blocks_for(self, *adapter_ids: int) -> int:
        """Cache blocks that are lost while these adapters are held."""
        coming = (one for one in adapter_ids if one not in self._holders)
        sizes = (self._size(one).num_bytes for one in coming if not self._stays(one))
        return self._neighbour.blocks_for(sum(sizes))

    def blocks_of(self, *adapter_ids: int) -> int:
        """Cache blocks that these adapters keep a sequence from having even while it is alone."""
        return self._neighbour.blocks_of(sum(self._size(one).num_bytes for one in adapter_ids))

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
            self._idle[adapter_id] = self._neighbour.now

    def fits(self, *adapter_ids: int) -> bool:
        """Whether these adapters are on the device, or find room beside all that are."""
        missing = [self._size(one) for one in adapter_ids if one not in self._places]
        return not missing or reduce(PoolSize.beside, missing).within(self._pool.free)

    def expect(self, adapter_ids: Sequence[int]) -> None:
        """What those who wait will acquire, the first first; replaces what was expected before."""
        self._expected = {adapter_id: turn for turn, adapter_id in enumerate(adapter_ids)}

    def prefetch(self) -> None:
        """Bring in the next expected adapter that is not there, in the room of unexpected ones."""
        missing = next((one for one in self._expected if one not in self._places), None)
        if missing is not None and self._bring_in(missing, self._expected):
            self._idle[missing] = self._neighbour.now

    def pin(self, adapter_id: int) -> bool:
        """Keep an adapter, which is in host memory, on the device as soon as there is room.

        False, with nothing changed, where pinned adapters would take more than they may.
        """
        size = self._pool.size(self._lowered(adapter_id))
        pinned = self._pinned | {adapter_id: size}
        if not reduce(PoolSize.beside, pinned.values()).within(self._pin_room):
            return False
        self._pinned = pinned
        return True

    def unpin(self, adapter_id: int) -> None:
        """Treat the adapter like any other again."""
        self._pinned.pop(adapter_id, None)

    def bring_back(self, is_ready: Callable[[int], bool]) -> None:
        """Bring in pinned adapters that are not here, as far as they are in host memory."""
        for missing in [one for one in self._pinned if one not in self._places and is_ready(one)]:
            if self._bring_in(missing, ()):
                self._idle[missing] = self._neighbour.now

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
        self.unpin(adapter_id)
        if adapter_id in self._places:
            self._evict(adapter_id)

    def check_integrity(self) -> None:
        """Raise ResidencyError unless each resident adapter is held or idle, in its own slot."""
        self._pool.check_integrity()
        if self._sizes.keys() != self._places.keys():
            raise ResidencyError("the sizes of other adapters are known than are resident")
        if self._holders.keys() & self._idle.keys():
            raise ResidencyError("an adapter is held and idle")
        if self._holders.keys() | self._idle.keys() != self._places.keys():
            raise ResidencyError("an adapter is held or idle without being resident, or neither")
        if len({id(place) for place in self._places.values()}) != len(self._places):
            raise ResidencyError("two adapters have one place")
        if any(count < 1 for count in self._holders.values()):
            raise ResidencyError("an adapter is held by no sequence")

    def _hold_all(self, adapter_ids: Sequence[int]) -> bool:
        there_first = sorted(adapter_ids, key=lambda one: one not in self._places)
        for count, adapter_id in enumerate(there_first):
            if adapter_id not in self._places and not self._bring_in(adapter_id, ()):
                for held in there_first[:count]:
                    self.release(held)
                return False
            self._idle.pop(adapter_id, None)
            self._holders[adapter_id] = self._holders.get(adapter_id, 0) + 1
        return True

    def _bring_in(self, adapter_id: int, kept: Collection[int]) -> bool:
        """Install the adapter, dropping idle ones if need be, but none of ``kept``."""
        adapter = self._lowered(adapter_id)
        size = self._pool.size(adapter)
        victims = [one for one in self._victims() if one not in kept]
        if not self._make_room(size, victims):
            return False
        place = self._pool.install(adapter)
        if place is None:
            raise ResidencyError(f"the room made for adapter {adapter_id} is not there")
        self._places[adapter_id], self._sizes[adapter_id] = place, size
        return True

    def _make_room(self, size: PoolSize, victims: list[int]) -> bool:
        """Drop what is worth least, of the victims in order or the neighbour's, until it fits."""
        lendable = PoolSize(self._neighbour.lendable_bytes)
        sizes = (self._sizes[one] for one in victims)
        if not size.within(reduce(PoolSize.beside, sizes, self._pool.free.beside(lendable))):
            return False
        while not size.within(self._pool.free):
            missing = size.num_bytes - self._pool.free.num_bytes
            rival = next((self._last_use(one) for one in victims), None)
            if missing <= 0 or not self._neighbour.lend(missing, rival):
                self._evict(victims.pop(0))
        return True

    def _size(self, adapter_id: int) -> PoolSize:
        known = self._sizes.get(adapter_id)
        return self._pool.size(self._lowered(adapter_id)) if known is None else known

    def _stays(self, adapter_id: int) -> bool:
        return adapter_id in self._places and adapter_id in self._pinned

    def _last_use(self, adapter_id: int) -> int:
        """The step in which it was used last, which for what is expected is now."""
        return self._neighbour.now if adapter_id in self._expected else self._idle[adapter_id]

    def _victims(self) -> list[int]:
        """Idle adapters that may go, the first first."""
        idle = (one for one in self._idle if one not in self._pinned)
        last = len(self._expected)
        return sorted(idle, key=lambda one: -self._expected.get(one, last))

    def _evict(self, adapter_id: int) -> None:
        self._pool.remove(self._places.pop(adapter_id))
        del self._idle[adapter_id], self._sizes[adapter_id]
