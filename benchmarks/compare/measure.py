"""One comparison, from its options to its report."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console

from ..errors import BenchmarkError
from ..machine import describe_machine, describe_versions
from . import report
from .comparison import Comparison, compare
from .environment import Environments
from .material import RANK, make_material
from .peers import hugging_face, llama_cpp, openvino, ours, vllm
from .peers.peer import Setup
from .process import SystemFailed
from .scenarios import SCENARIOS, Size, make_scenarios

Draw = Callable[[Comparison, Path], Path]
PEERS = (*hugging_face.PEERS, *vllm.PEERS, *openvino.PEERS, llama_cpp.PEER)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command under their names; None where one is not given."""

    peers: str | None
    scenarios: str | None
    rounds: int
    base: str
    streams: int
    prompt_tokens: int
    output_tokens: int
    requests_per_stream: int
    seconds: float
    first_token_id: int
    last_token_id: int
    threads: int | None
    seed: int
    torch: str
    work_dir: Path
    output: Path | None
    plot: Path | None

    @property
    def size(self) -> Size:
        """How much is asked for."""
        return Size(
            streams=self.streams,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            per_stream=self.requests_per_stream,
            seconds=self.seconds,
            token_ids=range(self.first_token_id, self.last_token_id + 1),
            seed=self.seed,
        )


def measure(options: Options) -> bool:
    """Compare, print the tables and the JSON line; whether this server did all it was asked.

    Raises:
        BenchmarkError: What was asked for cannot be measured.
    """
    console, started = Console(stderr=True), time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        console.out(f"{minutes:3}:{seconds:02}  {text}", highlight=False)

    _check(options)
    peers = {peer.name: peer for peer in PEERS}
    chosen = _chosen("--peers", options.peers, list(peers))
    systems = (ours.PEER, *(peers[name] for name in chosen))
    names = _chosen("--scenarios", options.scenarios, SCENARIOS)
    draw = _plotter(options)
    work_dir = options.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    material = make_material(options.base, work_dir, max(2, options.streams), options.seed)
    setup = Setup(
        material=material,
        size=options.size,
        threads=options.threads or len(os.sched_getaffinity(0)),
        logs=work_dir / "logs",
        environments=Environments(work_dir / "environments", options.torch, say),
    )
    scenarios = make_scenarios(names, list(material.adapters), options.streams)
    try:
        with ending_in_order():
            comparison = compare(systems, scenarios, setup, options.rounds, say)
    except SystemFailed as error:
        raise BenchmarkError(f"there is nothing to check answers with: {error}") from error
    _report(options, setup, comparison)
    if options.plot is not None and draw is not None:
        say(f"drawn: {draw(comparison, options.plot)}")
    return all(comparison.cells[ours.NAME, scenario.name].reason is None for scenario in scenarios)


def _chosen(option: str, text: str | None, known: Sequence[str]) -> Sequence[str]:
    if text is None:
        return known
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise BenchmarkError(f"{option} {text}: give some of {','.join(known)}")
    return names


def _check(options: Options) -> None:
    if options.last_token_id < options.first_token_id:
        raise BenchmarkError("--last-token-id is below --first-token-id")
    if options.output is not None and not options.output.parent.is_dir():
        raise BenchmarkError(f"--output {options.output}: there is no such folder")
    if options.plot is not None and not options.plot.is_dir():
        raise BenchmarkError(f"--plot {options.plot}: there is no such folder")


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let SIGTERM end the systems too: they are processes of their own, most of them asleep."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plotter(options: Options) -> Draw | None:
    """Imported before the run, so that a missing library does not cost its results."""
    if options.plot is None:
        return None
    from .plot import draw

    return draw


def _report(options: Options, setup: Setup, comparison: Comparison) -> None:
    """Tables, then the JSON line as the last of stdout."""
    line = json.dumps(
        {
            "benchmark": "compare",
            "machine": describe_machine(),
            "versions": describe_versions("deltamux") | {"systems": comparison.versions},
            "workload": _workload(options, setup),
            "seed": options.seed,
            "settings": comparison.settings,
            "results": report.document(comparison),
        }
    )
    click.echo(report.text(comparison))
    if options.output is not None:
        options.output.write_text(line + "\n", "utf-8")
    click.echo(line)


def _workload(options: Options, setup: Setup) -> dict[str, object]:
    size = asdict(setup.size) | {
        "token_ids": [setup.size.token_ids.start, setup.size.token_ids.stop - 1]
    }
    adapters = {"adapters": len(setup.material.adapters), "rank": RANK, "dtype": "bfloat16"}
    return {
        "base": options.base,
        "rounds": options.rounds,
        "threads": setup.threads,
        **size,
        **adapters,
    }
