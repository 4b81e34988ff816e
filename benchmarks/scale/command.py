"""``deltamux bench adapters``: the options of the measurements of the adapter store."""

from pathlib import Path
from typing import Any

import click

from ...server.config import parse_bytes
from ..usage import OneLineCommand, count_option, errors_of_use

SCENARIOS = ("many", "storm", "overcommit", "reload")
_POSITIVE = click.FloatRange(0, min_open=True)
_FILE = click.Path(path_type=Path, dir_okay=False)


def _bytes(_: click.Context, param: click.Parameter, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=param) from error


@click.command(
    cls=OneLineCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--scenario",
    type=click.Choice([*SCENARIOS, "all"]),
    default="all",
    show_default=True,
    help="many: all adapters registered, against ten of them; storm: cold adapters beside steady"
    " traffic; overcommit: more live adapters than the device holds; reload: new versions of one"
    " name under load.",
)
@count_option("--adapters", 10_000, 1, "LoRAs that are made and registered.")
@count_option("--rank", 2, 1, "Of each, on q_proj and v_proj.")
@click.option("--base", default="smollm2", metavar="MODEL", show_default=True, help="The base.")
@count_option("--streams", 16, 1, "Requests in flight, each for an adapter of its own choice.")
@count_option("--prompt-tokens", 64, 1, "Of every request; random ids.")
@count_option("--output-tokens", 32, 2, "Of every request, whatever they are.")
@count_option("--requests", 256, 1, "Of every measured run.")
@count_option("--rounds", 3, 1, "How often the runs of a scenario take their turns.")
@click.option(
    "--zipf",
    type=click.FloatRange(0),
    default=1.0,
    metavar="S",
    show_default=True,
    help="many: the r-th adapter has a share of the traffic proportional to r to the power of -S.",
)
@click.option(
    "--cold-per-minute",
    type=_POSITIVE,
    default=200.0,
    metavar="N",
    show_default=True,
    help="storm: cold adapters that are asked for.",
)
@click.option(
    "--device-budget",
    default="48MiB",
    callback=_bytes,
    metavar="BYTES",
    show_default=True,
    help="overcommit: the server's --memory-budget; small, so that few adapters fit.",
)
@count_option("--reloads", 1000, 2, "reload: new versions.")
@count_option("--first-token-id", 1000, 0, "Prompts are drawn from this id")
@count_option("--last-token-id", 30000, 0, "to this one, below the vocabulary's size.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Of the server.  [default: one for each core]",
)
@count_option("--seed", 0, 0, "Of adapters, prompts and traffic.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/scale"),
    show_default=True,
    help="For adapters, which are used again, the servers' state folders and logs.",
)
@click.option("--output", type=_FILE, metavar="FILE", help="Write the JSON line there as well.")
@click.option("--plot", type=_FILE, metavar="FILE", help="overcommit: draw to this PNG file.")
def adapters(**options: Any) -> None:
    """Measure the adapter store: many adapters, cold ones, too many for the device, reloads.

    Starts servers of its own. The last line of the output is one JSON object with every figure and
    whether it reaches its bar. The exit status is 1 if a request failed or was answered wrongly,
    and 2 if what was asked for cannot be measured; figures below their bar are only told.
    """
    with errors_of_use():
        from .measure import Options, measure

        raise SystemExit(0 if measure(Options(**options)) else 1)
