"""From probabilities to a token: what min_p, top_k and top_p drop, and the draw from the rest."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..generation import SamplingParams
from .stage import HostStage, Stage

_BLOCK = 256
"""Tokens summed at once in a draw, so that only one such block is summed token by token."""


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


def invert(probs: Tensor, numbers: Tensor) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class Filters:
    """What drops tokens; each is None where no row has it.

    Attributes:
        min_p: (rows,) float32.
        top_k: (rows,) int64, the vocabulary's size where a row has none.
        largest_k: The largest smaller than that.
        nuclear: (n,) int64, the rows with a nucleus.
        top_p: (n,) float32, of those.
    """

    min_p: Tensor | None
    top_k: Tensor | None
    largest_k: int
    nuclear: Tensor | None
    top_p: Tensor | None


def place_filters(params: Seq[SamplingParams], vocab: int, stage: Stage) -> Filters:
    """What the rows with these parameters drop of a vocabulary of this size."""
    ks = [min(each.top_k or vocab, vocab) for each in params]
    nuclear = [row for row, each in enumerate(params) if each.top_p < 1]
    floors = np.array([each.min_p for each in params], dtype=np.float32)
    masses = np.array([params[row].top_p for row in nuclear], dtype=np.float32)
    return Filters(
        min_p=stage.place(floors) if floors.any() else None,
        top_k=stage.place(np.array(ks, dtype=np.int64)) if min(ks) < vocab else None,
        largest_k=max((k for k in ks if k < vocab), default=0),
        nuclear=stage.place(np.array(nuclear, dtype=np.int64)) if nuclear else None,
        top_p=stage.place(masses) if nuclear else None,
    )


def filter_probs(probs: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Zero what min_p, top_k and top_p drop from probs (rows, vocab); rows are not renormalised.

    Equal probabilities at the edge of top_k or top_p are all kept.
    """
    filters = place_filters(params, probs.shape[1], HostStage())
    return filtered(probs, filters, probs.shape[1])[0]


def filtered(probs: Tensor, filters: Filters, nucleus_head: int) -> tuple[Tensor, Tensor]:
    """Zero what is dropped from probs (rows, vocab).

    Args:
        probs: Need not sum to one.
        filters: Of the rows.
        nucleus_head: Tokens of the highest probability among which a nucleus is looked for.

    Returns:
        The probabilities, and of each row whether its nucleus is larger than that.
    """
    unsure = torch.zeros(len(probs), dtype=torch.bool, device=probs.device)
    if filters.min_p is not None:
        probs = _keep(probs, filters.min_p * probs.amax(-1))
    if filters.top_k is not None:
        best = probs.topk(filters.largest_k, dim=-1).values
        edge = best.gather(1, filters.top_k.clamp(max=filters.largest_k)[:, None] - 1)[:, 0]
        probs = _keep(probs, torch.where(filters.top_k < probs.shape[1], edge, 0.0))
    if filters.nuclear is not None and filters.top_p is not None:
        edges = probs.new_zeros(len(probs))
        edges[filters.nuclear], unsure[filters.nuclear] = _nucleus_edges(
            probs[filters.nuclear], filters.top_p, nucleus_head
        )
        probs = _keep(probs, edges)
    return probs, unsure


def _keep(probs: Tensor, at_least: Tensor) -> Tensor:
    return probs.masked_fill(probs < at_least[:, None], 0.0)


def _nucleus_edges(probs: Tensor, mass: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Smallest probability in the smallest set of tokens that holds ``mass`` of each row.

    Returns:
        Of each row that probability, and whether ``head`` tokens do not hold as much.
    """
    wanted = mass * probs.sum(-1)
    if head < probs.shape[1]:
        best = probs.topk(head, dim=-1).values
        return _edges(best, wanted), best.sum(-1) < wanted
    best = probs.sort(dim=-1, descending=True).values
    return _edges(best, wanted), torch.zeros(len(probs), dtype=torch.bool, device=probs.device)


def _edges(best: Tensor, wanted: Tensor) -> Tensor:
    """Per row of descending ``best``, the value at which its running sum reaches ``wanted``."""
    before = best.cumsum(-1) - best
    last = (before < wanted[:, None]).sum(-1, keepdim=True).clamp(min=1) - 1
    return best.gather(1, last)[:, 0]
