"""What one step means for one sequence: its new token, whether that ends it, and what to report."""

from ..generation import FinishReason, SequenceUpdate, TokenLogprobs
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


def outcome(item: ScheduledSequence, result: SequenceResult, max_len: int) -> SequenceUpdate | None:
    """Append the new token, and say what there is to report; None if nothing.

    A sequence ends, in this order, with ERROR if its row is unusable, STOP at an end or stop token
    after at least ``min_tokens`` tokens, LENGTH at ``max_tokens`` or at ``max_len`` tokens in all.

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
    prompt_logprobs = _new_prompt_logprobs(item, result)
    if result.token_id is None:
        return _prompt_update(sequence, prompt_logprobs)
    sequence.token_ids.append(result.token_id)
    finish_reason = _finish_reason(sequence, result.token_id, max_len)
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        token_ids=[result.token_id],
        logprobs=[] if result.logprobs is None else [result.logprobs],
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=sequence.num_cached_tokens,
        finish_reason=finish_reason,
        stop_token_id=result.token_id if finish_reason is FinishReason.STOP else None,
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


def _finish_reason(sequence: Sequence, token_id: int, max_len: int) -> FinishReason | None:
    sampling = sequence.sampling
    num_output = sequence.num_output_tokens
    ends = token_id in sampling.end_token_ids or token_id in sampling.stop_token_ids
    if ends and num_output > sampling.min_tokens:
        return FinishReason.STOP
    if num_output >= sampling.max_tokens or len(sequence.token_ids) >= max_len:
        return FinishReason.LENGTH
    return None
