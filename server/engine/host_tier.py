"""Adapters in host memory: read and lowered in a thread of their own, off the step loop.

An adapter is *ready* while its lowered form is in host memory, and *held* while a request needs it
there. Over the budget, the least recently used ready adapters that are not held are dropped; their
files stay registered and are read again, against the same digest, when a request asks for them. A
load waits while held adapters leave no room for it.

A *pinned* adapter stays, and other loads wait for held ones to go rather than for it. Only where
waiting could have no end does it make way, and comes back when there is room again: for an adapter
that does not fit beside the pinned ones, and for those of one request that needs several.
"""

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

import torch

from ...adapters.errors import AdapterCorrupt, AdapterError, AdapterTooLarge
from ...adapters.primitives.lowered import LoweredAdapter
from .load_queue import LoadQueue

Lower = Callable[[Path], LoweredAdapter]

_AHEAD = 2
"""Loads that the loader is given at once, so that it need not wait for the engine."""
_NICENESS = 5
"""Of the loader, above the engine's: it holds the interpreter now and then, so not too much."""

_LAST_LOAD_SECONDS = 5.0
"""How long the process waits at its end for a load that has begun."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The end of one load: the adapter, or why it is refused."""

    adapter_id: int
    outcome: LoweredAdapter | AdapterError


@dataclass(frozen=True, slots=True)
class HostChange:
    """Adapters that came to host memory and that left it."""

    added: list[int]
    dropped: list[int]


@dataclass(slots=True)
class _Source:
    """Where an adapter comes from; digest and size are known once it has been loaded."""

    path: Path
    digest: str | None
    num_bytes: int = 0


class HostTier:
    """The second memory tier; every public method belongs to the engine's thread.

    Args:
        lower: Reads and lowers a folder, raising AdapterError.
        budget: Bytes of lowered adapters to keep.
    """

    def __init__(self, lower: Lower, budget: int) -> None:
        """Start the loader."""
        self._budget = budget
        self._sources: dict[int, _Source] = {}
        self._ready: OrderedDict[int, LoweredAdapter] = OrderedDict()
        self._ready_bytes = 0
        self._holders: Counter[int] = Counter()
        self._pinned: set[int] = set()
        self._urgent: set[int] = set()
        self._changed: dict[int, bool] = {}
        """Of adapters that came or went since the last report: whether they were there before."""
        self._pending = LoadQueue()
        self._loading: set[int] = set()
        self._loader = _Loader(lower)
        self.wakeup = self._loader.wakeup
        """Becomes readable when a load has ended: the engine sleeps on it."""

    def register(self, adapter_id: int, path: Path, digest: str | None) -> None:
        """Name the adapter's files and ask for them; ``digest`` is what they must hash to."""
        self._sources[adapter_id] = _Source(path, digest)
        self._ask_for(adapter_id)

    def hold(self, adapter_id: int, first: bool = False, tenant: str = "") -> bool:
        """Keep the adapter in host memory for one more request; True if it is ready now.

        Where it is not, it will be loaded when it is the ``tenant``'s turn, or ``first`` before all
        others that wait to be, and ``completed`` will tell.
        """
        self._holders[adapter_id] += 1
        if adapter_id in self._ready:
            self._ready.move_to_end(adapter_id)
            return True
        self._ask_for(adapter_id, first, tenant)
        return False

    def release(self, adapter_id: int) -> None:
        """Give back one ``hold``."""
        self._holders[adapter_id] -= 1
        if not self._holders[adapter_id]:
            del self._holders[adapter_id]
            self._make_room()
            self._start_loads()
            self._bring_back()

    def pin(self, adapter_id: int) -> None:
        """Keep the adapter, which is registered, in host memory; it is loaded if need be."""
        self._pinned.add(adapter_id)
        self._bring_back()

    def unpin(self, adapter_id: int) -> None:
        """Treat the adapter like any other again."""
        self._pinned.discard(adapter_id)
        self._start_loads()

    def changes(self) -> HostChange | None:
        """What came and went since the last call, None where nothing did."""
        changed, self._changed = self._changed, {}
        added = [one for one, before in changed.items() if not before and one in self._ready]
        dropped = [one for one, before in changed.items() if before and one not in self._ready]
        return HostChange(added, dropped) if added or dropped else None

    def is_ready(self, adapter_id: int) -> bool:
        """Whether the adapter is in host memory."""
        return adapter_id in self._ready

    def is_held(self, adapter_id: int) -> bool:
        """Whether any request holds the adapter."""
        return adapter_id in self._holders

    def lowered(self, adapter_id: int) -> LoweredAdapter:
        """The adapter's lowered form; it must be ready."""
        return self._ready[adapter_id]

    def ready(self) -> list[int]:
        """Ids of the adapters in host memory."""
        return list(self._ready)

    def forget(self, adapter_id: int) -> None:
        """Drop the adapter and its registration; no request may hold it."""
        if self.is_held(adapter_id):
            raise ValueError(
                f"adapter {adapter_id} is held by {self._holders[adapter_id]} requests"
            )
        self._sources.pop(adapter_id, None)
        if adapter_id in self._ready:
            self._drop(adapter_id)
        self._pending.remove(adapter_id)
        self._pinned.discard(adapter_id)
        self._urgent.discard(adapter_id)

    def completed(self) -> list[LoadResult]:
        """Loads that ended since the last call, taken in, save those of forgotten adapters."""
        ended = self._loader.ended()
        results = [self._take_in(result) for result in ended if result.adapter_id in self._sources]
        if ended:
            over = {result.adapter_id for result in ended}
            self._loading -= over
            self._urgent -= over
            self._make_room()
            self._start_loads()
        return results

    def close(self) -> None:
        """End the loader after what it was asked for, or leave it behind after some seconds."""
        self._loader.close()

    def _take_in(self, result: LoadResult) -> LoadResult:
        source, adapter = self._sources[result.adapter_id], result.outcome
        if isinstance(adapter, LoweredAdapter):
            refusal = self._refusal(source, adapter)
            adapter = adapter if refusal is None else refusal
        if isinstance(adapter, AdapterError):
            self._pinned.discard(result.adapter_id)  # or it would be read again and again
            return LoadResult(result.adapter_id, adapter)
        source.digest, source.num_bytes = adapter.digest, adapter.num_bytes
        self._changed.setdefault(result.adapter_id, False)
        self._ready[result.adapter_id] = adapter
        self._ready_bytes += adapter.num_bytes
        return result

    def _refusal(self, source: _Source, adapter: LoweredAdapter) -> AdapterError | None:
        if adapter.num_bytes > self._budget:
            return AdapterTooLarge(
                f"the adapter needs {adapter.num_bytes} bytes of host memory, the budget is "
                f"{self._budget}; raise --host-memory-budget"
            )
        if source.digest not in (None, adapter.digest):
            return AdapterCorrupt(
                f"the files at {source.path} changed since the adapter was loaded (digest "
                f"{adapter.digest[:12]}, not {source.digest[:12]}); load it again to serve them"
            )
        return None

    def _ask_for(self, adapter_id: int, first: bool = False, tenant: str = "") -> None:
        if adapter_id in self._loading:
            return
        if first:
            self._urgent.add(adapter_id)
            self._pending.add_first(adapter_id)
        else:
            self._pending.add(adapter_id, tenant)
        self._start_loads()

    def _start_loads(self) -> None:
        """Hand pending loads to the loader, in turn, while what is held leaves room for them.

        A few at a time: what the loader has, another tenant's load cannot pass.
        """
        if not self._pending:
            return
        taken = self._held_bytes()
        taken += sum(self._sources[one].num_bytes for one in self._loading if one in self._sources)
        while self._pending and len(self._loading) < _AHEAD:
            adapter_id = self._pending.first()
            source = self._sources[adapter_id]
            pinned = 0 if adapter_id in self._urgent else self._idle_pinned_bytes()
            if taken and taken + pinned + source.num_bytes > self._budget:
                return
            taken += source.num_bytes
            self._pending.pop()
            self._loading.add(adapter_id)
            self._loader.load(adapter_id, source.path)

    def _make_room(self) -> None:
        """Drop ready adapters that nothing holds, least recently used first, down to the budget."""
        if self._ready_bytes <= self._budget:
            return
        # There may be ten thousand, of which the first few will do: no more are looked at.
        order = list(self._ready)
        others = (one for one in order if one not in self._pinned)
        for adapter_id in chain(others, (one for one in order if one in self._pinned)):
            if not self.is_held(adapter_id):
                self._drop(adapter_id)
            if self._ready_bytes <= self._budget:
                return

    def _idle_pinned_bytes(self) -> int:
        idle = (one for one in self._pinned if one in self._ready and not self.is_held(one))
        return sum(self._ready[one].num_bytes for one in idle)

    def _bring_back(self) -> None:
        """Ask for pinned adapters that are not there, as far as they fit beside what must stay."""
        missing = sorted(self._pinned - self._ready.keys() - self._loading)
        if self._pending or not missing:
            return
        room = self._budget - self._idle_pinned_bytes() - self._held_bytes()
        for adapter_id in missing:
            room -= self._sources[adapter_id].num_bytes
            if room >= 0:
                self._ask_for(adapter_id)

    def _held_bytes(self) -> int:
        return sum(self._ready[held].num_bytes for held in self._holders if held in self._ready)

    def _drop(self, adapter_id: int) -> None:
        self._changed.setdefault(adapter_id, True)
        self._ready_bytes -= self._ready.pop(adapter_id).num_bytes


def _give_way_to_steps() -> None:
    """Lower this thread's priority, and keep it from computing in others beside it."""
    os.nice(_NICENESS)
    torch.set_num_threads(1)  # of this thread and of those that begin later


class _Loader:
    """One daemon thread that lowers folders in the order in which they were asked for."""

    def __init__(self, lower: Lower) -> None:
        self._lower = lower
        self._asked: SimpleQueue[tuple[int, Path] | None] = SimpleQueue()
        self._ended: SimpleQueue[LoadResult] = SimpleQueue()
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def load(self, adapter_id: int, path: Path) -> None:
        self._asked.put((adapter_id, path))

    def ended(self) -> list[LoadResult]:
        return [self._ended.get_nowait() for _ in range(self._ended.qsize())]

    def close(self) -> None:
        self._asked.put(None)
        # A daemon thread that still runs while the interpreter ends would take the process down.
        self._thread.join(_LAST_LOAD_SECONDS)

    def _run(self) -> None:
        _give_way_to_steps()
        for adapter_id, path in iter(self._asked.get, None):
            self._ended.put(LoadResult(adapter_id, self._outcome(path)))
            os.eventfd_write(self.wakeup, 1)
        os.close(self.wakeup)

    def _outcome(self, path: Path) -> LoweredAdapter | AdapterError:
        try:
            return self._lower(path)
        except AdapterError as error:
            return error
        except Exception as error:  # noqa: BLE001  # a stranger's file: refuse it, whatever it does
            return AdapterCorrupt(f"reading {path} failed: {type(error).__name__}: {error}")
