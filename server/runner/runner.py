"""Runs one planned step: batch, model, sampler."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...adapters.batch import AdapterBatch
from ...kernels.backend import Backend
from ...kernels.low_rank.op import LowRankTable, Segments
from ..generation import TokenLogprobs
from ..model.attention import KVCache
from ..model.decoder import Decoder
from ..scheduler.plan import ScheduledSequence, SequenceResult, StepPlan
from .batch import StepBatch, build_batch, make_segments
from .sampler import Choice, report_logprobs, sample

_HEAD_ROWS = 64
"""Rows of prompt logits held at once; (64, vocab) float32 is 12 MB at 49k tokens."""


class Runner:
    """Computes the next tokens of a step's sequences; its only state is the KV cache."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        backend: Backend,
        table: LowRankTable,
        adapter_slot: Callable[[int], int],
    ) -> None:
        """Run ``decoder`` over ``kv_cache``; ``adapter_slot`` maps an adapter id into ``table``."""
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._backend = backend
        self._table = table
        self._adapter_slot = adapter_slot

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SequenceResult]:
        """One result per scheduled sequence, in the plan's order."""
        device = self._table.pool.device
        batch = build_batch(plan, self._adapter_slot, self._kv_cache.block_size, device)
        deltas = self._deltas(batch.segments)
        hidden = self._decoder.forward(
            batch.token_ids, batch.positions, self._kv_cache, batch.paged, deltas
        )
        choices = iter(self._sample(batch, hidden))
        results: dict[ScheduledSequence, SequenceResult] = {}
        for index, item in enumerate(batch.items):
            choice = next(choices) if item.samples else Choice(None)
            results[item] = SequenceResult(
                token_id=choice.token_id,
                logprobs=choice.logprobs,
                prompt_logprobs=tuple(self._prompt_logprobs(batch, index, hidden)),
                error=choice.error,
            )
        return [results[item] for item in plan.scheduled]

    def _deltas(self, segments: Segments | None) -> AdapterBatch | None:
        if segments is None:
            return None
        return AdapterBatch(self._table, segments, self._backend.add_low_rank)

    def _sample(self, batch: StepBatch, hidden: Tensor) -> list[Choice]:
        sequences = [item.sequence for item in batch.items if item.samples]
        if not sequences:
            return []
        deltas = self._deltas(batch.sample_segments)
        return sample(self._decoder.logits(hidden[batch.sample_rows], deltas), sequences)

    def _prompt_logprobs(
        self, batch: StepBatch, index: int, hidden: Tensor
    ) -> Iterator[TokenLogprobs]:
        """Of the prompt tokens that follow this step's rows of one item, a few rows at a time."""
        item, first = batch.items[index], batch.first_rows[index]
        num_top = item.sequence.sampling.prompt_logprobs
        end = min(item.end, item.sequence.prompt_len - 1)
        if num_top is None:
            return
        for start in range(item.start, end, _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, end)
            rows = hidden[first + start - item.start : first + stop - item.start]
            bounds = (0, stop - start)
            segments = make_segments(batch.adapter_slots[index : index + 1], bounds, rows.device)
            logits = self._decoder.logits(rows, self._deltas(segments))
            next_tokens = item.sequence.token_ids[start + 1 : stop + 1]
            yield from report_logprobs(logits, next_tokens, num_top)
