"""What is asked of every system: which models, over how many streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from ..load.arrivals import Closed
from ..load.lengths import Lengths
from ..load.popularity import Popularity
from ..load.workload import Workload

BASE = "base"
"""The name under which every system serves the base."""
_TITLES = {
    "base-single": "base, 1 stream",
    "adapter-single": "1 adapter, 1 stream",
    "base": "base, {n} streams",
    "shared": "1 adapter shared by {n} streams",
    "distinct": "{n} adapters, {n} streams",
    "mixed": "base beside {half} adapters, {n} streams",
}
SCENARIOS = tuple(_TITLES)


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it.

    Attributes:
        streams: Of the scenarios with many.
        prompt_tokens: Of every request.
        output_tokens: Of every request, whatever they are.
        per_stream: Requests that each stream sends in a run.
        seconds: After which a run sends none any more.
        token_ids: That prompts are drawn from.
        seed: Of all that is drawn.
    """

    streams: int
    prompt_tokens: int
    output_tokens: int
    per_stream: int
    seconds: float
    token_ids: range
    seed: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """A closed loop.

    Attributes:
        name: Of ``SCENARIOS``.
        streams: In flight at any time.
        models: Asked for in turn.
    """

    name: str
    streams: int
    models: tuple[str, ...]
    title: str = field(compare=False, default="")

    def workload(
        self, size: Size, phase: str, extras: Mapping[str, Mapping[str, object]] | None = None
    ) -> Workload:
        """The requests of one run; no two phases share a prompt that a cache could know."""
        return Workload(
            models=self.models,
            base=BASE,
            load=Closed(self.streams),
            requests=self.streams * size.per_stream,
            seconds=size.seconds,
            warmup=self.streams,
            popularity=Popularity("turns"),
            prompts=_exactly(size.prompt_tokens),
            outputs=_exactly(size.output_tokens),
            token_ids=size.token_ids,
            extras=extras or {},
            seed=Random(f"{size.seed}/{phase}/{self.name}").randrange(1 << 31),
        )


def make_scenarios(names: Sequence[str], adapters: Sequence[str], streams: int) -> list[Scenario]:
    """Scenarios by name over at least ``streams`` adapters."""
    half = max(1, streams // 2)
    beside = [name for pair in zip([BASE] * half, adapters, strict=False) for name in pair]
    models = {
        "base-single": (1, [BASE]),
        "adapter-single": (1, adapters[:1]),
        "base": (streams, [BASE]),
        "shared": (streams, adapters[:1]),
        "distinct": (streams, adapters[:streams]),
        "mixed": (streams, beside),
    }
    return [
        Scenario(
            name,
            models[name][0],
            tuple(models[name][1]),
            _TITLES[name].format(n=streams, half=half),
        )
        for name in names
    ]


def _exactly(tokens: int) -> Lengths:
    return Lengths(tokens, tokens)
