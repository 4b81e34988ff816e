"""A system in a process group of its own, which can sleep while another one is measured."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_END_SECONDS = 30
_TAIL_LINES = 8
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TRITON_INTERPRET")
"""Variables that would lead another environment's Python to our packages, or change its kernels."""


Word = str | Path
"""Of a command."""


class SystemFailed(Exception):
    """A system cannot be had, did not start, died or answered with an error; says why."""


def foreign_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Variables for another environment's program: ours but for what leads to our packages."""
    kept = {name: value for name, value in os.environ.items() if name not in _OURS}
    return kept | dict(settings)


def run_tool(command: Sequence[Word], log: Path, cwd: Path | None = None) -> None:
    """Run to its end, its output at the end of ``log``.

    Raises:
        SystemFailed: It cannot be run or ended with an error; tells its last lines.
    """
    with log.open("a") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=foreign_environment({}),
                cwd=cwd,
                check=False,
            )
        except OSError as error:
            raise SystemFailed(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        name = Path(command[0]).name
        raise SystemFailed(f"{name} ended with {done.returncode}; {log} ends with: {tail(log)}")


def tail(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line]
    return said[-1][:300] if said else "nothing"


class Process:
    """A running program and all that it starts."""

    def __init__(
        self,
        command: Sequence[Word],
        log: Path,
        env: Mapping[str, str],
        cwd: Path | None = None,
        *,
        talks: bool = False,
    ) -> None:
        """Start it; what it says goes to ``log``, but for standard output if it ``talks``.

        Raises:
            SystemFailed: It cannot be started.
        """
        self.log = log
        self._over = False
        try:
            with log.open("w") as said:
                self._process = subprocess.Popen(
                    [str(each) for each in command],
                    stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if talks else said,
                    stderr=said,
                    env=env,
                    cwd=cwd,
                    text=True,
                    start_new_session=True,
                )
        except OSError as error:
            raise SystemFailed(f"{command[0]}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """Of the program itself."""
        return self._process.pid

    def ended(self) -> bool:
        """Whether it is no more."""
        return self._process.poll() is not None

    def obituary(self) -> str:
        """How it ended, or that it did not, and its last words."""
        status = self._process.poll()
        how = "does not answer" if status is None else f"ended with {status}"
        return f"{how}; {self.log} ends with: {tail(self.log)}"

    def ask(self, line: str) -> str:
        """Write a line and read one; of a program that talks.

        Raises:
            SystemFailed: It ended instead.
        """
        answer = "" if self.ended() else self._exchange(line)
        if not answer:
            with suppress(subprocess.TimeoutExpired):  # then it is ended by force
                self._process.wait(_END_SECONDS)
            self.end()
            raise SystemFailed(self.obituary())
        return answer

    def _exchange(self, line: str) -> str:
        """The answer; nothing if it ends instead."""
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        try:
            questions.write(line + "\n")
            questions.flush()
        except BrokenPipeError:
            return ""
        return answers.readline()

    def freeze(self) -> None:
        """Let it take no time of any core until it is thawed."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End it and all that it started, by force if need be; once is enough."""
        if self._over:
            return
        self.thaw()
        self._signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.communicate()
        self._signal(signal.SIGKILL)  # children that outlived their parent
        self._over = True  # and the number of the group may become another's

    def _signal(self, number: signal.Signals) -> None:
        if not self._over:
            with suppress(ProcessLookupError):  # all have ended already
                os.killpg(self._process.pid, number)
