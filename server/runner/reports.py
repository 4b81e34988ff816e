"""Log-probabilities of chosen tokens and their alternatives, in one tensor for one copy."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..generation import TokenLogprobs
from .stage import HostStage, Stage


@dataclass(frozen=True, slots=True)
class Reported:
    """Log-probabilities on the device, of n rows.

    Attributes:
        token_ids: (n,) int64.
        logprobs: (n,) float32, of these tokens.
        ranks: (n,) int64, from 1.
        top_ids: (n, num_top) int64, the most probable tokens.
        top_logprobs: (n, num_top) float32.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def report_logprobs(
    logits: Tensor, token_ids: Seq[int], num_top: int, stage: Stage | None = None
) -> list[TokenLogprobs]:
    """Log-probability, rank and ``num_top`` best tokens per row of raw logits (rows, vocab)."""
    way = HostStage() if stage is None else stage
    chosen = way.place(np.array(token_ids, dtype=np.int64))
    way.flush()
    packed = pack_report(logprobs_of(logits, chosen, num_top))
    return unpack_report(packed.cpu().numpy(), len(token_ids))


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> Reported:
    """Of raw logits (n, vocab) and the tokens (n,) in question."""
    normalizer = logits.logsumexp(-1, keepdim=True)
    at_chosen = logits.gather(1, token_ids[:, None])
    values, ids = logits.topk(num_top, dim=-1)
    return Reported(
        token_ids=token_ids,
        logprobs=(at_chosen - normalizer)[:, 0],
        ranks=(logits > at_chosen).sum(-1) + 1,
        top_ids=ids,
        top_logprobs=values - normalizer,
    )


def pack_report(reported: Reported) -> Tensor:
    """All of it as one tensor of int32."""
    integers = (reported.token_ids, reported.ranks, reported.top_ids)
    floats = (reported.logprobs, reported.top_logprobs)
    return torch.cat(
        [each.int().flatten() for each in integers]
        + [each.contiguous().view(torch.int32).flatten() for each in floats]
    )


def unpack_report(numbers: npt.NDArray[np.int32], count: int) -> list[TokenLogprobs]:
    """What ``pack_report`` made of ``count`` rows."""
    if count == 0:
        return []
    num_top = (len(numbers) // count - 3) // 2
    ends = np.cumsum([count, count, count * num_top, count])
    token_ids, ranks, top_ids, logprobs, top_logprobs = np.split(numbers, ends)
    columns = zip(
        token_ids.tolist(),
        logprobs.view(np.float32).tolist(),
        ranks.tolist(),
        top_ids.reshape(count, num_top).tolist(),
        top_logprobs.view(np.float32).reshape(count, num_top).tolist(),
        strict=True,
    )
    return [
        TokenLogprobs(token_id, logprob, rank, list(zip(ids, values, strict=True)))
        for token_id, logprob, rank, ids, values in columns
    ]
