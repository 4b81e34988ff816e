"""OpenVINO GenAI's continuous batching.

Its pipeline has one set of adapters at a time, that of the first request of the last ``generate``;
``add_request``, which streams, takes no notice of a request's own. So a request of one token, the
first that is to be answered, chooses the adapter, and then all go in by ``add_request``.
"turns" lets requests of other adapters wait until those of this one are done; without it they are
computed with them, as ``generate`` does with a batch.
"""

import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from .loop import Question, serve

BASE = "base"
_CACHE_GIB = 1


@dataclass
class _Flight:
    """A request that is being answered."""

    request: Question
    sent: float
    handle: Any = None
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def read(self, now: float) -> None:
        """Take what the last step brought."""
        while self.handle is not None and self.handle.can_read():
            for output in self.handle.read().values():
                self.times.append(now)
                self.tokens.append(len(output.generated_ids))
                self.token_ids += output.generated_ids

    def done(self) -> bool:
        """Whether there is no more to come."""
        running = openvino_genai.GenerationStatus.RUNNING
        return self.handle is not None and self.handle.get_status() != running

    def record(self) -> dict[str, object]:
        """For the answer."""
        return {
            "sent": self.sent,
            "times": self.times,
            "tokens": self.tokens,
            "token_ids": self.token_ids,
        }


class Pipeline:
    """A loaded model."""

    def start(self, question: Question) -> dict[str, object]:
        """Load the base, and the adapters if they are asked for."""
        properties: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": question["precision"],
            "INFERENCE_NUM_THREADS": question["threads"],
        }
        self._adapters = {}
        if question["lora"]:
            self._adapters = {name: _load(Path(f)) for name, f in question["adapters"].items()}
            config = openvino_genai.AdapterConfig(list(self._adapters.values()))
            properties["adapters"] = config
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            question["model"], _scheduler(question["streams"]), "CPU", properties
        )
        self._turns, self._current, self._count = question["turns"], BASE, 0
        return {}

    def run(self, question: Question) -> dict[str, object]:
        """Keep so many requests in flight until there are no more, or the time is up."""
        start, waiting = time.perf_counter(), deque(question["requests"])
        seconds = inf if question["seconds"] is None else question["seconds"]
        flights: list[_Flight] = []
        window: list[_Flight] = []
        while (waiting and time.perf_counter() - start < seconds) or window:
            now = time.perf_counter() - start
            while waiting and now < seconds and len(window) < question["streams"]:
                window.append(_Flight(waiting.popleft(), now))
                flights.append(window[-1])
            self._admit(window)
            self._pipeline.step()
            now = time.perf_counter() - start
            for flight in window:
                flight.read(now)
            window = [each for each in window if not each.done()]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "records": [each.record() for each in flights]}

    def _admit(self, window: Sequence[_Flight]) -> None:
        """Add the requests that may be computed now."""
        if self._adapters and all(each.handle is None for each in window):
            self._choose(window[0].request)
        for flight in window:
            wanted = not self._turns or flight.request["model"] == self._current
            if flight.handle is None and wanted:
                self._count += 1
                request = flight.request
                config = self._config(request, request["output_tokens"])
                flight.handle = self._pipeline.add_request(self._count, _tensor(request), config)

    def _choose(self, request: Question) -> None:
        if request["model"] != self._current:
            self._pipeline.generate([_tensor(request)], [self._config(request, 1)])
            self._current = request["model"]

    def _config(self, request: Question, tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        if self._adapters:
            chosen = [] if request["model"] == BASE else [self._adapters[request["model"]]]
            config.adapters = openvino_genai.AdapterConfig(chosen)
        return config


def _tensor(request: Question) -> Any:
    return openvino.Tensor(np.array([request["prompt"]], dtype=np.int64))


def _load(folder: Path) -> tuple[Any, float]:
    """An adapter and its scale, which the file with the tensors does not say."""
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = openvino_genai.Adapter(str(folder / "adapter_model.safetensors"))
    return adapter, config["lora_alpha"] / config["r"]


def _scheduler(streams: int) -> Any:
    config = openvino_genai.SchedulerConfig()
    config.max_num_seqs = streams
    config.cache_size = _CACHE_GIB
    return config


if __name__ == "__main__":
    pipeline = Pipeline()
    serve({"start": pipeline.start, "run": pipeline.run})
