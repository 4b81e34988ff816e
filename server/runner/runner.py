"""Runs one planned step: batch, model, sampler."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ...adapters.device.batch import AdapterBatch, make_batch
from ...adapters.device.pool import AdapterPool
from ...adapters.primitives.lowered import LoweredAdapter
from ...kernels.backend import DeltaOps
from ..generation import TokenLogprobs
from ..model.attention import KVCache
from ..model.decoder import Decoder
from ..scheduler.plan import PrefixLoad, ScheduledSequence, SequenceResult, StepPlan
from .batch import FindAdapter, RowSpan, StepBatch, build_batch, passes_of
from .prefix import load_prefix
from .sampler import Choice, report_logprobs, sample

_HEAD_ROWS = 64
"""Rows of prompt logits held at once; (64, vocab) float32 is 12 MB at 49k tokens."""


class Runner:
    """Computes the next tokens of a step's sequences; its only state is the KV cache."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        pool: AdapterPool,
        ops: DeltaOps,
        find_adapter: FindAdapter,
        lowered: Callable[[int], LoweredAdapter],
    ) -> None:
        """Run ``decoder`` over ``kv_cache``.

        Args:
            decoder: The base.
            kv_cache: Its cache.
            pool: The adapters on the device.
            ops: How they are computed.
            find_adapter: Where the adapter of an id is in the pool.
            lowered: The adapter of an id in host memory, for its prefix.
        """
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._pool = pool
        self._ops = ops
        self._find_adapter = find_adapter
        self._lowered = lowered

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SequenceResult]:
        """One result per scheduled sequence, in the plan's order."""
        for load in plan.prefix_loads:
            self._load(load)
        batch = build_batch(
            plan,
            self._find_adapter,
            self._decoder.config.num_layers,
            self._kv_cache.block_size,
            self._pool.device,
        )
        hidden = self._decoder.forward(
            batch.token_ids,
            batch.positions,
            self._kv_cache,
            batch.paged,
            make_batch(self._pool, self._ops, batch.passes),
        )
        choices = iter(self._sample(batch, hidden))
        results: dict[ScheduledSequence, SequenceResult] = {}
        for index, item in enumerate(batch.scheduled):
            choice = next(choices) if item.samples else Choice(None)
            results[item] = SequenceResult(
                token_id=choice.token_id,
                logprobs=choice.logprobs,
                prompt_logprobs=tuple(self._prompt_logprobs(batch, index, hidden)),
                error=choice.error,
            )
        return [results[item] for item in plan.scheduled]

    def _load(self, load: PrefixLoad) -> None:
        adapters = [self._lowered(adapter_id) for adapter_id in load.prefix.adapter_ids]
        prefixes = [adapter.prefix for adapter in adapters if adapter.prefix is not None]
        load_prefix(self._kv_cache, load, prefixes)

    def _head_deltas(self, spans: Iterable[RowSpan]) -> AdapterBatch | None:
        """What adapters change behind the layers; for most that is nothing."""
        if not self._pool.changes_any_head:
            return None
        at_head = (
            ([each for each in corrections if self._pool.changes_head(each[0])], start, end, row)
            for corrections, start, end, row in spans
        )
        return make_batch(self._pool, self._ops, passes_of(at_head))

    def _sample(self, batch: StepBatch, hidden: Tensor) -> list[Choice]:
        sampling = [
            (item, corrections)
            for item, corrections in zip(batch.scheduled, batch.corrections, strict=True)
            if item.samples
        ]
        if not sampling:
            return []
        deltas = self._head_deltas(
            (corrections, item.end - 1, item.end, row)
            for row, (item, corrections) in enumerate(sampling)
        )
        logits = self._decoder.logits(hidden[batch.sample_rows], deltas)
        return sample(logits, [item.sequence for item, _ in sampling])

    def _prompt_logprobs(
        self, batch: StepBatch, index: int, hidden: Tensor
    ) -> Iterator[TokenLogprobs]:
        """Of the prompt tokens that follow this step's rows of one sequence, a few at a time."""
        item, corrections = batch.scheduled[index], batch.corrections[index]
        num_top = item.sequence.sampling.prompt_logprobs
        last = min(item.end, item.sequence.prompt_len - 1)
        if num_top is None:
            return
        for start in range(item.start, last, _HEAD_ROWS):
            end = min(start + _HEAD_ROWS, last)
            row = batch.first_rows[index] + start - item.start
            deltas = self._head_deltas([(corrections, start, end, 0)])
            logits = self._decoder.logits(hidden[row : row + end - start], deltas)
            next_tokens = item.sequence.token_ids[start + 1 : end + 1]
            yield from report_logprobs(logits, next_tokens, num_top)
