"""A scripted engine behind a real HTTP server, for the API's tests."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import numpy as np
import uvicorn
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltamux.adapters.errors import AdapterCorrupt, AdapterError
from deltamux.adapters.folder import hash_folder
from deltamux.server.api.app import create_app
from deltamux.server.api.state import AppState, Limits
from deltamux.server.composition import Composable, Room
from deltamux.server.engine.errors import QueueFull
from deltamux.server.engine.messages import AdapterInfo, EngineInfo, EngineStats
from deltamux.server.generation import (
    FinishReason,
    GenerationRequest,
    SequenceUpdate,
    TokenLogprobs,
)
from deltamux.server.grammar.check import GrammarCheck
from deltamux.server.grammar.vocabulary import VocabularySource
from deltamux.server.metrics.metrics import Metrics
from deltamux.server.state.database import open_database
from deltamux.server.store.registry import AdapterRegistry
from deltamux.server.store.sources import SourcePolicy
from deltamux.server.tenants.admin import TenantAdmin
from deltamux.server.tenants.directory import Account, TenantDirectory
from deltamux.server.tenants.records import TenantRecords
from deltamux.server.text.reader import describe
from deltamux.server.text.tokenizer import Tokenizer
from deltamux.server.tools.formats import format_of
from deltamux.server.tracing import RequestTracer
from deltamux.server.usage.ledger import Ledger
from deltamux.server.usage.records import UsageRecords

from .fake_store import label_of, make_registry

BASE = "base"
MAX_MODEL_LEN = 64
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'forbidden' %}{{ raise_exception('no') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, one two three", "END of it"]


def byte_level_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """A small byte-level BPE vocabulary, as GPT-2, Qwen and Llama 3 have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    fast.chat_template = template
    return Tokenizer(describe(fast))


class FakeEngine:
    """Answers every request with ``reply``; records what it was asked and told to abort."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reply: Callable[[GenerationRequest], str] = lambda _: "hello world"
        self.tokens_per_update = 1
        self.stall_after: int | None = None
        self.max_submitted: int | None = None
        self.die_after: int | None = None
        self.death: Exception | None = None
        self.refusal: Exception | None = None
        self.bad_adapters: dict[str, AdapterError] = {}
        self.composables: dict[str, Composable] = {}
        self.load_gate: asyncio.Event | None = None
        self.submitted: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.loaded: dict[int, str] = {}
        self.unloaded: list[int] = []
        self.pins: list[tuple[int, bool]] = []
        self.targets = ["q_proj"]
        self.load_calls = 0
        self.on_stall = threading.Semaphore(0)
        self.on_abort = threading.Semaphore(0)
        self.on_unload = threading.Event()
        self.info: EngineInfo | None = EngineInfo(
            model_type="llama",
            dtype="float32",
            device="cpu",
            kernels="reference",
            vocab_size=tokenizer.vocab_size,
            max_model_len=MAX_MODEL_LEN,
            num_blocks=128,
            block_size=16,
            block_bytes=1 << 14,
            max_num_seqs=8,
            adapter_slots=4,
            adapter_room=Room(host_bytes=1 << 20, device_bytes=1 << 20, parts=4),
            pin_room=Room(host_bytes=1 << 19, device_bytes=1 << 18, parts=2),
        )
        self.stats: EngineStats | None = EngineStats(2, 1, 32, 128, 7, 10, 4, 1, [1])

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceUpdate, None]:
        if self.refusal is not None:
            raise self.refusal
        if len(self.submitted) == self.max_submitted:
            raise QueueFull("The queue is full.")
        self.submitted.append(request)
        try:
            for sent, update in enumerate(self._updates(request)):
                if sent == self.die_after and self.death is not None:
                    raise self.death
                if sent == self.stall_after:
                    self.on_stall.release()
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                if update.finish_reason is not None:
                    self.finished.append(request.request_id)
                yield update
        finally:
            if request.request_id not in self.finished:
                self.aborted.append(request.request_id)
                self.on_abort.release()

    def _updates(self, request: GenerationRequest) -> list[SequenceUpdate]:
        if request.embeds:
            return [self._embedded(request)]
        sampling = request.sampling
        ends = sampling.end_token_ids[:1]
        token_ids = [*self.tokenizer.encode(self.reply(request)), *ends][: sampling.max_tokens]
        stopped = bool(ends) and token_ids[-1] == ends[0]
        prompt = self._prompt_logprobs(request)
        head = [SequenceUpdate(request_id=request.request_id, prompt_logprobs=prompt)]
        step = self.tokens_per_update
        chunks = [token_ids[at : at + step] for at in range(0, len(token_ids), step)]
        return head + [
            SequenceUpdate(
                request_id=request.request_id,
                token_ids=chunk,
                logprobs=self._logprobs(chunk, sampling.logprobs),
                num_cached_tokens=2,
                scheduled=monotonic() if chunk is chunks[0] else None,
                finish_reason=self._reason(stopped) if last else None,
                stop_token_id=token_ids[-1] if stopped and last else None,
            )
            for chunk, last in zip(chunks, [False] * (len(chunks) - 1) + [True], strict=True)
        ]

    @staticmethod
    def _embedded(request: GenerationRequest) -> SequenceUpdate:
        """(3, 4, 0, ... number of tokens), of length 5 and more."""
        vector = np.array([3, 4, 0, len(request.prompt_token_ids)], dtype="<f4")
        return SequenceUpdate(
            request_id=request.request_id, finish_reason=FinishReason.STOP, hidden=vector.tobytes()
        )

    @staticmethod
    def _reason(stopped: bool) -> FinishReason:
        return FinishReason.STOP if stopped else FinishReason.LENGTH

    def _prompt_logprobs(self, request: GenerationRequest) -> list[TokenLogprobs]:
        return self._logprobs(request.prompt_token_ids[1:], request.sampling.prompt_logprobs)

    def _logprobs(self, token_ids: list[int], number: int | None) -> list[TokenLogprobs]:
        """The token itself is second best; the best ones are tokens 40, 41, ..."""
        if number is None:
            return []
        tops = [(40 + rank, -0.25 - rank) for rank in range(number)]
        return [TokenLogprobs(token_id, -0.5, 2, tops) for token_id in token_ids]

    async def load_adapter(self, adapter_id: int, path: str, digest: str | None) -> AdapterInfo:
        self.load_calls += 1
        if self.load_gate is not None:
            await self.load_gate.wait()
        if self.refusal is not None:
            raise self.refusal
        label = label_of(path)
        if label in self.bad_adapters:
            raise self.bad_adapters[label]
        found = hash_folder(Path(path))
        if found != digest:
            raise AdapterCorrupt(f"the files at {path} changed")
        self.loaded[adapter_id] = label
        composable = self.composables.get(label, Composable())
        return AdapterInfo(found, "lora", "peft", 8, 1000, 4000, self.targets, composable)

    async def unload_adapter(self, adapter_id: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        del self.loaded[adapter_id]
        self.unloaded.append(adapter_id)
        self.on_unload.set()

    def pin_adapter(self, adapter_id: int, pinned: bool) -> None:
        self.pins.append((adapter_id, pinned))


@dataclass(frozen=True)
class Running:
    """A server under test."""

    url: str
    engine: FakeEngine
    state: AppState
    state_dir: Path


def leave_when_stalled(server: Running, path: str, body: dict[str, object], times: int) -> None:
    """Send a request, wait until ``times`` sequences of it stall, and close the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body)
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        for _ in range(times):
            assert server.engine.on_stall.acquire(timeout=30)


def make_state(
    engine: FakeEngine,
    registry: AdapterRegistry,
    tenants: TenantAdmin,
    ledger: Ledger,
    limits: Limits,
    policy: SourcePolicy,
    tracer: RequestTracer | None = None,
) -> AppState:
    check = GrammarCheck(VocabularySource.of(engine.tokenizer.source, engine.tokenizer.vocab_size))
    metrics = Metrics(BASE)
    tools = format_of(engine.tokenizer.chat_template)
    state = AppState(
        engine,
        engine.tokenizer,
        registry,
        metrics,
        ledger,
        check,
        tools,
        tenants,
        "some/folder",
        limits,
        policy,
        tracer=tracer,
    )
    state.started.set()
    return state


@contextmanager
def serving(
    tokenizer: Tokenizer,
    limits: Limits | None = None,
    policy: SourcePolicy | None = None,
    accounts: list[Account] | None = None,
    tracer: RequestTracer | None = None,
    state_dir: Path | None = None,
    **store: Any,
) -> Iterator[Running]:
    """A real uvicorn on a free loopback port, in a thread; without ``state_dir``, on an empty one.

    ``accounts`` are those of a tenants file. The socket listens before the thread starts, so
    clients may connect at once.
    """
    engine = FakeEngine(tokenizer)
    with (
        TemporaryDirectory() as empty,
        open_database(folder := state_dir or Path(empty)) as database,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        registry = make_registry(database, folder, engine, base=BASE, **store)
        tenants = TenantAdmin(TenantRecords(database), TenantDirectory())
        if accounts is not None:
            tenants.directory.use_file(accounts)
        ledger = Ledger(folder / "usage", UsageRecords(database))
        limits, policy = limits or Limits(), policy or SourcePolicy()
        state = make_state(engine, registry, tenants, ledger, limits, policy, tracer)
        config = uvicorn.Config(create_app(state), log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield Running(url, engine, state, folder)
        finally:
            server.should_exit = True
            thread.join()
            state.check_grammar.close()
