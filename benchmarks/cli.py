"""``deltamux bench``: what may be asked of the benchmarks, and how they refuse."""

from pathlib import Path
from typing import Any

import click

from .compare.command import compare
from .load.command import serve
from .scale.command import adapters
from .usage import count_option, errors_of_use

_POSITIVE = click.FloatRange(0, min_open=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def bench() -> None:
    """Measure kernels, compile them for GPUs that are not there, count what a step must cost."""


@bench.command()
@click.option("--compile-only", is_flag=True, help="Compile the GPU's kernels; no GPU is needed.")
@click.option(
    "--tune",
    is_flag=True,
    help="Time the kernels' configurations on this GPU and keep the fastest for the server.",
)
@click.option(
    "--filter",
    "text",
    default="",
    metavar="TEXT",
    help="Only what has TEXT in its name: operations with --compile-only and --tune, else cases.",
)
def kernels(compile_only: bool, tune: bool, text: str) -> None:
    """Time the CPU's kernels, or compile or tune the GPU's and tell what they take there.

    With --compile-only the exit status is 1 if a kernel spills registers, needs more shared memory
    than there is, or multiplies without matrix instructions.
    """
    if compile_only and tune:
        raise click.UsageError("--compile-only needs no GPU and --tune needs one: give one of them")
    with errors_of_use():
        if tune:
            from .tune import run as tune_kernels

            tune_kernels(text)
        elif compile_only:
            from .compile_kernels import run as compile_kernels

            raise SystemExit(1 if compile_kernels(text) else 0)
        else:
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
    with errors_of_use():
        from .roofline import DEVICES, Workload, given_device, run

        devices = DEVICES if bandwidth is flops is None else (given_device(bandwidth, flops),)
        workload = Workload(
            devices=devices, rows=rows, context=context, prefix_tokens=prefix_tokens
        )
        run(workload if base is None else workload.of(base), plot)


@bench.command()
@click.option("--base", default="smollm2", metavar="MODEL", show_default=True, help="The base.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Of the engine.",
)
@click.option(
    "--kernels",
    type=click.Choice(["auto", "compiled", "reference"]),
    default="auto",
    show_default=True,
    help="Device operations.",
)
@count_option("--rows", 16, 1, "Sequences of a decode step.")
@count_option("--context", 128, 1, "Prompt tokens of each.")
@count_option("--adapters", 16, 0, "Different LoRAs over them; 0 for the bare base.")
@count_option("--rank", 16, 1, "Of each.")
@count_option("--steps", 40, 1, "Decode steps that are timed.")
@count_option("--seed", 0, 0, "Of prompts and adapters.")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Of torch.  [default: its own]"
)
def step(**options: Any) -> None:
    """Tell where the time of a prefill and of a decode step goes on this CPU, and its floor."""
    from ..server.engine.process import let_idle_threads_sleep

    let_idle_threads_sleep()  # as in the server, before torch is imported
    with errors_of_use():
        from .step import Workload, run

        run(Workload(**options))


@bench.command()
@click.option("--base", default="smollm2", metavar="MODEL", show_default=True, help="The base.")
@count_option("--rows", 16, 2, "Sequences of a decode step.")
@count_option("--context", 64, 1, "Prompt tokens of each.")
@count_option(
    "--steps", 50, 1, "Decode steps of a round, with none, half and all rows constrained."
)
@count_option("--rounds", 3, 1, "Of these.")
def structured(**options: Any) -> None:
    """Tell what it costs a decode step on this CPU that outputs must match a JSON schema."""
    from ..server.engine.process import let_idle_threads_sleep

    let_idle_threads_sleep()
    with errors_of_use():
        from .structured import Workload, run

        run(Workload(**options))


bench.add_command(serve)
bench.add_command(compare)
bench.add_command(adapters)
