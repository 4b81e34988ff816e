"""Runs the tests of the kernels on the GPU: what the interpreter proved must hold there as well.

They run in as many processes as there are cores, since most of their time goes into compiling
kernels. An illegal access to memory is the end of all CUDA work in a process: the test that made it
ends its process, and pytest-xdist starts another for the rest (``tests/kernels/conftest.py``).
"""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from .gpu_section import Options
from .markdown import table

ROOT = Path(__file__).resolve().parents[1]
TESTS = Path("tests") / "kernels"

_RAN, _NOTHING_TO_RUN = (0, 1), 5
"""Exit statuses of pytest: all passed or some failed; none of the tests needs a GPU."""


@dataclass(frozen=True, slots=True)
class FileResult:
    """The tests of one file.

    Attributes:
        file: Its name.
        tests: That ran.
        failed: Those of them that failed: name, and the last line of why.
        seconds: They took, one after another.
    """

    file: str
    tests: int
    failed: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Parity:
    """All files.

    Attributes:
        files: With tests for a GPU.
    """

    files: tuple[FileResult, ...]

    @property
    def faults(self) -> Sequence[str]:
        """Tests that failed, and that there are none."""
        if not any(each.tests for each in self.files):
            return ["no test ran"]
        return [f"{each.file}: {failed}" for each in self.files for failed in each.failed]


def measure(_: Options) -> Parity:
    """All tests that take the GPU's kernels, on the current GPU.

    Raises:
        ValueError: There are no tests here.
        RuntimeError: pytest broke off.
    """
    folder = ROOT / TESTS
    if not any(folder.glob("test_*.py")):
        raise ValueError(f"there is no {TESTS} in {ROOT}: run the check from a checkout")
    with TemporaryDirectory() as written:
        report = Path(written) / "report.xml"
        status = _pytest(folder, report)
        if status == _NOTHING_TO_RUN:
            return Parity(())
        if status not in _RAN:
            raise RuntimeError(f"pytest {TESTS} ended with {status}; see above")
        return Parity(tuple(read_junit(report.read_text("utf-8"))))


def read_junit(text: str) -> Sequence[FileResult]:
    """Of pytest's report in JUnit's format, by file."""
    by_file: defaultdict[str, list[ElementTree.Element]] = defaultdict(list)
    for case in ElementTree.fromstring(text).iter("testcase"):
        by_file[_file(case)].append(case)
    return [_result(file, cases) for file, cases in sorted(by_file.items())]


def render(parity: Parity) -> str:
    """Counts by file."""
    rows = [
        (each.file, str(each.tests), str(len(each.failed)), f"{each.seconds:.1f}")
        for each in parity.files
    ]
    return table(("file", "tests", "failed", "seconds"), rows)


def _file(case: ElementTree.Element) -> str:
    """The name of the file that a test is in, which pytest gives as a module's."""
    return case.get("classname", "").rpartition(".")[2] + ".py"


def _result(file: str, cases: Sequence[ElementTree.Element]) -> FileResult:
    failed = [
        f"{case.get('name')}: {_last_line(problem)}"
        for case in cases
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    seconds = sum(float(case.get("time", 0)) for case in cases)
    return FileResult(file, len(cases), tuple(failed), round(seconds, 1))


def _pytest(folder: Path, report: Path) -> int:
    environment = {**os.environ, "DELTAMUX_TEST_GPU": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"]
    processes = ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
    # Its output is progress: standard output is the report's.
    done = subprocess.run(
        [*command, *processes, str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=sys.stderr.fileno(),
        check=False,
    )
    return done.returncode


def _last_line(problem: ElementTree.Element) -> str:
    lines = (problem.get("message") or problem.text or "").strip().splitlines()
    return lines[0] if lines else problem.tag
