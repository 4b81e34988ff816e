"""Prometheus series, under vLLM's names where vLLM has them.

Counters and histograms are fed by the API, one ``SequenceRecord`` per sequence, and by the engine's
client, once per step. Gauges are read from the engine's last stats when they are scraped.
"""

from collections import Counter as Multiset
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ..engine.messages import EngineInfo, EngineStats
from ..store.residency import Residency
from .by_name import MAX_NAMES, ByName
from .gauges import ENGINE, LABELS, EngineView, Gauges
from .request import RequestRecord
from .sequence import SequenceRecord

NO_TENANT = "(none)"
"""The tenant of requests of nobody in particular; no tenant can be called so."""

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKEN_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 40),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REVIEW_SECONDS = 60.0


class Metrics:
    """All series of one server."""

    def __init__(self, model_name: str, max_names: int = MAX_NAMES) -> None:
        """Start every series, labelled with the base's served name, at zero.

        Args:
            model_name: Served name of the base.
            max_names: Tenants, and adapters, that have series of their own.
        """
        self._model_name = model_name
        self._requested: Multiset[int] = Multiset()
        self._registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of sequences begun.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("num_preemptions", "Sequences preempted.")
        self._queries = self._counter("prefix_cache_queries", "Tokens looked up in the cache.")
        self._hits = self._counter("prefix_cache_hits", "Tokens found in the cache.")
        self._success = Counter(
            "vllm:request_success",
            "Sequences ended, by reason.",
            (*LABELS, "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, ENGINE, reason)
        self._responses = Counter(
            "deltamux:http_responses",
            "Answers sent, by HTTP status.",
            ("status",),
            registry=self._registry,
        )
        self._step_tokens = self._histogram("iteration_tokens_total", _STEP_TOKENS)
        self.first_token = self._histogram("time_to_first_token_seconds", _SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", _TOKEN_SECONDS)
        self.latency = self._histogram("e2e_request_latency_seconds", _SECONDS)
        self.queue_time = self._histogram("request_queue_time_seconds", _SECONDS)
        self.prefill_time = self._histogram("request_prefill_time_seconds", _SECONDS)
        self.decode_time = self._histogram("request_decode_time_seconds", _SECONDS)
        self.request_prompt = self._histogram("request_prompt_tokens", _TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", _TOKENS)
        self._tenants = ByName("tenant", self._registry, max_names)
        self._adapters = ByName("adapter", self._registry, max_names)
        self._next_review = monotonic() + _REVIEW_SECONDS

    def names(self, request: RequestRecord) -> tuple[str, str]:
        """What its tenant and its adapter are called in labels."""
        consumer = request.consumer
        return consumer.tenant or NO_TENANT, consumer.adapter or self._model_name

    @contextmanager
    def sequence(
        self, request: RequestRecord, adapter_ids: list[int], prompt_tokens: int
    ) -> Iterator[SequenceRecord]:
        """Record one sequence; one that is cut short counts as aborted, one that fails as error."""
        self._requested.update(adapter_ids)
        record = SequenceRecord(self, request, prompt_tokens)
        try:
            yield record
        except Exception:
            record.times.finish_reason = "error"
            self.success("error")
            raise
        except BaseException:  # cancellation, or its generator was closed
            record.times.finish_reason = "abort"
            self.success("abort")
            raise
        finally:
            self._forget(adapter_ids)

    def begun(self, tenant: str, adapter: str, prompt_tokens: int, seconds: float) -> None:
        """A sequence got its first token after so long."""
        self._prompt_tokens.inc(prompt_tokens)
        self._tenants.begun(tenant, prompt_tokens, seconds)
        self._adapters.begun(adapter, prompt_tokens, seconds)
        if monotonic() >= self._next_review:
            self.review()

    def generated(self, tenant: str, adapter: str, number: int) -> None:
        """So many tokens were generated."""
        self._generation_tokens.inc(number)
        self._tenants.generated(tenant, number)
        self._adapters.generated(adapter, number)

    def review(self) -> None:
        """Choose anew which tenants and adapters have series of their own."""
        self._next_review = monotonic() + _REVIEW_SECONDS
        self._tenants.review()
        self._adapters.review()

    def step(self, stats: EngineStats) -> None:
        """Count what the engine did since its last report, which need not be a step."""
        if stats.step_tokens:
            self._step_tokens.observe(stats.step_tokens)
        self._queries.inc(stats.prefix_queries)
        self._hits.inc(stats.prefix_hits)
        self._preemptions.inc(stats.preemptions)

    def success(self, reason: str) -> None:
        """Count one sequence that ended for ``reason``."""
        self._success.labels(self._model_name, ENGINE, reason).inc()

    def answered(self, status: int) -> None:
        """Count one answer."""
        self._responses.labels(str(status)).inc()

    def render(
        self, info: EngineInfo | None, stats: EngineStats | None, residency: Residency
    ) -> tuple[bytes, str]:
        """(body, content type) of a scrape; gauges of an engine that is down are left out."""
        view = EngineView(info, stats, residency, tuple(self._requested))
        scrape = CollectorRegistry()
        scrape.register(Gauges(self._model_name, view))
        return generate_latest(self._registry) + generate_latest(scrape), CONTENT_TYPE_PLAIN_0_0_4

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, LABELS, registry=self._registry)
        return counter.labels(self._model_name, ENGINE)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        text = name.replace("_", " ").capitalize() + "."
        histogram = Histogram(
            f"vllm:{name}", text, LABELS, buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model_name, ENGINE)

    def _forget(self, adapter_ids: list[int]) -> None:
        for adapter_id in adapter_ids:
            self._requested[adapter_id] -= 1
            if not self._requested[adapter_id]:
                del self._requested[adapter_id]
