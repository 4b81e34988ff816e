"""Admits waiting sequences to a step: whose turn it is, and what happens to those without room."""

from collections.abc import Callable
from dataclasses import dataclass

from .room import Lack, RoomSharing
from .running import RunningSequences
from .sequence import Sequence
from .step import Step
from .turns import Turns


@dataclass(frozen=True, slots=True)
class Admission:
    """One pass over those who wait.

    Attributes:
        step: Where those who are admitted run.
        turns: Who is next.
        room: Who makes room for whom.
        running: What runs.
        max_overtakes: Steps in which a sequence that lacks room for its adapters may be overtaken.
        try_to_start: Starts a sequence, or says what it lacks.
        preempt: Takes a sequence off the device, and out of the step.
        give_up: Ends a sequence that can never run.
    """

    step: Step
    turns: Turns
    room: RoomSharing
    running: RunningSequences
    max_overtakes: int
    try_to_start: Callable[[Sequence], Lack | None]
    preempt: Callable[[Sequence], None]
    give_up: Callable[[Sequence], None]

    def run(self) -> None:
        """Admit all who may run now."""
        goes_on = True
        while goes_on and self.step.budget > 0:
            sequence = self.turns.next()
            goes_on = sequence is not None and self._admit_or_pass(sequence)
        self.turns.close()

    def _admit_or_pass(self, sequence: Sequence) -> bool:
        """Admit the sequence, or say whose turn it is instead; False if it is nobody's."""
        if self.step.room(sequence) <= 0 or self.room.is_claimed_from(sequence):
            self.turns.set_aside(sequence.tenant)
            return True
        lack = self._start_or_make_room(sequence)
        match lack:
            case None:
                self.turns.admitted(sequence)
            case Lack.ADAPTERS:
                return self._pass_for_adapters(sequence)
            case _:
                self.turns.hold_back(sequence)
        return True

    def _start_or_make_room(self, sequence: Sequence) -> Lack | None:
        """Start the sequence, if need be in the place of others; what it lacks if that fails."""
        lack = self.try_to_start(sequence)
        while lack is not None and (victim := self.room.victim(sequence, lack, self.step)):
            self.turns.set_aside(victim.tenant)
            self.preempt(victim)
            lack = self.try_to_start(sequence)
        return lack

    def _pass_for_adapters(self, sequence: Sequence) -> bool:
        """Who is next, where the adapters of a sequence get no room; False for nobody."""
        runs = self.running.runs(sequence.tenant)
        if not self.running:
            self.give_up(sequence)
            self.turns.pass_over(sequence)
        elif sequence.num_overtaken < self.max_overtakes:
            self.turns.pass_over(sequence, hangs=not runs)
        elif runs:
            self.turns.set_aside(sequence.tenant)
        else:
            return False
        return True
