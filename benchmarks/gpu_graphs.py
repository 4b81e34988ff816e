"""Decode steps replayed from CUDA graphs must give what the same padded steps give run eagerly.

Two runners of one base and one pool of adapters, each with a cache of its own, generate from the
same prompts, one with graphs and one without. Tokens and log-probabilities are compared exactly:
the same launches on the same numbers have the same bits.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ..adapters.device.pool import AdapterPool, Placement
from ..adapters.lower import lower
from ..adapters.primitives.lowered import LoweredAdapter
from ..kernels.backend import Backend, select_backend
from ..server.config import default_state_dir
from ..server.engine.build import pinned
from ..server.engine.composition import use_adapters
from ..server.generation import AdapterWeight, GenerationRequest, SamplingParams
from ..server.model.base import ServedBase, load_base
from ..server.model.source import DEMO_BASE, resolve_model
from ..server.runner.graphs import Capture, CudaCapture, StepGraphs, decode_buckets
from ..server.runner.runner import Runner
from ..server.runner.stage import make_stage
from ..server.scheduler.plan import PrefixLoad, ScheduledSequence, SequenceResult, StepPlan
from ..server.scheduler.sequence import NO_ADAPTER
from ..server.scheduler.sequence import Sequence as Running
from .gpu_section import Options, say
from .markdown import table

ADAPTERS = Path(__file__).resolve().parents[1] / "examples" / "adapters"
_BLOCK, _STAGE_BYTES, _POOL_BYTES = 16, 16 << 20, 1 << 30
_TOP = 5
"""Alternatives of which log-probabilities are compared."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is generated.

    Attributes:
        sizes: Sequences of a batch.
        steps: Decode steps of each: a shape is captured in its second, and replayed from then on.
        prompt: Tokens of a prompt.
        seed: Of the prompts.
    """

    sizes: Sequence[int] = (1, 2, 3, 4, 7, 8, 17, 33, 64)
    steps: int = 6
    prompt: int = 24
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One batch.

    Attributes:
        batch: Whose rows they are.
        sequences: How many.
        tokens: Compared.
        replays: Steps that a graph gave.
        differences: Tokens or log-probabilities that differ.
    """

    batch: str
    sequences: int
    tokens: int
    replays: int
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graphs:
    """All batches.

    Attributes:
        base: The model.
        adapters: Names of the adapters.
        batches: In order.
    """

    base: str
    adapters: tuple[str, ...]
    batches: tuple[BatchResult, ...]

    @property
    def faults(self) -> Sequence[str]:
        """Differences, and that nothing was replayed."""
        found = [
            f"{each.sequences} sequences, {each.batch}: {difference}"
            for each in self.batches
            for difference in each.differences
        ]
        return found if any(each.replays for each in self.batches) else [*found, "nothing replayed"]


class CountedGraphs(StepGraphs):
    """Step graphs that know how often one was replayed."""

    def __init__(self, capture: Capture) -> None:
        """None was."""
        super().__init__(capture)
        self._runs: Counter[Hashable] = Counter()

    def run(self, shape: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """See ``StepGraphs``: the first step of a shape runs as it is."""
        self._runs[shape] += 1
        return super().run(shape, compute)

    @property
    def replays(self) -> int:
        """So far."""
        return sum(self._runs.values()) - len(self._runs)


@dataclass(frozen=True, slots=True)
class Model:
    """A base on a device with adapters beside it.

    Attributes:
        base: It.
        backend: The device's operations.
        pool: Where the adapters are.
        adapters: By name.
        ids: Of them, by name.
        placements: Where each is, by its id.
    """

    base: ServedBase
    backend: Backend
    pool: AdapterPool
    adapters: Mapping[str, LoweredAdapter]
    ids: Mapping[str, int] = field(default_factory=dict)
    placements: Mapping[int, Placement] = field(default_factory=dict)

    def runner(self, graphs: StepGraphs | None, most: int, num_blocks: int) -> Runner:
        """One with a cache of its own, for up to ``most`` sequences."""
        by_id = {self.ids[name]: adapter for name, adapter in self.adapters.items()}
        return Runner(
            self.base.decoder,
            self.base.decoder.new_kv_cache(num_blocks, _BLOCK),
            self.pool,
            self.backend.deltas,
            self.backend.largest,
            self.placements.__getitem__,
            by_id.__getitem__,
            make_stage(self.pool.device, _STAGE_BYTES),
            decode_buckets(most),
            graphs,
        )


def measure(options: Options) -> Graphs:
    """The demo base with the demo adapters, on the current GPU.

    Raises:
        RuntimeError: The device does not do what is asked of it.
        ValueError: The device's tuning file is no such thing.
    """
    device, dtype = torch.device("cuda"), torch.bfloat16
    backend = select_backend("triton", dtype, device)
    folder = resolve_model(DEMO_BASE, default_state_dir())
    base = load_base(folder, dtype, device, backend)
    adapters = {
        path.name: pinned(lower(path, base, _POOL_BYTES)) for path in sorted(ADAPTERS.iterdir())
    }
    model = install(base, backend, adapters, device)
    trial = Trial(seed=options.seed)
    largest = decode_buckets(max(trial.sizes))[-1]
    graphs = CountedGraphs(CudaCapture(largest, base.decoder.config.vocab_size, device))
    batches = compare(model, graphs, lambda: graphs.replays, trial)
    return Graphs(DEMO_BASE, tuple(adapters), tuple(batches))


def install(
    base: ServedBase,
    backend: Backend,
    adapters: Mapping[str, LoweredAdapter],
    device: torch.device,
) -> Model:
    """The base with all adapters on the device.

    Raises:
        ValueError: They do not fit.
    """
    slots = sum(len(each.parts) for each in adapters.values())
    memory = torch.empty(_POOL_BYTES, dtype=torch.uint8, device=device)
    pool = AdapterPool(base.layout, max(slots, 1), memory, base.dtype)
    ids = {name: number for number, name in enumerate(adapters, start=1)}
    placements = {}
    for name, adapter in adapters.items():
        placement = pool.install(adapter)
        if placement is None:
            raise ValueError(f"the adapter {name} does not fit beside the others")
        placements[ids[name]] = placement
    return Model(base, backend, pool, adapters, ids, placements)


def compare(
    model: Model, graphs: StepGraphs, replays: Callable[[], int], trial: Trial
) -> Iterator[BatchResult]:
    """Batches of every size: of the base alone, of one adapter after another, of all in turn."""
    longest = max(
        (each.prefix.length for each in model.adapters.values() if each.prefix), default=0
    )
    blocks_each = -(-(trial.prompt + trial.steps + 1) // _BLOCK) + -(-longest // _BLOCK)
    most = max(trial.sizes)
    runners = (
        model.runner(graphs, most, blocks_each * most),
        model.runner(None, most, blocks_each * most),
    )
    one = cycle(model.adapters)
    for size in trial.sizes:
        alone = next(one)
        mixes: dict[str, list[str | None]] = {
            "the base": [None] * size,
            alone: [alone] * size,
            "base and adapters in turn": list(islice(cycle([None, *model.adapters]), size)),
        }
        for batch, names in mixes.items():
            before = replays()
            tokens, differences = _compare_batch(model, runners, names, trial)
            result = BatchResult(batch, size, tokens, replays() - before, tuple(differences))
            say(f"{size} sequences, {batch}: {len(differences)} differences")
            yield result


def _compare_batch(
    model: Model, runners: Sequence[Runner], names: Sequence[str | None], trial: Trial
) -> tuple[int, list[str]]:
    """Tokens that were compared, and differences."""
    batches = [_sequences(model, names, trial) for _ in runners]
    differences: list[str] = []
    for step in range(trial.steps + 1):
        results = [
            runner.run(_plan(sequences, step == 0))
            for runner, sequences in zip(runners, batches, strict=True)
        ]
        differences += [
            f"step {step}, row {row}: {_shown(replayed)} replayed, {_shown(eager)} eagerly"
            for row, (replayed, eager) in enumerate(zip(*results, strict=True))
            if replayed != eager
        ]
        # Both go on with the same tokens, so that one difference does not make others.
        for sequences in batches:
            for sequence, result in zip(sequences, results[1], strict=True):
                sequence.token_ids.append(result.token_id or 0)
    return (trial.steps + 1) * len(names), differences


def _sequences(model: Model, names: Sequence[str | None], trial: Trial) -> list[Running]:
    """With blocks of the cache for each, the prefix's included."""
    free = count()
    rng, vocab = Random(trial.seed), model.base.decoder.config.vocab_size
    made = []
    for index, name in enumerate(names):
        prompt = rng.choices(range(vocab), k=trial.prompt)
        request = GenerationRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=trial.steps + 1, seed=0, temperature=0.0, logprobs=_TOP
            ),
            adapters=[] if name is None else [AdapterWeight(model.ids[name])],
        )
        use = NO_ADAPTER
        if name is not None:
            use = use_adapters(request, [model.adapters[name]], model.base.layout)
        sequence = Running(request, use, index)
        if use.prefix is not None:
            sequence.prefix_blocks = list(islice(free, -(-use.prefix.length // _BLOCK)))
        tokens = trial.prompt + trial.steps + 1
        sequence.block_table = list(islice(free, -(-tokens // _BLOCK)))
        made.append(sequence)
    return made


def _plan(sequences: Sequence[Running], is_first: bool) -> StepPlan:
    """The prompts and what is before them, or the last token of each."""
    loads = [
        PrefixLoad(each.adapters.prefix, dict(enumerate(each.prefix_blocks)))
        for each in sequences
        if is_first and each.adapters.prefix is not None
    ]
    scheduled = [
        ScheduledSequence(
            each, 0 if is_first else len(each.token_ids) - 1, len(each.token_ids), True
        )
        for each in sequences
    ]
    return StepPlan(tuple(scheduled), tuple(loads))


def _shown(result: SequenceResult) -> str:
    if result.logprobs is None:
        return result.error or "nothing"
    return f"{result.token_id} ({result.logprobs.logprob})"


def render(graphs: Graphs) -> str:
    """Counts by batch."""
    rows = [
        (
            each.batch,
            str(each.sequences),
            str(each.tokens),
            str(each.replays),
            str(len(each.differences)),
        )
        for each in graphs.batches
    ]
    header = ("rows are of", "sequences", "tokens compared", "steps replayed", "differences")
    names = ", ".join(graphs.adapters)
    return f"{graphs.base} in bfloat16 with {names}.\n\n{table(header, rows)}"
