"""``deltamux bench serve``: the options of the load generator."""

from pathlib import Path
from typing import Any

import click

from ..usage import OneLineCommand, errors_of_use

_POSITIVE = click.FloatRange(0, min_open=True)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(
    cls=OneLineCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True, metavar="URL")
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    help="Load: N streams, each sends its next request when its last one ended.  [default: 16]",
)
@click.option(
    "--rate",
    type=_POSITIVE,
    metavar="R",
    help="Load: R requests a second, whatever becomes of them; gaps as of a Poisson process.",
)
@click.option(
    "--burstiness",
    type=_POSITIVE,
    metavar="B",
    help="Shape of the gamma distribution of those gaps: below 1 in bursts, above 1 evenly.",
)
@click.option(
    "--burst", metavar="K:T", help="Load: K requests at once every T seconds, such as 32:10."
)
@click.option(
    "--trace",
    type=_FILE,
    metavar="FILE",
    help="Load: requests of a file, a JSON object a line with time (seconds), model,"
    " output_tokens, prompt_tokens or prompt, and tenant if you like. What another option"
    " gives (a load, a popularity, lengths) is taken from there.",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    metavar="N",
    help="Requests to measure.  [default: 64; without bound with --seconds; all of a trace]",
)
@click.option("--seconds", type=_POSITIVE, metavar="T", help="Send no request after T seconds.")
@click.option(
    "--warmup",
    type=click.IntRange(0),
    metavar="N",
    help="Requests before, not counted, over all models in turn.  [default: --concurrency]",
)
@click.option("--models", metavar="NAME,NAME", help="Models to ask for.  [default: the base]")
@click.option(
    "--adapters",
    type=click.IntRange(1),
    metavar="N",
    help="Ask for the first N adapters that the server lists.",
)
@click.option(
    "--popularity",
    metavar="HOW",
    help="Of those models: one (all on the first), turns, uniform, zipf:EXPONENT, skewed:SHARE:K"
    " (SHARE of the traffic on the first K), half-base (half on the base).  [default: turns]",
)
@click.option(
    "--prompt-tokens",
    metavar="LENGTHS",
    help="N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA[:LOW:HIGH]; random ids.  [default: 128]",
)
@click.option("--output-tokens", metavar="LENGTHS", help="The same of the answers.  [default: 64]")
@click.option(
    "--shared-prefix",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Tokens that all prompts start with, before --prompt-tokens of their own.",
)
@click.option(
    "--adapter-prefix",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Tokens that the prompts of a model share, after --shared-prefix.",
)
@click.option(
    "--first-token-id", type=click.IntRange(0), default=1000, show_default=True, metavar="ID"
)
@click.option(
    "--last-token-id",
    type=click.IntRange(0),
    default=30000,
    show_default=True,
    metavar="ID",
    help="Prompts are drawn from these; below the vocabulary's size.",
)
@click.option(
    "--stop-at-eos",
    is_flag=True,
    help="Let answers end where the model ends them; else a shorter one is a failure.",
)
@click.option(
    "--tenant",
    multiple=True,
    metavar="NAME=KEY",
    help="A tenant whose API key is in the environment variable KEY, or in a file: NAME=@FILE."
    " Repeat it: requests are spread over all at random.",
)
@click.option(
    "--timeout",
    type=_POSITIVE,
    default=600.0,
    show_default=True,
    metavar="T",
    help="Seconds of silence after which a request has failed.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of all that is drawn: two runs with the same options send the same requests.",
)
@click.option(
    "--slo",
    metavar="BOUNDS",
    help="Goodput: the requests within bounds in ms, such as ttft=500,itl=50,tpot=40,e2e=10000."
    " Every gap between tokens must be within itl, their mean within tpot.",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    metavar="K",
    help="Rows of the tables by adapter and by tenant; the JSON has all.",
)
@click.option("--out", type=_FILE, metavar="FILE", help="Write the JSON line there as well.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="PREFIX",
    help="Draw PREFIX-latency.png, PREFIX-throughput.png and PREFIX-adapters.png.",
)
def serve(**options: Any) -> None:
    """Load a running server that speaks OpenAI's completions API, and measure its answers.

    The last line of the output is one JSON object. The exit status is 1 if a request failed, and 2
    if what was asked for cannot be measured.
    """
    with errors_of_use():
        from .measure import measure
        from .options import Options

        raise SystemExit(0 if measure(Options(**options)) else 1)
