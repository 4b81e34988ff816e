"""``deltamux bench adapters``: workloads, bars and reports, and one small run of all of it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from deltamux.benchmarks.errors import BenchmarkError
from deltamux.benchmarks.load.popularity import Popularity
from deltamux.benchmarks.load.run import Outcome, Record
from deltamux.benchmarks.scale import fleet, many, overcommit, reload, report, storm
from deltamux.benchmarks.scale.findings import Bar, Finding
from deltamux.benchmarks.scale.fleet import make_fleet, require_disk
from deltamux.benchmarks.scale.overcommit import Level
from deltamux.benchmarks.scale.reload import Tally
from deltamux.benchmarks.scale.setup import Setup, Size
from deltamux.benchmarks.scale.storm import Extra, Turn
from deltamux.benchmarks.scale.subject import Resident, Subject, running
from deltamux.server.cli import cli

SIZE = Size(4, 8, 4, 2000, 1, range(3, 300), 7)
NAMES = [f"lora-{index:05}" for index in range(10_000)]


def test_zipf_traffic_favours_the_first_and_reaches_far() -> None:
    load = SIZE.workload(NAMES, Popularity("zipf", exponent=1.0), "many")
    drawn = Counter(each.request.model for each in load.planned())
    assert sum(drawn.values()) == 2000
    # The first of n has 1 / H(n) of it, H(10,000) = 9.79.
    assert drawn["lora-00000"] == pytest.approx(2000 / 9.79, rel=0.25)
    assert drawn["lora-00000"] > 1.3 * drawn["lora-00001"]
    assert len(drawn) > 700
    assert max(drawn) > "lora-09000"


def test_runs_of_a_phase_are_alike_and_of_two_phases_are_not() -> None:
    def prompts(phase: str, models: list[str]) -> list[list[int]]:
        load = SIZE.workload(models, Popularity("uniform"), phase, requests=20)
        return [list(each.request.prompt) for each in load.planned()]

    assert prompts("a", NAMES) == prompts("a", NAMES[:10])
    assert not {*map(tuple, prompts("a", NAMES))} & {*map(tuple, prompts("b", NAMES))}
    assert all(len(prompt) == 8 for prompt in prompts("a", NAMES))


def record(model: str, ttft: float, gaps: list[float], error: str | None = None) -> Record:
    times = np.cumsum([ttft, *gaps])
    return Record(model, None, None, 0.0, 9.0, times, np.ones(len(times), np.int64), 8, error)


def outcome(rate: float, *, slowest: float = 1.0, error: str | None = None) -> Outcome:
    """Four requests of ten tokens each at ``rate`` tokens a second in all."""
    records = [record(f"m{n}", slowest if n == 3 else 1.0, [0.1] * 9) for n in range(4)]
    if error is not None:
        records.append(record("m4", 1.0, [], error))
    return Outcome(records, 40 / rate, 0.1, [])


@pytest.mark.parametrize(
    ("value", "bound", "at_least", "met"),
    [
        (0.9, 0.9, True, True),
        (0.89, 0.9, True, False),
        (1.2, 1.2, False, True),
        (1.21, 1.2, False, False),
        (None, 1.0, False, False),
        (None, 1.0, True, False),
    ],
)
def test_a_bar_is_met_or_not(value: float | None, bound: float, at_least: bool, met: bool) -> None:
    bar = Bar("it", value, bound, at_least)
    assert bar.met is met
    assert bar.document() == {
        "what": "it",
        "value": value,
        "at least" if at_least else "at most": bound,
        "met": met,
    }


def bars(finding: Finding) -> list[tuple[float | None, bool]]:
    return [(bar.value, bar.met) for bar in finding.bars]


def test_many_takes_the_median_of_the_rounds() -> None:
    rounds = [{"few": outcome(100), "all": outcome(rate)} for rate in (95, 50, 91)]
    start = {"start_seconds": 15.5}
    memory = {"engine_growth": 10, "budgets": 10}
    finding = many.judge(start, memory, outcome(30), rounds)
    assert bars(finding) == [(0.91, True), (15.5, False), (10, True)]
    assert finding.figures["ratio_while_cold"] == 0.3
    assert finding.faults == ()
    broken = [{"few": outcome(100), "all": outcome(95, error="no such model")}]
    [fault] = many.judge(start, memory, outcome(30), broken).faults
    assert fault == "all: 1 of 5 requests failed: no such model"


def test_storm_compares_the_slowest_gaps_with_those_of_quiet() -> None:
    def turn(gap: float, extra: Extra) -> Turn:
        records = [record("m", 1.0, [0.1] * 50 + [gap])]
        return Turn(Outcome(records, 10.0, 0.1, []), extra)

    extra = Extra(3, [0.2, 0.4], ["lora-7: RequestFailed: HTTP 503"])
    one = {"quiet": turn(0.2, Extra()), "busy": turn(0.22, Extra()), "storm": turn(0.25, extra)}
    finding = storm.judge([one])
    assert bars(finding) == [(1.25, False)]
    assert finding.figures["busy_over_quiet"] == [1.1]
    told = finding.figures["rounds"][0]["storm"]["extra"]
    assert told == {"sent": 3, "failed": 1, "ttft_p50_ms": 200.0, "ttft_p99_ms": 400.0}
    assert finding.faults == ("storm, cold: lora-7: RequestFailed: HTTP 503",)


def test_overcommit_compares_with_all_resident_and_finds_who_starves() -> None:
    rates = {0.5: 100, 1.0: 98, 2.0: 80, 4.0: 59, 8.0: 40}
    levels = [
        Level(times, int(10 * times), (outcome(rate, slowest=2 * times),) * 2)
        for times, rate in rates.items()
    ]
    finding = overcommit.judge(10, levels)
    assert bars(finding) == [(0.59, False), (16.0, False)]
    assert [each["ratio"] for each in finding.figures["levels"]] == [1, 0.98, 0.8, 0.59, 0.4]
    text = report.text({"overcommit": finding})
    assert "| tokens/s at 4x over all resident" in text
    assert text.splitlines()[-1].startswith("|              8 |       80 |")


def test_reload_finds_growth_failures_wrong_answers_and_what_is_left() -> None:
    flat, growing = [1000] * 100, [1000 + n for n in range(100)]
    assert reload.growth_per_thousand(flat) == 0
    assert reload.growth_per_thousand(growing) == pytest.approx(1000 / 1074.5, rel=1e-3)
    warming_up = list(range(50)) + [1000] * 50
    assert reload.growth_per_thousand(warming_up) == 0
    tally = Tally(answers=9, wrong=["an answer of version 2"])
    tally.resident = [Resident(http, 1000) for http in growing]
    before = {"gpu_bytes": 8, "disk_bytes": 5}
    finding = reload.judge(tally, before, {"gpu_bytes": 8, "disk_bytes": 7})
    assert [met for _, met in bars(finding)] == [True, False, False, True, False]
    assert finding.bars[-1].value == 2
    assert finding.faults == ("an answer of version 2",)


def test_adapters_are_made_once_and_all_are_different(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model("llama")
    made = make_fleet(base, tmp_path, 5, 2, 0)
    assert sorted(path.name for path in made.folder.iterdir()) == list(made.names)
    weights = {made.path(name) / "adapter_model.safetensors" for name in made.names}
    assert len({file.read_bytes() for file in weights}) == 5
    written = {file: file.stat().st_mtime_ns for file in weights}
    assert make_fleet(base, tmp_path, 5, 2, 0) == made
    assert {file: file.stat().st_mtime_ns for file in weights} == written
    assert make_fleet(base, tmp_path, 5, 2, 1).folder != made.folder
    monkeypatch.setattr(fleet, "TARGETS", ["nothing"])
    with pytest.raises(BenchmarkError, match="no module is called nothing"):
        make_fleet(base, tmp_path, 5, 2, 2)


def test_a_full_disk_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"take 1000000000.0 GB, and .* GB are free: ask for"):
        require_disk(tmp_path, 10**18)


SMALL = ["--rounds", "1", "--requests", "24", "--streams", "4", "--rank", "2", "--threads", "1"]
SMALL += ["--prompt-tokens", "8", "--output-tokens", "6", "--reloads", "12"]
SMALL += ["--first-token-id", "3", "--last-token-id", "299", "--cold-per-minute", "1200"]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One server for three of the scenarios, to save the time of their starts."""
    with ExitStack() as stack:
        started: list[Subject] = []

        @contextmanager
        def one(setup: Setup, log: str, state_dir: Path, _: object) -> Iterator[Subject]:
            if not started:
                folders = (setup.fleet.folder, reload.make_versions(setup).folder)
                options = [f"--adapter-dir={folder}" for folder in folders]
                options += ["--dtype", "float32", "--memory-budget", "1MiB", "--max-num-seqs", "4"]
                options += ["--host-memory-budget", "1MiB"]
                started.append(stack.enter_context(running(setup, log, state_dir, options)))
            yield started[0]

        for scenario in (storm, overcommit, reload):
            monkeypatch.setattr(scenario, "running", one)
        yield


def test_all_scenarios_on_a_tiny_base(
    tiny_model: Callable[..., Path], tmp_path: Path, shared: None
) -> None:
    work, plot, out = tmp_path / "work", tmp_path / "over.png", tmp_path / "out.json"
    command = ["bench", "adapters", "--base", str(tiny_model("llama")), "--adapters", "130", *SMALL]
    command += ["--work-dir", str(work), "--plot", str(plot), "--output", str(out)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert line == json.loads(out.read_text())
    assert line.keys() == {"benchmark", "machine", "versions", "workload", "seed", "results"}
    results = line["results"]
    assert results["many"]["registered"] == 130
    assert results["many"]["rounds"][0]["all"]["completed"] == 24
    assert results["storm"]["rounds"][0]["storm"]["extra"]["failed"] == 0
    levels = results["overcommit"]["levels"]
    assert [each["times"] for each in levels] == [0.5, 1, 2, 4, 8]
    held = results["overcommit"]["device_holds"]
    assert [each["live"] for each in levels] == [held // 2, *(held * n for n in (1, 2, 4, 8))]
    again = results["reload"]
    assert again["cached_prompt_tokens"] > 0
    assert reload.left(again["held_before"], again["held_after"]) == 0
    assert again["held_before"]["cpu_adapters"] >= reload.VERSIONS
    met = {bar["what"]: bar["met"] for bar in again["bars"]}
    assert met["requests that failed"]
    assert met["answers of no version that was served"]
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scenario", "everything"], "--scenario"),
        (["--scenario", "many", "--adapters", "10"], "--adapters 10: many compares with 10"),
        (["--scenario", "many", "--plot", "x.png"], "--plot draws the scenario overcommit"),
        (["--output", "/nowhere/at/all"], "--output /nowhere/at/all: there is no such folder"),
        (["--device-budget", "much"], "'much' is not a size"),
        (["--first-token-id", "9", "--last-token-id", "8"], "--last-token-id is below"),
        (["--base", "/nowhere/x"], "--base /nowhere/x: "),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    command = ["bench", "adapters", "--work-dir", str(tmp_path), *arguments]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
