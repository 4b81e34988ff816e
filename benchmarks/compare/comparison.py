"""The comparison: all systems up, each answer checked, then rounds in which they take turns.

One system is awake at a time; the others' processes are stopped, so that what they would do while
idle costs nobody anything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice

from ..client import Request
from ..load.results import Figures, Objective, summarize
from .answers import Finding, check
from .peers.judge import Judge
from .peers.peer import Peer, Running, Setup
from .process import SystemFailed
from .scenarios import BASE, Scenario

Say = Callable[[str], None]
_CHECKED_TOKENS = 32
"""Of an answer: enough to tell models apart, and float32 takes its time."""
_CHECKED_REQUESTS = 4
"""At least, one after the other where there is one stream."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A system in a scenario.

    Attributes:
        reason: Why it has no figures, in words that begin with what kind of reason it is:
            unavailable, not offered, wrong or failed; None if it has.
        finding: Of the check of its answers; None without one.
        rounds: Its figures, by round.
    """

    reason: str | None
    finding: Finding | None
    rounds: Mapping[int, Figures]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that was found.

    Attributes:
        systems: In the order they took their turns; the first is ours.
        cells: By system and scenario.
        versions: By system.
        settings: By system.
    """

    systems: tuple[Peer, ...]
    scenarios: tuple[Scenario, ...]
    cells: Mapping[tuple[str, str], Cell]
    versions: Mapping[str, Mapping[str, object]]
    settings: Mapping[str, Mapping[str, object]]


def compare(
    systems: Sequence[Peer], scenarios: Sequence[Scenario], setup: Setup, rounds: int, say: Say
) -> Comparison:
    """Check, then measure.

    Raises:
        SystemFailed: The reference cannot be had, without which nothing is measured.
    """
    run = _Run(systems, scenarios, setup, say)
    with ExitStack() as stack:
        run.check(stack)
        for number in range(1, rounds + 1):
            run.measure(number, rounds)
        return run.result()


class _Run:
    """A comparison under way: who is running, and what is known so far."""

    def __init__(
        self, systems: Sequence[Peer], scenarios: Sequence[Scenario], setup: Setup, say: Say
    ) -> None:
        self._systems = systems
        self._scenarios = scenarios
        self._setup = setup
        self._say = say
        self._running: dict[str, Running] = {}
        pairs = [(peer, scenario.name) for peer in systems for scenario in scenarios]
        self._reasons = {
            (peer.name, name): f"not offered: {peer.lacks[name]}"
            for peer, name in pairs
            if name in peer.lacks
        }
        self._findings: dict[tuple[str, str], Finding] = {}
        self._rounds: dict[tuple[str, str], dict[int, Figures]] = {
            (peer.name, name): {} for peer, name in pairs
        }

    def check(self, stack: ExitStack) -> None:
        """Start every system, to end with ``stack``, and compare its answers with the reference's.

        Raises:
            SystemFailed: The reference cannot be had.
        """
        self._say("starting the reference: transformers and PEFT in float32")
        judge = Judge(self._setup)
        try:
            judge.freeze()
            for peer in self._systems:
                asked = [each for each in self._scenarios if self._asks(peer, each)]
                if asked and self._start(peer, asked, stack):
                    for scenario in asked:
                        self._say(f"checking the answers of {peer.name}: {scenario.title}")
                        self._check(peer, scenario, judge)
        finally:
            judge.end()

    def measure(self, number: int, rounds: int) -> None:
        """One round; every other one backwards, so that a machine that slows favours nobody."""
        systems = self._systems if number % 2 else tuple(reversed(self._systems))
        for scenario in self._scenarios:
            for peer in systems:
                if self._asks(peer, scenario):
                    self._say(f"round {number} of {rounds}, {scenario.title}: {peer.name}")
                    self._measure(peer, scenario, number)

    def result(self) -> Comparison:
        """What is known; of those that dropped out later, no figures."""
        running = self._running.items()
        return Comparison(
            systems=tuple(self._systems),
            scenarios=tuple(self._scenarios),
            cells={
                key: Cell(
                    reason := self._reasons.get(key),
                    self._findings.get(key),
                    rounds if reason is None else {},
                )
                for key, rounds in self._rounds.items()
            },
            versions={name: system.versions for name, system in running},
            settings={name: system.settings for name, system in running},
        )

    def _asks(self, peer: Peer, scenario: Scenario) -> bool:
        """Whether a system is still in the comparison of a scenario."""
        return (peer.name, scenario.name) not in self._reasons

    def _start(self, peer: Peer, asked: Sequence[Scenario], stack: ExitStack) -> bool:
        self._say(f"starting {peer.name}: {peer.about}")
        try:
            running = peer.start(self._setup)
        except SystemFailed as error:
            for scenario in asked:
                self._drop(peer, scenario, f"unavailable: {error}")
            return False
        stack.callback(running.end)
        running.freeze()
        self._running[peer.name] = running
        return True

    def _drop(self, peer: Peer, scenario: Scenario, reason: str) -> None:
        self._say(f"{peer.name} has no figures, {scenario.title}: {reason}")
        self._reasons[peer.name, scenario.name] = reason

    def _check(self, peer: Peer, scenario: Scenario, judge: Judge) -> None:
        requests, running = self._requests(scenario), self._running[peer.name]
        try:
            with _awake(running):
                answers = _answer(running, requests, scenario.streams)
        except SystemFailed as error:
            self._drop(peer, scenario, f"failed: {error}")
            return
        with _awake(judge):
            finding = check(judge, requests, answers, [BASE, *self._setup.material.adapters])
        self._findings[peer.name, scenario.name] = finding
        if finding.fault is not None:
            self._drop(peer, scenario, f"wrong: {finding.fault}")

    def _requests(self, scenario: Scenario) -> list[Request]:
        """One for each stream, or a few for one."""
        size = self._setup.size
        tokens = min(_CHECKED_TOKENS, size.output_tokens)
        size = replace(size, output_tokens=tokens, per_stream=_CHECKED_REQUESTS)
        planned = scenario.workload(size, "check").planned()
        count = max(_CHECKED_REQUESTS, scenario.streams)
        return [each.request for each in islice(planned, count)]

    def _measure(self, peer: Peer, scenario: Scenario, number: int) -> None:
        running = self._running[peer.name]
        try:
            with _awake(running):
                outcome = running.run(scenario, self._setup.size, f"round {number}")
        except SystemFailed as error:
            self._drop(peer, scenario, f"failed: {error}")
            return
        faults = [*outcome.warmup_errors, *(each.error for each in outcome.records if each.error)]
        if faults:
            reason = f"failed: {len(faults)} requests, the first: {faults[0]}"
            self._drop(peer, scenario, reason)
            return
        figures = summarize(outcome.records, outcome.seconds, Objective())
        self._rounds[peer.name, scenario.name][number] = figures


def _answer(running: Running, requests: Sequence[Request], streams: int) -> list[list[int]]:
    """So many in flight at a time."""
    batches = [requests[first : first + streams] for first in range(0, len(requests), streams)]
    return [answer for batch in batches for answer in running.answer(batch)]


@contextmanager
def _awake(running: Running | Judge) -> Iterator[None]:
    running.thaw()
    try:
        yield
    finally:
        running.freeze()
