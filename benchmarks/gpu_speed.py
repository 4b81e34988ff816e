"""Times every operation against its floor and the plain torch loop, and compares their results.

The loop is the reference backend on the same GPU: adapters one after another, as one would write it
without kernels. It cannot be captured, so that its time includes what the host does.
"""

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from triton.errors import TritonError

from ..kernels.backend import Backend, reference_backend, select_backend
from ..kernels.gpu.shapes import LLAMA_8B, Shapes
from .gpu_case import Case, Load
from .gpu_cases import all_cases
from .gpu_operands import Operands
from .gpu_section import Options, say
from .gpu_timing import Rates, Timer, called_us, measure_rates, replayed_us
from .markdown import table

POOL_BYTES, INDEX_BYTES = 2 << 30, 64 << 20
DTYPE = torch.bfloat16

MOST_DIFFERENCE = 2.0**-6
"""Of two results, of the largest number: each is rounded once or twice to 8 bits."""

_HEADER = (
    *("operation", "case", "µs", "GB/s", "floor, µs", "% of the floor's speed"),
    *("torch loop, µs", "times faster", "difference"),
)


@dataclass(frozen=True, slots=True)
class Timing:
    """One case.

    Attributes:
        operation: Its.
        case: What it is.
        us: Microseconds of a call; None where it broke off.
        loop_us: Of the plain torch loop's.
        floor_us: That bytes and operations take at the device's measured rates.
        num_bytes: That it cannot do without.
        difference: Of the two results, of the largest number; None where it is not finite.
        error: Why it broke off.
    """

    operation: str
    case: str
    us: float | None
    loop_us: float | None
    floor_us: float
    num_bytes: int
    difference: float | None
    error: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with it, empty if nothing is."""
        what = f"{self.operation}, {self.case}"
        if self.error:
            return f"{what}: {self.error.strip().splitlines()[-1]}"
        if self.difference is None or self.difference > MOST_DIFFERENCE:
            return f"{what}: the result differs from the reference's by {self.difference}"
        return ""


@dataclass(frozen=True, slots=True)
class Speed:
    """All cases.

    Attributes:
        shapes: The base whose sizes they have.
        dtype: Of numbers and rows.
        rates: What the device was measured to do.
        timings: Theirs.
    """

    shapes: str
    dtype: str
    rates: Rates
    timings: tuple[Timing, ...]

    @property
    def faults(self) -> Sequence[str]:
        """Cases that broke off, and wrong results."""
        return [each.fault for each in self.timings if each.fault]


def measure(options: Options) -> Speed:
    """At the sizes of an 8B base, on the current GPU.

    Raises:
        RuntimeError: The device does not do what its rates are measured by.
        ValueError: The device's tuning file is no such thing.
    """
    device = torch.device("cuda")
    operands = Operands(POOL_BYTES, INDEX_BYTES, DTYPE, device, options.seed)
    backends = (select_backend("triton", DTYPE, device), reference_backend())
    rates = measure_rates()
    timings = time_cases(operands, backends, rates, (replayed_us, called_us), LLAMA_8B, Load())
    return Speed(LLAMA_8B.name, str(DTYPE).removeprefix("torch."), rates, tuple(timings))


def time_cases(
    operands: Operands,
    backends: tuple[Backend, Backend],
    rates: Rates,
    timers: tuple[Timer, Timer],
    shapes: Shapes,
    load: Load,
) -> Iterator[Timing]:
    """Of the kernels and of the reference, each by its timer."""
    for build in all_cases(shapes, load):
        operands.reset()
        case = build(operands)
        timing = _timed(case, backends, rates, timers)
        say(f"{case.operation}, {case.name}: {_number(timing.us)} us {timing.fault}")
        yield timing


def difference(case: Case, backends: tuple[Backend, Backend]) -> float | None:
    """The largest of the two results' differences, of the largest number of the second's."""
    before = [each.clone() for each in case.changed]

    def results(backend: Backend) -> list[torch.Tensor]:
        for now, then in zip(case.changed, before, strict=True):
            now.copy_(then)
        returned = case.run(backend)
        found = (*case.changed, *(() if returned is None else (returned,)))
        return [each.to(torch.float32, copy=True) for each in found]

    tested, expected = map(results, backends)
    found = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(tested, expected, strict=True)
    )
    return found if math.isfinite(found) else None


def render(speed: Speed) -> str:
    """The rates and the table."""
    rates = speed.rates
    cells = [_cells(each) for each in speed.timings]
    return (
        f"At the sizes of an {speed.shapes} base in {speed.dtype}. Measured of this device: copies"
        f" at {rates.bytes_per_second / 1e9:,.0f} GB/s (read and written), products of bfloat16 at"
        f" {rates.flops_per_second / 1e12:,.0f} TFLOP/s; a graph of one empty launch takes"
        f" {rates.replay_us:.1f} µs, which every time of ours includes. The floor is the bytes and"
        f" operations of the case at these rates.\n\n{table(_HEADER, cells)}"
    )


def _timed(
    case: Case, backends: tuple[Backend, Backend], rates: Rates, timers: tuple[Timer, Timer]
) -> Timing:
    us = loop_us = found = None
    error = ""
    try:
        found = difference(case, backends)
        us, loop_us = (
            timer(_calling(case, backend)) for timer, backend in zip(timers, backends, strict=True)
        )
    except (TritonError, RuntimeError, ValueError):
        error = traceback.format_exc()
    floor_us = rates.floor_us(case.work.num_bytes, case.work.flops)
    return Timing(
        case.operation, case.name, us, loop_us, floor_us, case.work.num_bytes, found, error
    )


def _calling(case: Case, backend: Backend) -> Callable[[], object]:
    return lambda: case.run(backend)


def _cells(timing: Timing) -> list[str]:
    us, loop_us = timing.us, timing.loop_us
    return [
        timing.operation,
        timing.case,
        _number(us),
        _number(us and timing.num_bytes / us / 1e3, 0),
        _number(timing.floor_us),
        _number(us and 100 * timing.floor_us / us, 0),
        _number(loop_us, 0),
        _number(us and loop_us and loop_us / us),
        "-" if timing.difference is None else f"{timing.difference:.1e}",
    ]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
