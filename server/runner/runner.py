"""Runs one planned step: batch, model, sampler."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...adapters.device.batch import AdapterBatch, RowRange, make_batch
from ...adapters.device.pool import AdapterPool
from ...adapters.primitives.lowered import LoweredAdapter
from ...kernels.backend import DeltaOps
from ..generation import TokenLogprobs
from ..model.attention import KVCache
from ..model.decoder import Decoder
from ..scheduler.plan import PrefixLoad, ScheduledSequence, SequenceResult, StepPlan
from .batch import FindAdapter, Passes, StepBatch, StepItem, build_batch
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
        for item in batch.items:
            choice = next(choices) if item.scheduled.samples else Choice(None)
            results[item.scheduled] = SequenceResult(
                token_id=choice.token_id,
                logprobs=choice.logprobs,
                prompt_logprobs=tuple(self._prompt_logprobs(item, hidden)),
                error=choice.error,
            )
        return [results[item] for item in plan.scheduled]

    def _load(self, load: PrefixLoad) -> None:
        adapters = [self._lowered(adapter_id) for adapter_id in load.prefix.adapter_ids]
        prefixes = [adapter.prefix for adapter in adapters if adapter.prefix is not None]
        load_prefix(self._kv_cache, load, prefixes)

    def _head_deltas(self, passes: Passes) -> AdapterBatch | None:
        """What adapters change behind the layers; for most that is nothing."""
        at_head = ([each for each in ranges if self._changes_head(each)] for ranges in passes)
        return make_batch(self._pool, self._ops, at_head)

    def _changes_head(self, rows: RowRange) -> bool:
        return self._pool.changes_head(rows.slot)

    def _sample(self, batch: StepBatch, hidden: Tensor) -> list[Choice]:
        sequences = [item.scheduled.sequence for item in batch.items if item.scheduled.samples]
        if not sequences:
            return []
        deltas = self._head_deltas(batch.sample_passes)
        return sample(self._decoder.logits(hidden[batch.sample_rows], deltas), sequences)

    def _prompt_logprobs(self, item: StepItem, hidden: Tensor) -> Iterator[TokenLogprobs]:
        """Of the prompt tokens that follow this step's rows of one item, a few rows at a time."""
        scheduled = item.scheduled
        num_top = scheduled.sequence.sampling.prompt_logprobs
        last = min(scheduled.end, scheduled.sequence.prompt_len - 1)
        if num_top is None:
            return
        for start in range(scheduled.start, last, _HEAD_ROWS):
            end = min(start + _HEAD_ROWS, last)
            first_row = item.first_row + start - scheduled.start
            ranges = (each for each in item.ranges(start, end, 0) if each is not None)
            deltas = self._head_deltas([[each] for each in ranges])
            logits = self._decoder.logits(hidden[first_row : first_row + end - start], deltas)
            next_tokens = scheduled.sequence.token_ids[start + 1 : end + 1]
            yield from report_logprobs(logits, next_tokens, num_top)
