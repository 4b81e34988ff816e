"""``deltamux bench serve`` against a scripted server: what it sends, reports and refuses."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from deltamux.server.cli import cli

from .fake_openai import FakeServer

SMALL = ["--requests", "12", "--prompt-tokens", "5", "--output-tokens", "6"]


def bench(server: FakeServer, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    command = ["bench", "serve", "--base-url", server.url, *arguments]
    result = CliRunner().invoke(cli, command)
    return result.exit_code, result.stdout, result.stderr


def load(server: FakeServer, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The JSON line of a small run."""
    status, stdout, stderr = bench(server, *SMALL, *arguments)
    assert status == code, stderr
    return json.loads(stdout.splitlines()[-1])


def prompts(server: FakeServer) -> list[tuple[int, ...]]:
    return [tuple(body["prompt"]) for body in server.bodies]


def test_a_report_is_complete(server: FakeServer) -> None:
    server.chunk_sizes = (1, 3, 2)
    server.seconds_per_chunk = 0.01
    report = load(server, "--concurrency", "3", "--seed", "7", "--slo", "ttft=1e6,e2e=1e6")
    assert report.keys() == {"benchmark", "machine", "versions", "workload", "seed", "results"}
    assert report["versions"]["server"] == {"version": "0"}
    assert report["seed"] == report["workload"]["seed"] == 7
    assert report["workload"]["models"] == ["base"]
    assert report["workload"]["load"] == {"kind": "closed", "concurrency": 3}
    total = report["results"]["total"]
    assert (total["completed"], total["failed"]) == (12, 0)
    assert (total["output_tokens"], total["prompt_tokens"]) == (72, 60)
    assert total["goodput"]["share"] == 1
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        points = total[name]
        assert 0 <= points["p50"] <= points["p90"] <= points["p99"] <= points["max"]
    assert report["results"]["generator"]["cpu_us_per_token"] > 0
    assert len(server.bodies) == 12 + 3


def test_a_closed_loop_keeps_its_concurrency(server: FakeServer) -> None:
    server.together = 3
    load(server, "--concurrency", "3", "--warmup", "0", "--timeout", "60")
    assert server.most_running == 3


def test_adapters_in_turn_and_the_tables(server: FakeServer) -> None:
    status, stdout, stderr = bench(
        server, *SMALL, "--concurrency", "2", "--adapters", "3", "--top", "2"
    )
    assert status == 0
    measured = [body["model"] for body in server.bodies[2:]]
    assert sorted(measured) == sorted(["a0", "a1", "a2"] * 4)
    assert {len(prompt) for prompt in prompts(server)} == {5}
    assert len(set(prompts(server))) == 14
    assert "1 more adapters: see the JSON" in stdout
    assert "| adapter | requests |" in stdout
    assert "warm-up: 2/2 done" in stderr
    assert "measure: 12/12 done, 0 running" in stderr


def test_a_seed_sends_the_same_requests(server: FakeServer) -> None:
    options = ["--rate", "400", "--adapters", "4", "--popularity", "zipf:1.2"]
    options += ["--prompt-tokens", "uniform:1:20", "--output-tokens", "lognormal:4:1:1:9"]

    def bodies(*more: str) -> list[str]:
        load(server, *options, *more)
        sent = sorted(json.dumps(body) for body in server.bodies)
        server.bodies.clear()
        return sent

    first = bodies()
    assert bodies() == first
    assert bodies("--seed", "1") != first


def test_an_open_loop_does_not_wait_for_answers(server: FakeServer) -> None:
    server.seconds_per_chunk = 0.05
    server.together = 12
    report = load(server, "--burst", "6:0.1", "--warmup", "0", "--timeout", "60")
    assert server.most_running == 12
    assert report["workload"]["load"] == {"kind": "bursts", "size": 6, "every": 0.1}
    late = report["results"]["generator"]["late_ms"]
    assert 0 <= late["p50"] <= late["max"]
    assert report["results"]["total"]["itl_ms"]["p50"] > 40
    assert report["results"]["total"]["ttft_ms"]["p50"] > 40


def test_a_time_limit_ends_both_loops(server: FakeServer) -> None:
    server.seconds_per_chunk = 0.01
    for load_options in (["--rate", "100"], ["--concurrency", "4"]):
        status, stdout, _ = bench(server, "--seconds", "1", "--output-tokens", "3", *load_options)
        report = json.loads(stdout.splitlines()[-1])
        assert status == 0
        assert report["workload"]["requests"] is None
        assert 0 < report["results"]["total"]["completed"] < 200
        assert report["results"]["seconds"] > 0.9


@pytest.mark.parametrize("model", ["refused", "busy", "torn", "failing", "undone", "short"])
def test_failures_are_counted_and_leave_the_others_measured(server: FakeServer, model: str) -> None:
    report = load(server, "--models", f"base,{model}", "--warmup", "0", code=1)
    total = report["results"]["total"]
    assert (total["completed"], total["failed"]) == (6, 6)
    assert list(report["results"]["failures"].values()) == [6]
    assert report["results"]["adapters"][model]["ttft_ms"]["p50"] is None
    assert report["results"]["adapters"]["base"]["output_tokens"] == 36


def test_failures_say_why_on_stderr(server: FakeServer) -> None:
    _, _, stderr = bench(server, *SMALL, "--models", "busy", "--warmup", "4")
    assert "12 failed: HTTP 429: too many requests" in stderr
    assert "4 failed in the warm-up: HTTP 429: too many requests" in stderr


def test_a_failed_warm_up_is_a_failure(server: FakeServer) -> None:
    options = ["--models", "busy,base", "--popularity", "skewed:0:1"]
    report = load(server, *options, "--warmup", "2", code=1)
    assert report["results"]["total"]["failed"] == 0
    assert report["results"]["warmup_failures"] == {"HTTP 429: too many requests": 1}


def test_silence_is_a_failure(server: FakeServer) -> None:
    server.seconds_per_chunk = 0.6
    report = load(server, "--timeout", "0.2", "--concurrency", "12", "--warmup", "0", code=1)
    [(reason, count)] = report["results"]["failures"].items()
    assert (reason.startswith("ReadTimeout"), count) == (True, 12)


def test_tenants_send_their_keys_and_nothing_shows_them(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_ONE", "sk-secret-one")
    (tmp_path / "key").write_text("sk-secret-two\n")
    options = ["--tenant", "one=KEY_OF_ONE", "--tenant", f"two=@{tmp_path / 'key'}"]
    out = tmp_path / "report.json"
    command = [*SMALL, *options, "--models", "base,leaky", "--out", str(out)]
    status, stdout, stderr = bench(server, *command)
    assert status == 1
    report = json.loads(out.read_text())
    assert out.read_text() == stdout.splitlines()[-1] + "\n"
    assert set(server.keys) == {"Bearer sk-secret-one", "Bearer sk-secret-two"}
    counts = Counter(server.keys[16:])
    assert report["workload"]["tenants"] == ["one", "two"]
    for name, figures in report["results"]["tenants"].items():
        sent = figures["completed"] + figures["failed"]
        assert sent == counts[f"Bearer sk-secret-{name}"]
    assert "wrong key Bearer ***" in stderr
    assert "secret" not in stdout + stderr


def write_trace(path: Path, *rows: dict[str, Any]) -> list[str]:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return ["--trace", str(path)]


ROWS = [
    {"time": 0.0, "model": "a1", "prompt_tokens": 7, "output_tokens": 2, "tenant": "x"},
    {"time": 0.0, "model": "base", "prompt": "as text", "output_tokens": 3},
    {"time": 0.2, "model": "a1", "prompt_tokens": 9, "output_tokens": 4, "tenant": "y"},
]


def test_a_trace_is_sent_as_it_was(server: FakeServer, tmp_path: Path) -> None:
    status, stdout, _ = bench(server, *write_trace(tmp_path / "t.jsonl", *ROWS), "--warmup", "2")
    report = json.loads(stdout.splitlines()[-1])
    assert status == 0
    warm, sent = server.bodies[:2], server.bodies[2:]
    assert [len(body["prompt"]) for body in warm] == [7, 32]
    assert [(body["model"], body["max_tokens"]) for body in sent] == [
        ("a1", 2),
        ("base", 3),
        ("a1", 4),
    ]
    assert [len(sent[0]["prompt"]), sent[1]["prompt"], len(sent[2]["prompt"])] == [7, "as text", 9]
    assert report["results"]["seconds"] >= 0.2
    assert report["results"]["tenants"].keys() == {"x", "y"}
    assert report["workload"]["models"] == ["a1", "base"]
    trace = report["workload"]["trace"]
    assert (trace["file"], trace["requests"], len(trace["sha256"])) == ("t.jsonl", 3, 64)


def test_options_take_the_place_of_parts_of_a_trace(server: FakeServer, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", *ROWS)
    options = ["--concurrency", "1", "--output-tokens", "5", "--adapters", "2", "--warmup", "0"]
    status, stdout, _ = bench(server, *trace, *options, "--requests", "2")
    assert status == 0
    assert [body["model"] for body in server.bodies] == ["a0", "a1"]
    assert [body["max_tokens"] for body in server.bodies] == [5, 5]
    assert len(server.bodies[0]["prompt"]) == 7
    load = json.loads(stdout.splitlines()[-1])["workload"]["load"]
    assert load == {"kind": "closed", "concurrency": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no request"),
        ([{"time": 0}], "t:1: Object missing required field `model`"),
        ([ROWS[0] | {"typo": 1}], "t:1: Object contains unknown field `typo`"),
        ([ROWS[0], ROWS[0] | {"output_tokens": 0}], "t:2: Expected `int` >= 1"),
        ([ROWS[0] | {"prompt": "and text"}], "t:1: give one of prompt_tokens and prompt"),
        ([ROWS[2], ROWS[0]], "t:2: time 0 is before the last"),
    ],
)
def test_traces_that_are_none_are_refused(
    server: FakeServer, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    status, _, stderr = bench(server, *write_trace(tmp_path / "t", *rows))
    assert (status, len(stderr.splitlines())) == (2, 1)
    assert message in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapters", "5"], "--adapters 5: the server lists 4 adapters; load more first"),
        (["--adapters", "2", "--models", "a"], "--models and --adapters are two ways"),
        (["--concurrency", "0"], "Invalid value for '--concurrency'"),
        (["--rate", "2", "--burst", "2:2"], "--rate and --burst are different loads"),
        (["--rate", "2", "--concurrency", "2"], "--concurrency and --rate are different loads"),
        (["--burstiness", "2"], "--burstiness is of a --rate"),
        (["--popularity", "zipf"], "--popularity zipf: give one, turns"),
        (["--prompt-tokens", "no"], "--prompt-tokens no: give TOKENS"),
        (["--last-token-id", "10"], "--last-token-id is below --first-token-id"),
        (["--tenant", "a"], "give NAME=ENVVAR"),
        (["--tenant", "a=SURELY_NOT_SET"], "SURELY_NOT_SET is not set or empty"),
        (["--tenant", "a=@missing/file"], "the file cannot be read"),
        (["--trace", "missing"], "--trace missing: No such file"),
        (["--out", "missing/report.json"], "--out missing/report.json: there is no folder"),
        (["--seconds", "1e-9"], "no request was sent in the time given"),
        (["--nonsense"], "No such option"),
    ],
)
def test_errors_of_use_are_one_line(server: FakeServer, arguments: list[str], message: str) -> None:
    status, stdout, stderr = bench(server, *arguments, "--warmup", "0")
    line = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert (status, stdout, len(line)) == (2, "", 1)
    assert message in line[0]
    assert server.bodies == []


def test_tenants_of_a_trace_need_their_keys(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_X", "k")
    trace = write_trace(tmp_path / "t", *ROWS)
    status, _, stderr = bench(server, *trace, "--tenant", "x=KEY_OF_X")
    assert status == 2
    assert "the trace names tenant y: no --tenant has its key" in stderr


def test_texts_of_a_trace_take_no_prefix(server: FakeServer, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", *ROWS)
    status, _, stderr = bench(server, *trace, "--shared-prefix", "4")
    assert status == 2
    assert "a prefix of tokens cannot be set before the trace's texts" in stderr


def test_a_server_that_is_not_there_is_one_line() -> None:
    status, _, stderr = bench(FakeServer("http://127.0.0.1:1"))
    assert (status, len(stderr.splitlines())) == (2, 1)
    assert "is the server running?" in stderr


def test_a_server_without_a_base_needs_names(server: FakeServer) -> None:
    server.base = None
    server.with_version = False
    report = load(server, "--models", "a1")
    assert report["versions"]["server"] is None


def test_pictures_are_drawn(server: FakeServer, tmp_path: Path) -> None:
    server.seconds_per_chunk = 0.001
    load(server, "--adapters", "4", "--plot", str(tmp_path / "run"))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["run-adapters.png", "run-latency.png", "run-throughput.png"]
    for file in files:
        height, width, _ = imread(tmp_path / file).shape
        assert (width, height >= 300) == (1500, True)


def test_pictures_of_nothing_are_not_drawn(server: FakeServer, tmp_path: Path) -> None:
    load(server, "--models", "busy", "--plot", str(tmp_path / "run"), code=1)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_told(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    for name in [name for name in sys.modules if name.startswith("deltamux.benchmarks.load.")]:
        monkeypatch.delitem(sys.modules, name)
    status, _, stderr = bench(server, *SMALL)
    assert (status, len(stderr.splitlines())) == (2, 1)
    assert "httpx is not installed; run: pip install 'deltamux[bench]'" in stderr


def test_help_waits_for_no_library() -> None:
    program = (
        "import sys; from deltamux.benchmarks.cli import bench\n"
        "bench(['serve', '--help'], standalone_mode=False)\n"
        "print(sys.modules.keys() & {'httpx', 'numpy', 'torch', 'rich', 'matplotlib'})"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "--popularity HOW" in result.stdout
    assert result.stdout.splitlines()[-1] == "set()"


def test_the_module_is_the_same_command(server: FakeServer) -> None:
    command = [sys.executable, "-m", "deltamux.benchmarks.serve", "--base-url", server.url]
    result = subprocess.run(
        [*command, *SMALL], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["results"]["total"]["completed"] == 12
