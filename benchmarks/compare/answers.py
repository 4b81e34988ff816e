"""Whether a system's answers are those of the model that was asked for.

Greedy answers in bfloat16 leave the reference's sooner or later, at a token where two were all but
equal; so tokens are not compared. Instead the reference, in float32, reads the prompt with the
system's own answer behind it and tells the *gap* of every token: the log-probability of the token
it would have chosen there, less that of the token that is there. A system that computes the right
model picks the best token, or one that rounding put first: its gaps are 0 but for a few small ones.

The same answer is read under its rivals too: the base, the model of the batch's first request, the
neighbours'. It is a model's if its mean gap under that model is a third of that under every other,
or less. A scenario passes if no answer is another model's, nearly all are certainly of the model
asked for, and the gaps are those of bfloat16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from ..client import Request
from .scenarios import BASE

LARGEST_MEAN_GAP = 0.05
"""In nats, over all answers of a scenario: what bfloat16 may cost by this project's parity."""
_TIMES = 3.0
_LEAST_GAP = 0.01
"""Gaps below count as this much: a third of nothing proves nothing."""
_NOBODYS_GAP = 0.5
"""Mean gap of an answer from which it is no model's."""
_UNDECIDED_SHARE = 0.25


class Reference(Protocol):
    """Who knows what the models say."""

    def gaps(self, rows: Sequence[tuple[str, Request, list[int]]]) -> list[list[float]]:
        """Of the tokens of an answer to a request, read under a model; a list for each row."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a check.

    Attributes:
        fault: What is wrong; None if nothing is.
        mean_gap: In nats, over all tokens, under the models that were asked for; None without a
            reading.
        worst_gap: Of one token.
        rival_gap: The least mean gap of an answer under another model; None without a reading.
    """

    fault: str | None
    mean_gap: float | None
    worst_gap: float | None
    rival_gap: float | None


def check(
    reference: Reference,
    requests: Sequence[Request],
    answers: Sequence[list[int]],
    models: Sequence[str],
) -> Finding:
    """Judge the answers to requests that were in flight together.

    Args:
        reference: The judge.
        requests: In the order they were sent.
        answers: Token ids of each.
        models: All that are served: who an answer is from if it is not from who was asked.
    """
    fault = _length_fault(requests, answers)
    if fault is not None:
        return Finding(fault, None, None, None)
    pairs = [
        (row, model)
        for row, request in enumerate(requests)
        for model in (request.model, *_rivals(requests, row, models))
    ]
    gaps = _read(reference, requests, answers, pairs)
    means = {pair: fmean(each) for pair, each in gaps.items()}
    own = [gap for row, request in enumerate(requests) for gap in gaps[row, request.model]]
    rivals = [mean for (row, model), mean in means.items() if model != requests[row].model]
    wrong = [row for row in range(len(requests)) if _is_wrong(requests[row].model, _of(means, row))]
    if wrong:
        fault = _wrong(reference, requests, answers, models, wrong)
    else:
        fault = _doubt(requests, means) or _imprecision(fmean(own))
    return Finding(fault, round(fmean(own), 4), max(own), round(min(rivals), 4))


def _of(means: Mapping[tuple[int, str], float], row: int) -> dict[str, float]:
    """A request's mean gaps by model."""
    return {model: mean for (other, model), mean in means.items() if other == row}


def _is_wrong(asked: str, means: Mapping[str, float]) -> bool:
    """Whether an answer is certainly not the model's that was asked for."""
    owner = _owner(means)
    return means[asked] > _NOBODYS_GAP if owner is None else owner != asked


def _owner(means: Mapping[str, float]) -> str | None:
    """Whose answer it is; None if that cannot be told."""
    best, second = sorted(means, key=lambda model: means[model])[:2]
    certain = means[second] >= _TIMES * max(means[best], _LEAST_GAP)
    return best if certain else None


def _doubt(requests: Sequence[Request], means: Mapping[tuple[int, str], float]) -> str | None:
    undecided = [row for row in range(len(requests)) if _owner(_of(means, row)) is None]
    if len(undecided) <= _UNDECIDED_SHARE * len(requests):
        return None
    return (
        f"whose {len(undecided)} of {len(requests)} answers are cannot be told, such as that of"
        f" request {undecided[0]}, for {requests[undecided[0]].model}"
    )


def _imprecision(mean: float) -> str | None:
    if mean <= LARGEST_MEAN_GAP:
        return None
    return f"its tokens are {mean:.3f} nats less likely than the best ones on average"


def _length_fault(requests: Sequence[Request], answers: Sequence[list[int]]) -> str | None:
    for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if len(answer) != request.output_tokens:
            return f"request {row}: {len(answer)} tokens instead of {request.output_tokens}"
    return None


def _rivals(requests: Sequence[Request], row: int, models: Sequence[str]) -> list[str]:
    """Models that a mistake would most likely take: the base, the batch's first, neighbours'."""
    own = requests[row].model
    near = [requests[other % len(requests)].model for other in (0, row - 1, row + 1)]
    likely = [model for model in dict.fromkeys([BASE, *near]) if model != own]
    others = [model for model in models if model not in (own, *likely)]
    return likely if len(likely) > 1 else likely + others[:1]


def _read(
    reference: Reference,
    requests: Sequence[Request],
    answers: Sequence[list[int]],
    pairs: Sequence[tuple[int, str]],
) -> Mapping[tuple[int, str], list[float]]:
    """Gaps of rows under models; rows of a model one after the other, as the reference likes it."""
    ordered = sorted(pairs, key=lambda pair: pair[1])
    rows = [(model, requests[row], answers[row]) for row, model in ordered]
    return dict(zip(ordered, reference.gaps(rows), strict=True))


def _wrong(
    reference: Reference,
    requests: Sequence[Request],
    answers: Sequence[list[int]],
    models: Sequence[str],
    wrong: Sequence[int],
) -> str:
    """How many answers are wrong, and whose the first of them is."""
    row = wrong[0]
    gaps = _read(reference, requests, answers, [(row, model) for model in models])
    means = {model: fmean(each) for (_, model), each in gaps.items()}
    owner, asked = _owner(means), requests[row].model
    whose = "no model here" if owner in (None, asked) else owner
    return (
        f"{len(wrong)} of {len(requests)} answers are not the model's that was asked for; request"
        f" {row}, for {asked}, was answered as {whose} ({means[asked]:.2f} nats a token from"
        f" {asked}, {min(means.values()):.2f} from {min(means, key=lambda model: means[model])})"
    )
