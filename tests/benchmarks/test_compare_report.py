"""The arithmetic of a comparison's report, and how systems drop out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from deltamux.benchmarks.client import Request
from deltamux.benchmarks.compare import comparison as comparing
from deltamux.benchmarks.compare import report
from deltamux.benchmarks.compare.answers import Finding
from deltamux.benchmarks.compare.comparison import Cell, Comparison, compare
from deltamux.benchmarks.compare.environment import Environments
from deltamux.benchmarks.compare.material import Material
from deltamux.benchmarks.compare.peers.peer import ONLY_BASE, Peer, Setup
from deltamux.benchmarks.compare.plot import draw
from deltamux.benchmarks.compare.process import SystemFailed
from deltamux.benchmarks.compare.scenarios import BASE, SCENARIOS, Scenario, Size, make_scenarios
from deltamux.benchmarks.load.results import Figures, Objective, summarize
from deltamux.benchmarks.load.run import Outcome, Record

SIZE = Size(4, 8, 4, 2, 60.0, range(3, 300), seed=5)
ADAPTERS = ["a", "b", "c", "d"]


def figures(rate: float, ttft: float, itl: float) -> Figures:
    """Of one request of three tokens; ``rate`` in tokens/s, the others in seconds."""
    times = np.array([ttft, ttft + itl, ttft + 2 * itl])
    record = Record(BASE, None, None, 0.0, times[-1], times, np.array([1, 1, 1]), 8)
    return summarize([record], 3 / rate, Objective())


def cell(*rounds: Figures) -> Cell:
    return Cell(None, None, dict(enumerate(rounds, start=1)))


def test_ratios_are_taken_within_rounds() -> None:
    ours = cell(figures(100, 0.1, 0.01), figures(300, 0.1, 0.01), figures(200, 0.2, 0.01))
    theirs = cell(figures(50, 0.2, 0.04), figures(100, 0.1, 0.02), figures(200, 0.1, 0.01))
    rates = report.ratios(ours, theirs, "output_tokens_per_second")
    assert rates == report.Spread(min=1.0, median=2.0, max=3.0)
    assert report.ratios(ours, theirs, "ttft_p50_ms") == report.Spread(0.5, 1.0, 2.0)
    assert report.ratios(ours, theirs, "itl_p50_ms") == report.Spread(0.25, 0.5, 1.0)


def test_a_round_that_one_of_two_lacks_has_no_ratio() -> None:
    ours = cell(figures(100, 0.1, 0.01), figures(300, 0.1, 0.01))
    late = Cell(None, None, {2: figures(100, 0.1, 0.01)})
    assert report.ratios(ours, late, "output_tokens_per_second") == report.Spread(3.0, 3.0, 3.0)
    assert report.ratios(ours, Cell("failed: x", None, {}), "ttft_p50_ms") is None


def test_a_single_token_has_no_gap_and_no_ratio() -> None:
    record = Record(BASE, None, None, 0.0, 1.0, np.array([1.0]), np.array([1]), 8)
    alone = cell(summarize([record], 1.0, Objective()))
    assert report.values(alone, "itl_p50_ms") is None
    assert report.ratios(alone, alone, "itl_p50_ms") is None


def test_scenarios_ask_for_what_they_say() -> None:
    models = {each.name: each.models for each in make_scenarios(SCENARIOS, ADAPTERS, 4)}
    assert models["base-single"] == models["base"] == (BASE,)
    assert models["adapter-single"] == models["shared"] == ("a",)
    assert models["distinct"] == ("a", "b", "c", "d")
    assert models["mixed"] == (BASE, "a", BASE, "b")


def test_no_prompt_is_sent_twice_in_a_comparison() -> None:
    prompts = [
        tuple(planned.request.prompt)
        for scenario in make_scenarios(SCENARIOS, ADAPTERS, 4)
        for phase in ("check", "round 1", "round 2")
        for workload in [scenario.workload(SIZE, phase)]
        for planned in (*workload.warm_up(), *workload.planned())
    ]
    assert len(set(prompts)) == len(prompts)


@dataclass
class Fake:
    """A system that takes a second a token, and does to a request for it what it is told."""

    fails: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, object] = field(default_factory=lambda: {"fake": "1"})
    settings: Mapping[str, object] = field(default_factory=lambda: {"threads": 1})
    log: list[str] = field(default_factory=list)
    frozen: bool = False

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        assert not self.frozen
        return [[len(each.model)] * each.output_tokens for each in requests]

    def run(self, scenario: Scenario, size: Size, phase: str) -> Outcome:
        assert not self.frozen
        self.log.append(f"{phase}, {scenario.name}")
        match self.fails.get(scenario.name):
            case "dies":
                raise SystemFailed("ended with -9; its log ends with: out of memory")
            case "refuses":
                return Outcome([self._record("HTTP 500: no")], 1.0, 0.0, [])
        return Outcome([self._record(None)], 4.0, 0.0, [])

    def _record(self, error: str | None) -> Record:
        times = np.array([1.0, 2.0, 3.0, 4.0])
        return Record(BASE, None, None, 0.0, 4.0, times, np.ones(4, int), 8, error)

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False

    def end(self) -> None:
        self.log.append("ended")


def run_fakes(
    monkeypatch: pytest.MonkeyPatch, peers: Sequence[Peer], names: Sequence[str], rounds: int = 2
) -> Comparison:
    """Compare without a reference: what ``wrong`` answers is what its name says."""
    monkeypatch.setattr(comparing, "Judge", lambda _: Fake())
    monkeypatch.setattr(comparing, "check", lambda *_: Finding(None, 0.0, 0.0, 1.0))
    material = Material(Path(), Path(), {name: Path(name) for name in ADAPTERS})
    setup = Setup(material, SIZE, 1, Path(), SimpleNamespace(python=None))
    return compare(peers, make_scenarios(names, ADAPTERS, 4), setup, rounds, lambda _: None)


def peer(name: str, fake: Fake | SystemFailed, lacks: Mapping[str, str] | None = None) -> Peer:
    def start(_: Setup) -> Fake:
        if isinstance(fake, SystemFailed):
            raise fake
        return fake

    return Peer(name, f"the system {name}", start, lacks or {})


def test_systems_take_turns_and_one_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    one, two = Fake(log=log), Fake(log=log)
    comparison = run_fakes(monkeypatch, [peer("ours", one), peer("other", two)], ["base", "shared"])
    assert log[:4] == ["round 1, base", "round 1, base", "round 1, shared", "round 1, shared"]
    assert log[-2:] == ["ended", "ended"]
    assert comparison.cells["other", "base"].rounds.keys() == {1, 2}
    ratio = report.ratios(
        comparison.cells["ours", "base"], comparison.cells["other", "base"], "ttft_p50_ms"
    )
    assert ratio == report.Spread(1.0, 1.0, 1.0)


def test_whoever_has_no_figures_is_in_the_report_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peers = [
        peer("ours", Fake()),
        peer("absent", SystemFailed("pip ended with 1: no such version")),
        peer("plain", Fake(), ONLY_BASE),
        peer("frail", Fake(fails={"shared": "dies", "base": "refuses"})),
    ]
    comparison = run_fakes(monkeypatch, peers, ["base", "shared"])
    text, document = report.text(comparison), report.document(comparison)
    assert document["base"]["absent"]["reason"] == "unavailable: pip ended with 1: no such version"
    assert "absent (base, shared): unavailable: pip ended with 1: no such version" in text
    assert "plain (shared): not offered: serves the base alone" in text
    assert "frail (shared): failed: ended with -9; its log ends with: out of memory" in text
    assert "frail (base): failed: 1 requests, the first: HTTP 500: no" in text
    assert document["base"]["frail"]["rounds"] == {}
    assert document["base"]["plain"]["ours_over_this"]["ttft_p50_ms"]["median"] == 1.0
    assert imread(draw(comparison, tmp_path)).shape[2] == 4


def test_a_system_that_serves_the_wrong_adapter_has_no_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Fake()
    wrong = Finding("3 of 4 answers are not the model's", 2.0, 9.0, 0.0)
    right = Finding(None, 0.0, 0.0, 1.0)
    short = Finding("request 0: 3 tokens instead of 4", None, None, None)
    findings = iter([right, right, wrong, right, short, right])
    monkeypatch.setattr(comparing, "Judge", lambda _: Fake())
    monkeypatch.setattr(comparing, "check", lambda *_: next(findings))
    material = Material(Path(), Path(), {name: Path(name) for name in ADAPTERS})
    setup = Setup(material, SIZE, 1, Path(), Environments(Path(), "torch", print))
    scenarios = make_scenarios(["distinct", "shared"], ADAPTERS, 4)
    peers = [peer("ours", Fake()), peer("other", fake), peer("brief", Fake())]
    comparison = compare(peers, scenarios, setup, 1, lambda _: None)
    assert fake.log == ["round 1, shared", "ended"]
    cell = comparison.cells["other", "distinct"]
    assert cell.reason == "wrong: 3 of 4 answers are not the model's"
    assert not cell.rounds
    assert "| other  | wrong " in report.text(comparison)
