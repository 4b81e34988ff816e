"""What the scheduler asks of the device's adapter tier."""

from typing import Protocol


class AdapterSlots(Protocol):
    """Reference-counted residency of adapters on the device."""

    def acquire(self, *adapter_ids: int) -> bool:
        """Hold all these adapters on the device for one more sequence, or none of them.

        Makes room by dropping the least recently used adapters that no sequence holds. False, with
        nothing held, where even that is not enough.
        """
        ...

    def release(self, adapter_id: int) -> None:
        """Give back one ``acquire``; the adapter stays resident until its room is needed."""
        ...
