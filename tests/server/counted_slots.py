"""The device's adapters as a scheduler sees them, without a device."""

from collections import Counter


class CountedSlots:
    """Room for a number of adapters, each one slot large."""

    def __init__(self, room):
        self.room = room
        self.held = Counter()
        self.asked = Counter()

    def acquire(self, *adapter_ids):
        self.asked.update(adapter_ids)
        if len({*self.held, *adapter_ids}) > self.room:
            return False
        self.held.update(adapter_ids)
        return True

    def fits(self, *adapter_ids):
        return len({*self.held, *adapter_ids}) <= self.room

    def blocks_for(self, *adapter_ids):
        return 0

    def blocks_of(self, *adapter_ids):
        return 0

    def expect(self, adapter_ids):
        self.expected = list(adapter_ids)

    def prefetch(self):
        pass

    def release(self, adapter_id):
        self.held[adapter_id] -= 1
        assert self.held[adapter_id] >= 0
        self.held += Counter()
