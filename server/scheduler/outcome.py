"""What one step means for one sequence: its new token, whether that ends it, and what to report."""

from ..generation import BeamAnswer, FinishReason, SequenceUpdate, TokenLogprobs
from .plan import ScheduledSequence, SequenceResult
from .sequence import Sequence


def failed(sequence: Sequence, error: str) -> SequenceUpdate:
    """The update that ends the sequence with ``error``."""
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        num_cached_tokens=sequence.num_cached_tokens,
        finish_reason=FinishReason.ERROR,
        error=error,
    )


def found(sequence: Sequence, answers: list[BeamAnswer]) -> SequenceUpdate:
    """The update that ends a search with what it found."""
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        num_cached_tokens=sequence.num_cached_tokens,
        finish_reason=answers[0].finish_reason,
        beams=answers,
    )


def outcome(item: ScheduledSequence, result: SequenceResult) -> SequenceUpdate | None:
    """Append the new token, and say what there is to report; None if nothing.

    One that embeds ends with its hidden state. Another ends, in this order, with ERROR if its row
    is unusable, STOP at an end or stop token after at least ``min_tokens`` tokens or where its
    grammar allows no more, LENGTH at ``max_tokens`` or at its ``max_len`` tokens in all.

    Raises:
        ValueError: The result has a token where none was to be sampled, or none where one was.
    """
    sequence = item.sequence
    if result.error is not None:
        return failed(sequence, result.error)
    if (result.token_id is not None) != item.samples:
        raise ValueError(
            f"{sequence.request.request_id}: samples is {item.samples} but the runner returned"
            f" token {result.token_id}"
        )
    if item.embeds:
        return _embedded(sequence, result)
    prompt_logprobs = _new_prompt_logprobs(item, result)
    if result.token_id is None:
        return _prompt_update(sequence, prompt_logprobs)
    sequence.token_ids.append(result.token_id)
    stops = _is_stop_token(sequence, result.token_id)
    matcher = sequence.matcher
    if matcher is not None and not stops and not matcher.accept(result.token_id):
        return failed(sequence, matcher.error or "its output does not match its grammar")
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        token_ids=[result.token_id],
        logprobs=[] if result.logprobs is None else [result.logprobs],
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=sequence.num_cached_tokens,
        finish_reason=FinishReason.STOP if stops else _finish_reason(sequence),
        stop_token_id=result.token_id if stops else None,
    )


def _embedded(sequence: Sequence, result: SequenceResult) -> SequenceUpdate:
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        num_cached_tokens=sequence.num_cached_tokens,
        finish_reason=FinishReason.STOP,
        hidden=result.hidden,
    )


def _new_prompt_logprobs(item: ScheduledSequence, result: SequenceResult) -> list[TokenLogprobs]:
    """Those not sent yet: a preempted sequence computes some of them a second time."""
    if not result.prompt_logprobs:
        return []
    sequence = item.sequence
    # Number k of all (from 0) belongs to prompt token k + 1, and comes from row k.
    new = list(result.prompt_logprobs[sequence.num_prompt_logprobs - item.start :])
    sequence.num_prompt_logprobs += len(new)
    return new


def _prompt_update(
    sequence: Sequence, prompt_logprobs: list[TokenLogprobs]
) -> SequenceUpdate | None:
    if not prompt_logprobs:
        return None
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=sequence.num_cached_tokens,
    )


def _is_stop_token(sequence: Sequence, token_id: int) -> bool:
    """Whether it ends the sequence; a grammar that allows nothing else overrules ``min_tokens``."""
    sampling, matcher = sequence.sampling, sequence.matcher
    if matcher is not None and token_id in matcher.end_token_ids:
        return True
    ends = token_id in sampling.end_token_ids or token_id in sampling.stop_token_ids
    return ends and sequence.num_output_tokens > sampling.min_tokens


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    """Why it ends with a token that is no end or stop token; None if it goes on."""
    if sequence.matcher is not None and sequence.matcher.is_complete:
        return FinishReason.STOP
    num_output = sequence.num_output_tokens
    if num_output >= sequence.sampling.max_tokens or len(sequence.token_ids) >= sequence.max_len:
        return FinishReason.LENGTH
    return None
