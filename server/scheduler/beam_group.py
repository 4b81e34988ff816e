"""Beam search: which continuations of a request's beams go on, and which are among its answers.

The rules are those of transformers with ``early_stopping=False``. The continuations of all beams by
one token are ordered by ``s``, the sum of log-probabilities of the whole output, whose length is
``n``. One of the first ``width`` that ends is an answer with the score ``s / n ** length_penalty``,
of which the best ``width`` are kept; the first ``width`` that do not end are the next beams. The
search is over when the best beam, had it ended now, would not be better than the worst of ``width``
answers, or when the output may not be longer.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

from ..generation import BeamAnswer, BeamSearch, FinishReason, TokenLogprobs
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Continuation:
    """One more token of a beam.

    Attributes:
        parent: The beam's number in its group.
        token: What is appended, and its log-probability.
        total: The sum of log-probabilities of the output with it.
        ends: Whether the token ends the output.
    """

    parent: int
    token: TokenLogprobs
    total: float
    ends: bool


class BeamGroup:
    """The beams of one request; a single one until its prompt is computed.

    Attributes:
        search: What was asked for.
        beams: Sequences of equal length that all run or wait; the scheduler forks them.
    """

    def __init__(self, search: BeamSearch, root: Sequence) -> None:
        """Start with the prompt alone."""
        self.search = search
        self.beams = [root]
        self._totals = [0.0]
        self._tokens: list[tuple[TokenLogprobs, ...]] = [()]
        self._answers: list[BeamAnswer] = []
        self._num_made = 1

    @property
    def is_forked(self) -> bool:
        """Whether there are as many beams as there will be."""
        return bool(self._tokens[0])

    @property
    def is_ready(self) -> bool:
        """Whether each beam lacks its last token alone: they go on together or not at all."""
        return all(beam.num_uncomputed_tokens == 1 for beam in self.beams)

    def choose(self, rows: Seq[TokenLogprobs], max_output: int) -> list[Continuation]:
        """The next beams, by the likeliest tokens of each; none when the search is over.

        ``max_output`` is what the output may have at most, in tokens.
        """
        found = sorted(self._continuations(rows), key=attrgetter("total"), reverse=True)
        length = len(self._tokens[0]) + 1
        is_last = length >= max_output
        for each in found[: self.search.width]:
            if each.ends or is_last:
                self._answer(each, length)
        going_on = [each for each in found if not each.ends][: self.search.width]
        if is_last or not going_on or self._cannot_improve(going_on[0], length):
            return []
        self._tokens = [(*self._tokens[each.parent], each.token) for each in going_on]
        self._totals = [each.total for each in going_on]
        return going_on

    def child(self, parent: Sequence) -> Sequence:
        """Another beam with the parent's tokens, and nothing else of it."""
        child = Sequence(
            parent.request, parent.adapters, parent.arrival, group=self, number=self._num_made
        )
        self._num_made += 1
        child.token_ids, child.max_len = list(parent.token_ids), parent.max_len
        child.num_cached_tokens = parent.num_cached_tokens
        child.num_preemptions = parent.num_preemptions
        return child

    def answers(self) -> list[BeamAnswer]:
        """The best, best first."""
        return self._answers[: self.search.num_answers]

    def _continuations(self, rows: Seq[TokenLogprobs]) -> Iterator[Continuation]:
        sampling = self.beams[0].sampling
        ending = {*sampling.end_token_ids, *sampling.stop_token_ids}
        for parent, (row, total) in enumerate(zip(rows, self._totals, strict=True)):
            for rank, (token_id, logprob) in enumerate(row.top, 1):
                token = TokenLogprobs(token_id, logprob, rank, row.top)
                yield Continuation(parent, token, total + logprob, token_id in ending)

    def _answer(self, last: Continuation, length: int) -> None:
        answer = BeamAnswer(
            tokens=[*self._tokens[last.parent], last.token],
            score=self._score(last.total, length),
            finish_reason=FinishReason.STOP if last.ends else FinishReason.LENGTH,
        )
        self._answers.append(answer)
        self._answers.sort(key=attrgetter("score"), reverse=True)
        del self._answers[self.search.width :]

    def _cannot_improve(self, best: Continuation, length: int) -> bool:
        full = len(self._answers) == self.search.width
        return full and self._score(best.total, length) <= self._answers[-1].score

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self.search.length_penalty)


def beams_of(sequence: Sequence) -> Seq[Sequence]:
    """All sequences of its request: itself, or all beams where it is one of a search."""
    return [sequence] if sequence.group is None else sequence.group.beams


def rows_of(sequence: Sequence) -> int:
    """Rows of a step that are kept for it: those of all beams for a search that is yet to fork."""
    group = sequence.group
    return 1 if group is None or group.is_forked else group.search.width
