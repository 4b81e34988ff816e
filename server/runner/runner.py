"""Runs one planned step: batch, model, sampler.

A step has four parts. What the host knows is laid out and sent to the device; the model and then
the choice of tokens are launched, without waiting for either; then the chosen tokens are read.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...adapters.device.batch import AdapterBatch, make_batch, place_batch
from ...adapters.device.batch_layout import LatestLayout
from ...adapters.device.pool import AdapterPool
from ...adapters.primitives.lowered import LoweredAdapter
from ...kernels.backend import DeltaOps
from ...kernels.cpu.program import Padded
from ...kernels.largest.op import Largest
from ..generation import TokenLogprobs
from ..model.attention import KVCache
from ..model.decoder import Decoder
from ..scheduler.plan import PrefixLoad, SequenceResult, StepPlan
from ..scheduler.sequence import Sequence as RunningSequence
from .batch import Buckets, FindAdapter, RowSpan, StepBatch, build_batch, passes_of
from .graphs import PromptPrograms, StepGraphs
from .prefix import load_prefix
from .reports import report_logprobs
from .sampler import Choice, Sampled, read_choices, start_sampling
from .stage import Stage

_NOT_FINITE = "nothing can be embedded: the hidden state of this request is not finite"

_HEAD_ROWS = 64
"""Rows of prompt logits held at once; (64, vocab) float32 is 12 MB at 49k tokens."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step, laid out.

    Attributes:
        batch: Its rows.
        deltas: Their adapters.
        sampling: The sequences that choose a token, in the order of their rows.
        head_deltas: What adapters change behind the layers, in the rows that choose.
    """

    batch: StepBatch
    deltas: AdapterBatch | None
    sampling: Sequence[RunningSequence]
    head_deltas: AdapterBatch | None

    @property
    def shape(self) -> Hashable:
        """Equal for two padded steps whose launches are equal."""
        adapters = (self.deltas, self.head_deltas)
        return (self.batch.shape, *(each and each.shape for each in adapters))


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What the model computes.

    Attributes:
        hidden: (rows, hidden), None where the step is captured and all of its rows choose.
        logits: (n, vocab) float32, of the sequences that choose; None where none does.
    """

    hidden: Tensor | None
    logits: Tensor | None


class Runner:
    """Computes the next tokens of a step's sequences; its only state is the KV cache."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        pool: AdapterPool,
        ops: DeltaOps,
        largest: Largest,
        find_adapter: FindAdapter,
        lowered: Callable[[int], LoweredAdapter],
        stage: Stage,
        buckets: Sequence[int] = (),
        graphs: StepGraphs | None = None,
        prompts: PromptPrograms | None = None,
    ) -> None:
        """Run ``decoder`` over ``kv_cache``.

        Args:
            decoder: The base.
            kv_cache: Its cache.
            pool: The adapters on the device.
            ops: How they are computed.
            largest: The device's operation.
            find_adapter: Where the adapter of an id is in the pool.
            lowered: The adapter of an id in host memory, for its prefix.
            stage: The way to the device.
            buckets: Numbers of rows that decode steps are padded to; empty where none is captured.
            graphs: Where these steps are captured and replayed.
            prompts: Where other steps are.
        """
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._pool = pool
        self._layouts = LatestLayout(pool)
        self._ops = ops
        self._largest = largest
        self._find_adapter = find_adapter
        self._lowered = lowered
        self._stage = stage
        self._buckets = Buckets(buckets, prompts.buckets if prompts else ())
        self._graphs = graphs
        self._prompts = prompts

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SequenceResult]:
        """One result per scheduled sequence, in the plan's order."""
        inputs = self.prepare(plan)
        outputs = self.compute(inputs)
        return self.collect(inputs, outputs, self.choose(inputs, outputs))

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Lay the step out and send it to the device."""
        self._stage.begin()
        batch = build_batch(
            plan,
            self._find_adapter,
            self._decoder.config.num_layers,
            self._kv_cache.block_size,
            self._stage.place,
            self._buckets,
        )
        layout = self._layouts.of(batch.passes, batch.bucket)
        deltas = place_batch(layout, self._ops, self._stage.place)
        head_deltas = self._head_deltas(
            _sampling_spans(batch), batch.bucket if batch.decodes else None
        )
        sampling = [item.sequence for item in batch.scheduled if item.samples]
        self._pool.wait_for_copies()
        for load in plan.prefix_loads:
            self._load(load)
        self._stage.flush()
        self._copy_blocks(plan.block_copies)
        return StepInputs(batch, deltas, sampling, head_deltas)

    def compute(self, inputs: StepInputs) -> StepOutputs:
        """Launch the model; nothing here waits for the device."""
        if inputs.batch.decodes:
            return StepOutputs(None, self._padded_logits(inputs)[: len(inputs.sampling)])
        hidden = self._hidden(inputs)
        if not inputs.sampling:
            return StepOutputs(hidden, None)
        rows = hidden[inputs.batch.sample_rows]
        return StepOutputs(hidden, self._decoder.logits(rows, inputs.head_deltas))

    def choose(self, inputs: StepInputs, outputs: StepOutputs) -> Sampled | None:
        """Launch the choice of tokens; nothing here waits for the device either."""
        if outputs.logits is None:
            return None
        return start_sampling(outputs.logits, inputs.sampling, self._stage, self._largest)

    def collect(
        self, inputs: StepInputs, outputs: StepOutputs, sampled: Sampled | None
    ) -> list[SequenceResult]:
        """Read what was chosen; see ``run``."""
        batch = inputs.batch
        choices: Iterator[Choice] = iter(())
        if sampled is not None:
            choices = iter(read_choices(sampled, inputs.sampling, self._stage))
        embedded = _last_hidden(batch, outputs.hidden)
        results: dict[int, SequenceResult] = {}
        for index, (place, item) in enumerate(zip(batch.places, batch.scheduled, strict=True)):
            choice = next(choices) if item.samples else Choice(None)
            hidden, error = embedded.get(index, (None, choice.error))
            results[place] = SequenceResult(
                token_id=choice.token_id,
                logprobs=choice.logprobs,
                prompt_logprobs=self._prompt_logprobs(batch, index, outputs.hidden),
                error=error,
                hidden=hidden,
            )
        return [results[place] for place in range(len(results))]

    def _forward(self, inputs: StepInputs) -> Tensor:
        batch = inputs.batch
        return self._decoder.forward(
            batch.token_ids, batch.positions, self._kv_cache, batch.paged, inputs.deltas
        )

    def _hidden(self, inputs: StepInputs) -> Tensor:
        """(rows, hidden), and of a captured step rows of no meaning behind these."""
        batch = inputs.batch
        if batch.bucket is None or self._prompts is None:
            return self._forward(inputs)
        compute, padded = partial(self._forward, inputs), Padded(batch.num_rows, batch.bucket)
        if self._stage.overflowed:
            return self._prompts.run_once(compute, padded)
        deltas = inputs.deltas and inputs.deltas.shape
        return self._prompts.run((batch.shape, deltas), compute, padded)

    def _padded_logits(self, inputs: StepInputs) -> Tensor:
        """(bucket, vocab): every row of a padded step chooses, or is padding."""

        def compute() -> Tensor:
            return self._decoder.logits(self._forward(inputs), inputs.head_deltas)

        if self._graphs is None or self._stage.overflowed:
            return compute()
        return self._graphs.run(inputs.shape, compute)

    def _load(self, load: PrefixLoad) -> None:
        adapters = [self._lowered(adapter_id) for adapter_id in load.prefix.adapter_ids]
        prefixes = [adapter.prefix for adapter in adapters if adapter.prefix is not None]
        load_prefix(self._kv_cache, load, prefixes)

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Placed behind everything else: where that lies must not depend on these."""
        if copies:
            placed = self._stage.place(np.array(copies, dtype=np.int64))
            self._stage.flush()
            self._kv_cache.copy(*placed.unbind(1))

    def _head_deltas(
        self, spans: Iterable[RowSpan], bucket: int | None = None
    ) -> AdapterBatch | None:
        """What adapters change behind the layers; for most that is nothing."""
        if not self._pool.changes_any_head:
            return None
        at_head = (
            ([each for each in corrections if self._pool.changes_head(each[0])], start, end, row)
            for corrections, start, end, row in spans
        )
        return make_batch(self._pool, self._ops, passes_of(at_head), self._stage.place, bucket)

    def _prompt_logprobs(
        self, batch: StepBatch, index: int, hidden: Tensor | None
    ) -> tuple[TokenLogprobs, ...]:
        """Of the prompt tokens that follow this step's rows of one sequence, where asked for."""
        num_top = batch.scheduled[index].sequence.sampling.prompt_logprobs
        if num_top is None or hidden is None:
            return ()
        return tuple(self._next_logprobs(batch, index, hidden, num_top))

    def _next_logprobs(
        self, batch: StepBatch, index: int, hidden: Tensor, num_top: int
    ) -> Iterator[TokenLogprobs]:
        """These, a few rows at a time."""
        item, corrections = batch.scheduled[index], batch.corrections[index]
        last = min(item.end, item.sequence.prompt_len - 1)
        for start in range(item.start, last, _HEAD_ROWS):
            end = min(start + _HEAD_ROWS, last)
            row = batch.first_rows[index] + start - item.start
            deltas = self._head_deltas([(corrections, start, end, 0)])
            self._stage.flush()
            logits = self._decoder.logits(hidden[row : row + end - start], deltas)
            next_tokens = item.sequence.token_ids[start + 1 : end + 1]
            yield from report_logprobs(logits, next_tokens, num_top, self._stage)


def _last_hidden(
    batch: StepBatch, hidden: Tensor | None
) -> Mapping[int, tuple[bytes | None, str | None]]:
    """The last row of every sequence that embeds, as float32, or why it is of no use."""
    if hidden is None:
        return {}
    rows = {
        index: batch.first_rows[index] + item.num_tokens - 1
        for index, item in enumerate(batch.scheduled)
        if item.embeds
    }
    if not rows:
        return {}
    vectors = torch.stack([hidden[row] for row in rows.values()]).float().cpu().numpy()
    return {
        index: (vector.tobytes(), None) if np.isfinite(vector).all() else (None, _NOT_FINITE)
        for index, vector in zip(rows, vectors, strict=True)
    }


def _sampling_spans(batch: StepBatch) -> Iterator[RowSpan]:
    """The last row of every sequence that chooses, among those rows alone."""
    sampling = (
        (item, corrections)
        for item, corrections in zip(batch.scheduled, batch.corrections, strict=True)
        if item.samples
    )
    for row, (item, corrections) in enumerate(sampling):
        yield corrections, item.end - 1, item.end, row
