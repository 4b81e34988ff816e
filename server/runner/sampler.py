"""Chooses one token per row of logits.

Order of operations, per row, as in vLLM: log-probabilities are read from the raw logits; then logit
bias, penalties and the mask of early end tokens; greedy rows take the largest logit; the others are
divided by the temperature and filtered by min_p, top_k and top_p. The draw inverts the distribution
function in vocabulary order at a number that depends on (seed, index of the token) alone, so that a
row does not depend on its neighbours and tiny differences of rounding almost never move it.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..generation import SamplingParams, TokenLogprobs
from ..scheduler.sequence import Sequence

_NUCLEUS_HEAD = 1024
"""Tokens looked at first for top_p; a nucleus larger than this is rare and costs a full sort."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a row: a token, or the reason there can be none."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None


def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[Choice]:
    """One token per row.

    Args:
        logits: (rows, vocab) float32; changed in place.
        sequences: The sequence of each row.

    Returns:
        A choice per row; a row whose logits hold NaN or +inf has an error instead of a token.
    """
    usable = logits.amax(-1).isfinite().tolist()
    raw = _logprob_rows(logits, sequences)
    edit_logits(logits, sequences)
    token_ids = _choose(logits, sequences)
    logprobs = _report_choices(raw, token_ids, sequences)
    return [
        Choice(token_id, logprobs.get(row))
        if usable[row]
        else Choice(None, error="the model's logits are not finite for this request")
        for row, token_id in enumerate(token_ids)
    ]


def report_logprobs(logits: Tensor, token_ids: Seq[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability, rank and ``num_top`` best tokens per row of raw logits (rows, vocab)."""
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    normalizer = logits.logsumexp(-1, keepdim=True)
    at_chosen = logits.gather(1, chosen)
    ranks = (logits > at_chosen).sum(-1) + 1
    values, ids = logits.topk(num_top, dim=-1)
    columns = zip(
        token_ids,
        (at_chosen - normalizer)[:, 0].tolist(),
        ranks.tolist(),
        ids.tolist(),
        (values - normalizer).tolist(),
        strict=True,
    )
    return [
        TokenLogprobs(token_id, logprob, rank, list(zip(top_ids, top_values, strict=True)))
        for token_id, logprob, rank, top_ids, top_values in columns
    ]


def uniforms(seeds: Seq[int], indices: Seq[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """u in [0, 1) from (seed, token index), mixed by splitmix64 (Steele et al., OOPSLA 2014)."""
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    mixed = _splitmix(_splitmix(state) ^ np.array(indices, dtype=np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(
    state: np.ndarray[tuple[int], np.dtype[np.uint64]],
) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _logprob_rows(logits: Tensor, sequences: Seq[Sequence]) -> dict[int, Tensor]:
    """Copies of the raw rows that report log-probabilities, before anything edits them."""
    return {
        row: logits[row].clone()
        for row, sequence in enumerate(sequences)
        if sequence.sampling.logprobs is not None
    }


def _report_choices(
    raw: dict[int, Tensor], token_ids: Seq[int], sequences: Seq[Sequence]
) -> dict[int, TokenLogprobs]:
    if not raw:
        return {}
    tops = {row: sequences[row].sampling.logprobs or 0 for row in raw}
    reports = report_logprobs(
        torch.stack(list(raw.values())), [token_ids[row] for row in raw], max(tops.values())
    )
    return {
        row: TokenLogprobs(report.token_id, report.logprob, report.rank, report.top[: tops[row]])
        for row, report in zip(raw, reports, strict=True)
    }


def edit_logits(logits: Tensor, sequences: Seq[Sequence]) -> None:
    """Apply logit bias, penalties and the mask of early end tokens to (rows, vocab) in place."""
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        if _has_penalties(params):
            _penalize(logits[row], sequence)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if sequence.num_output_tokens < params.min_tokens:
            ends = [*params.end_token_ids, *params.stop_token_ids]
            logits[row, ends] = float("-inf")


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _penalize(row: Tensor, sequence: Sequence) -> None:
    """Repetition over prompt and output, presence and frequency over the output, row (vocab,)."""
    params = sequence.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(sequence.token_ids)), device=row.device)
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    counts = Counter(sequence.token_ids[sequence.prompt_len :])
    if counts:
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * times


def _choose(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    token_ids: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sequence in enumerate(sequences) if _is_random(sequence.sampling)]
    if drawn:
        chosen = _draw(logits[drawn], [sequences[row] for row in drawn])
        for row, token_id in zip(drawn, chosen, strict=True):
            token_ids[row] = token_id
    return token_ids


def _is_random(params: SamplingParams) -> bool:
    return params.temperature > 0.0 and params.top_k != 1


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    params = [sequence.sampling for sequence in sequences]
    numbers = uniforms([p.seed for p in params], [s.num_output_tokens for s in sequences])
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    # The largest logit is taken off first: a temperature near zero then underflows to greedy
    # instead of overflowing to NaN.
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature[:, None]).softmax(-1)
    probs = filter_probs(probs, params)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = torch.from_numpy(numbers).to(logits.device)[:, None] * cumulative[:, -1:]
    # right=True finds the first token whose cumulative probability exceeds the target, which is
    # never one of probability zero.
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return chosen.clamp_(max=logits.shape[1] - 1).tolist()


def filter_probs(probs: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Zero what min_p, top_k and top_p drop from probs (rows, vocab); rows are not renormalised.

    Equal probabilities at the edge of top_k or top_p are all kept.
    """
    vocab = probs.shape[1]
    if any(p.min_p > 0 for p in params):
        floor = torch.tensor([p.min_p for p in params], device=probs.device)
        probs = _keep(probs, floor * probs.amax(-1))
    if any(0 < p.top_k < vocab for p in params):
        sizes = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=probs.device)
        largest = int(max(p.top_k for p in params if p.top_k < vocab))
        best = probs.topk(largest, dim=-1).values
        edge = best.gather(1, sizes.clamp(max=largest)[:, None] - 1)[:, 0]
        probs = _keep(probs, torch.where(sizes < vocab, edge, 0.0))
    if any(p.top_p < 1 for p in params):
        mass = torch.tensor([p.top_p for p in params], device=probs.device)
        probs = _keep(probs, torch.where(mass < 1, _nucleus_edge(probs, mass), 0.0))
    return probs


def _keep(probs: Tensor, at_least: Tensor) -> Tensor:
    return probs.masked_fill(probs < at_least[:, None], 0.0)


def _nucleus_edge(probs: Tensor, mass: Tensor) -> Tensor:
    """Smallest probability in the smallest set of tokens that holds ``mass`` of each row."""
    wanted = mass * probs.sum(-1)
    best = probs.topk(min(_NUCLEUS_HEAD, probs.shape[1]), dim=-1).values
    if bool((best.sum(-1) < wanted)[mass < 1].any()):
        best = probs.sort(dim=-1, descending=True).values
    before = best.cumsum(-1) - best
    last = (before < wanted[:, None]).sum(-1, keepdim=True).clamp(min=1) - 1
    return best.gather(1, last)[:, 0]
