"""The engine: takes commands between steps, runs one step at a time, reports what it did.

A request starts when all its adapters are in host memory. One with several would keep those that
are there while it waits for the others, and two of them could wait for each other for ever: so
requests of several adapters gather them in turns.
"""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from msgspec import structs

from ...adapters.device.pool import Placement
from ...adapters.device.residency import Residency
from ...adapters.errors import AdapterError
from ...adapters.layout import BaseLayout
from ...adapters.primitives.lowered import LoweredAdapter
from ..composition import Composable, CompositionRefused, Room, check_room
from ..generation import FinishReason, GenerationRequest, SequenceUpdate
from ..grammar.constraint import GrammarRefused
from ..grammar.matcher import Matcher
from ..runner.runner import Runner
from ..scheduler.block_manager import BlockManager
from ..scheduler.errors import SequenceRefused
from ..scheduler.plan import StepPlan
from ..scheduler.scheduler import Scheduler
from ..scheduler.sequence import Sequence
from ..scheduler.shared_memory import SharedMemory
from .composition import composable, use_adapters
from .deadlines import Deadlines
from .grammars import GrammarCompiler
from .host_tier import HostTier, LoadResult
from .messages import (
    Abort,
    AdapterInfo,
    AdapterLoaded,
    AdapterRefused,
    AdapterUnloaded,
    EngineStats,
    Event,
    HostChanges,
    LoadAdapter,
    PinAdapter,
    StepOutputs,
    Submit,
    UnloadAdapter,
)


@dataclass(slots=True)
class _Registration:
    """A registered adapter.

    Attributes:
        composable: What it is beside others; None until its first load has been answered.
        unloading: Whether it goes as soon as no request holds it.
        pinned: Whether it is to stay in memory.
        waiting: Ids of the requests that wait for it to be in host memory.
    """

    composable: Composable | None = None
    unloading: bool = False
    pinned: bool = False
    waiting: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Live:
    """A request that has not ended.

    Attributes:
        request: What was asked for.
        holding: Whether it keeps its adapters in host memory, or has them loaded.
        missing: Of these, the ones that are not there yet.
        matcher: Follows its output, once its grammar has been compiled.
        scheduled: When it was part of a step for the first time, until that is reported.
        was_scheduled: Whether it was part of one.
    """

    request: GenerationRequest
    holding: bool = False
    missing: set[int] = field(default_factory=set)
    matcher: Matcher | None = None
    scheduled: float | None = None
    was_scheduled: bool = False


class Engine:
    """Scheduler, runner and adapter tiers of one process, driven by ``handle`` and ``step``."""

    def __init__(
        self,
        scheduler: Scheduler,
        blocks: BlockManager,
        runner: Runner,
        host: HostTier,
        residency: Residency[LoweredAdapter, Placement],
        shared: SharedMemory,
        grammars: GrammarCompiler,
        layout: BaseLayout,
        adapter_room: Room,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Drive these parts of the base of ``layout``; nothing else may touch them."""
        self._layout = layout
        self._adapter_room = adapter_room
        self._scheduler = scheduler
        self._blocks = blocks
        self._runner = runner
        self._host = host
        self._residency = residency
        self._shared = shared
        self._grammars = grammars
        self.deadlines = Deadlines() if deadlines is None else deadlines
        self._registrations: dict[int, _Registration] = {}
        self._live: dict[str, _Live] = {}
        self._gathering: deque[_Live] = deque()
        """Requests of several adapters that lack some; only the first of them holds the others."""
        self._events: list[Event] = []
        self._updates: list[SequenceUpdate] = []
        self._arrivals = 0
        self._step_tokens = 0
        self._counted = _Counters()
        self._stats_stale = False

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    def handle(self, command: Submit | Abort | LoadAdapter | UnloadAdapter | PinAdapter) -> None:
        """Take one command; its answer comes with ``drain``."""
        self._stats_stale = True
        match command:
            case Submit():
                self._submit(command.request)
            case Abort():
                for request_id in command.request_ids:
                    self._abort(request_id)
            case LoadAdapter():
                self._registrations[command.adapter_id] = _Registration()
                self._host.register(command.adapter_id, Path(command.path), command.digest)
            case UnloadAdapter():
                self._unload(command.adapter_id)
            case PinAdapter():
                self._pin(command.adapter_id, command.pinned)
        self._gather()

    def take_loads(self) -> None:
        """Take in the loads that ended in the background, of grammars too."""
        for request_id in self._grammars.completed():
            if request_id in self._live:
                self._submit_compiled(self._live[request_id])
                self._stats_stale = True
        for result in self._host.completed():
            self._end_load(result)
            self._stats_stale = True
        self._gather()

    def expire(self) -> None:
        """End the requests that have not begun to run by their deadlines."""
        for request_id in self.deadlines.passed():
            if request_id in self._live and not self._scheduler.has_begun(request_id):
                self._scheduler.abort(request_id)
                error = "it had not begun to run when its deadline passed"
                self._report(structs.replace(_failed(request_id, error), expired=True))
                self._stats_stale = True

    def step(self) -> None:
        """Compute one step for the sequences the scheduler chooses."""
        self._shared.now += 1
        plan = self._scheduler.schedule()
        if not (plan.scheduled or plan.unservable):
            raise RuntimeError("the scheduler has work but planned none")
        self._note_scheduled(plan)
        results = self._runner.run(plan) if plan.scheduled else []
        self._residency.bring_back(self._host.is_ready)
        for update in self._scheduler.commit(plan, results):
            self._report(update)
        self._step_tokens = plan.num_tokens
        self._stats_stale = True

    def close(self) -> None:
        """End the threads beside the engine's own."""
        self._grammars.close()
        self._host.close()

    def check_integrity(self) -> None:
        """Balance the books of blocks, sequences and resident adapters.

        Raises:
            AccountingError: Those of the scheduler, the block manager or the memory do not balance.
            ResidencyError: Those of the device's adapters do not.
        """
        self._scheduler.check_integrity()
        self._residency.check_integrity()
        self._shared.check_integrity()

    def drain(self) -> list[Event]:
        """Everything to tell the HTTP process since the last call."""
        events, self._events = self._events, []
        change = self._host.changes()
        if change is not None:
            events.append(HostChanges(change.added, change.dropped))
        if self._stats_stale:
            updates, self._updates = self._updates, []
            events.append(StepOutputs(updates, self._stats()))
            self._stats_stale = False
        return events

    def _submit(self, request: GenerationRequest) -> None:
        live = self._live[request.request_id] = _Live(request)
        self.deadlines.add(request)
        grammar = request.sampling.grammar
        if grammar is None or self._grammars.ask(grammar, request.request_id):
            self._submit_compiled(live)

    def _submit_compiled(self, live: _Live) -> None:
        """Go on with a request whose grammar, if it has one, is there."""
        request = live.request
        try:
            live.matcher = self._grammars.matcher(request)
        except GrammarRefused as error:
            self._report(_failed(request.request_id, f"its grammar is refused: {error}"))
            return
        ready = all(self._host.is_ready(each.adapter_id) for each in request.adapters)
        if ready or len(request.adapters) == 1:
            self._hold(live)
        else:
            self._gathering.append(live)

    def _gather(self) -> None:
        """Give the next request its turn, if the one before has all its adapters."""
        while self._gathering and not self._gathering[0].missing:
            live = self._gathering[0]
            if live.holding:
                self._gathering.popleft()
            else:
                self._hold(live)

    def _hold(self, live: _Live) -> None:
        """Keep the request's adapters in host memory, and start it if all are there."""
        request = live.request
        refusal = self._refusal(request)
        if refusal is not None:
            self._report(_failed(request.request_id, refusal))
            return
        live.holding = True
        several = len(request.adapters) > 1
        for each in request.adapters:
            if not self._host.hold(each.adapter_id, several, request.share.tenant):
                live.missing.add(each.adapter_id)
                self._registrations[each.adapter_id].waiting.add(request.request_id)
        if not live.missing:
            self._start(live)

    def _refusal(self, request: GenerationRequest) -> str | None:
        """Why its adapters cannot be had; None if they can."""
        found = [self._registrations.get(each.adapter_id) for each in request.adapters]
        if any(each is None or each.unloading for each in found):
            return "the adapter is not loaded"
        known = [each.composable for each in found if each is not None]
        try:
            check_room([each for each in known if each is not None], self._adapter_room)
        except CompositionRefused as error:
            return str(error)
        return None

    def _start(self, live: _Live) -> None:
        request = live.request
        self._arrivals += 1
        adapters = [self._host.lowered(each.adapter_id) for each in request.adapters]
        try:
            use = use_adapters(request, adapters, self._layout)
            self._scheduler.add(Sequence(request, use, self._arrivals, live.matcher))
        except SequenceRefused as error:
            self._report(_failed(request.request_id, str(error)))

    def _abort(self, request_id: str) -> None:
        if request_id not in self._live:
            return
        self._scheduler.abort(request_id)
        self._forget(request_id)

    def _note_scheduled(self, plan: StepPlan) -> None:
        now = monotonic()
        for item in plan.scheduled:
            live = self._live[item.sequence.request.request_id]
            if not live.was_scheduled:
                live.scheduled, live.was_scheduled = now, True

    def _report(self, update: SequenceUpdate) -> None:
        live = self._live[update.request_id]
        if live.scheduled is not None:
            update = structs.replace(update, scheduled=live.scheduled)
            live.scheduled = None
        self._updates.append(update)
        if update.finish_reason is not None:
            self._forget(update.request_id)

    def _forget(self, request_id: str) -> None:
        live = self._live.pop(request_id)
        if live in self._gathering:
            self._gathering.remove(live)
        if not live.holding:
            return
        for adapter_id in live.missing:
            self._registrations[adapter_id].waiting.discard(request_id)
        for each in live.request.adapters:
            self._host.release(each.adapter_id)
            self._unload_if_idle(each.adapter_id)

    def _end_load(self, result: LoadResult) -> None:
        registration = self._registrations[result.adapter_id]
        waiting = [self._live[request_id] for request_id in sorted(registration.waiting)]
        registration.waiting.clear()
        if isinstance(result.outcome, LoweredAdapter):
            if registration.composable is None:
                info = _info(result.outcome)
                self._events.append(AdapterLoaded(result.adapter_id, info))
                registration.composable = info.composable
            self._pin_on_device(result.adapter_id)
            for live in waiting:
                live.missing.discard(result.adapter_id)
                if not live.missing:
                    self._start(live)
        else:
            for live in waiting:
                reason = f"its adapter could not be loaded: {result.outcome}"
                self._report(_failed(live.request.request_id, reason))
            if registration.composable is None and not registration.unloading:
                self._refuse(result.adapter_id, result.outcome)

    def _refuse(self, adapter_id: int, error: AdapterError) -> None:
        self._host.forget(adapter_id)
        del self._registrations[adapter_id]
        self._events.append(AdapterRefused(adapter_id, type(error).__name__, str(error)))

    def _pin(self, adapter_id: int, pinned: bool) -> None:
        """Pin in every tier that can; an adapter that went meanwhile needs no pin."""
        registration = self._registrations.get(adapter_id)
        if registration is None or registration.unloading:
            return
        registration.pinned = pinned
        if pinned:
            self._host.pin(adapter_id)
            self._pin_on_device(adapter_id)
        else:
            self._host.unpin(adapter_id)
            self._residency.unpin(adapter_id)

    def _pin_on_device(self, adapter_id: int) -> None:
        """Have it stay there too, once it is in host memory and its size is known."""
        if self._registrations[adapter_id].pinned and self._host.is_ready(adapter_id):
            self._residency.pin(adapter_id)
            self._residency.bring_back(self._host.is_ready)

    def _unload(self, adapter_id: int) -> None:
        if adapter_id in self._registrations:
            self._registrations[adapter_id].unloading = True
            self._unload_if_idle(adapter_id)
        else:
            # It was refused when an engine that was started later read it again.
            self._events.append(AdapterUnloaded(adapter_id))

    def _unload_if_idle(self, adapter_id: int) -> None:
        if not self._registrations[adapter_id].unloading or self._host.is_held(adapter_id):
            return
        self._residency.drop(adapter_id)
        self._host.forget(adapter_id)
        del self._registrations[adapter_id]
        self._events.append(AdapterUnloaded(adapter_id))

    def _stats(self) -> EngineStats:
        step_tokens, self._step_tokens = self._step_tokens, 0
        before, now = self._counted, self._counters()
        self._counted = now
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=len(self._live) - self._scheduler.num_running_requests,
            blocks_used=self._blocks.num_used,
            blocks_total=self._blocks.most_blocks,
            step_tokens=step_tokens,
            prefix_queries=now.prefix_queries - before.prefix_queries,
            prefix_hits=now.prefix_hits - before.prefix_hits,
            preemptions=now.preemptions - before.preemptions,
            device_adapters=self._residency.resident(),
            adapter_bytes=self._residency.num_bytes,
        )

    def _counters(self) -> "_Counters":
        return _Counters(
            self._blocks.prefix_queries, self._blocks.prefix_hits, self._scheduler.num_preemptions
        )


@dataclass(frozen=True, slots=True)
class _Counters:
    """Totals at the last report."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


def _failed(request_id: str, reason: str) -> SequenceUpdate:
    return SequenceUpdate(request_id=request_id, finish_reason=FinishReason.ERROR, error=reason)


def _info(adapter: LoweredAdapter) -> AdapterInfo:
    return AdapterInfo(
        digest=adapter.digest,
        kind=adapter.kind,
        library=adapter.library,
        rank=adapter.rank,
        num_parameters=adapter.num_elements,
        num_bytes=adapter.num_bytes,
        targets=sorted({primitive.path for primitive in adapter.primitives}),
        composable=composable(adapter),
    )
