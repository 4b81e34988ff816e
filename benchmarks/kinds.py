"""Times what each kind of adapter adds to a step of the engine, on the demo base in one process.

    python -m deltamux.benchmarks.kinds [--threads N] [--rounds N] [--only KIND ...] [--seed N]

Measured are

- a decode step of 16 rows: of the bare base, of 16 different adapters of each kind, of one adapter
  that all rows share, and of a mixed batch with one row of every kind and the rest of the base,
- the step that computes a prompt of 512 tokens of one adapter,
- how long it takes to read and lower an adapter, and what it takes on the device.

Every round measures everything once, and the bare base right before each of them. Reported are
medians over the rounds with their quartiles, and the median ratio to the base right before, which a
machine whose speed drifts changes least. Beside a decode step stands its floor: the bytes that it
must read, of the base and of each different adapter, over the bandwidth measured in the same run.
Adapters are random, 16 of a kind from one seed; PEFT makes its own (``pip install peft``). The last
line is one JSON object; the load average in it tells whether the machine did something else at the
time.
"""

import argparse
import json
import os
import random
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ..server.config import default_state_dir
from ..server.engine.build import build_engine
from ..server.engine.config import EngineConfig
from ..server.engine.messages import AdapterLoaded, LoadAdapter, StepOutputs, Submit
from ..server.generation import AdapterWeight, GenerationRequest, SamplingParams
from ..server.model.source import resolve_model
from ..server.text.reader import read_tokenizer
from .counting import Step, count_step, total
from .kind_adapters import OTHER_LENGTHS, SOURCES, KindSource
from .machine import describe_machine, describe_versions
from .markdown import table
from .roofline import read_shapes
from .step import measure_bandwidth

BASE, MIXED = "base", "mixed"
SHARED = "{}, shared"
"""A batch of one adapter of a kind in every row."""

DECODE, PREFILL = "decode_step_ms", "prefill_ms"
TOKEN_IDS = range(1000, 30000)


@dataclass(frozen=True)
class Workload:
    """What is measured."""

    model: str
    dtype: str
    rows: int
    context_tokens: int
    decode_steps: int
    prefill_tokens: int
    rounds: int


@dataclass(frozen=True)
class Loaded:
    """The adapters of one kind in the engine.

    Attributes:
        ids: Theirs.
        lower_seconds: Median, of reading the files, checking and lowering.
        device_bytes: Of one in the adapter pool.
        prefix_bytes: Of one's keys and values in the cache.
        parameters: Numbers of one, prefix included.
        primitives: Their types.
    """

    ids: list[int]
    lower_seconds: float
    device_bytes: int
    prefix_bytes: int
    parameters: int
    primitives: list[str]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of milliseconds, and the median ratio to the base right before."""

    median: float
    quartiles: tuple[float, float]
    over_base: float

    def __str__(self) -> str:
        """For people."""
        low, high = self.quartiles
        return f"{self.median:.1f} ms ({low:.1f} to {high:.1f}), {self.over_base:.2f} of the base's"


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a batch and, right before, of the base; one of each a round."""

    batch: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)

    @property
    def spread(self) -> Spread | None:
        """None where nothing was measured."""
        if not self.batch:
            return None
        low, median, high = (
            round(each, 2) for each in statistics.quantiles(self.batch, n=4, method="inclusive")
        )
        ratios = [batch / base for batch, base in zip(self.batch, self.base, strict=True)]
        return Spread(median, (low, high), round(statistics.median(ratios), 3))


class BenchedEngine:
    """The parts of an engine in this process, stepped by hand."""

    def __init__(self, workload: Workload, state_dir: Path) -> None:
        """Load the base."""
        self.model = resolve_model(workload.model, state_dir)
        self._engine, self._host, _ = build_engine(
            EngineConfig(
                model_folder=str(self.model),
                dtype=workload.dtype,
                device="cpu",
                kernels="compiled",
                max_model_len=None,
                max_num_seqs=workload.rows,
                max_num_batched_tokens=workload.rows * workload.prefill_tokens,
                block_size=16,
                memory_budget=8 << 30,
                host_memory_budget=8 << 30,
                prefix_caching=False,  # the same prompts come in every round
            ),
            read_tokenizer(self.model),
        )
        self._loads = 0
        self._requests = 0

    def load(self, folders: Iterable[Path]) -> Loaded:
        """Load adapters of one kind, one after the other."""
        ids, seconds = [], []
        for folder in folders:
            started = time.perf_counter()
            ids.append(self._load(folder))
            seconds.append(time.perf_counter() - started)
        one = self._host.lowered(ids[0])
        prefix = () if one.prefix is None else one.prefix.tensors
        return Loaded(
            ids,
            round(statistics.median(seconds), 4),
            one.num_device_bytes,
            sum(tensor.nbytes for tensor in prefix),
            one.num_elements,
            sorted({type(each).__name__ for each in one.primitives}),
        )

    def decode_seconds(self, adapters: list[int | None], workload: Workload) -> list[float]:
        """Of every step in which each of these rows, None for the base, gets one token."""
        for row, adapter in enumerate(adapters):
            self._submit(row, adapter, workload.context_tokens, workload.decode_steps + 1)
        steps = list(self._steps())
        return [seconds for seconds, tokens in steps if tokens == len(adapters)]

    def prefill_seconds(self, adapter: int | None, workload: Workload) -> float:
        """Of the step that computes a prompt and its first token."""
        self._submit(-1, adapter, workload.prefill_tokens, 1)
        ((seconds, _),) = self._steps()
        return seconds

    def _load(self, folder: Path) -> int:
        self._loads += 1
        self._engine.handle(LoadAdapter(self._loads, str(folder)))
        select.select([self._host.wakeup], [], [])
        os.eventfd_read(self._host.wakeup)
        self._engine.take_loads()
        events = self._engine.drain()
        if not any(isinstance(event, AdapterLoaded) for event in events):
            raise RuntimeError(f"{folder} was not loaded: {events}")
        return self._loads

    def _submit(self, row: int, adapter: int | None, prompt: int, max_tokens: int) -> None:
        self._requests += 1
        request = GenerationRequest(
            request_id=str(self._requests),
            prompt_token_ids=random.Random(row).choices(TOKEN_IDS, k=prompt),
            sampling=SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0),
            adapters=[] if adapter is None else [AdapterWeight(adapter)],
        )
        self._engine.handle(Submit(request))

    def _steps(self) -> Iterator[tuple[float, int]]:
        """Seconds and tokens of each step until all is done."""
        while self._engine.has_work:
            started = time.perf_counter()
            self._engine.step()
            seconds = time.perf_counter() - started
            (outputs,) = self._engine.drain()
            if not isinstance(outputs, StepOutputs):
                raise RuntimeError(f"the engine reported {outputs}")
            for update in outputs.updates:
                if update.error is not None:
                    raise RuntimeError(update.error)
            yield seconds, outputs.stats.step_tokens


def make_and_load(
    engine: BenchedEngine, sources: list[KindSource], count: int, seed: int
) -> dict[str, Loaded]:
    """Adapters of every kind, ``count`` of each."""
    base = AutoModelForCausalLM.from_pretrained(engine.model, dtype=torch.bfloat16).eval()
    found = {}
    for source in sources:
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / str(index) for index in range(count)]
            source.write(base, folders)
            found[source.name] = engine.load(folders)
        print(f"{source.name} loaded", file=sys.stderr)
    return found


def measure(
    engine: BenchedEngine, loaded: dict[str, Loaded], workload: Workload
) -> dict[str, dict[str, Timed]]:
    """Name of the batch -> decode step and prefill step.

    Raises:
        ValueError: There are more kinds than rows.
    """
    base: list[int | None] = [None] * workload.rows
    one_each = [kind.ids[0] for name, kind in loaded.items() if name not in OTHER_LENGTHS]
    if len(one_each) > workload.rows:
        raise ValueError(f"{len(one_each)} kinds do not fit in a batch of {workload.rows} rows")
    batches = {BASE: base} | {name: list(kind.ids) for name, kind in loaded.items()}
    for name, kind in loaded.items():
        batches[SHARED.format(name)] = [kind.ids[0]] * workload.rows
    batches[MIXED] = [*base[len(one_each) :], *one_each]
    found = {name: {DECODE: Timed(), PREFILL: Timed()} for name in batches}
    for adapters in batches.values():  # unmeasured: memory is touched
        engine.decode_seconds(adapters, workload)
    for _ in range(workload.rounds):
        for name, adapters in batches.items():
            time_decode(engine, base, found[name][DECODE].base, workload)
            time_decode(engine, adapters, found[name][DECODE].batch, workload)
            if name == BASE or name in loaded:
                time_prefill(engine, None, found[name][PREFILL].base, workload)
                time_prefill(engine, adapters[0], found[name][PREFILL].batch, workload)
    return found


def time_decode(
    engine: BenchedEngine, adapters: list[int | None], found: list[float], workload: Workload
) -> None:
    """Append the median step."""
    found.append(1e3 * statistics.median(engine.decode_seconds(adapters, workload)))


def time_prefill(
    engine: BenchedEngine, adapter: int | None, found: list[float], workload: Workload
) -> None:
    """Append the step."""
    found.append(1e3 * engine.prefill_seconds(adapter, workload))


def floors_ms(loaded: dict[str, Loaded], workload: Workload, bandwidth: float) -> dict[str, float]:
    """Name of the batch -> bytes of its decode step over the bandwidth."""
    context = workload.context_tokens + workload.decode_steps // 2
    step = Step(rows=workload.rows, context=context, ranks=[], number_bytes=2)
    shapes = read_shapes(workload.model, workload.context_tokens)
    base = total(count_step(shapes, step)).num_bytes
    num_bytes: dict[str, float] = {BASE: base}
    for name, kind in loaded.items():
        of_one = kind.device_bytes + kind.prefix_bytes
        num_bytes[name] = base + workload.rows * of_one
        num_bytes[SHARED.format(name)] = base + of_one
    return {name: 1e3 * count / bandwidth for name, count in num_bytes.items()}


def print_decode_table(
    timings: dict[str, dict[str, Timed]], floors: dict[str, float], bandwidth: float
) -> None:
    """Decode steps beside the base's and their floors."""
    rows = []
    for name, timed in timings.items():
        spread = timed[DECODE].spread
        if spread is not None and name in floors:
            own = floors[name] - floors[BASE]
            added = spread.median * (1 - 1 / spread.over_base)
            rows.append(
                [
                    name,
                    f"{spread.median:.1f}",
                    f"{spread.over_base:.2f}",
                    f"{floors[name]:.1f}",
                    f"{spread.median / floors[name]:.2f}",
                    f"{added:.2f}",
                    f"{own:.2f}",
                    f"{added / own:.2f}" if own else "",
                ]
            )
    headings = ["16 rows of", "step, ms", "of the base's", "floor, ms", "of it", "added, ms"]
    print(f"decode, floors at {bandwidth / 1e9:.1f} GB/s")
    print(table([*headings, "its floor, ms", "of it"], rows))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file or hub id")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=[source.name for source in SOURCES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state-dir", type=Path, default=default_state_dir())
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    workload = Workload(options.model, options.dtype, 16, 32, 16, 512, options.rounds)
    sources = [s for s in SOURCES if options.only is None or s.name in options.only]
    engine = BenchedEngine(workload, options.state_dir)
    loaded = make_and_load(engine, sources, workload.rows, options.seed)
    timings: dict[str, dict[str, object]] = {}
    measured = measure(engine, loaded, workload)
    bandwidth = measure_bandwidth()
    floors = floors_ms(loaded, workload, bandwidth)
    for name, timed in measured.items():
        timings[name] = {}
        for what, spread in ((what, each.spread) for what, each in timed.items()):
            timings[name][what] = None if spread is None else asdict(spread)
            if spread is not None:
                print(f"{name}, {what}: {spread}")
    print_decode_table(measured, floors, bandwidth)
    report = {
        "benchmark": "kinds",
        "machine": describe_machine(),
        "versions": describe_versions("torch", "transformers", "peft"),
        "workload": asdict(workload),
        "seed": options.seed,
        "threads": options.threads,
        "load_average": os.getloadavg(),
        "adapters": {
            source.name: {"made_of": source.made_of, **_described(loaded[source.name])}
            for source in sources
        },
        "timings": timings,
        "bandwidth_bytes_per_second": bandwidth,
        "decode_floors_ms": floors,
    }
    print(json.dumps(report))


def _described(kind: Loaded) -> dict[str, object]:
    described = asdict(kind)
    del described["ids"]
    return described


if __name__ == "__main__":
    main()
