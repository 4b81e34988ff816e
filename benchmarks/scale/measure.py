"""One run of ``deltamux bench adapters``, from its options to its report."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console

from ...server.config import default_state_dir
from ...server.model.errors import ModelError
from ...server.model.source import resolve_model
from ..compare.measure import ending_in_order
from ..errors import BenchmarkError
from ..machine import describe_machine, describe_versions
from . import many, overcommit, reload, report, storm
from .command import SCENARIOS
from .findings import Finding
from .fleet import make_fleet
from .overcommit import Level
from .setup import Say, Setup, Size

Draw = Callable[[Sequence[Level], Path], None]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command under their names; None where one is not given."""

    scenario: str
    adapters: int
    rank: int
    base: str
    streams: int
    prompt_tokens: int
    output_tokens: int
    requests: int
    rounds: int
    zipf: float
    cold_per_minute: float
    device_budget: int
    reloads: int
    first_token_id: int
    last_token_id: int
    threads: int | None
    seed: int
    work_dir: Path
    output: Path | None
    plot: Path | None

    @property
    def scenarios(self) -> Sequence[str]:
        """That are asked for."""
        return SCENARIOS if self.scenario == "all" else (self.scenario,)

    @property
    def fleet_size(self) -> int:
        """Adapters that the scenarios need; reload makes its own."""
        return 1 if self.scenario == "reload" else self.adapters

    @property
    def size(self) -> Size:
        """How much is asked for."""
        return Size(
            streams=self.streams,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            requests=self.requests,
            rounds=self.rounds,
            token_ids=range(self.first_token_id, self.last_token_id + 1),
            seed=self.seed,
        )


def measure(options: Options) -> bool:
    """Measure, print the table and the JSON line; whether every request was answered rightly.

    Raises:
        BenchmarkError: What was asked for cannot be measured.
    """
    _check(options)
    draw = _plotter(options)
    setup = _setup(options, _clock())
    findings = {}
    with ending_in_order():
        for name in options.scenarios:
            findings[name] = _measure(name, options, setup, draw)
    _report(options, setup, findings)
    return not any(finding.faults for finding in findings.values())


def _measure(name: str, options: Options, setup: Setup, draw: Draw | None) -> Finding:
    match name:
        case "many":
            return many.measure(setup, options.zipf)
        case "storm":
            return storm.measure(setup, options.cold_per_minute)
        case "reload":
            return reload.measure(setup, options.reloads)
        case _:
            finding, levels = overcommit.measure(setup, options.device_budget)
            if options.plot is not None and draw is not None:
                draw(levels, options.plot)
            return finding


def _clock() -> Say:
    """Says what is being done, and when since the start."""
    console, started = Console(stderr=True), time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        console.out(f"{minutes:3}:{seconds:02}  {text}", highlight=False)

    return say


def _setup(options: Options, say: Say) -> Setup:
    work_dir = options.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        base = resolve_model(options.base, default_state_dir())
    except ModelError as error:
        raise BenchmarkError(f"--base {options.base}: {error}") from error
    fleet = make_fleet(base, work_dir, options.fleet_size, options.rank, options.seed)
    threads = options.threads or len(os.sched_getaffinity(0))
    return Setup(base, work_dir, fleet, options.size, threads, say)


def _check(options: Options) -> None:
    if options.last_token_id < options.first_token_id:
        raise BenchmarkError("--last-token-id is below --first-token-id")
    if "many" in options.scenarios and options.adapters <= many.FEW:
        raise BenchmarkError(f"--adapters {options.adapters}: many compares with {many.FEW}")
    if options.plot is not None and "overcommit" not in options.scenarios:
        raise BenchmarkError("--plot draws the scenario overcommit, which is not asked for")
    for flag, path in (("--output", options.output), ("--plot", options.plot)):
        if path is not None and not path.parent.is_dir():
            raise BenchmarkError(f"{flag} {path}: there is no such folder")


def _plotter(options: Options) -> Draw | None:
    """Imported before the run, so that a missing library does not cost its results."""
    if options.plot is None:
        return None
    from .plot import draw

    return draw


def _report(options: Options, setup: Setup, findings: dict[str, Finding]) -> None:
    """A table, then the JSON line as the last of stdout."""
    size = asdict(setup.size) | {
        "token_ids": [options.first_token_id, options.last_token_id],
    }
    line = json.dumps(
        {
            "benchmark": "adapters",
            "machine": describe_machine(),
            "versions": describe_versions("deltamux", "torch", "httpx"),
            "workload": {
                "base": options.base,
                "adapters": options.adapters,
                "rank": options.rank,
                "adapter_file_bytes": setup.fleet.file_bytes,
                "threads": setup.threads,
                "zipf": options.zipf,
                "cold_per_minute": options.cold_per_minute,
                "device_budget": options.device_budget,
                "reloads": options.reloads,
                **size,
            },
            "seed": options.seed,
            "results": report.document(findings),
        }
    )
    for fault in report.faults(findings):
        click.echo(fault, err=True)
    click.echo(report.text(findings))
    if options.output is not None:
        options.output.write_text(line + "\n", "utf-8")
    click.echo(line)
