"""Adapters in host memory: read and lowered in a thread of their own, off the step loop.

An adapter is *ready* while its lowered form is in host memory. Over the budget, the least recently
used ready adapters that no request holds are *dropped*; their files stay registered and are read
again, against the same digest, when a request asks for them.
"""

import os
import queue
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...adapters.errors import AdapterCorrupt, AdapterError, AdapterTooLarge
from ...adapters.primitives import LoweredAdapter

Lower = Callable[[Path], LoweredAdapter]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The end of one load: the adapter, or why it is refused."""

    adapter_id: int
    outcome: LoweredAdapter | AdapterError


@dataclass(slots=True)
class _Source:
    path: Path
    digest: str | None


class HostTier:
    """The second memory tier. All methods are called from the engine's thread.

    Args:
        lower: Reads and lowers a folder, raising AdapterError.
        budget: Bytes of lowered adapters to keep.
    """

    def __init__(self, lower: Lower, budget: int) -> None:
        """Start the loader thread."""
        self._lower = lower
        self._budget = budget
        self._sources: dict[int, _Source] = {}
        self._ready: OrderedDict[int, LoweredAdapter] = OrderedDict()
        self._loading: set[int] = set()
        self._holders: Counter[int] = Counter()
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Becomes readable when a load has ended: the engine sleeps on it."""

    def register(self, adapter_id: int, path: Path, digest: str | None) -> None:
        """Name the adapter's files and start to load them; ``digest`` is what they must hash to."""
        self._sources[adapter_id] = _Source(path, digest)
        self._start_load(adapter_id)

    def knows(self, adapter_id: int) -> bool:
        """Whether the adapter is registered."""
        return adapter_id in self._sources

    def hold(self, adapter_id: int) -> bool:
        """Keep the adapter in host memory for one more request; True if it is ready now.

        Where it is not, it is being loaded, and ``completed`` will tell.
        """
        self._holders[adapter_id] += 1
        if adapter_id in self._ready:
            self._ready.move_to_end(adapter_id)
            return True
        self._start_load(adapter_id)
        return False

    def release(self, adapter_id: int) -> None:
        """Give back one ``hold``."""
        self._holders[adapter_id] -= 1
        if not self._holders[adapter_id]:
            del self._holders[adapter_id]
        self._make_room()

    def is_held(self, adapter_id: int) -> bool:
        """Whether any request holds the adapter."""
        return adapter_id in self._holders

    def lowered(self, adapter_id: int) -> LoweredAdapter:
        """The adapter's lowered form; it must be ready."""
        return self._ready[adapter_id]

    def digest(self, adapter_id: int) -> str:
        """The digest of the adapter's files; it must have been loaded once."""
        digest = self._sources[adapter_id].digest
        if digest is None:
            raise KeyError(f"adapter {adapter_id} has not been loaded yet")
        return digest

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
        self._ready.pop(adapter_id, None)

    def completed(self) -> list[LoadResult]:
        """Loads that ended since the last call, taken in, save those of forgotten adapters."""
        results = []
        while not self._results.empty():
            result = self._results.get_nowait()
            self._loading.discard(result.adapter_id)
            if result.adapter_id in self._sources:
                results.append(self._take_in(result))
        self._make_room()
        return results

    def close(self) -> None:
        """Stop the loader thread; a load under way is waited for."""
        self._loader.shutdown(cancel_futures=True)
        os.close(self.wakeup)

    def _take_in(self, result: LoadResult) -> LoadResult:
        source, outcome = self._sources[result.adapter_id], result.outcome
        if isinstance(outcome, AdapterError):
            return result
        if source.digest is not None and outcome.digest != source.digest:
            changed = AdapterCorrupt(
                f"the files at {source.path} changed since the adapter was loaded (digest "
                f"{outcome.digest[:12]}, not {source.digest[:12]}); load it again to serve them"
            )
            return LoadResult(result.adapter_id, changed)
        source.digest = outcome.digest
        self._ready[result.adapter_id] = outcome
        return result

    def _start_load(self, adapter_id: int) -> None:
        if adapter_id in self._loading or adapter_id in self._ready:
            return
        self._loading.add(adapter_id)
        future = self._loader.submit(self._load, self._sources[adapter_id].path)
        future.add_done_callback(lambda done: self._finish(adapter_id, done))

    def _load(self, path: Path) -> LoweredAdapter:
        lowered = self._lower(path)
        if lowered.num_bytes > self._budget:
            raise AdapterTooLarge(
                f"the adapter needs {lowered.num_bytes} bytes of host memory, the budget is "
                f"{self._budget}; raise --host-memory-budget"
            )
        return lowered

    def _finish(self, adapter_id: int, done: Future[LoweredAdapter]) -> None:
        """On the loader thread: pass the outcome to the engine's thread and wake it."""
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            outcome: LoweredAdapter | AdapterError = done.result()
        elif isinstance(error, AdapterError):
            outcome = error
        else:
            outcome = AdapterCorrupt(f"reading the adapter failed: {type(error).__name__}: {error}")
        self._results.put(LoadResult(adapter_id, outcome))
        os.eventfd_write(self.wakeup, 1)

    def _make_room(self) -> None:
        """Drop ready adapters that nothing holds, least recently used first, down to the budget."""
        total = sum(adapter.num_bytes for adapter in self._ready.values())
        idle = [adapter_id for adapter_id in self._ready if not self.is_held(adapter_id)]
        for adapter_id in idle:
            if total <= self._budget:
                return
            total -= self._ready.pop(adapter_id).num_bytes
