"""Compiles every kernel launch of a served base for GPUs that are not there.

What is compiled is what ``kernels/gpu/production.py`` lists: all operations in all configurations,
at the shapes of an 8B base. Each distinct specialisation is compiled once for each target, by
processes of their own: in this one, kernels may have been made to be interpreted.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from multiprocessing import get_context

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from triton.errors import TritonError

from ..kernels.gpu.compile import (
    TARGETS,
    Compiled,
    Target,
    compile_launch,
    faults_of,
    specialisation,
)
from ..kernels.gpu.launch import Launch
from ..kernels.gpu.production import OPERATIONS, Production
from ..kernels.gpu.shapes import LLAMA_8B
from .errors import BenchmarkError
from .machine import describe_machine, describe_versions
from .markdown import table

DTYPES = (torch.bfloat16, torch.float16)
WORKERS = 2
_HEADER = (
    *("kernel", "configuration", "dtype", "target", "registers"),
    *("spilled bytes", "shared bytes", "matrix"),
)

Operations = Callable[[], Mapping[str, Production]]
"""A function of a module, by whose name another process finds what it returns."""


@dataclass(frozen=True, slots=True)
class Job:
    """One compilation.

    Attributes:
        operations: Where to find the operation.
        operation: Its name.
        dtype: Of rows and weights.
        index: Of the launch among the operation's.
        target: What it is compiled for.
    """

    operations: Operations
    operation: str
    dtype: torch.dtype
    index: int
    target: Target


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a job.

    Attributes:
        operation: The job's.
        kernel: Its name.
        configuration: Its constants, warps and stages.
        dtype: The job's.
        target: The name of the job's.
        compiled: None where it does not compile.
        faults: Why it should not run as it is.
    """

    operation: str
    kernel: str
    configuration: str
    dtype: str
    target: str
    compiled: Compiled | None
    faults: tuple[str, ...]


def served_operations() -> Mapping[str, Production]:
    """Those of a served base."""
    return OPERATIONS


def jobs_of(
    operations: Operations = served_operations,
    dtypes: Sequence[torch.dtype] = DTYPES,
    text: str = "",
) -> list[Job]:
    """Every distinct specialisation for every target.

    Args:
        operations: What there is to compile.
        dtypes: Of rows and weights.
        text: Only operations whose name contains it.
    """
    jobs: list[Job] = []
    seen: set[str] = set()
    for name in (name for name in operations() if text in name):
        for dtype in dtypes:
            for index, launch in enumerate(_launches(operations, name, dtype)):
                key = specialisation(launch)
                if key not in seen:
                    jobs += [Job(operations, name, dtype, index, target) for target in TARGETS]
                seen.add(key)
    return jobs


def compile_all(jobs: Sequence[Job], on_done: Callable[[], None] = lambda: None) -> list[Row]:
    """What became of each job, in order; ``on_done`` is called after each."""
    with _not_interpreted(), ProcessPoolExecutor(WORKERS, get_context("spawn")) as workers:
        futures = [workers.submit(compile_job, job) for job in jobs]
        for _ in as_completed(futures):
            on_done()
        return [future.result() for future in futures]


def compile_job(job: Job) -> Row:
    """Compile in this process; whatever hinders it is a fault."""
    launch = _launches(job.operations, job.operation, job.dtype)[job.index]
    compiled = None
    try:
        compiled = compile_launch(launch, job.target)
        faults = faults_of(compiled, job.target, launch.matrix)
    except (TritonError, RuntimeError) as error:  # the latter is what LLVM's passes raise
        faults = [f"does not compile: {str(error).splitlines()[-1]}"]
    return Row(
        operation=job.operation,
        kernel=launch.name,
        configuration=_configuration(launch),
        dtype=str(job.dtype).removeprefix("torch."),
        target=job.target.name,
        compiled=compiled,
        faults=tuple(faults),
    )


def run(text: str = "") -> int:
    """Compile what a served base needs and print it: how many faults there are.

    Args:
        text: Only operations whose name contains it.

    Raises:
        BenchmarkError: There are none.
    """
    jobs = jobs_of(text=text)
    if not jobs:
        raise BenchmarkError(f"no operation is called {text}; there are: {', '.join(OPERATIONS)}")
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=len(jobs))
        rows = compile_all(jobs, lambda: progress.advance(task))
    return report(rows)


def report(rows: Sequence[Row]) -> int:
    """Print a table an operation, a line a fault and the JSON line: how many faults there are."""
    for operation, group in groupby(rows, lambda row: row.operation):
        print(f"{operation}\n\n{table(_HEADER, [_cells(row) for row in group])}\n")
    faults = [line for row in rows for line in fault_lines(row)]
    print("\n".join([*faults, f"{len(rows)} compiled, {len(faults)} faults"]))
    found = {
        "benchmark": "kernels --compile-only",
        "machine": describe_machine(),
        "versions": describe_versions("torch", "triton"),
        "shapes": LLAMA_8B.name,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(found))
    return len(faults)


def fault_lines(row: Row) -> list[str]:
    """Each of its faults, with what it is a fault of."""
    what = f"{row.operation}, {row.kernel} ({row.configuration}), {row.dtype}, {row.target}"
    return [f"fault: {what}: {fault}" for fault in row.faults]


@cache
def _launches(operations: Operations, operation: str, dtype: torch.dtype) -> tuple[Launch, ...]:
    return tuple(operations()[operation](LLAMA_8B, dtype))


@contextmanager
def _not_interpreted() -> Iterator[None]:
    """For the processes that are started meanwhile, kernels are there to be compiled."""
    found = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if found is not None:
            os.environ["TRITON_INTERPRET"] = found


def _configuration(launch: Launch) -> str:
    constants = (f"{name}={value}" for name, value in launch.constants.items())
    return " ".join([*constants, f"warps={launch.num_warps}", f"stages={launch.num_stages}"])


def _cells(row: Row) -> list[str]:
    what = [row.kernel, row.configuration, row.dtype, row.target]
    if row.compiled is None:
        return [*what, "-", "-", "-", "does not compile"]
    costs = (row.compiled.registers, row.compiled.spilled_bytes, row.compiled.shared_bytes)
    return [*what, *map(str, costs), row.compiled.matrix]
