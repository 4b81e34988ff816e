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


class _Book:
    """What is known so far."""

    def __init__(self, systems: Sequence[Peer], scenarios: Sequence[Scenario]) -> None:
        names = [scenario.name for scenario in scenarios]
        self.reasons = {
            (peer.name, name): f"not offered: {peer.lacks[name]}"
            for peer in systems
            for name in names
            if name in peer.lacks
        }
        self.findings: dict[tuple[str, str], Finding] = {}
        self.figures: dict[tuple[str, str], dict[int, Figures]] = {
            (peer.name, name): {} for peer in systems for name in names
        }
        self.running: dict[str, Running] = {}

    def open(self, peer: Peer, scenario: Scenario) -> bool:
        """Whether a system is still asked for a scenario."""
        return (peer.name, scenario.name) not in self.reasons

    def strike(self, name: str, scenarios: Sequence[Scenario], reason: str) -> None:
        """Ask a system for these no more, where there is no reason already."""
        for scenario in scenarios:
            self.reasons.setdefault((name, scenario.name), reason)

    def cells(self) -> dict[tuple[str, str], Cell]:
        return {
            key: Cell(
                self.reasons.get(key), self.findings.get(key), {} if key in self.reasons else rounds
            )
            for key, rounds in self.figures.items()
        }


def compare(
    systems: Sequence[Peer], scenarios: Sequence[Scenario], setup: Setup, rounds: int, say: Say
) -> Comparison:
    """Check, then measure.

    Raises:
        SystemFailed: The reference cannot be had, without which nothing is measured.
    """
    book = _Book(systems, scenarios)
    with ExitStack() as stack:
        _check_all(systems, scenarios, setup, book, stack, say)
        for number in range(1, rounds + 1):
            for scenario in scenarios:
                for peer in _in_turn(systems, number):
                    if book.open(peer, scenario):
                        say(f"round {number} of {rounds}, {scenario.title}: {peer.name}")
                        _measure(peer, scenario, setup, book, number)
        return Comparison(
            systems=tuple(systems),
            scenarios=tuple(scenarios),
            cells=book.cells(),
            versions={name: running.versions for name, running in book.running.items()},
            settings={name: running.settings for name, running in book.running.items()},
        )


def _in_turn(systems: Sequence[Peer], number: int) -> Sequence[Peer]:
    """Forwards and backwards, so that a machine that slows down favours nobody."""
    return systems if number % 2 else tuple(reversed(systems))


def _check_all(
    systems: Sequence[Peer],
    scenarios: Sequence[Scenario],
    setup: Setup,
    book: _Book,
    stack: ExitStack,
    say: Say,
) -> None:
    """Start every system and compare its answers with the reference's."""
    say("starting the reference: transformers and PEFT in float32")
    judge = Judge(setup)
    try:
        judge.freeze()
        for peer in systems:
            asked = [scenario for scenario in scenarios if book.open(peer, scenario)]
            if asked and _start(peer, asked, setup, book, stack, say):
                for scenario in asked:
                    say(f"checking the answers of {peer.name}: {scenario.title}")
                    _check(peer, scenario, setup, book, judge)
    finally:
        judge.end()


def _start(
    peer: Peer,
    asked: Sequence[Scenario],
    setup: Setup,
    book: _Book,
    stack: ExitStack,
    say: Say,
) -> bool:
    say(f"starting {peer.name}: {peer.about}")
    try:
        running = peer.start(setup)
    except SystemFailed as error:
        say(f"{peer.name} is not available: {error}")
        book.strike(peer.name, asked, f"unavailable: {error}")
        return False
    stack.callback(running.end)
    running.freeze()
    book.running[peer.name] = running
    return True


def _check(peer: Peer, scenario: Scenario, setup: Setup, book: _Book, judge: Judge) -> None:
    if not book.open(peer, scenario):
        return
    requests = _requests(scenario, setup)
    running = book.running[peer.name]
    try:
        with _awake(running):
            answers = [
                answer
                for batch in _batches(requests, scenario.streams)
                for answer in running.answer(batch)
            ]
    except SystemFailed as error:
        book.strike(peer.name, [scenario], f"failed: {error}")
        return
    with _awake(judge):
        finding = check(judge, requests, answers, [BASE, *setup.material.adapters])
    book.findings[peer.name, scenario.name] = finding
    if finding.fault is not None:
        book.strike(peer.name, [scenario], f"wrong: {finding.fault}")


def _requests(scenario: Scenario, setup: Setup) -> list[Request]:
    """One for each stream, or a few for one."""
    tokens = min(_CHECKED_TOKENS, setup.size.output_tokens)
    size = replace(setup.size, output_tokens=tokens, per_stream=_CHECKED_REQUESTS)
    planned = scenario.workload(size, "check").planned()
    count = max(_CHECKED_REQUESTS, scenario.streams)
    return [each.request for each in islice(planned, count)]


def _batches(requests: Sequence[Request], streams: int) -> Iterator[Sequence[Request]]:
    return (requests[first : first + streams] for first in range(0, len(requests), streams))


def _measure(peer: Peer, scenario: Scenario, setup: Setup, book: _Book, number: int) -> None:
    running = book.running[peer.name]
    try:
        with _awake(running):
            outcome = running.run(scenario, setup.size, f"round {number}")
    except SystemFailed as error:
        book.strike(peer.name, [scenario], f"failed: {error}")
        return
    faults = [*outcome.warmup_errors, *(each.error for each in outcome.records if each.error)]
    if faults:
        reason = f"failed: {len(faults)} requests, the first: {faults[0]}"
        book.strike(peer.name, [scenario], reason)
        return
    figures = summarize(outcome.records, outcome.seconds, Objective())
    book.figures[peer.name, scenario.name][number] = figures


@contextmanager
def _awake(running: Running | Judge) -> Iterator[None]:
    running.thaw()
    try:
        yield
    finally:
        running.freeze()
