"""``deltamux bench compare``: the options of the comparison."""

from pathlib import Path
from typing import Any

import click

from ..usage import OneLineCommand, count_option, errors_of_use

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(
    cls=OneLineCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--peers",
    metavar="NAME,NAME",
    help="Of transformers, peft, peft-turns, vllm, vllm-base, openvino, openvino-turns,"
    " openvino-base and llama.cpp.  [default: all]",
)
@click.option(
    "--scenarios",
    metavar="NAME,NAME",
    help="Of base-single, adapter-single, base, shared, distinct and mixed.  [default: all]",
)
@count_option("--rounds", 3, 1, "How often all systems take their turns.")
@click.option("--base", default="smollm2", metavar="MODEL", show_default=True, help="The base.")
@count_option("--streams", 16, 1, "Of the scenarios with many; as many adapters are made.")
@count_option("--prompt-tokens", 128, 1, "Of every request; random ids.")
@count_option("--output-tokens", 64, 1, "Of every request, whatever they are.")
@count_option("--requests-per-stream", 4, 1, "That each stream sends in a run.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    metavar="T",
    show_default=True,
    help="Send no request after T seconds of a run.",
)
@count_option("--first-token-id", 1000, 1, "Prompts are drawn from this id")
@count_option("--last-token-id", 30000, 1, "to this one, below the vocabulary's size.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Of every system.  [default: one for each core]",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N")
@click.option(
    "--torch",
    default="torch==2.13.0",
    metavar="REQUIREMENT",
    show_default=True,
    help="The build of PyTorch that peers get.",
)
@click.option(
    "--work-dir",
    type=_FOLDER,
    default=Path("build/compare"),
    show_default=True,
    help="For peers' environments, models, adapters and logs; what is there is used again.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the JSON line there as well.",
)
@click.option("--plot", type=_FOLDER, metavar="DIR", help="Draw compare.png there.")
def compare(**options: Any) -> None:
    """Measure this server and others on the same work, in one run, in turns.

    Every system's answers are checked first; one that serves the wrong model has no figure. Peers
    are installed into environments of their own. The last line of the output is one JSON object.
    The exit status is 1 if this server's own answers are wrong or fail, and 2 if what was asked for
    cannot be measured.
    """
    with errors_of_use():
        from .measure import Options, measure

        raise SystemExit(0 if measure(Options(**options)) else 1)
