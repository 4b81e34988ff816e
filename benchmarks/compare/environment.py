"""A virtual environment for each peer: what it needs never touches what this package runs on."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from .process import SystemFailed, Word, foreign_environment, run_tool

_MARK = "installed.json"
_PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
_VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({"python": sys.version.split()[0], **{p: version(p) for p in sys.argv[1:]}}))
"""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Environment:
    """What a peer runs on.

    Attributes:
        name: Of its folder.
        requirements: For pip, versions pinned.
        without: Packages that these ask for and that break the peer: taken away again.
        metadata: Version by package name, for packages that look themselves up under a name which
            is not theirs.
    """

    name: str
    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None

    @property
    def packages(self) -> list[str]:
        """Names of what is required."""
        return [Requirement(each).name for each in self.requirements]


class Environments:
    """Makes environments, each at most once.

    Attributes:
        folder: Where they are.
        say: Tells the user what takes long.
    """

    def __init__(self, folder: Path, torch: str, say: Say) -> None:
        """Below ``folder``; ``torch`` is the requirement that chooses PyTorch's build."""
        self.folder = folder
        self._torch = torch
        self.say = say

    def python(self, environment: Environment) -> Path:
        """The interpreter of an environment: ours if it has just what is required, else made.

        Raises:
            SystemFailed: pip cannot install it.
        """
        if _is_here(environment):
            return Path(sys.executable)
        folder = self.folder / environment.name
        python = folder / "bin" / "python"
        if _read(folder / _MARK) != self._described(environment):
            self.say(f"installing {', '.join(environment.requirements)} into {folder}")
            self._make(environment, folder, python)
        return python

    def _make(self, environment: Environment, folder: Path, python: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{environment.name}.log"
        run_tool([sys.executable, "-m", "venv", folder], log)
        pip: list[Word] = [python, *_PIP]
        # Both at once, so that no other requirement can bring another build of torch.
        run_tool([*pip, "install", self._torch, *environment.requirements], log)
        if environment.without:
            run_tool([*pip, "uninstall", "--yes", *environment.without], log)
        for name, number in (environment.metadata or {}).items():
            _write_metadata(folder, name, number)
        (folder / _MARK).write_text(json.dumps(self._described(environment)))

    def _described(self, environment: Environment) -> dict[str, object]:
        described = {"torch": self._torch, **asdict(environment)}
        return dict(json.loads(json.dumps(described)))


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the packages in an environment.

    Raises:
        SystemFailed: One is not there.
    """
    done = subprocess.run(
        [python, "-c", _VERSIONS, *packages],
        capture_output=True,
        text=True,
        env=foreign_environment({}),
        check=False,
    )
    if done.returncode:
        raise SystemFailed(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


def _is_here(environment: Environment) -> bool:
    """Whether this interpreter has all of it, in these versions."""
    if environment.without or environment.metadata:
        return False
    return all(map(_is_met, map(Requirement, environment.requirements)))


def _is_met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _read(path: Path) -> object:
    return json.loads(path.read_text()) if path.is_file() else None


def _write_metadata(folder: Path, name: str, number: str) -> None:
    [packages] = folder.glob("lib/python3*/site-packages")
    info = packages / f"{name}-{number}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
