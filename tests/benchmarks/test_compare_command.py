"""``deltamux bench compare`` with real systems on a tiny base, and how it fails."""

import json
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from deltamux.benchmarks.client import Request
from deltamux.benchmarks.compare import environment, measure
from deltamux.benchmarks.compare.environment import Environment, Environments, versions
from deltamux.benchmarks.compare.peers import hugging_face
from deltamux.benchmarks.compare.peers.library import Library
from deltamux.benchmarks.compare.peers.peer import Peer, Setup
from deltamux.benchmarks.compare.peers.server import Server
from deltamux.benchmarks.compare.process import Process, SystemFailed, run_tool
from deltamux.server.cli import cli

from .fake_openai import FakeServer

SMALL = ["--streams", "4", "--prompt-tokens", "12", "--output-tokens", "16", "--rounds", "2"]
SMALL += ["--requests-per-stream", "1", "--threads", "1"]
SMALL += ["--first-token-id", "3", "--last-token-id", "299"]


def test_this_server_beside_transformers_and_peft(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PEERS", (*hugging_face.PEERS[:2], _dying()))
    command = ["bench", "compare", "--base", str(tiny_model("llama")), *SMALL]
    command += ["--scenarios", "base,mixed", "--work-dir", str(tmp_path / "work")]
    command += ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert line == json.loads((tmp_path / "out.json").read_text())
    assert line.keys() >= {"benchmark", "machine", "versions", "workload", "seed", "settings"}
    assert line["versions"]["systems"]["peft"]["peft"] == "0.21.2"
    mixed, base = line["results"]["mixed"], line["results"]["base"]
    for name in ("deltamux", "peft"):
        assert mixed[name]["reason"] is None
        assert mixed[name]["answers"]["fault"] is None
        assert [mixed[name]["rounds"][n]["output_tokens"] for n in "12"] == [64, 64]
    assert base["transformers"]["ours_over_this"]["output_tokens_per_second"]["median"] > 0
    assert mixed["transformers"]["reason"] == "not offered: serves the base alone"
    assert base["mortal"]["reason"].startswith("unavailable: ended with 7; ")
    assert base["mortal"]["reason"].endswith("ends with: no more")
    assert "mortal (base, mixed): unavailable" in result.stdout
    assert (tmp_path / "compare.png").stat().st_size > 1000


def _dying() -> Peer:
    """A library whose worker ends when it is started."""

    def start(setup: Setup) -> Library:
        code = "import sys; print('no more', file=sys.stderr); sys.exit(7)"
        process = Process([sys.executable, "-c", code], setup.log("mortal"), os.environ, talks=True)
        process.ask("{}")
        raise AssertionError("it answered")

    return Peer("mortal", "a system that dies", start)


def test_a_server_that_refuses_a_request_has_failed(server: FakeServer) -> None:
    asked = Server(None, server.url, versions={}, settings={}, extras={})
    requests = [Request("a0", [5, 6], 3), Request("base", [7], 2)]
    assert [len(answer) for answer in asked.answer(requests)] == [3, 2]
    with pytest.raises(SystemFailed, match="a request failed: HTTP"):
        asked.answer([*requests, Request("refused", [5, 6], 3)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "vlm"], "--peers vlm: give some of transformers,peft,"),
        (["--scenarios", "all"], "--scenarios all: give some of base-single,"),
        (["--output", "/nowhere/at/all"], "--output /nowhere/at/all: there is no such folder"),
        (["--plot", "/nowhere"], "--plot /nowhere: there is no such folder"),
        (["--first-token-id", "9", "--last-token-id", "8"], "--last-token-id is below"),
        (["--base", "/nowhere/x"], "--base /nowhere/x: "),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    command = ["bench", "compare", "--work-dir", str(tmp_path), *arguments]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_environment_that_is_here_is_not_made_again(tmp_path: Path) -> None:
    environments = Environments(tmp_path, "torch", print)
    assert environments.python(hugging_face.ENVIRONMENT) == Path(sys.executable)
    assert versions(Path(sys.executable), ["peft"])["peft"] == "0.21.2"
    with pytest.raises(SystemFailed, match="PackageNotFoundError"):
        versions(Path(sys.executable), ["a-package-that-is-not-there"])


def test_an_environment_is_made_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def record(command: list[object], log: Path) -> None:
        ran.append([str(word) for word in command[1:]])
        (tmp_path / "some" / "lib" / "python3.11" / "site-packages").mkdir(
            parents=True, exist_ok=True
        )

    monkeypatch.setattr(environment, "run_tool", record)
    environments = Environments(tmp_path, "torch==1", lambda _: None)
    some = Environment("some", ("thing==2",), without=("other",), metadata={"thong": "2+cpu"})
    assert environments.python(some) == tmp_path / "some" / "bin" / "python"
    assert [command[-2:] for command in ran] == [
        ["venv", str(tmp_path / "some")],
        ["torch==1", "thing==2"],
        ["--yes", "other"],
    ]
    metadata = next(tmp_path.glob("some/lib/*/*/thong-2+cpu.dist-info/METADATA"))
    assert "Name: thong\nVersion: 2+cpu\n" in metadata.read_text()
    environments.python(some)
    assert len(ran) == 3
    environments.python(Environment("some", ("thing==3",), ("other",), {"thong": "2+cpu"}))
    assert len(ran) == 6


def test_a_tool_that_fails_says_its_last_line(tmp_path: Path) -> None:
    code = "print('first'); print('there is no such version'); raise SystemExit(3)"
    with pytest.raises(SystemFailed, match=r"ended with 3; .*: there is no such version"):
        run_tool([sys.executable, "-c", code], tmp_path / "log")
    with pytest.raises(SystemFailed, match="No such file"):
        run_tool([tmp_path / "nothing"], tmp_path / "log")


def test_a_frozen_process_is_ended_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "for line in sys.stdin: print(child.pid, flush=True)\n"
    )
    process = Process([sys.executable, "-c", code], tmp_path / "log", os.environ, talks=True)
    child = os.pidfd_open(int(process.ask("who?")))  # readable once it has ended
    process.freeze()
    assert not process.ended()
    process.end()
    assert process.ended()
    with pytest.raises(SystemFailed, match="ended with"):
        process.ask("who?")
    assert select.select([child], [], [], 10)[0] == [child]
    os.close(child)


def test_a_signal_to_end_ends_the_systems_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, measure.ending_in_order():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
