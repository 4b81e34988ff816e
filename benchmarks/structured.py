"""What it costs a decode step that the output of some of its rows must match a JSON schema.

An engine in this process is stepped by hand with the same prompts, none, half or all of them under
one schema; rounds of these alternate, so that what else the machine does falls on all alike.

    deltamux bench structured
"""

import json
import os
import random
import select
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..server.config import default_state_dir
from ..server.engine.build import build_engine
from ..server.engine.config import EngineConfig
from ..server.engine.messages import StepOutputs, Submit
from ..server.generation import GenerationRequest, SamplingParams
from ..server.grammar.constraint import JsonSchema, grammar_of
from ..server.model.source import resolve_model
from ..server.text.reader import read_tokenizer
from .machine import describe_machine, describe_versions
from .markdown import table

SCHEMA = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["person", "place", "thing"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["name", "kind", "age", "tags", "day"],
        "additionalProperties": False,
    },
}
"""So long that no row comes to its end while steps are timed."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is stepped.

    Attributes:
        base: As ``deltamux serve`` takes it.
        rows: Sequences.
        context: Prompt tokens of each.
        steps: Timed in each round, for none, half and all of the rows constrained.
        rounds: Of these.
    """

    base: str
    rows: int
    context: int
    steps: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured.

    Attributes:
        dtype: Of the engine.
        step_ms: Median milliseconds of a step, by how many rows were constrained.
        us_per_token: Microseconds that a constrained token takes more than another.
    """

    dtype: str
    step_ms: dict[str, float]
    us_per_token: float


class SteppedEngine:
    """An engine in this process."""

    def __init__(self, workload: Workload, model: Path) -> None:
        """Load the base."""
        self._workload = workload
        self._engine, self._host, info = build_engine(
            EngineConfig(
                model_folder=str(model),
                dtype="auto",
                device="cpu",
                kernels="auto",
                max_model_len=None,
                max_num_seqs=workload.rows,
                max_num_batched_tokens=workload.rows * workload.context,
                block_size=16,
                memory_budget=1 << 30,
                host_memory_budget=1 << 30,
                prefix_caching=False,
            ),
            read_tokenizer(model),
        )
        self.dtype = info.dtype
        self._token_ids = range(100, info.vocab_size)
        self._submitted = 0

    def step_seconds(self, constrained: int) -> list[float]:
        """Of every step in which each row gets a token, the first ``constrained`` under SCHEMA."""
        grammar = grammar_of(JsonSchema(SCHEMA))
        for row in range(self._workload.rows):
            self._submit(row, grammar if row < constrained else None)
        return [seconds for seconds, tokens in self._steps() if tokens == self._workload.rows]

    def _submit(self, row: int, grammar: str | None) -> None:
        self._submitted += 1
        prompt = random.Random(row).choices(self._token_ids, k=self._workload.context)
        sampling = SamplingParams(
            max_tokens=self._workload.steps + 1, seed=row, temperature=0.7, grammar=grammar
        )
        request = GenerationRequest(
            request_id=str(self._submitted), prompt_token_ids=prompt, sampling=sampling
        )
        self._engine.handle(Submit(request))

    def _steps(self) -> Iterator[tuple[float, int]]:
        if not self._engine.has_work:  # the grammar is compiled first
            select.select([self._host.wakeup], [], [])
            os.eventfd_read(self._host.wakeup)
            self._engine.take_loads()
        while self._engine.has_work:
            started = time.perf_counter()
            self._engine.step()
            seconds = time.perf_counter() - started
            outputs = [each for each in self._engine.drain() if isinstance(each, StepOutputs)]
            yield seconds, sum(len(each.token_ids) for one in outputs for each in one.updates)


def measure(workload: Workload, model: Path) -> Costs:
    """Step with none, half and all of the rows constrained."""
    engine = SteppedEngine(workload, model)
    shares = {"none": 0, "half": workload.rows // 2, "all": workload.rows}
    engine.step_seconds(workload.rows)  # the grammar is compiled, pages are touched
    rounds = [
        {name: statistics.median(engine.step_seconds(rows)) * 1e3 for name, rows in shares.items()}
        for _ in range(workload.rounds)
    ]
    steps = {name: round(statistics.median(each[name] for each in rounds), 2) for name in shares}
    more = statistics.median(each["all"] - each["none"] for each in rounds)
    return Costs(engine.dtype, steps, round(more * 1e3 / workload.rows, 1))


def run(workload: Workload) -> None:
    """Measure, and print a table and one line of JSON."""
    costs = measure(workload, resolve_model(workload.base, default_state_dir()))
    rows = [[name, f"{each}"] for name, each in costs.step_ms.items()]
    print(table(["constrained rows", "step, ms"], rows))
    machine = {"machine": describe_machine(), "versions": describe_versions("torch", "llguidance")}
    print(json.dumps({**asdict(costs), "workload": asdict(workload), **machine}))
