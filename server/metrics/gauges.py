"""Gauges, made for one scrape of what the engine last said and of where adapters are."""

from dataclasses import dataclass
from time import time

from prometheus_client.core import GaugeMetricFamily

from ..engine.messages import EngineInfo, EngineStats
from ..store.residency import Residency

ENGINE = "0"
LABELS = ("model_name", "engine")


@dataclass(frozen=True, slots=True)
class EngineView:
    """What there is to show.

    Attributes:
        info: What the engine runs; None while it is down.
        stats: Its last report; None while it is down.
        residency: Where adapters are.
        requested: What the engine calls the adapters of live requests.
    """

    info: EngineInfo | None
    stats: EngineStats | None
    residency: Residency
    requested: tuple[int, ...]


class Gauges:
    """A prometheus collector of one scrape's gauges."""

    def __init__(self, model_name: str, view: EngineView) -> None:
        """Show ``view``, of the base that is served under this name."""
        self._model_name = model_name
        self._view = view

    def collect(self) -> list[GaugeMetricFamily]:
        """What is known now; gauges of an engine that is down are left out."""
        info, stats = self._view.info, self._view.stats
        gauges = [self._registered(), self._store_bytes(), self._up()]
        if info is not None:
            gauges.append(self._cache_config(info))
        if stats is not None:
            usage = stats.blocks_used / max(stats.blocks_total, 1)
            gauges.append(self._gauge("num_requests_running", "Sequences running.", stats.running))
            gauges.append(self._gauge("num_requests_waiting", "Sequences waiting.", stats.waiting))
            gauges.append(self._gauge("kv_cache_usage_perc", "1 means full.", usage))
            gauges.append(self._adapter_bytes(stats))
        if info is not None and stats is not None:
            gauges.append(self._lora_requests(info, stats))
            gauges += [self._lora_loaded(), self._in_memory()]
        return gauges

    def _lora_requests(self, info: EngineInfo, stats: EngineStats) -> GaugeMetricFamily:
        """Gateway API's reading: "running" is on the device, "waiting" is asked for and is not."""
        residency = self._view.residency
        waiting = [one for one in self._view.requested if one not in stats.device_adapters]
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device and waited for; the value is the time of this scrape.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running = ",".join(residency.names(stats.device_adapters))
        waited = ",".join(residency.names(waiting))
        family.add_metric((str(info.adapter_slots), running, waited), time())
        return family

    def _lora_loaded(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Adapters in device (gpu) and host (cpu) memory, used or not; the value is always 1.",
            labels=("adapter_name", "level", "pinned"),
        )
        for each in self._view.residency.loaded():
            family.add_metric((each.name, each.level, str(each.pinned).lower()), 1)
        return family

    def _in_memory(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "deltamux:adapters_in_memory",
            "Adapters in device (gpu) and host (cpu) memory, those without a name too.",
            labels=("level",),
        )
        for level, number in self._view.residency.counts().items():
            family.add_metric((level,), number)
        return family

    def _registered(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "deltamux:adapters_registered", "Names of adapters.", labels=("model_name",)
        )
        family.add_metric((self._model_name,), len(self._view.residency.registry.catalog))
        return family

    def _store_bytes(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "deltamux:adapter_store_bytes",
            "Disk that copies of adapters take.",
            value=self._view.residency.registry.store_bytes,
        )

    def _adapter_bytes(self, stats: EngineStats) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "deltamux:adapter_device_bytes",
            "Bytes of --memory-budget that adapters take.",
            labels=("model_name",),
        )
        family.add_metric((self._model_name,), stats.adapter_bytes)
        return family

    def _up(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "deltamux:engine_up",
            "1 while the engine serves requests, 0 while it starts or restarts.",
            labels=("model_name",),
        )
        family.add_metric((self._model_name,), float(self._view.info is not None))
        return family

    def _cache_config(self, info: EngineInfo) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Size of the KV cache; the value is always 1.",
            labels=("engine", "block_size", "num_gpu_blocks"),
        )
        family.add_metric((ENGINE, str(info.block_size), str(info.num_blocks)), 1)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric((self._model_name, ENGINE), value)
        return family
