"""Runs the tests of the kernels on the GPU: what the interpreter proved must hold there as well.

Each test file has a process of its own, since an illegal access to memory is the end of all CUDA
work in a process.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from .gpu_section import Options, say
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
        seconds: They took.
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
    files = sorted((ROOT / TESTS).glob("test_*.py"))
    if not files:
        raise ValueError(f"there is no {TESTS} in {ROOT}: run the check from a checkout")
    return Parity(tuple(_results(files)))


def read_junit(file: str, text: str) -> FileResult:
    """Of pytest's report in JUnit's format."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    failed = [
        f"{case.get('name')}: {_last_line(problem)}"
        for case in cases
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    seconds = sum(float(case.get("time", 0)) for case in cases)
    return FileResult(file, len(cases), tuple(failed), round(seconds, 1))


def render(parity: Parity) -> str:
    """Counts by file."""
    rows = [
        (each.file, str(each.tests), str(len(each.failed)), f"{each.seconds:.1f}")
        for each in parity.files
    ]
    return table(("file", "tests", "failed", "seconds"), rows)


def _results(files: Sequence[Path]) -> Iterator[FileResult]:
    for file in files:
        say(f"{file.name}:")
        with TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            status = _pytest(file, report)
            if status in _RAN:
                yield read_junit(file.name, report.read_text("utf-8"))
            elif status != _NOTHING_TO_RUN:
                raise RuntimeError(f"pytest {file.name} ended with {status}; see above")


def _pytest(file: Path, report: Path) -> int:
    environment = {**os.environ, "DELTAMUX_TEST_GPU": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"]
    # Its output is progress: standard output is the report's.
    done = subprocess.run(
        [*command, str(file)], cwd=ROOT, env=environment, stdout=sys.stderr.fileno(), check=False
    )
    return done.returncode


def _last_line(problem: ElementTree.Element) -> str:
    lines = (problem.get("message") or problem.text or "").strip().splitlines()
    return lines[0] if lines else problem.tag
