"""``deltamux bench kernels --tune``: which configuration of each kernel is fastest on this GPU.

Every operation with several configurations is timed in all of them at the sizes that serving needs:
the linear sites, the layers and the heads of Llama 1B, 8B and 70B. Sizes that choose together, as
``kernels/gpu/tuning.Key`` says, are timed together, and the least sum of their times wins. A
measurement stands for the smaller sizes down to the next measured one. What wins is written to the
device's file, from where the server takes it when it starts.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from triton.errors import TritonError

from ..kernels.gpu.tuning import Key, Measured, read_measured, tuning_file, write_measured
from .errors import BenchmarkError
from .gpu_operands import Operands
from .gpu_section import say
from .gpu_timing import Timer, replayed_us
from .machine import describe_machine, describe_versions
from .markdown import table
from .tune_problems import Grid, Problem, Tunable, tunables

POOL_BYTES, INDEX_BYTES = 2 << 30, 256 << 20
DTYPE = torch.bfloat16
NO_GPU = "--tune needs an NVIDIA GPU, and torch finds none here; check nvidia-smi"
_HEADER = ("operation", "rows", "inner", "size", "fastest", "µs", "the rule's, µs", "times faster")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The fastest configuration for some keys.

    Attributes:
        operation: Its name.
        key: Of the sizes that were timed.
        keys: That it is chosen for.
        config: Its index.
        fastest: What it is.
        us: Microseconds, of all sites of these sizes together.
        rule_us: Of the configuration that the operation's rule takes.
    """

    operation: str
    key: Key
    keys: tuple[Key, ...]
    config: int
    fastest: str
    us: float
    rule_us: float


def tune(
    operations: Sequence[Tunable], grid: Grid, operands: Operands, timer: Timer
) -> Iterator[Chosen]:
    """The fastest configuration for every key of every operation."""
    for operation in operations:
        for problem in operation.problems(grid):
            chosen = _fastest(operation, problem, operands, timer)
            if chosen is not None:
                say(f"{chosen.operation} {tuple(chosen.key)}: {chosen.fastest} {chosen.us:.1f} us")
                yield chosen


def measured_of(chosen: Sequence[Chosen]) -> Measured:
    """The choices by operation and key."""
    measured: dict[str, dict[Key, int]] = {}
    for each in chosen:
        measured.setdefault(each.operation, {}).update(dict.fromkeys(each.keys, each.config))
    return measured


def run(text: str = "", seed: int = 0) -> None:
    """Tune on the current GPU, keep what was found in the device's file, and print it.

    Args:
        text: Only operations whose name contains it; what the file has of the others stays there.
        seed: Of the operands.

    Raises:
        BenchmarkError: There is no GPU or no such operation, or the file is of another kind.
    """
    wanted = [each for each in tunables() if text in each.name]
    if not wanted:
        there = ", ".join(each.name for each in tunables())
        raise BenchmarkError(f"no operation to tune is called {text}; there are: {there}")
    if not torch.cuda.is_available():
        raise BenchmarkError(NO_GPU)
    device_name = torch.cuda.get_device_name()
    path = tuning_file(device_name)
    before = _before(path) if text else {}
    operands = Operands(POOL_BYTES, INDEX_BYTES, DTYPE, torch.device("cuda"), seed)
    quickly = partial(replayed_us, warmup_ms=5, measured_ms=20)
    report(list(tune(wanted, Grid(), operands, quickly)), before, path, device_name, seed)


def report(
    chosen: Sequence[Chosen], before: Measured, path: Path, device_name: str, seed: int
) -> None:
    """Write the file, print the table and the JSON line."""
    write_measured(path, {**before, **measured_of(chosen)})
    print(table(_HEADER, [_cells(each) for each in chosen]))
    print(f"\nwritten to {path}")
    found = {
        "benchmark": "kernels --tune",
        "machine": describe_machine(),
        "device": device_name,
        "versions": describe_versions("torch", "triton"),
        "seed": seed,
        "dtype": str(DTYPE),
        "file": str(path),
        "chosen": [asdict(each) for each in chosen],
    }
    print(json.dumps(found))


def _before(path: Path) -> Measured:
    try:
        return read_measured(path)
    except ValueError as error:
        raise BenchmarkError(str(error)) from error


def _fastest(
    operation: Tunable, problem: Problem, operands: Operands, timer: Timer
) -> Chosen | None:
    """None where no configuration runs on this device."""
    totals = [0.0] * len(operation.configs)
    for build in problem.builds:
        operands.reset()
        launch = build(operands)
        for config in range(len(totals)):
            totals[config] += _time(timer, partial(launch, config))
    config = min(range(len(totals)), key=totals.__getitem__)
    if math.isinf(totals[config]):
        return None
    return Chosen(
        operation=operation.name,
        key=problem.key,
        keys=problem.keys,
        config=config,
        fastest=f"{config}: {_described(operation.configs[config])}",
        us=totals[config],
        rule_us=totals[operation.rule(problem.key)],
    )


def _time(timer: Timer, call: Callable[[], object]) -> float:
    """Microseconds; without end where the device has too little for the configuration."""
    try:
        return timer(call)
    except TritonError as error:
        say(f"does not run here: {error}")
        return math.inf


def _cells(chosen: Chosen) -> list[str]:
    return [
        chosen.operation,
        *map(str, chosen.key),
        chosen.fastest,
        f"{chosen.us:,.1f}",
        f"{chosen.rule_us:,.1f}",
        f"{chosen.rule_us / chosen.us:.2f}",
    ]


def _described(config: object) -> str:
    """Its fields, if it names them."""
    named: Mapping[str, object] = getattr(config, "_asdict", dict)()
    return " ".join(f"{name}={value}" for name, value in named.items()) or repr(config)
