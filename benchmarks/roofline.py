"""The floor of a decode step: what its bytes and operations take at a device's full rates.

No step of any implementation is faster; how near one comes is for measurements to tell. The floor
is the larger of two times, bytes over bandwidth and operations over arithmetic rate, as if either
hid entirely behind the other. ``counting.py`` says what is counted.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..kernels.gpu.shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B, Shapes
from ..server.config import default_state_dir
from ..server.model.errors import ModelError
from ..server.model.families import read_config
from ..server.model.source import DEMO_BASE, resolve_model
from .counting import Step, Work, count_step, num_parameters, total
from .errors import BenchmarkError
from .machine import describe_machine, describe_versions
from .markdown import table

BASES = (LLAMA_1B, LLAMA_8B, LLAMA_70B)
COUNTS, RANKS = (1, 8, 32, 128), (8, 16, 32, 64)
SUMMARY = (32, 16)
"""Adapters and rank of the short table."""
ROOM = 1.2
"""Memory for a base: its weights and a fifth more, for the cache."""


@dataclass(frozen=True, slots=True)
class Device:
    """What its maker says of it.

    Attributes:
        name: As people call it.
        bytes_per_second: Of its memory.
        flops_per_second: Of dense 16-bit matrix products.
        memory_bytes: None where it is not known: all fits.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    memory_bytes: float | None = None


DEVICES = (
    Device("A100 80GB SXM", 2.039e12, 312e12, 80e9),
    Device("H100 SXM", 3.35e12, 989e12, 80e9),
    Device("H200 SXM", 4.8e12, 989e12, 141e9),
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is counted.

    Attributes:
        bases: Their shapes.
        devices: What they run on.
        rows: Sequences of a step.
        context: Keys of each.
        prefix_tokens: Of every adapter.
    """

    bases: tuple[Shapes, ...] = BASES
    devices: tuple[Device, ...] = DEVICES
    rows: int = 64
    context: int = 1024
    prefix_tokens: int = 0

    def step(self, adapters: int, rank: int) -> Step:
        """With so many different adapters."""
        return Step(self.rows, self.context, (rank,) * adapters, self.prefix_tokens)

    def of(self, model: str) -> "Workload":
        """The same of another base, as in ``read_shapes``."""
        return replace(self, bases=(read_shapes(model, self.context),))


@dataclass(frozen=True, slots=True)
class Floor:
    """One step on one device, or on several that share its work evenly.

    Attributes:
        base: Its name.
        device: Its name.
        gpus: How many of them.
        adapters: Different ones in the batch.
        rank: Of each; 0 without adapters.
        parts: Bytes and operations, by what they are for.
        fits: Whether everything that is read fits their memory.
        memory_us: Microseconds that the bytes take.
        compute_us: Microseconds that the operations take.
        adapters_us: What the adapters add to the same step without them.
    """

    base: str
    device: str
    gpus: int
    adapters: int
    rank: int
    parts: Mapping[str, Work]
    fits: bool
    memory_us: float
    compute_us: float
    adapters_us: float

    @property
    def step_us(self) -> float:
        """Microseconds of the step."""
        return max(self.memory_us, self.compute_us)

    @property
    def binds(self) -> str:
        """What the step waits for."""
        return "memory" if self.memory_us >= self.compute_us else "compute"

    @property
    def adapters_percent(self) -> float:
        """Part of the step that the adapters added."""
        return 100 * self.adapters_us / self.step_us


def gpus_for(shapes: Shapes, device: Device, number_bytes: int = 2) -> int:
    """The least power of two of devices whose memory has room for the base."""
    if device.memory_bytes is None:
        return 1
    needed = ROOM * num_parameters(shapes) * number_bytes / device.memory_bytes
    return 1 << (math.ceil(needed) - 1).bit_length()


def floor_of(shapes: Shapes, device: Device, workload: Workload, adapters: int, rank: int) -> Floor:
    """One step, divided among as many devices as the base needs, communication left out."""
    gpus = gpus_for(shapes, device)
    parts = count_step(shapes, workload.step(adapters, rank))
    memory_us, compute_us = _times_us(total(parts), device, gpus)
    without = _times_us(total(count_step(shapes, workload.step(0, 0))), device, gpus)
    return Floor(
        base=shapes.name,
        device=device.name,
        gpus=gpus,
        adapters=adapters,
        rank=rank,
        parts=parts,
        fits=_fits(shapes, device, gpus, parts),
        memory_us=memory_us,
        compute_us=compute_us,
        adapters_us=max(memory_us, compute_us) - max(without),
    )


def floors_of(shapes: Shapes, device: Device, workload: Workload) -> Iterator[Floor]:
    """Without adapters, then every number of them in every rank."""
    yield floor_of(shapes, device, workload, 0, 0)
    for adapters in COUNTS:
        for rank in RANKS:
            yield floor_of(shapes, device, workload, adapters, rank)


def given_device(gigabytes: float | None, teraflops: float | None) -> Device:
    """One whose rates the user knows.

    Args:
        gigabytes: A second, from memory.
        teraflops: A second.

    Raises:
        BenchmarkError: Only one of them is given.
    """
    if gigabytes is None or teraflops is None:
        raise BenchmarkError("--bandwidth and --flops are of one device: give both")
    name = f"given: {gigabytes:g} GB/s, {teraflops:g} TFLOP/s"
    return Device(name, 1e9 * gigabytes, 1e12 * teraflops)


def read_shapes(model: str, context: int) -> Shapes:
    """Of a model folder, or of the demo base under its name.

    Raises:
        BenchmarkError: There is no model, it is not served, or not counted.
    """
    try:
        folder = resolve_model(model, default_state_dir()) if model == DEMO_BASE else Path(model)
        _, config = read_config(folder)
    except ModelError as error:
        raise BenchmarkError(str(error)) from error
    if config.activation != "silu":
        raise BenchmarkError(f"{model}: bases without a gated MLP are not counted")
    if any(window is not None and window < context for window in config.windows):
        raise BenchmarkError(f"{model}: its windows are shorter than --context; choose less")
    return Shapes(
        name=Path(model).name,
        layers=config.num_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        tied_head=config.tie_word_embeddings,
    )


def run(workload: Workload, plot: Path | None = None) -> None:
    """Print the tables and the JSON line; draw them to a file where one is named."""
    floors = [
        floor
        for shapes in workload.bases
        for device in workload.devices
        for floor in floors_of(shapes, device, workload)
    ]
    print(summary(workload) + "\n")
    for shapes in workload.bases:
        print(f"{heading(shapes, workload)}\n\n{base_table(shapes, workload)}\n")
    if plot is not None:
        from .roofline_plot import draw

        draw(floors, plot)
    report = {
        "benchmark": "roofline",
        "machine": describe_machine(),
        "versions": describe_versions("deltamux"),
        "workload": asdict(workload),
        "floors": [
            asdict(each) | {"step_us": each.step_us, "binds": each.binds} for each in floors
        ],
    }
    print(json.dumps(report))


def summary(workload: Workload) -> str:
    """Every base on every device: the step without adapters, and what a usual batch adds."""
    adapters, rank = SUMMARY
    header = (
        *("base", "device", "GPUs", "step without adapters, µs", "binds"),
        *(f"{adapters} adapters of rank {rank} add, µs", "% of the step"),
    )
    floors = (
        floor_of(shapes, device, workload, adapters, rank)
        for shapes in workload.bases
        for device in workload.devices
    )
    return table(header, [_summary_cells(floor) for floor in floors])


def heading(shapes: Shapes, workload: Workload) -> str:
    """What a base's table is of, with the bytes of a step without adapters."""
    parts = count_step(shapes, workload.step(0, 0))
    gigabytes = {name: work.num_bytes / 1e9 for name, work in parts.items() if work.num_bytes}
    read = ", ".join(f"{name} {size:.3g} GB" for name, size in gigabytes.items())
    return (
        f"{shapes.name}: {num_parameters(shapes):,} parameters; a step of {workload.rows} rows of"
        f" context {workload.context:,} without adapters: {read};"
        f" {total(parts).flops / 1e12:.3g} TFLOP"
    )


def base_table(shapes: Shapes, workload: Workload) -> str:
    """One base: a line for every number of adapters and rank, three columns for every device."""
    columns = [list(floors_of(shapes, device, workload)) for device in workload.devices]
    header = ["adapters", "rank"]
    for first, *_ in columns:
        many = f"{first.gpus} x " if first.gpus > 1 else ""
        header += [f"{many}{first.device}, µs", "binds", "adapters, µs (%)"]
    rows = [
        [str(line[0].adapters), str(line[0].rank or "-"), *_device_cells(line)]
        for line in zip(*columns, strict=True)
    ]
    return table(header, rows)


def _times_us(work: Work, device: Device, gpus: int) -> tuple[float, float]:
    return (
        1e6 * work.num_bytes / (gpus * device.bytes_per_second),
        1e6 * work.flops / (gpus * device.flops_per_second),
    )


def _fits(shapes: Shapes, device: Device, gpus: int, parts: Mapping[str, Work]) -> bool:
    """The whole base, and what a step reads beside it."""
    if device.memory_bytes is None:
        return True
    beside = sum(parts[name].num_bytes for name in ("cache", "adapters", "prefixes"))
    return num_parameters(shapes) * 2 + beside <= gpus * device.memory_bytes


def _summary_cells(floor: Floor) -> list[str]:
    where = [floor.base, floor.device, str(floor.gpus)]
    without = f"{floor.step_us - floor.adapters_us:,.0f}"
    added = (f"{floor.adapters_us:,.0f}", f"{floor.adapters_percent:.1f}")
    return [*where, without, floor.binds, *(added if floor.fits else ("does not fit", "-"))]


def _device_cells(line: Sequence[Floor]) -> Iterator[str]:
    for floor in line:
        if floor.fits:
            yield f"{floor.step_us:,.0f}"
            yield floor.binds
            yield f"{floor.adapters_us:,.0f} ({floor.adapters_percent:.1f})"
        else:
            yield from ("-", "does not fit", "-")
