"""One run, from its options to its report."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from ..errors import BenchmarkError
from ..machine import describe_machine, describe_versions
from . import report
from .options import Options, Plan
from .results import evaluate
from .run import Outcome, run
from .served import Served, ask_server
from .tenants import without_keys
from .workload import Workload

Draw = Callable[[Outcome, str, Path], list[Path]]


def measure(options: Options) -> bool:
    """Measure, print the tables and the JSON line; whether all requests succeeded.

    Raises:
        BenchmarkError: What was asked for cannot be measured.
    """
    plan, draw = options.plan(), _plotter(options)
    base_url = options.base_url.rstrip("/").removesuffix("/v1")
    served = ask_server(base_url, next(iter(plan.keys.values()), None))
    workload = plan.workload(served)
    outcome = asyncio.run(run(base_url, workload, options.timeout))
    if not outcome.records:
        raise BenchmarkError("no request was sent in the time given")
    _report(options, plan, served, workload, outcome)
    if options.plot is not None and draw is not None:
        for path in draw(outcome, report.title(workload), options.plot):
            click.echo(f"drawn: {path}", err=True)
    failed = any(record.error for record in outcome.records)
    return not failed and not outcome.warmup_errors


def _plotter(options: Options) -> Draw | None:
    """Imported before the run, so that a missing library does not cost its results."""
    if options.plot is None:
        return None
    from .plot import draw

    return draw


def _report(
    options: Options, plan: Plan, served: Served, workload: Workload, outcome: Outcome
) -> None:
    """Tables and warnings, then the JSON line as the last of stdout."""
    results = evaluate(outcome, plan.objective)
    line = json.dumps(
        {
            "benchmark": "serve",
            "machine": describe_machine(),
            "versions": describe_versions("deltamux", "httpx") | {"server": served.version},
            "workload": workload.describe(),
            "seed": workload.seed,
            "results": asdict(results),
        }
    )
    for warning in report.warnings(results):
        click.echo(without_keys(warning, plan.keys), err=True)
    click.echo(report.text(workload, results, options.top))
    line = without_keys(line, plan.keys)
    if options.out is not None:
        _write(options.out, line)
    click.echo(line)


def _write(path: Path, line: str) -> None:
    try:
        path.write_text(line + "\n", "utf-8")
    except OSError as error:
        click.echo(f"--out {path}: {error.strerror}; the same line is on stdout", err=True)
