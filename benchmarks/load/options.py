"""What was asked for on the command line, made into a workload or refused."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import BenchmarkError
from .arrivals import Closed, Gamma, Load, Traced, parse_bursts
from .lengths import Lengths, parse_lengths
from .popularity import Popularity, parse_popularity
from .results import Objective, parse_objective
from .served import Served, choose_models
from .tenants import read_keys
from .trace import read_trace
from .workload import Workload

CONCURRENCY, REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 64, "128", "64"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command under their names; None where one is not given."""

    base_url: str
    concurrency: int | None
    rate: float | None
    burstiness: float | None
    burst: str | None
    trace: Path | None
    requests: int | None
    seconds: float | None
    warmup: int | None
    models: str | None
    adapters: int | None
    popularity: str | None
    prompt_tokens: str | None
    output_tokens: str | None
    shared_prefix: int
    adapter_prefix: int
    first_token_id: int
    last_token_id: int
    stop_at_eos: bool
    tenant: tuple[str, ...]
    timeout: float
    seed: int
    slo: str | None
    top: int
    out: Path | None
    plot: Path | None

    def load(self) -> Load:
        """When requests are sent.

        Raises:
            BenchmarkError: More than one way is named, or a burstiness without a rate.
        """
        ways = {"--concurrency": self.concurrency, "--rate": self.rate, "--burst": self.burst}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise BenchmarkError(f"{' and '.join(given)} are different loads: give one")
        if self.burstiness is not None and self.rate is None:
            raise BenchmarkError("--burstiness is of a --rate")
        if self.rate is not None:
            return Gamma(self.rate, 1.0 if self.burstiness is None else self.burstiness)
        if self.burst is not None:
            return parse_bursts(self.burst)
        if self.trace is not None and self.concurrency is None:
            return Traced()
        return Closed(self.concurrency or CONCURRENCY)

    def objective(self) -> Objective:
        """The bounds of the goodput.

        Raises:
            BenchmarkError: They cannot be read.
        """
        return Objective() if self.slo is None else parse_objective(self.slo)

    def plan(self) -> "Plan":
        """All that can be refused before the server is asked.

        Raises:
            BenchmarkError: Something is refused.
        """
        if self.models is not None and self.adapters is not None:
            raise BenchmarkError("--models and --adapters are two ways to choose: give one")
        if self.last_token_id < self.first_token_id:
            raise BenchmarkError("--last-token-id is below --first-token-id")
        for option, path in (("--out", self.out), ("--plot", self.plot)):
            if path is not None and not path.parent.is_dir():
                raise BenchmarkError(f"{option} {path}: there is no folder {path.parent}")
        return Plan(self)


class Plan:
    """The parts of a workload that do not depend on the server."""

    def __init__(self, options: Options) -> None:
        """Reads the trace and the keys; raises BenchmarkError for what is refused."""
        self._options = options
        self.load = options.load()
        self.trace = None if options.trace is None else read_trace(options.trace)
        self.keys = read_keys(options.tenant)
        self.objective = options.objective()
        self.popularity = self._popularity()
        self.prompts = self._lengths("--prompt-tokens", options.prompt_tokens, PROMPT_TOKENS)
        self.outputs = self._lengths("--output-tokens", options.output_tokens, OUTPUT_TOKENS)

    def workload(self, served: Served) -> Workload:
        """All of it for a server; raises BenchmarkError as ``choose_models`` and ``Workload``."""
        options = self._options
        return Workload(
            models=self._models(served),
            base=served.base,
            load=self.load,
            requests=self._requests(),
            seconds=options.seconds,
            warmup=self._warmup(),
            popularity=self.popularity,
            prompts=self.prompts,
            outputs=self.outputs,
            shared_prefix=options.shared_prefix,
            adapter_prefix=options.adapter_prefix,
            token_ids=range(options.first_token_id, options.last_token_id + 1),
            exact=not options.stop_at_eos,
            keys=self.keys,
            trace=self.trace,
            seed=options.seed,
        )

    def _models(self, served: Served) -> tuple[str, ...]:
        options = self._options
        if self.popularity is None and self.trace is not None:
            return tuple(dict.fromkeys(row.model for row in self.trace.rows))
        names = None if options.models is None else options.models.split(",")
        return choose_models(served, names, options.adapters)

    def _popularity(self) -> Popularity | None:
        options = self._options
        chosen = options.popularity or options.models or options.adapters
        if self.trace is not None and chosen is None:
            return None
        return parse_popularity(options.popularity or "turns")

    def _lengths(self, option: str, text: str | None, default: str) -> Lengths | None:
        if self.trace is not None and text is None:
            return None
        return parse_lengths(option, text or default)

    def _requests(self) -> int | None:
        options = self._options
        if options.requests is None and options.seconds is None and self.trace is None:
            return REQUESTS
        rows = [len(self.trace.rows)] if self.trace else []
        given = [] if options.requests is None else [options.requests]
        return min([*rows, *given], default=None)

    def _warmup(self) -> int:
        if self._options.warmup is not None:
            return self._options.warmup
        return self.load.concurrency if isinstance(self.load, Closed) else CONCURRENCY
