"""Which adapter a request is for."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from math import inf

from ..errors import BenchmarkError

FORMS = "one, turns, uniform, zipf:EXPONENT, skewed:SHARE:COUNT or half-base"


@dataclass(frozen=True, slots=True)
class Popularity:
    """How traffic is shared among models, the most popular first.

    Attributes:
        kind: ``one``: all on the first. ``turns``: one after the other. ``uniform``: drawn, all
            alike. ``zipf``: the r-th has a share proportional to r ** -``exponent``. ``skewed``:
            the first ``count`` have ``share`` of the traffic between them. ``half-base``: the base
            has half of it and the adapters the other half.
    """

    kind: str = "turns"
    exponent: float = 1.0
    share: float = 1.0
    count: int = 1

    def __str__(self) -> str:
        arguments = {"zipf": [self.exponent], "skewed": [self.share, self.count]}
        return ":".join([self.kind, *(f"{each:g}" for each in arguments.get(self.kind, []))])


def parse_popularity(text: str) -> Popularity:
    """Of one of ``FORMS``.

    Raises:
        BenchmarkError: It is none of them.
    """
    try:
        match text.split(":"):
            case [("one" | "turns" | "uniform" | "half-base") as kind]:
                return Popularity(kind)
            case ["zipf", exponent] if 0 <= float(exponent) < inf:
                return Popularity("zipf", exponent=float(exponent))
            case ["skewed", share, count] if 0 <= float(share) <= 1 and int(count) > 0:
                return Popularity("skewed", share=float(share), count=int(count))
    except ValueError:
        pass
    raise BenchmarkError(f"--popularity {text}: give {FORMS}")


def shares(popularity: Popularity, models: Sequence[str], base: str | None) -> Mapping[str, float]:
    """Each model's share of the traffic.

    Raises:
        BenchmarkError: The models are too few for it, or there is no base.
    """
    even = 1 / len(models)
    match popularity.kind:
        case "one":
            return {models[0]: 1.0}
        case "zipf":
            return _normalised(models, [rank**-popularity.exponent for rank in _ranks(models)])
        case "skewed":
            return _skewed(popularity, models)
        case "half-base":
            if base is None or base in models:
                raise BenchmarkError("--popularity half-base: needs a base, and adapters beside it")
            return {base: 0.5} | dict.fromkeys(models, even / 2)
        case _:
            return dict.fromkeys(models, even)


def draw_models(
    popularity: Popularity, models: Sequence[str], base: str | None, seed: int
) -> Iterator[str]:
    """Models of a run's requests, without end; the same for a seed.

    Raises:
        BenchmarkError: As ``shares``.
    """
    if popularity.kind == "turns":
        return cycle(models)
    return _drawn(shares(popularity, models, base), random.Random(f"{seed}/models"))


def _drawn(shares: Mapping[str, float], generator: random.Random) -> Iterator[str]:
    names, sums = list(shares), list(accumulate(shares.values()))
    while True:
        yield generator.choices(names, cum_weights=sums)[0]


def _skewed(popularity: Popularity, models: Sequence[str]) -> Mapping[str, float]:
    first, others = popularity.count, len(models) - popularity.count
    if others < 1:
        raise BenchmarkError(
            f"--popularity {popularity}: there are {len(models)} models; COUNT must be lower"
        )
    parts = [popularity.share / first] * first + [(1 - popularity.share) / others] * others
    return dict(zip(models, parts, strict=True))


def _ranks(models: Sequence[str]) -> range:
    return range(1, len(models) + 1)


def _normalised(models: Sequence[str], weights: Sequence[float]) -> Mapping[str, float]:
    total = sum(weights)
    return {model: weight / total for model, weight in zip(models, weights, strict=True)}
