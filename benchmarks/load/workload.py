"""Which requests a run sends: a pure function of what was asked for and of the seed."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, cycle, islice, repeat
from random import Random

from ..client import Request, random_prompt
from ..errors import BenchmarkError
from .arrivals import Closed, Load, Traced
from .lengths import Lengths
from .popularity import Popularity, draw_models, shares
from .trace import Row, Trace

_WARMUP, _MEASURE = "warm-up", "measure"
_WARMUP_TEXT_TOKENS = 32
"""Of the random prompt that warms up for a text: its own would then be cached."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A request of a run.

    Attributes:
        due: Seconds after the start; None in a closed loop.
        prompt_tokens: None where the prompt is a text.
        tenant: Whose key it carries; None without tenants.
    """

    request: Request
    due: float | None
    prompt_tokens: int | None
    tenant: str | None


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a server; two runs of one workload send the same requests.

    Attributes:
        models: That traffic is shared among, the most popular first.
        base: The base's name, where the server told it.
        load: When requests are sent.
        requests: How many at most; None without a bound.
        seconds: After which none is sent any more; None without a bound.
        warmup: How many are sent before, in a closed loop, and not counted.
        popularity, prompts, outputs: None where the trace decides.
        shared_prefix: Tokens that all prompts start with, before their own.
        adapter_prefix: Tokens that all prompts of a model have next.
        token_ids: That prompts are drawn from.
        exact: Whether an answer must be as long as asked for.
        keys: By tenant.
        extras: Further fields of a request's body, by model.
        trace: Where it is given, its rows in turn are the requests.
        seed: Of all that is drawn.
    """

    models: tuple[str, ...]
    base: str | None
    load: Load
    requests: int | None
    seconds: float | None
    warmup: int
    popularity: Popularity | None
    prompts: Lengths | None
    outputs: Lengths | None
    shared_prefix: int = 0
    adapter_prefix: int = 0
    token_ids: range = range(1000, 30001)
    exact: bool = True
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    extras: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    trace: Trace | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises BenchmarkError where the parts do not fit each other."""
        if self.popularity is not None:
            shares(self.popularity, self.models, self.base)
        tenants = {row.tenant for row in self._rows() if row.tenant}
        unknown = sorted(tenants - set(self.keys))
        if self.keys and unknown:
            raise BenchmarkError(f"the trace names tenant {unknown[0]}: no --tenant has its key")
        prefixed = self.shared_prefix or self.adapter_prefix
        if prefixed and self.prompts is None and any(row.prompt for row in self._rows()):
            raise BenchmarkError("a prefix of tokens cannot be set before the trace's texts")

    def planned(self) -> Iterator[Planned]:
        """The requests to measure, in the order they are sent, up to ``requests``."""
        return islice(self._planned(_MEASURE, self._due(), self._models()), self.requests)

    def warm_up(self) -> Iterator[Planned]:
        """Requests before those, over all models in turn; they share no prompt but prefixes."""
        models = dict.fromkeys(self._names())
        return islice(self._planned(_WARMUP, repeat(None), cycle(models)), self.warmup)

    def describe(self) -> dict[str, object]:
        """All of it, for a report; keys left out."""
        trace = self.trace
        return {
            "models": list(self.models),
            "base": self.base,
            "load": {"kind": type(self.load).__name__.lower()} | asdict(self.load),
            "requests": self.requests,
            "seconds": self.seconds,
            "warmup": self.warmup,
            "popularity": str(self.popularity or "trace"),
            "prompt_tokens": str(self.prompts or "trace"),
            "output_tokens": str(self.outputs or "trace"),
            "shared_prefix": self.shared_prefix,
            "adapter_prefix": self.adapter_prefix,
            "first_token_id": self.token_ids.start,
            "last_token_id": self.token_ids.stop - 1,
            "exact": self.exact,
            "tenants": list(self.keys),
            "trace": trace
            and {"file": trace.name, "sha256": trace.sha256, "requests": len(trace.rows)},
            "seed": self.seed,
        }

    def _rows(self) -> Iterator[Row]:
        return iter(self.trace.rows if self.trace else ())

    def _due(self) -> Iterator[float | None]:
        match self.load:
            case Closed():
                return repeat(None)
            case Traced():
                return (row.time for row in self._rows())
            case load:
                return load.times(self.seed)

    def _models(self) -> Iterator[str]:
        if self.popularity is None:
            return (row.model for row in self._rows())
        return draw_models(self.popularity, self.models, self.base, self.seed)

    def _names(self) -> Iterator[str]:
        """Models that requests may be for."""
        if self.popularity is None:
            return self._models()
        half = [self.base] if self.popularity.kind == "half-base" and self.base else []
        return chain(half, self.models)

    def _prompts(self, phase: str) -> Iterator[int | str]:
        """Their lengths, or they themselves where the trace has texts."""
        if self.prompts is not None:
            return self.prompts.draws(f"{self.seed}/{phase}/prompts")
        if phase == _WARMUP:
            return (row.prompt_tokens or _WARMUP_TEXT_TOKENS for row in self._rows())
        return (row.prompt or row.prompt_tokens or 0 for row in self._rows())

    def _outputs(self, phase: str) -> Iterator[int]:
        if self.outputs is not None:
            return self.outputs.draws(f"{self.seed}/{phase}/outputs")
        return (row.output_tokens for row in self._rows())

    def _tenants(self, phase: str) -> Iterator[str | None]:
        generator = Random(f"{self.seed}/{phase}/tenants")
        names: list[str | None] = [*self.keys] or [None]
        rows = self._rows() if self.trace else repeat(None)
        return ((row and row.tenant) or generator.choice(names) for row in rows)

    def _planned(
        self, phase: str, due: Iterator[float | None], models: Iterator[str]
    ) -> Iterator[Planned]:
        make = _Prompts(self, phase)
        parts = zip(
            due,
            models,
            self._prompts(phase),
            self._outputs(phase),
            self._tenants(phase),
            strict=False,
        )
        for index, (at, model, given, output, tenant) in enumerate(parts):
            prompt = given if isinstance(given, str) else make.prompt(index, model, given)
            key = None if tenant is None else self.keys.get(tenant)
            extra = self.extras.get(model, {})
            request = Request(model, prompt, output, self.exact, key, extra)
            yield Planned(request, at, None if isinstance(prompt, str) else len(prompt), tenant)


class _Prompts:
    """Prompts of one phase: the prefix of all, that of the model, and tokens of its own."""

    def __init__(self, workload: Workload, phase: str) -> None:
        self._workload = workload
        self._seed = f"{workload.seed}/{phase}"
        self._prefixes: dict[str, list[int]] = {}

    def prompt(self, index: int, model: str, length: int) -> list[int]:
        if model not in self._prefixes:
            self._prefixes[model] = self._prefix(model)
        own = random_prompt(f"{self._seed}/{index}", length, self._workload.token_ids)
        return self._prefixes[model] + own

    def _prefix(self, model: str) -> list[int]:
        workload, seed = self._workload, f"{self._workload.seed}/prefix"
        shared = random_prompt(seed, workload.shared_prefix, workload.token_ids)
        return shared + random_prompt(
            f"{seed}/{model}", workload.adapter_prefix, workload.token_ids
        )
