"""What a system under comparison is, to those who check and measure it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...client import Request
from ...load.run import Outcome
from ..environment import Environments
from ..material import Material
from ..scenarios import SCENARIOS, Scenario, Size


@dataclass(frozen=True, slots=True)
class Setup:
    """What a system is started with.

    Attributes:
        material: That it serves.
        size: Of what it will be asked.
        threads: That it may compute with.
        logs: Where systems leave theirs.
        environments: Where it is installed.
    """

    material: Material
    size: Size
    threads: int
    logs: Path
    environments: Environments

    @property
    def context(self) -> int:
        """Tokens of a sequence, its answer included."""
        return self.size.prompt_tokens + self.size.output_tokens

    def log(self, name: str) -> Path:
        """Of a system."""
        self.logs.mkdir(parents=True, exist_ok=True)
        return self.logs / f"{name}.log"


class Running(Protocol):
    """A system that answers. All may raise SystemFailed.

    Attributes:
        versions: Of what it is made of.
        settings: How it was started, for the report.
    """

    versions: Mapping[str, object]
    settings: Mapping[str, object]

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids, all requests in flight at once."""
        ...

    def run(self, scenario: Scenario, size: Size, phase: str) -> Outcome:
        """Warm up, then measure."""
        ...

    def freeze(self) -> None:
        """Take no time of any core until thawed."""
        ...

    def thaw(self) -> None:
        """Go on."""
        ...

    def end(self) -> None:
        """Give everything back."""
        ...


@dataclass(frozen=True, slots=True)
class Peer:
    """A system, not started yet.

    Attributes:
        name: As in the report.
        about: What it is and how it serves adapters.
        start: Installs what it needs and starts it; raises SystemFailed.
        lacks: Why it is not asked for a scenario, by the scenario's name.
    """

    name: str
    about: str
    start: Callable[[Setup], Running]
    lacks: Mapping[str, str] = field(default_factory=dict)


ONLY_BASE = {
    name: "serves the base alone" for name in SCENARIOS if name not in ("base-single", "base")
}
"""What a system without adapters lacks."""
