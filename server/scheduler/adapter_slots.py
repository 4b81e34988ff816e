"""What the scheduler asks of the device's adapter tier."""

from collections.abc import Sequence
from typing import Protocol


class AdapterSlots(Protocol):
    """Reference-counted residency of adapters on the device."""

    def acquire(self, *adapter_ids: int) -> bool:
        """Hold all these adapters on the device for one more sequence, or none of them.

        Makes room by dropping adapters that no sequence holds, those first that are not expected,
        the least recently used before others. False, with nothing held, where even that is not
        enough.
        """
        ...

    def release(self, adapter_id: int) -> None:
        """Give back one ``acquire``; the adapter stays resident until its room is needed."""
        ...

    def blocks_for(self, *adapter_ids: int) -> int:
        """Cache blocks that are lost, as things are, while these adapters are held."""
        ...

    def blocks_of(self, *adapter_ids: int) -> int:
        """Cache blocks that these adapters keep a sequence from having even while it is alone."""
        ...

    def fits(self, *adapter_ids: int) -> bool:
        """Whether these adapters are on the device, or find room beside all that are."""
        ...

    def expect(self, adapter_ids: Sequence[int]) -> None:
        """What those who wait will acquire, the first first; replaces what was expected before."""
        ...

    def prefetch(self) -> None:
        """Bring in the next expected adapter that is not there, if that pushes no other one out."""
        ...
