"""When requests are sent: in a closed loop, or at times that no answer changes."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from math import isfinite

from ..errors import BenchmarkError


@dataclass(frozen=True, slots=True)
class Closed:
    """So many streams, each sends its next request as soon as its last one ended."""

    concurrency: int

    def __str__(self) -> str:
        return f"a closed loop of {self.concurrency} streams"


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps drawn from a gamma distribution whose mean is 1 / ``rate`` seconds.

    Its shape is the burstiness, as in vLLM's benchmark: 1 is a Poisson process, less comes in
    bursts, more comes evenly.
    """

    rate: float
    burstiness: float = 1.0

    def __str__(self) -> str:
        kind = "" if self.burstiness == 1 else f", burstiness {self.burstiness:g}"
        return f"an open loop at {self.rate:g} requests/s{kind}"

    def times(self, seed: int) -> Iterator[float]:
        """Seconds since the start, without end."""
        draw = random.Random(f"{seed}/arrivals").gammavariate
        scale = 1 / (self.rate * self.burstiness)
        return accumulate(draw(self.burstiness, scale) for _ in count())


@dataclass(frozen=True, slots=True)
class Bursts:
    """``size`` requests at once every ``every`` seconds, the first at the start."""

    size: int
    every: float

    def __str__(self) -> str:
        return f"bursts of {self.size} requests every {self.every:g} s"

    def times(self, seed: int) -> Iterator[float]:  # noqa: ARG002 - nothing is drawn
        """Seconds since the start, without end."""
        return (burst * self.every for burst in count() for _ in range(self.size))


@dataclass(frozen=True, slots=True)
class Traced:
    """At the times of a trace."""

    def __str__(self) -> str:
        return "the times of a trace"


Load = Closed | Gamma | Bursts | Traced


def parse_bursts(text: str) -> Bursts:
    """Of ``SIZE:SECONDS``.

    Raises:
        BenchmarkError: It is not that.
    """
    size, _, every = text.partition(":")
    try:
        bursts = Bursts(int(size), float(every))
    except ValueError:
        bursts = Bursts(0, 0)
    if bursts.size < 1 or not (bursts.every > 0 and isfinite(bursts.every)):
        raise BenchmarkError(f"--burst {text}: give SIZE:SECONDS, both above 0, such as 32:10")
    return bursts
