"""Adapters that wait to be read: tenants take turns, each in the order of its asking."""

from collections import OrderedDict


class LoadQueue:
    """The lines of tenants, and one of the urgent before them. An adapter may stand in several."""

    def __init__(self) -> None:
        """Start empty."""
        self._urgent: OrderedDict[int, None] = OrderedDict()
        self._lines: OrderedDict[str, OrderedDict[int, None]] = OrderedDict()
        self._askers: dict[int, set[str]] = {}
        """Of every adapter that waits, the tenants in whose lines it does."""

    def __len__(self) -> int:
        """Adapters that wait."""
        return len(self._askers)

    def add(self, adapter_id: int, tenant: str) -> None:
        """The tenant needs the adapter too."""
        askers = self._askers.setdefault(adapter_id, set())
        if tenant not in askers and adapter_id not in self._urgent:
            askers.add(tenant)
            self._lines.setdefault(tenant, OrderedDict())[adapter_id] = None

    def add_first(self, adapter_id: int) -> None:
        """Read the adapter before all others."""
        self.remove(adapter_id)
        self._askers[adapter_id] = set()
        self._urgent[adapter_id] = None
        self._urgent.move_to_end(adapter_id, last=False)

    def first(self) -> int:
        """The adapter that is next; there is one."""
        line = self._urgent or next(iter(self._lines.values()))
        return next(iter(line))

    def pop(self) -> int:
        """Take the next one out; its tenant's turn comes again after those of all others."""
        adapter_id = self.first()
        if not self._urgent:
            self._lines.move_to_end(next(iter(self._lines)))
        self.remove(adapter_id)
        return adapter_id

    def remove(self, adapter_id: int) -> None:
        """Forget the adapter, if it waits."""
        self._urgent.pop(adapter_id, None)
        for tenant in self._askers.pop(adapter_id, ()):
            del self._lines[tenant][adapter_id]
            if not self._lines[tenant]:
                del self._lines[tenant]
