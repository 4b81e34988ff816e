"""Chooses one token per row of logits.

Order of operations, per row, as in vLLM: log-probabilities are read from the raw logits; then logit
bias, penalties, the masks of early end tokens and of what a grammar excludes; greedy rows take the
largest logit; the others are divided by the temperature and filtered by min_p, top_k and top_p. The
draw inverts the distribution function in vocabulary order at a number that depends on (seed, index
of the token) alone, so that a row does not depend on its neighbours and tiny differences of
rounding almost never move it.

All of it happens on the device, whose results come to the host in one copy. Only a row whose
nucleus is larger than the tokens that are looked at first is drawn once more afterwards.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.largest.op import Largest
from ...kernels.largest.reference import largest as reference_largest
from ..generation import SamplingParams, TokenLogprobs
from ..scheduler.sequence import Sequence
from .filters import Filters, filtered, invert, place_filters, uniforms
from .masks import exclude_tokens
from .reports import logprobs_of, pack_report, report_logprobs, unpack_report
from .stage import HostStage, Stage

_NUCLEUS_HEAD = 1024
"""Tokens looked at first for top_p; a nucleus larger than this is rare and costs a full sort."""

_GREEDY_BELOW = 1e-5
"""Temperatures up to this are greedy, as in vLLM: dividing by them would overflow."""


class Choice(NamedTuple):
    """What was chosen for a row: a token, or the reason there can be none."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens on the device.

    Attributes:
        token_ids: (rows,) int32, -1 where a row is not usable: it has a NaN or +inf, or no token
            that is not masked.
        random: The n rows that were drawn at random.
        unsure: (n,) bool: the row must be drawn again from its whole vocabulary; None where n is 0.
    """

    token_ids: Tensor
    random: Seq[int]
    unsure: Tensor | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's choices, on their way to the host.

    Attributes:
        edited: (rows, vocab) float32, the logits that were drawn from.
        random: The rows that were drawn at random.
        reporting: The n rows that report log-probabilities.
        raw: (n, vocab), the logits of these as they were.
        packed: (numbers,) int32, what was drawn and what is reported of it, as one tensor.
    """

    edited: Tensor
    random: Seq[int]
    reporting: Seq[int]
    raw: Tensor
    packed: Tensor


@dataclass(frozen=True, slots=True)
class _Draws:
    """What n rows are drawn with.

    Attributes:
        numbers: (n,) float64, where the distribution functions are inverted.
        temperature: (n,) float32.
        filters: What is left of the distributions.
    """

    numbers: Tensor
    temperature: Tensor
    filters: Filters


def sample(
    logits: Tensor,
    sequences: Seq[Sequence],
    stage: Stage | None = None,
    largest: Largest = reference_largest,
) -> list[Choice]:
    """One token per row.

    Args:
        logits: (rows, vocab) float32; changed in place.
        sequences: The sequence of each row.
        stage: Brings parameters to the device; none is needed where that is the host's memory.
        largest: The device's operation.

    Returns:
        A choice per row; a row whose logits hold NaN or +inf has an error instead of a token.
    """
    way = HostStage() if stage is None else stage
    return read_choices(start_sampling(logits, sequences, way, largest), sequences, way)


def start_sampling(
    logits: Tensor, sequences: Seq[Sequence], stage: Stage, largest: Largest
) -> Sampled:
    """Draw on the device: nothing here waits for it."""
    reporting = [row for row, each in enumerate(sequences) if each.sampling.logprobs is not None]
    reported = _index(reporting, stage) if reporting else None
    raw = logits[:0] if reported is None else logits[reported]
    edit_logits(logits, sequences, stage)
    drawn = _draw(logits, sequences, stage, largest)
    packed = [drawn.token_ids]
    if drawn.unsure is not None:
        packed.append(drawn.unsure.int())
    if reported is not None:
        num_top = _most_asked(reporting, sequences)
        # What is reported of a row that is not usable is not read, but must be of a token.
        chosen = drawn.token_ids[reported].clamp(min=0).long()
        packed.append(pack_report(logprobs_of(raw, chosen, num_top)))
    one = packed[0] if len(packed) == 1 else torch.cat(packed)
    return Sampled(logits, drawn.random, reporting, raw, one)


def read_choices(sampled: Sampled, sequences: Seq[Sequence], stage: Stage) -> list[Choice]:
    """Wait for the device and take the choices from it: the one copy of a step."""
    packed, num_rows, num_random = sampled.packed.cpu(), len(sequences), len(sampled.random)
    numbers = packed.tolist()
    token_ids, unsure = numbers[:num_rows], numbers[num_rows : num_rows + num_random]
    again = [row for row, is_so in zip(sampled.random, unsure, strict=True) if is_so]
    reports: list[TokenLogprobs] = []
    if sampled.reporting:
        reported = packed[num_rows + num_random :].numpy()
        reports = unpack_report(reported, len(sampled.reporting))
    if again:
        _draw_again(again, sampled, sequences, stage, token_ids, reports)
    by_row = dict(zip(sampled.reporting, reports, strict=True))
    return [
        Choice(None, None, _why_unusable(sequence))
        if token_id < 0
        else Choice(token_id, _cut(by_row.get(row), sequence.sampling.logprobs))
        for row, (token_id, sequence) in enumerate(zip(token_ids, sequences, strict=True))
    ]


def _index(rows: Seq[int], stage: Stage) -> Tensor:
    """These on the device, with all that was placed before them."""
    index = stage.place(np.array(rows, dtype=np.int64))
    stage.flush()
    return index


def _why_unusable(sequence: Sequence) -> str:
    if sequence.matcher is not None and sequence.matcher.error is not None:
        return sequence.matcher.error
    return "no token can be chosen: the logits of this request are not finite"


def _most_asked(reporting: Seq[int], sequences: Seq[Sequence]) -> int:
    return max((sequences[row].sampling.logprobs or 0 for row in reporting), default=0)


def _cut(report: TokenLogprobs | None, num_top: int | None) -> TokenLogprobs | None:
    """As many alternatives as the row asked for: its neighbours may have asked for more."""
    if report is None or num_top is None:
        return None
    return TokenLogprobs(report.token_id, report.logprob, report.rank, report.top[:num_top])


def _draw_again(
    rows: Seq[int],
    sampled: Sampled,
    sequences: Seq[Sequence],
    stage: Stage,
    token_ids: list[int],
    reports: list[TokenLogprobs],
) -> None:
    """Replace the tokens of these rows by draws from their whole vocabulary, and their reports."""
    vocab = sampled.edited.shape[1]
    draws = _place_draws([sequences[row] for row in rows], vocab, stage)
    edited = sampled.edited[_index(rows, stage)]
    drawn, _ = _draw_at_random(edited, draws, vocab)
    for row, token_id in zip(rows, drawn.tolist(), strict=True):
        token_ids[row] = token_id
    places = [place for place, row in enumerate(sampled.reporting) if row in set(rows)]
    chosen = [token_ids[sampled.reporting[place]] for place in places]
    num_top = _most_asked(sampled.reporting, sequences)
    raw = sampled.raw[_index(places, stage)]
    for place, report in zip(places, report_logprobs(raw, chosen, num_top, stage), strict=True):
        reports[place] = report


def edit_logits(logits: Tensor, sequences: Seq[Sequence], stage: Stage | None = None) -> None:
    """Apply logit bias, penalties and masks to (rows, vocab) in place."""
    edited = [(row, each) for row, each in enumerate(sequences) if _is_edited(each)]
    if not edited:
        return
    way = HostStage() if stage is None else stage
    vocab, flat = logits.shape[1], logits.view(-1)
    biases = {
        row * vocab + token_id: bias
        for row, sequence in edited
        for token_id, bias in sequence.sampling.logit_bias.items()
    }
    if biases:
        index = way.place(np.array(list(biases), dtype=np.int64))
        values = way.place(np.array(list(biases.values()), dtype=np.float32))
        way.flush()
        flat.index_add_(0, index, values)
    for row, sequence in edited:
        if _has_penalties(sequence.sampling):
            _penalize(logits[row], sequence, way)
    exclude_tokens(logits, sequences, way)
    masked = [
        row * vocab + token_id
        for row, sequence in edited
        if _is_too_early(sequence)
        for token_id in (*sequence.sampling.end_token_ids, *sequence.sampling.stop_token_ids)
    ]
    if masked:
        index = way.place(np.array(masked, dtype=np.int64))
        way.flush()
        flat.index_fill_(0, index, float("-inf"))


def _is_edited(sequence: Sequence) -> bool:
    params = sequence.sampling
    return (
        sequence.matcher is not None
        or params.min_tokens > 0
        or bool(params.logit_bias)
        or _has_penalties(params)
    )


def _is_too_early(sequence: Sequence) -> bool:
    """Whether it may not end yet; a grammar that allows nothing else lets it."""
    must_end = sequence.matcher is not None and sequence.matcher.must_end
    return sequence.num_output_tokens < sequence.sampling.min_tokens and not must_end


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _penalize(row: Tensor, sequence: Sequence, stage: Stage) -> None:
    """Repetition over prompt and output, presence and frequency over the output, row (vocab,)."""
    params = sequence.sampling
    token_ids = stage.place(np.array(sequence.token_ids, dtype=np.int64))
    stage.flush()
    if params.repetition_penalty != 1.0:
        # Reads come before writes, so a token seen twice is still penalised once.
        values, penalty = row[token_ids], params.repetition_penalty
        row[token_ids] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        output = token_ids[sequence.prompt_len :]
        times = torch.zeros_like(row).index_add_(
            0, output, torch.ones_like(output, dtype=row.dtype)
        )
        row -= params.presence_penalty * times.clamp(max=1) + params.frequency_penalty * times


def _draw(logits: Tensor, sequences: Seq[Sequence], stage: Stage, largest: Largest) -> Drawn:
    """A token of each row: the largest logit, or at random."""
    # Edits keep NaN and +inf; a row of -inf alone is one whose every token is masked.
    token_ids = largest(logits)
    random = [row for row, each in enumerate(sequences) if _is_random(each.sampling)]
    if not random:
        return Drawn(token_ids, random, None)
    rows = stage.place(np.array(random, dtype=np.int64))
    draws = _place_draws([sequences[row] for row in random], logits.shape[1], stage)
    stage.flush()
    usable = token_ids[rows] >= 0
    chosen = torch.where(usable[:, None], logits[rows], 0.0)
    drawn, unsure = _draw_at_random(chosen, draws, _NUCLEUS_HEAD)
    token_ids[rows] = torch.where(usable, drawn.int(), -1)
    return Drawn(token_ids, random, unsure & usable)


def _place_draws(sequences: Seq[Sequence], vocab: int, stage: Stage) -> _Draws:
    params = [each.sampling for each in sequences]
    indices = [each.num_output_tokens for each in sequences]
    return _Draws(
        stage.place(uniforms([each.seed for each in params], indices)),
        stage.place(np.array([each.temperature for each in params], np.float32)),
        place_filters(params, vocab, stage),
    )


def _draw_at_random(logits: Tensor, draws: _Draws, nucleus_head: int) -> tuple[Tensor, Tensor]:
    """A token of each row, and whether it must be drawn again: its nucleus is larger."""
    probs = (logits / draws.temperature[:, None]).softmax(-1)
    kept, unsure = filtered(probs, draws.filters, nucleus_head)
    return invert(kept, draws.numbers), unsure


def _is_random(params: SamplingParams) -> bool:
    return params.temperature > _GREEDY_BELOW and params.top_k != 1
