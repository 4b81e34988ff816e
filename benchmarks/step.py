"""Where the time of a step goes: every stage timed, and the stages add up to the step.

An engine is put together in this process, with a stopwatch around each operation of the device, and
stepped by hand. What no stopwatch covers is the Python between the operations; it has a line too.
Beside the decode step stands its floor: the bytes that ``counting`` finds, over the bandwidth that
one pass over memory reaches in the same run.

    deltamux bench step --rows 16 --adapters 16
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import Backend, DeltaOps
from ..kernels.linear.op import LinearOp, PrepareLinear
from ..kernels.tables import SiteTargets
from ..server.config import default_state_dir
from ..server.engine.build import EngineParts, build_parts
from ..server.engine.config import EngineConfig
from ..server.engine.core import Engine
from ..server.engine.messages import Abort, AdapterLoaded, AdapterRefused, LoadAdapter, Submit
from ..server.generation import AdapterWeight, GenerationRequest, SamplingParams
from ..server.model.source import resolve_model
from ..server.text.reader import read_tokenizer
from .counting import Step, count_step, total
from .errors import BenchmarkError
from .machine import describe_machine, describe_versions
from .make_adapters import linear_modules, random_lora, write_adapter
from .markdown import table
from .roofline import read_shapes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BUDGET = 2 << 30
WARM_STEPS = 5
COPY_BYTES = 1 << 29


@dataclass(frozen=True, slots=True)
class Workload:
    """What is stepped.

    Attributes:
        base: As ``deltamux serve`` takes it.
        dtype: Of the engine.
        kernels: Its device operations.
        rows: Sequences.
        context: Tokens of each before the steps that are timed.
        adapters: Different ones, over the sequences in turn; 0 for the bare base.
        rank: Of each.
        steps: Timed.
        threads: Of torch; None for its own choice.
        seed: Of prompts and adapters.
    """

    base: str
    dtype: str
    kernels: str
    rows: int
    context: int
    adapters: int
    rank: int
    steps: int
    threads: int | None
    seed: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Milliseconds of one step, the median of several.

    Attributes:
        step: From scheduling to the last report.
        stages: By name, what adds up to it.
    """

    step: float
    stages: Mapping[str, float]


Timed = tuple[float, Mapping[str, float]]
"""Seconds of a step and of its stages."""


class Stopwatch:
    """Seconds by stage; a stage within another is the inner one's alone."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start with nothing."""
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        self._inner.append(0.0)
        start = self._clock()
        try:
            yield
        finally:
            spent = self._clock() - start
            self._seconds[name] += spent - self._inner.pop()
            self._inner[-1] += spent

    def add(self, name: str, seconds: float) -> None:
        """Count what was timed elsewhere."""
        self._seconds[name] += seconds
        self._inner[-1] += seconds

    def around(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        """The operation, timed."""

        def timed(*operands: Any, **named: Any) -> Any:
            with self.stage(name):
                return operation(*operands, **named)

        return timed

    def take(self) -> dict[str, float]:
        """What was found since the last time."""
        found = dict(self._seconds)
        self._seconds.clear()
        return found


@dataclass(frozen=True, slots=True)
class _TimedLinear:
    """A product of the base with the stopwatch around it."""

    product: LinearOp
    watch: Stopwatch
    name: str

    def __call__(self, x: Tensor, /) -> Tensor:
        """See ``LinearOp``."""
        with self.watch.stage(self.name):
            return self.product(x)

    def per_target(self, inputs: Tensor, changed: Tensor, targets: SiteTargets, /) -> Tensor:
        """See ``LinearOp``."""
        with self.watch.stage(self.name):
            return self.product.per_target(inputs, changed, targets)


def instrumented(backend: Backend, watch: Stopwatch) -> Backend:
    """Every operation of the device with the stopwatch around it."""
    timed: Backend = _timed_fields(backend, watch)
    programs = backend.programs and replace(backend.programs, report=watch.add)
    prepare = _timed_linear(backend.prepare_linear, watch)
    return replace(timed, prepare_linear=prepare, programs=programs)


def _timed_fields(operations: Any, watch: Stopwatch) -> Any:
    changed: dict[str, Any] = {}
    for each in fields(operations):
        value = getattr(operations, each.name)
        if isinstance(value, DeltaOps):
            changed[each.name] = _timed_fields(value, watch)
        elif callable(value):
            changed[each.name] = watch.around(each.name, value)
    return replace(operations, **changed)


def _timed_linear(prepare: PrepareLinear, watch: Stopwatch) -> PrepareLinear:
    def prepared(weight: Tensor, bias: Tensor | None) -> LinearOp:
        out_size, in_size = weight.shape
        return _TimedLinear(prepare(weight, bias), watch, f"linear {in_size} -> {out_size}")

    return prepared


def run(workload: Workload) -> None:
    """Profile prefill and decode, print both, and one JSON object."""
    if workload.threads is not None:
        torch.set_num_threads(workload.threads)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        model = resolve_model(workload.base, default_state_dir())
        parts = build_parts(
            _config(workload, model),
            read_tokenizer(model),
            lambda backend: instrumented(backend, watch),
        )
        engine = parts.engine()
        try:
            _load_adapters(engine, workload, model, Path(folder))
            # Once unmeasured: what lies in memory for the first time costs more than it will.
            _profiles(engine, parts, replace(workload, steps=1), watch)
            prefill, decode = _profiles(engine, parts, workload, watch)
        finally:
            parts.host.close()
    bandwidth = measure_bandwidth()
    floor = _floor_ms(parts, workload, bandwidth)
    print(_table(f"prefill, {_chunk(workload)} rows a step", prefill))
    print(_table(f"decode, {workload.rows} rows of context {workload.context}", decode))
    print(
        f"decode floor {floor:.2f} ms at {bandwidth / 1e9:.1f} GB/s:"
        f" the step takes {decode.step:.2f} ms, {floor / decode.step:.0%} of what is possible\n"
    )
    print(
        json.dumps(
            {
                "benchmark": "step",
                "machine": describe_machine(),
                "versions": describe_versions("torch", "deltamux"),
                "workload": asdict(workload),
                "threads": torch.get_num_threads(),
                "bandwidth_bytes_per_second": bandwidth,
                "decode_floor_ms": floor,
                "prefill_ms": asdict(prefill),
                "decode_ms": asdict(decode),
            }
        )
    )


def measure_bandwidth() -> float:
    """Bytes a second that a sum over memory larger than any cache reads: the best of five."""
    numbers = torch.ones(COPY_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return COPY_BYTES / best


def _config(workload: Workload, model: Path) -> EngineConfig:
    return EngineConfig(
        model_folder=str(model),
        dtype=workload.dtype,
        device="cpu",
        kernels=workload.kernels,
        max_model_len=None,
        max_num_seqs=workload.rows,
        max_num_batched_tokens=_chunk(workload),
        block_size=16,
        memory_budget=BUDGET,
        host_memory_budget=BUDGET,
        prefix_caching=False,
    )


def _chunk(workload: Workload) -> int:
    """Rows of a prefill step: as ``deltamux serve`` has them."""
    return max(512, workload.rows)


def _load_adapters(engine: Engine, workload: Workload, model: Path, folder: Path) -> None:
    modules = list(linear_modules(model, TARGETS)) if workload.adapters else []
    for index in range(workload.adapters):
        tensors = random_lora(modules, workload.rank, torch.bfloat16, workload.seed + index)
        write_adapter(folder / str(index), tensors, workload.rank, TARGETS)
        engine.handle(LoadAdapter(index + 1, str(folder / str(index))))
    loaded = 0
    while loaded < workload.adapters:
        engine.take_loads()
        for event in engine.drain():
            if isinstance(event, AdapterRefused):
                raise BenchmarkError(f"a synthetic adapter is refused: {event.message}")
            loaded += isinstance(event, AdapterLoaded)
        time.sleep(0.01)


def _profiles(
    engine: Engine, parts: EngineParts, workload: Workload, watch: Stopwatch
) -> tuple[Profile, Profile]:
    vocabulary = parts.info.vocab_size
    generator = torch.Generator().manual_seed(workload.seed)
    # The first sequences decode while the last are still being read.
    prefill_steps = 2 + 2 * workload.rows * workload.context // _chunk(workload)
    max_tokens = workload.steps + WARM_STEPS + prefill_steps
    for row in range(workload.rows):
        prompt = torch.randint(3, vocabulary, (workload.context,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
        adapters = [AdapterWeight(1 + row % workload.adapters)] if workload.adapters else []
        request = GenerationRequest(
            request_id=str(row),
            prompt_token_ids=prompt,
            sampling=sampling,
            adapters=adapters,
        )
        engine.handle(Submit(request))
    prefill: list[Timed] = []
    decode: list[Timed] = []
    while len(decode) < workload.steps + WARM_STEPS:
        rows, seconds, stages = _step(parts, watch)
        if rows == workload.rows:
            decode.append((seconds, stages))
        elif rows == _chunk(workload):
            prefill.append((seconds, stages))
    engine.handle(Abort([str(row) for row in range(workload.rows)]))
    return _median(prefill), _median(decode[WARM_STEPS:])


def _step(parts: EngineParts, watch: Stopwatch) -> tuple[int, float, dict[str, float]]:
    """Rows of one step, its seconds and those of its stages."""
    watch.take()
    runner = parts.runner
    with torch.inference_mode(), watch.stage("between stages"):
        with watch.stage("schedule"):
            plan = parts.scheduler.schedule()
        with watch.stage("prepare"):
            inputs = runner.prepare(plan)
        with watch.stage("python between operations"):
            outputs = runner.compute(inputs)
        with watch.stage("sample"):
            results = runner.collect(inputs, outputs, runner.choose(inputs, outputs))
        with watch.stage("commit"):
            list(parts.scheduler.commit(plan, results))
    stages = watch.take()
    return plan.num_tokens, sum(stages.values()), stages


def _median(found: Sequence[Timed]) -> Profile:
    """The median step, and its stages by their mean share of the steps."""
    if not found:
        return Profile(0.0, {})
    step = statistics.median(seconds for seconds, _ in found)
    whole = sum(seconds for seconds, _ in found)
    names = {name for _, stages in found for name in stages}
    shares = {name: sum(stages.get(name, 0.0) for _, stages in found) / whole for name in names}
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return Profile(1e3 * step, {name: 1e3 * step * share for name, share in ordered})


def _floor_ms(parts: EngineParts, workload: Workload, bandwidth: float) -> float:
    step = Step(
        rows=workload.rows,
        context=workload.context + WARM_STEPS + workload.steps // 2,
        ranks=[workload.rank] * workload.adapters,
        number_bytes=parts.decoder.tokens.weight.element_size(),
    )
    return (
        1e3
        * total(count_step(read_shapes(workload.base, workload.context), step)).num_bytes
        / bandwidth
    )


def _table(title: str, profile: Profile) -> str:
    rows = [[name, f"{ms:.3f}", f"{ms / profile.step:.1%}"] for name, ms in profile.stages.items()]
    rows.append(["all stages", f"{sum(profile.stages.values()):.3f}", ""])
    rows.append(["step", f"{profile.step:.3f}", ""])
    return f"{title}\n\n{table(['stage', 'ms', 'share'], rows)}\n"
