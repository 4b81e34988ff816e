"""Chooses one token per row of logits.

Order of operations, per row, as in vLLM: log-probabilities are read from the raw logits; then logit
bias, penalties and the mask of early end tokens; greedy rows take the largest logit; the others are
divided by the temperature and filtered by min_p, top_k and top_p. The draw inverts the distribution
function in vocabulary order at a number that depends on (seed, index of the token) alone, so that a
row does not depend on its neighbours and tiny differences of rounding almost never move it.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..generation import SamplingParams, TokenLogprobs
from ..scheduler.sequence import Sequence

_NUCLEUS_HEAD = 1024
"""Tokens looked at first for top_p; a nucleus larger than this is rare and costs a full sort."""


_GREEDY_BELOW = 1e-5
"""Temperatures up to this are greedy, as in vLLM: dividing by them would overflow."""

_BLOCK = 256
"""Tokens summed at once in a draw, so that only one such block is summed token by token."""


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
    raw = _logprob_rows(logits, sequences)
    edit_logits(logits, sequences)
    # Edits keep NaN and +inf; a row of -inf alone is one whose every token is masked.
    usable = logits.amax(-1).isfinite().tolist()
    token_ids = _choose(logits, sequences, usable)
    logprobs = _report_choices(raw, token_ids, sequences)
    return [
        Choice(token_id, logprobs.get(row))
        if usable[row]
        else Choice(None, error="no token can be chosen: the logits of this request are not finite")
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
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if _has_penalties(params):
            _penalize(logits[row], sequence)
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
    token_ids = torch.tensor(sequence.token_ids, device=row.device)
    if params.repetition_penalty != 1.0:
        # Reads come before writes, so a token seen twice is still penalised once.
        values, penalty = row[token_ids], params.repetition_penalty
        row[token_ids] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        times = torch.bincount(token_ids[sequence.prompt_len :], minlength=len(row)).to(row.dtype)
        row -= params.presence_penalty * times.clamp(max=1) + params.frequency_penalty * times


def _choose(logits: Tensor, sequences: Seq[Sequence], usable: Seq[bool]) -> list[int]:
    token_ids: list[int] = logits.argmax(-1).tolist()
    random = [_is_random(sequence.sampling) for sequence in sequences]
    drawn = [row for row in range(len(random)) if random[row] and usable[row]]
    if drawn:
        chosen = _draw(logits[drawn], [sequences[row] for row in drawn])
        for row, token_id in zip(drawn, chosen, strict=True):
            token_ids[row] = token_id
    return token_ids


def _is_random(params: SamplingParams) -> bool:
    return params.temperature > _GREEDY_BELOW and params.top_k != 1


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    params = [sequence.sampling for sequence in sequences]
    numbers = uniforms([p.seed for p in params], [s.num_output_tokens for s in sequences])
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    probs = (logits / temperature[:, None]).softmax(-1)
    probs = filter_probs(probs, params)
    return _invert(probs, torch.from_numpy(numbers).to(logits.device)).tolist()


def _invert(probs: Tensor, numbers: Tensor) -> Tensor:
    """First token of each row whose cumulative probability exceeds ``number`` times the row's sum.

    Args:
        probs: (rows, vocab), not normalised, with a positive sum.
        numbers: (rows,) float64 in [0, 1).
    """
    vocab = probs.shape[1]
    blocks = functional.pad(probs, (0, -vocab % _BLOCK)).view(len(probs), -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = ends[:, -1:]
    # Rounding may lift the product to the sum itself, which no token exceeds.
    target = (numbers[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    # right=True passes over what has probability zero.
    block = torch.searchsorted(ends, target, right=True)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    before = functional.pad(ends, (1, 0)).gather(1, block)
    cumulative = within.cumsum(-1, dtype=torch.float64) + before
    last = (within > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    return (block * _BLOCK + torch.searchsorted(cumulative, target, right=True).minimum(last))[:, 0]


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
    nuclear = [row for row, p in enumerate(params) if p.top_p < 1]
    if nuclear:
        mass = torch.tensor([params[row].top_p for row in nuclear], device=probs.device)
        edges = probs.new_zeros(len(params))
        edges[nuclear] = _nucleus_edges(probs[nuclear], mass)
        probs = _keep(probs, edges)
    return probs


def _keep(probs: Tensor, at_least: Tensor) -> Tensor:
    return probs.masked_fill(probs < at_least[:, None], 0.0)


def _nucleus_edges(probs: Tensor, mass: Tensor) -> Tensor:
    """Smallest probability in the smallest set of tokens that holds ``mass`` of each row."""
    wanted = mass * probs.sum(-1)
    best = probs.topk(min(_NUCLEUS_HEAD, probs.shape[1]), dim=-1).values
    edges = _edges(best, wanted)
    short = (best.sum(-1) < wanted).nonzero()[:, 0]
    if len(short):
        edges[short] = _edges(probs[short].sort(dim=-1, descending=True).values, wanted[short])
    return edges


def _edges(best: Tensor, wanted: Tensor) -> Tensor:
    """Per row of descending ``best``, the value at which its running sum reaches ``wanted``."""
    before = best.cumsum(-1) - best
    last = (before < wanted[:, None]).sum(-1, keepdim=True).clamp(min=1) - 1
    return best.gather(1, last)[:, 0]
