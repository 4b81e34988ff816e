"""Prometheus series, under vLLM's names where vLLM has them.

Counters and histograms are fed by the API, one ``SequenceRecord`` per sequence, and by the engine's
client, once per step. Gauges are read from the engine's last stats when they are scraped.
"""

from collections import Counter as Multiset
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from .engine.messages import EngineInfo, EngineStats
from .store.residency import Residency

_ENGINE = "0"
_LABELS = ("model_name", "engine")
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class SequenceRecord:
    """Timing of one sequence; reports to its ``Metrics`` as things happen."""

    def __init__(self, metrics: "Metrics", prompt_tokens: int) -> None:
        """Start the clock."""
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._generated = 0
        self._start = monotonic()
        self._last: float | None = None

    def tokens(self, number: int) -> None:
        """``number`` tokens arrived now; a last update may bring none."""
        if not number:
            return
        now = monotonic()
        if self._last is None:
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
            self._metrics.first_token.observe(now - self._start)
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._last = now
        self._generated += number
        self._metrics.generation_tokens.inc(number)

    def finish(self, reason: str) -> None:
        """The sequence ended by itself, for one of OpenAI's reasons."""
        self._metrics.success(reason)
        self._metrics.latency.observe(monotonic() - self._start)
        self._metrics.request_prompt.observe(self._prompt_tokens)
        self._metrics.request_generation.observe(self._generated)


class Metrics:
    """All series of one server."""

    def __init__(self, model_name: str) -> None:
        """Start every series, labelled with the base's served name, at zero."""
        self._model_name = model_name
        self._requested: Multiset[int] = Multiset()
        self._registry = CollectorRegistry()
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of sequences begun.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("num_preemptions", "Sequences preempted.")
        self._queries = self._counter("prefix_cache_queries", "Tokens looked up in the cache.")
        self._hits = self._counter("prefix_cache_hits", "Tokens found in the cache.")
        self._success = Counter(
            "vllm:request_success",
            "Sequences ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self.first_token = self._histogram("time_to_first_token_seconds", _SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", _SECONDS)
        self.latency = self._histogram("e2e_request_latency_seconds", _SECONDS)
        self.request_prompt = self._histogram("request_prompt_tokens", _TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", _TOKENS)
        self._step_tokens = self._histogram("iteration_tokens_total", _STEP_TOKENS)
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, _ENGINE, reason)

    @contextmanager
    def sequence(self, adapter_ids: list[int], prompt_tokens: int) -> Iterator[SequenceRecord]:
        """Record one sequence; one that is cut short counts as aborted, one that fails as error."""
        self._requested.update(adapter_ids)
        try:
            yield SequenceRecord(self, prompt_tokens)
        except Exception:
            self.success("error")
            raise
        except BaseException:  # cancellation, or its generator was closed
            self.success("abort")
            raise
        finally:
            self._forget(adapter_ids)

    def step(self, stats: EngineStats) -> None:
        """Count what the engine did since its last report, which need not be a step."""
        if stats.step_tokens:
            self._step_tokens.observe(stats.step_tokens)
        self._queries.inc(stats.prefix_queries)
        self._hits.inc(stats.prefix_hits)
        self._preemptions.inc(stats.preemptions)

    def success(self, reason: str) -> None:
        """Count one sequence that ended for ``reason``."""
        self._success.labels(self._model_name, _ENGINE, reason).inc()

    def render(
        self, info: EngineInfo | None, stats: EngineStats | None, residency: Residency
    ) -> tuple[bytes, str]:
        """(body, content type) of a scrape; gauges of an engine that is down are left out."""
        scrape = CollectorRegistry()
        scrape.register(_Gauges(self._gauges(info, stats, residency)))
        return generate_latest(self._registry) + generate_latest(scrape), CONTENT_TYPE_PLAIN_0_0_4

    def _gauges(
        self, info: EngineInfo | None, stats: EngineStats | None, residency: Residency
    ) -> list[GaugeMetricFamily]:
        gauges = [self._registered(residency)]
        if info is not None:
            gauges.append(self._cache_config(info))
        if stats is not None:
            usage = stats.blocks_used / max(stats.blocks_total, 1)
            gauges.append(self._gauge("num_requests_running", "Sequences running.", stats.running))
            gauges.append(self._gauge("num_requests_waiting", "Sequences waiting.", stats.waiting))
            gauges.append(self._gauge("kv_cache_usage_perc", "1 means full.", usage))
        if info is not None and stats is not None:
            gauges.append(self._lora_requests(info, stats, residency))
            gauges.append(self._lora_loaded(residency))
        return gauges

    def _lora_requests(
        self, info: EngineInfo, stats: EngineStats, residency: Residency
    ) -> GaugeMetricFamily:
        """Gateway API's reading: "running" is on the device, "waiting" is asked for and is not."""
        waiting = [one for one in self._requested if one not in stats.device_adapters]
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device and waited for; the value is the time of this scrape.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running = ",".join(residency.names(stats.device_adapters))
        waited = ",".join(residency.names(waiting))
        family.add_metric((str(info.adapter_slots), running, waited), time())
        return family

    def _lora_loaded(self, residency: Residency) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Adapters in device (gpu) and host (cpu) memory, used or not; the value is always 1.",
            labels=("adapter_name", "level", "pinned"),
        )
        for each in residency.loaded():
            family.add_metric((each.name, each.level, str(each.pinned).lower()), 1)
        return family

    def _registered(self, residency: Residency) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "deltamux:adapters_registered", "Names of adapters.", labels=("model_name",)
        )
        family.add_metric((self._model_name,), len(residency.registry.catalog))
        return family

    def _cache_config(self, info: EngineInfo) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Size of the KV cache; the value is always 1.",
            labels=("engine", "block_size", "num_gpu_blocks"),
        )
        family.add_metric((_ENGINE, str(info.block_size), str(info.num_blocks)), 1)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric((self._model_name, _ENGINE), value)
        return family

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, _LABELS, registry=self._registry)
        return counter.labels(self._model_name, _ENGINE)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        text = name.replace("_", " ").capitalize() + "."
        histogram = Histogram(
            f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model_name, _ENGINE)

    def _forget(self, adapter_ids: list[int]) -> None:
        for adapter_id in adapter_ids:
            self._requested[adapter_id] -= 1
            if not self._requested[adapter_id]:
                del self._requested[adapter_id]


class _Gauges:
    """A prometheus collector of families made for one scrape."""

    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> list[GaugeMetricFamily]:
        return self._families
