"""``deltamux bench``: what may be asked of the benchmarks, and how they refuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from .errors import BenchmarkError

_PACKAGES = ("httpx", "rich", "matplotlib")
"""Of the extra ``bench``."""
_POSITIVE = click.FloatRange(0, min_open=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def bench() -> None:
    """Measure kernels, compile them for GPUs that are not there, count what a step must cost."""


@bench.command()
@click.option("--compile-only", is_flag=True, help="Compile the GPU's kernels; no GPU is needed.")
@click.option(
    "--filter",
    "text",
    default="",
    metavar="TEXT",
    help="Only what has TEXT in its name: operations with --compile-only, else cases.",
)
def kernels(compile_only: bool, text: str) -> None:
    """Time the CPU's kernels, or compile the GPU's and tell what they take there.

    With --compile-only the exit status is 1 if a kernel spills registers, needs more shared memory
    than there is, or multiplies without matrix instructions.
    """
    with _errors_of_use():
        if compile_only:
            from .compile_kernels import run as compile_kernels

            raise SystemExit(1 if compile_kernels(text) else 0)
        from .kernels import run as time_kernels

        time_kernels(text=text)


@bench.command()
@click.option(
    "--base",
    metavar="FOLDER",
    help="Count for this model folder, or for smollm2.  [default: Llama 1B, 8B and 70B]",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=64,
    metavar="N",
    show_default=True,
    help="Sequences of a step.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=1024,
    metavar="N",
    show_default=True,
    help="Keys that a row attends to.",
)
@click.option(
    "--prefix",
    "prefix_tokens",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    show_default=True,
    help="Tokens of the prefix that every adapter has beside its matrices.",
)
@click.option(
    "--bandwidth",
    type=_POSITIVE,
    metavar="GB/S",
    help="Of a device to count for, with --flops.  [default: A100, H100 and H200]",
)
@click.option(
    "--flops", type=_POSITIVE, metavar="TFLOP/S", help="Of the device that --bandwidth is of."
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw to this file.")
def roofline(
    base: str | None,
    rows: int,
    context: int,
    prefix_tokens: int,
    bandwidth: float | None,
    flops: float | None,
    plot: Path | None,
) -> None:
    """Tell the time that no decode step can be shorter than, with and without adapters."""
    with _errors_of_use():
        from .roofline import DEVICES, Workload, given_device, run

        devices = DEVICES if bandwidth is flops is None else (given_device(bandwidth, flops),)
        workload = Workload(
            devices=devices, rows=rows, context=context, prefix_tokens=prefix_tokens
        )
        run(workload if base is None else workload.of(base), plot)


def _refuse(name: str) -> None:
    """Name a benchmark of a later release."""

    @bench.command(
        name,
        short_help="Later release.",
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def refused(arguments: tuple[str, ...]) -> None:
        raise click.UsageError(
            f"bench {' '.join([name, *arguments])} is not in this release; see the roadmap in"
            " CHANGELOG.md; python -m deltamux.benchmarks.serve measures a running server"
        )


for _name in ("serve", "compare", "adapters", "step"):
    _refuse(_name)


@contextmanager
def _errors_of_use() -> Iterator[None]:
    try:
        yield
    except BenchmarkError as error:
        raise click.UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _PACKAGES:
            raise
        raise click.UsageError(
            f"{error.name} is not installed; run: pip install 'deltamux[bench]'"
        ) from error
