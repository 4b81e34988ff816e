"""How many tokens a prompt or an answer has."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import BenchmarkError

FORMS = "TOKENS, uniform:LOW:HIGH or lognormal:MEAN:SIGMA[:LOW:HIGH]"
_TIMES_THE_MEAN = 10
"""Where a lognormal is cut off unless one says otherwise."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of whole numbers from ``low`` to ``high``, both included.

    Attributes:
        mean: Of a lognormal before it is clipped to the range; None for a uniform distribution.
        sigma: Standard deviation of the lognormal's logarithm.
    """

    low: int
    high: int
    mean: float | None = None
    sigma: float = 0.0

    def __str__(self) -> str:
        if self.mean is not None:
            return f"lognormal:{self.mean:g}:{self.sigma:g}:{self.low}:{self.high}"
        return str(self.low) if self.low == self.high else f"uniform:{self.low}:{self.high}"

    def draws(self, seed: str) -> Iterator[int]:
        """Lengths without end; the same for a seed."""
        generator = random.Random(seed)
        while True:
            yield self._draw(generator)

    def _draw(self, generator: random.Random) -> int:
        if self.mean is None:
            return generator.randint(self.low, self.high)
        location = math.log(self.mean) - self.sigma**2 / 2
        drawn = generator.lognormvariate(location, self.sigma)
        return round(min(max(drawn, self.low), self.high))


def parse_lengths(option: str, text: str) -> Lengths:
    """Of one of ``FORMS``.

    Raises:
        BenchmarkError: It is none of them, or a range is empty.
    """
    try:
        match text.split(":"):
            case [tokens]:
                lengths = Lengths(int(tokens), int(tokens))
            case ["uniform", low, high] | [low, high]:
                lengths = Lengths(int(low), int(high))
            case ["lognormal", mean, sigma]:
                most = max(1, round(_TIMES_THE_MEAN * float(mean)))
                lengths = Lengths(1, most, float(mean), float(sigma))
            case ["lognormal", mean, sigma, low, high]:
                lengths = Lengths(int(low), int(high), float(mean), float(sigma))
            case _:
                raise ValueError
        _check(lengths)
    except (ValueError, OverflowError) as error:
        raise BenchmarkError(f"{option} {text}: give {FORMS}, with 1 <= LOW <= HIGH") from error
    return lengths


def _check(lengths: Lengths) -> None:
    mean = 1.0 if lengths.mean is None else lengths.mean
    fits = 1 <= lengths.low <= lengths.high and 0 < mean < math.inf
    if not (fits and 0 <= lengths.sigma < math.inf):
        raise ValueError
