"""One streamed completion as a benchmark sees it: when how many tokens arrived.

Works with any server that speaks OpenAI's completions API. Tokens are counted by vLLM's
``return_token_ids`` where the server knows it, else by the usage it sends at the end, else one a
chunk that has text.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import msgspec
import numpy as np
from aiohttp import ClientSession, TCPConnector
from httpx_aiohttp import AiohttpTransport

_DONE = b"[DONE]"

_CONNECT_SECONDS = 60.0
"""A server at its limit accepts late."""


class RequestFailed(Exception):
    """The server refused or broke off a request, or sent fewer or more tokens than asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how many tokens to generate.

    Attributes:
        model: The name of the base or of an adapter.
        prompt: Token ids, or text.
        output_tokens: How many to generate whatever they are, or at most if not ``exact``.
        exact: Whether a shorter answer is a failure; sends vLLM's ``ignore_eos``.
        key: Sent as bearer token; never printed.
        extra: Further fields of the body, for servers that need some.
    """

    model: str
    prompt: list[int] | str
    output_tokens: int
    exact: bool = True
    key: str | None = field(default=None, repr=False)
    extra: Mapping[str, object] = field(default_factory=dict)

    def body(self) -> bytes:
        """What is posted."""
        body = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        exact = {"ignore_eos": True} if self.exact else {}
        return msgspec.json.encode({**body, **exact, **self.extra})

    def headers(self) -> dict[str, str]:
        """Of the post; a compressed stream would arrive in lumps."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {})


class _Choice(msgspec.Struct):
    text: str | None = ""
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


def random_prompt(seed: str, length: int, token_ids: range) -> list[int]:
    """``length`` token ids, drawn uniformly so that no prompt starts with a cached one's tokens."""
    generator = np.random.default_rng(list(seed.encode()))
    drawn: list[int] = generator.integers(token_ids.start, token_ids.stop, length).tolist()
    return drawn


def open_client(base_url: str, silence: float = 600, *, reuse: bool = True) -> httpx.AsyncClient:
    """A client that never waits for a connection and allows ``silence`` seconds without a byte."""
    return httpx.AsyncClient(
        base_url=base_url,
        timeout=httpx.Timeout(silence, connect=_CONNECT_SECONDS, pool=None),
        transport=AiohttpTransport(client=lambda: _session(reuse), trust_env=False),
    )


def _session(reuse: bool) -> ClientSession:
    """Connections without bound, whose answers are parsed in C: half of what a token costs."""
    return ClientSession(connector=TCPConnector(limit=0, force_close=not reuse))


class Answer:
    """One answer as it arrives.

    Attributes:
        times: When chunks with tokens arrived (``time.perf_counter``, seconds).
        tokens: How many each of them brought.
        token_ids: Of the answer so far, where the server tells them.
        prompt_tokens: By the server's usage; None where it sends none.
    """

    def __init__(self, request: Request) -> None:
        """Of a request that is not sent yet."""
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.token_ids: list[int] = []
        self.prompt_tokens: int | None = None
        self._request = request
        self._usage: int | None = None
        self._counted = False

    async def arrivals(self, client: httpx.AsyncClient) -> AsyncIterator[int]:
        """Send the request and yield each arrival's tokens, counted as far as one knows by then.

        Raises:
            RequestFailed: The answer is an error, breaks off or is not as long as asked for.
            httpx.HTTPError: The connection failed.
        """
        async with aclosing(_payloads(client, self._request)) as payloads:
            async for now, payload in payloads:
                tokens = self._read(payload)
                if tokens:
                    self.times.append(now)
                    self.tokens.append(tokens)
                    yield tokens
        self._settle()

    def _read(self, payload: bytes) -> int:
        """Tokens of one event."""
        try:
            chunk = _decode(payload)
        except msgspec.DecodeError as error:
            raise RequestFailed(f"the server sent what is no completion chunk: {error}") from error
        if chunk.error is not None:
            raise RequestFailed(f"the stream ended with an error: {_message(payload)}")
        if chunk.usage is not None:
            self._usage = chunk.usage.completion_tokens
            self.prompt_tokens = chunk.usage.prompt_tokens
        return sum(map(self._count, chunk.choices))

    def _count(self, choice: _Choice) -> int:
        if choice.token_ids is not None:
            self._counted = True
            self.token_ids += choice.token_ids
            return len(choice.token_ids)
        return 1 if choice.text and not self._counted else 0

    def _settle(self) -> None:
        """Without token ids, share the usage's tokens among the chunks; then check the sum."""
        if not self._counted and self._usage is not None:
            shared = zip(self.times, share(self._usage, len(self.times)), strict=True)
            arrivals = [(now, tokens) for now, tokens in shared if tokens]
            self.times, self.tokens = [each[0] for each in arrivals], [each[1] for each in arrivals]
        received, asked = sum(self.tokens), self._request.output_tokens
        if received > asked or (received < asked and self._request.exact):
            raise RequestFailed(f"asked for {asked} tokens, got {received}")
        if received == 0:
            raise RequestFailed("the answer holds no token")


def share(tokens: int, chunks: int) -> list[int]:
    """``tokens`` spread over ``chunks`` as evenly as whole numbers go, more before fewer."""
    ends = [-(-tokens * index // chunks) for index in range(chunks + 1)] if chunks else []
    return [end - start for start, end in pairwise(ends)]


def stream(client: httpx.AsyncClient, request: Request) -> AsyncIterator[int]:
    """``Answer.arrivals`` for those who do not look back."""
    return Answer(request).arrivals(client)


async def _payloads(
    client: httpx.AsyncClient, request: Request
) -> AsyncGenerator[tuple[float, bytes], None]:
    """Events of the stream without the last, each with the time its bytes were received."""
    done, rest = False, b""
    async with client.stream(
        "POST", "/v1/completions", content=request.body(), headers=request.headers()
    ) as response:
        if response.status_code != 200:
            await response.aread()
            raise RequestFailed(f"HTTP {response.status_code}: {_message(response.content)}")
        async for data in response.aiter_raw():
            now = time.perf_counter()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    payload = line[5:].strip()
                    if payload == _DONE:
                        done = True
                    else:
                        yield now, payload
    if not done:
        raise RequestFailed("the stream ended without [DONE]")


def _message(content: bytes) -> str:
    """What an error says, on one line; OpenAI's ``error.message`` where there is one."""
    try:
        match msgspec.json.decode(content):
            case {"error": {"message": str(text)}} | {"error": str(text)} | {"message": str(text)}:
                return " ".join(text.split())[:300]
    except msgspec.DecodeError:
        pass
    return " ".join(content.decode(errors="replace").split())[:300]
