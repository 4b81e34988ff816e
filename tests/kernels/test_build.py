"""The compiled library: found again, rebuilt when anything changes, and on torch's own threads."""

import errno
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from deltamux.kernels import build
from deltamux.kernels.backend import Backend, compiled_backend, select_backend

CPU = torch.device("cpu")


class FakeCompiler:
    """A shell script in place of a compiler: predefines ``macros``, writes a file, keeps a log.

    ``fails`` is a word of the commands that fail.
    """

    def __init__(self, folder: Path, macros: str = "AVX", fails: str = "") -> None:
        self.log = folder / "runs"
        script = folder / "compiler"
        ending = f"case \"$all\" in *{fails}*) echo 'no such instruction' >&2; exit 1;; esac"
        script.write_text(
            "#!/bin/sh\n"
            f'case "$*" in *-dM*) echo {macros}; exit 0;; esac\n'
            f'all="$*"; echo "$all" >> {self.log}\n'
            'while [ "$1" != -o ]; do shift; done\n'
            'echo library > "$2"\n'
            f"{ending if fails else 'exit 0'}\n"
        )
        script.chmod(0o755)
        self.compiler = build.Compiler((str(script),))

    @property
    def runs(self) -> list[str]:
        return self.log.read_text().splitlines()


def test_a_library_is_built_once(tmp_path: Path) -> None:
    fake = FakeCompiler(tmp_path)
    first = build.build_library(fake.compiler, tmp_path / "cache")
    assert build.build_library(fake.compiler, tmp_path / "cache") == first
    *compiled, linked = fake.runs
    sources = sorted(re.findall(r"-c (\S+\.cpp)", "\n".join(compiled)))
    assert sources == sorted(map(str, Path(build.__file__).parent.rglob("*.cpp")))
    assert len(compiled) == len(sources)
    assert len(re.findall(r"\S+\.o\b", linked)) == len(sources)
    assert list((tmp_path / "cache").iterdir()) == [first]


class Meeting:
    """A compiler of which two must run at once."""

    command = ("meeting",)

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)

    def run(self, arguments: Sequence[str]) -> str:
        if "-c" in arguments:
            self.barrier.wait(timeout=30)
        elif "-shared" in arguments:
            Path(arguments[arguments.index("-o") + 1]).touch()
        return ""


def test_sources_are_compiled_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [tmp_path / f"{name}.cpp" for name in "ab"]
    for source in sources:
        source.touch()
    monkeypatch.setattr(build, "_sources", lambda: sources)
    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    assert build.build_library(Meeting(), tmp_path / "cache").exists()


def test_another_cpu_or_compiler_gets_another_library(tmp_path: Path) -> None:
    one = build.build_library(FakeCompiler(tmp_path, "AVX").compiler, tmp_path / "cache")
    two = build.build_library(FakeCompiler(tmp_path, "AVX512").compiler, tmp_path / "cache")
    assert one != two


def test_another_source_gets_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "one.cpp"
    fake = FakeCompiler(tmp_path)
    libraries = set()
    monkeypatch.setattr(build, "_sources", lambda: [source])
    for text in ("int a;", "int b;"):
        source.write_text(text)
        libraries.add(build.build_library(fake.compiler, tmp_path / "cache"))
    assert len(libraries) == 2


def test_concurrent_builds_agree(tmp_path: Path) -> None:
    fake = FakeCompiler(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(build.build_library, fake.compiler, tmp_path / "c") for _ in range(8)]
    assert len({job.result() for job in jobs}) == 1
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".so"]


@pytest.mark.parametrize("fails", ["sparse/cpu.cpp", "-shared"])
def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path: Path, fails: str) -> None:
    fake = FakeCompiler(tmp_path, fails=fails)
    with pytest.raises(build.CompilerError, match=f"(?s){fails}.*no such instruction"):
        build.build_library(fake.compiler, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_cxx_names_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache some-c++")
    assert build.find_compiler() == build.Compiler(("ccache", "some-c++"))


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_auto_warns_and_compiled_refuses(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", torch.float32, CPU, tmp_path).name == "reference"
    assert "install g++" in caplog.text
    with pytest.raises(build.CompilerError, match="install g"):
        select_backend("compiled", torch.float32, CPU, tmp_path)


def test_a_compiler_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(build.CompilerError, match="/nowhere/c"):
        compiled_backend(tmp_path)


def test_backends_by_name(compiled: Backend) -> None:
    names = ("auto", "compiled", "reference")
    for dtype in (torch.float32, torch.bfloat16):
        chosen = [select_backend(name, dtype, CPU).name for name in names]
        assert chosen == [compiled.name, "compiled", "reference"]
    with pytest.raises(ValueError, match="no backend 'fast'"):
        select_backend("fast", torch.float32, CPU)


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        ("triton", "cpu", "need a GPU"),
        ("interpret", "cuda", "no backend 'interpret' for cuda"),
        ("compiled", "cuda", "compiled kernels are for the CPU"),
    ],
)
def test_a_backend_of_another_device_is_refused(name: str, device: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        select_backend(name, torch.bfloat16, torch.device(device))


def test_a_dtype_without_compiled_kernels(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", torch.float16, CPU).name == "reference"
    assert "no compiled kernels for torch.float16: serve in float32 or bfloat16" in caplog.text
    with pytest.raises(ValueError, match=r"no compiled kernels for torch\.float16"):
        select_backend("compiled", torch.float16, CPU)


def test_a_cache_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", *FakeCompiler(tmp_path).compiler.command)
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    with pytest.raises(build.CompilerError, match=r"cannot keep.*file/cache.*XDG_CACHE_HOME"):
        select_backend("compiled", torch.float32, CPU, folder)
    assert select_backend("auto", torch.float32, CPU, folder).name == "reference"
    assert "file/cache" in caplog.text


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fake = FakeCompiler(tmp_path)
    monkeypatch.setattr(build.os, "replace", full)
    with pytest.raises(build.CompilerError, match="No space left"):
        build.build_library(fake.compiler, tmp_path / "cache")


def test_a_library_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", *FakeCompiler(tmp_path).compiler.command)
    with pytest.raises(build.CompilerError, match=r"cannot load.*remove .*kernels-\w+\.so"):
        select_backend("compiled", torch.float32, CPU, tmp_path / "cache")
    assert select_backend("auto", torch.float32, CPU, tmp_path / "cache").name == "reference"
    assert "cannot load" in caplog.text


THREADS_SCRIPT = """
import os, sys, torch
from deltamux.kernels.backend import compiled_backend

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(int(sys.argv[1]))
kernels, x = compiled_backend(), torch.randn(512, 4096)
before = threads()
kernels.silu_mul(x)
ours = threads()
x.exp()
maps = open("/proc/self/maps").read().split()
runtimes = {path for path in maps if "gomp" in path or "iomp" in path or "libomp" in path}
print(len(runtimes), ours - before, threads() - ours)
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_one_openmp_runtime_with_torchs_threads(compiled: Backend, threads: int) -> None:
    command = [sys.executable, "-c", THREADS_SCRIPT, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    runtimes, started_by_us, started_by_torch = map(int, done.stdout.split())
    assert runtimes == 1
    assert started_by_us == threads - 1
    assert started_by_torch == 0, "torch did not find the threads we had started"


def test_the_number_of_threads_does_not_change_a_bit(compiled: Backend) -> None:
    before = torch.get_num_threads()
    gate_up = torch.randn(64, 4096)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(compiled.silu_mul(gate_up))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
