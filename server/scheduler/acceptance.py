"""What a sequence must be to run at all, checked before it is queued."""

from .errors import SequenceRefused, SequenceTooLong
from .limits import SchedulerLimits
from .sequence import Sequence


def check_can_run(sequence: Sequence, limits: SchedulerLimits, longest: int) -> None:
    """Check a sequence of which at most ``longest`` tokens fit.

    Raises:
        SequenceTooLong: Its tokens leave no room for another.
        SequenceRefused: It has no prompt, nothing left to generate, more beams than sequences may
            run, or tokens that the model does not have.
    """
    request, beams = sequence.request, sequence.sampling.beams
    if beams is not None and beams.width > limits.max_num_seqs:
        raise SequenceRefused(
            f"{beams.width} beams are more than the {limits.max_num_seqs} sequences that run at"
            " once: ask for fewer (or serve with a larger --max-num-seqs)"
        )
    if not request.prompt_token_ids:
        raise SequenceRefused("the prompt is empty: send at least one token")
    if sequence.num_output_tokens >= request.sampling.max_tokens:
        raise SequenceRefused(
            f"nothing is left to generate: {sequence.num_output_tokens} tokens are there and"
            f" max_tokens is {request.sampling.max_tokens}"
        )
    if len(sequence.token_ids) >= longest:
        prefix = sequence.adapters.prefix
        beside = "" if prefix is None else f" beside the adapter's prefix of {prefix.length}"
        raise SequenceTooLong(
            f"the sequence has {len(sequence.token_ids)} tokens, but this server holds at most"
            f" {longest} tokens of prompt and output{beside}: shorten the prompt (or serve with"
            " a larger --max-model-len or --memory-budget)"
        )
    _check_token_ids(sequence, limits.vocab_size)


def _check_token_ids(sequence: Sequence, vocab_size: int) -> None:
    """One id outside the tables of the model would end the step for everybody in it."""
    sampling = sequence.sampling
    for what, ids in (
        ("prompt or output", sequence.token_ids),
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
        ("end_token_ids", sampling.end_token_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
            raise SequenceRefused(
                f"{what}: there is no token {wrong}, the model's ids are 0 to {vocab_size - 1}"
            )
