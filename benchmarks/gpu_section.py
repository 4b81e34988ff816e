"""What the sections of ``gpu_check.py`` share: what they are asked, and what one found."""

import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Protocol

from triton.errors import TritonError

from ..adapters.errors import AdapterError
from ..server.model.errors import ModelError
from .errors import BenchmarkError

SHOWN_FAULTS = 20
"""Of a section, in the report for people; the other has all."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a check was asked for.

    Attributes:
        out: The report's folder, where files that are made on the way lie too.
        base: The model that is served: a folder, a hub id, or smollm2.
        most_adapters: That it is served with.
        requests: Of each run of it, after half as many that do not count.
        seed: Of everything that is drawn.
    """

    out: Path
    base: str = "smollm2"
    most_adapters: int = 128
    requests: int = 512
    seed: int = 0


_WRONG = (
    *(TritonError, RuntimeError, ValueError, AdapterError, ModelError, BenchmarkError),
    *(OSError, subprocess.SubprocessError),
)
"""How a GPU, its compiler, a server, a base and the system say that something is wrong."""


class Result(Protocol):
    """What a section found, a dataclass of what JSON has."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def faults(self) -> Sequence[str]:
        """What is wrong, a line each."""
        ...


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the check.

    Attributes:
        name: By which it can be asked for.
        title: Over its part of the report.
        measure: Does it.
        render: What it found, as Markdown.
    """

    name: str
    title: str
    measure: Callable[[Options], Result]
    render: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a section.

    Attributes:
        name: Its.
        seconds: It took.
        result: What it found; None where it broke off.
        error: Why it broke off, empty where it did not.
    """

    name: str
    seconds: float
    result: Result | None
    error: str = ""

    @property
    def faults(self) -> Sequence[str]:
        """What is wrong."""
        if self.result is None:
            return ["it broke off"]
        return self.result.faults


def attempt(section: Section, options: Options) -> Outcome:
    """Measure a section; where it breaks off, that is what it found."""
    started = perf_counter()
    try:
        result, error = section.measure(options), ""
    except _WRONG:
        result, error = None, traceback.format_exc()
    return Outcome(section.name, round(perf_counter() - started, 1), result, error)


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)
