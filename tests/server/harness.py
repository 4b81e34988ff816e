"""The engine's parts in this process, stepped by hand, the books checked after every step."""

import os
import select
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from deltamux.server.engine.build import build_engine
from deltamux.server.engine.config import EngineConfig
from deltamux.server.engine.messages import (
    Abort,
    AdapterLoaded,
    AdapterRefused,
    AdapterUnloaded,
    HostChanges,
    LoadAdapter,
    StepOutputs,
    Submit,
    UnloadAdapter,
)
from deltamux.server.generation import (
    AdapterWeight,
    BeamAnswer,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from deltamux.server.text.reader import read_tokenizer


def engine_config(model: Path, **changes) -> EngineConfig:
    defaults = {
        "dtype": "float32",
        "device": "cpu",
        "kernels": "auto",
        "max_model_len": None,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "memory_budget": 4 << 20,
        "host_memory_budget": 64 << 20,
        "prefix_caching": True,
    }
    return EngineConfig(model_folder=str(model), **{**defaults, **changes})


_OUTER = ("adapters", "cache_salt", "priority", "embeds")


def make_request(request_id: str, prompt: list[int], **changes) -> GenerationRequest:
    outer = {k: changes.pop(k) for k in _OUTER if k in changes}
    if (adapter_id := changes.pop("adapter_id", None)) is not None:
        outer["adapters"] = [AdapterWeight(adapter_id)]
    sampling = {"max_tokens": 12, "temperature": 0.0, "seed": 0, "logprobs": 0, **changes}
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**sampling),
        **outer,
    )


@dataclass
class Received:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    hidden: bytes | None = None


class EngineHarness:
    def __init__(self, config: EngineConfig):
        tokenizer = read_tokenizer(config.model_folder)
        self.engine, self.host, self.info = build_engine(config, tokenizer)
        self.received: dict[str, Received] = defaultdict(Received)
        self.adapter_events: list[AdapterLoaded | AdapterRefused | AdapterUnloaded] = []
        self.on_host: set[int] = set()
        self.beams: dict[str, list[BeamAnswer]] = {}
        self.preemptions = 0
        self.steps = 0

    def submit(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.engine.handle(Submit(request))

    def abort(self, request_id: str) -> None:
        self.engine.handle(Abort([request_id]))

    def load(self, adapter_id: int, path: Path) -> AdapterLoaded | AdapterRefused:
        self.engine.handle(LoadAdapter(adapter_id, str(path)))
        self.wait_for_load()
        return self.adapter_events[-1]

    def unload(self, adapter_id: int) -> None:
        self.engine.handle(UnloadAdapter(adapter_id))
        self.collect()

    def wait_for_load(self) -> None:
        readable, _, _ = select.select([self.host.wakeup], [], [], 30)
        assert readable, "no load ended"
        os.eventfd_read(self.host.wakeup)
        self.engine.take_loads()
        self.collect()

    def step(self) -> None:
        self.engine.step()
        self.steps += 1
        self.collect()
        self.check_integrity()

    def run(self) -> dict[str, Received]:
        """Step until nothing is left to do."""
        while self.engine.has_work:
            self.step()
            self.engine.take_loads()
        self.collect()
        return self.received

    def check_integrity(self) -> None:
        self.engine.check_integrity()
        assert self.on_host == {*self.host.ready()}, "what is told to be in host memory is there"

    def collect(self) -> None:
        for event in self.engine.drain():
            if isinstance(event, HostChanges):
                self.on_host = (self.on_host | {*event.added}) - {*event.dropped}
                continue
            if not isinstance(event, StepOutputs):
                self.adapter_events.append(event)
                continue
            self.preemptions += event.stats.preemptions
            for update in event.updates:
                self._take(update)

    def close(self) -> None:
        self.engine.close()

    def _take(self, update) -> None:
        entry = self.received[update.request_id]
        assert entry.finish_reason is None, "an update after the last one"
        entry.token_ids += update.token_ids
        entry.logprobs += [report.logprob for report in update.logprobs]
        entry.prompt_logprobs += update.prompt_logprobs
        entry.num_cached_tokens = max(entry.num_cached_tokens, update.num_cached_tokens)
        entry.finish_reason = update.finish_reason
        entry.error = update.error
        entry.hidden = update.hidden
        if update.beams:
            self.beams[update.request_id] = update.beams
