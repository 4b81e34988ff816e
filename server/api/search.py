"""More candidates than answers: the best of them, and what beam search finds in the engine."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from ..engine.errors import EngineDied
from ..generation import AdapterWeight, BeamAnswer, FinishReason, SequenceUpdate
from ..metrics.request import RequestRecord
from .choice import Choice, ChoiceDelta, ChoiceText
from .state import AppState

if TYPE_CHECKING:
    from .generate import Gathered


async def stream_beams(
    choices: Sequence[Choice],
    adapters: list[AdapterWeight],
    record: RequestRecord,
    state: AppState,
) -> AsyncGenerator[ChoiceDelta, None]:
    """Search for the answers of one prompt, all of which come at the end.

    Raises:
        EngineError: As ``EnginePort.generate``.
        ApiError: As ``ChoiceText.take``.
    """
    request = msgspec.structs.replace(choices[0].request, adapters=adapters)
    with state.metrics.sequence(
        record, [each.adapter_id for each in adapters], len(request.prompt_token_ids)
    ) as sequence:
        last: SequenceUpdate | None = None
        async with aclosing(state.engine.generate(request)) as updates:
            async for last in updates:
                if last.finish_reason is not None:
                    break
        if last is None or last.finish_reason is None:
            raise EngineDied("The engine ended a request without a reason.")
        shown = [_delta(choice, place, last, state) for place, choice in enumerate(choices)]
        deltas = [each for each in shown if each is not None]
        sequence.tokens(sum(len(each.token_ids) for each in deltas), last.scheduled)
        sequence.finish(last.finish_reason.value)
    for delta in deltas:
        yield delta


def _delta(choice: Choice, place: int, last: SequenceUpdate, state: AppState) -> ChoiceDelta | None:
    """The whole of one answer, as a choice of its own would end; what is no answer raises."""
    text = ChoiceText(choice, state.tokenizer)
    if not last.beams:
        return text.take(last)
    return text.take(_as_update(last, last.beams[place], choice.num_logprobs or 0))


def _as_update(last: SequenceUpdate, answer: BeamAnswer, num_logprobs: int) -> SequenceUpdate:
    ends = answer.finish_reason is FinishReason.STOP
    return SequenceUpdate(
        request_id=last.request_id,
        token_ids=[token.token_id for token in answer.tokens],
        logprobs=[
            msgspec.structs.replace(token, top=token.top[:num_logprobs]) for token in answer.tokens
        ],
        num_cached_tokens=last.num_cached_tokens,
        finish_reason=answer.finish_reason,
        stop_token_id=answer.tokens[-1].token_id if ends else None,
    )


def best_answers(candidates: "list[Gathered]", per_prompt: int, n: int) -> "list[Gathered]":
    """Of each prompt's candidates the n with the highest log-probability per token, renumbered."""
    if per_prompt == n:
        return candidates
    best: list[Gathered] = []
    for first in range(0, len(candidates), per_prompt):
        of_prompt = sorted(candidates[first : first + per_prompt], key=_mean, reverse=True)
        best += [replace(each, index=len(best) + rank) for rank, each in enumerate(of_prompt[:n])]
    return best


def _mean(candidate: "Gathered") -> float:
    scored = [one.logprobs.logprob for one in candidate.scored if one.logprobs is not None]
    return sum(scored) / len(scored) if scored else float("-inf")
