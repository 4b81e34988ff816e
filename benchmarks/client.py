"""One streamed completion as a benchmark sees it: when how many tokens arrived.

Works with any server that speaks OpenAI's completions API with vLLM's ``ignore_eos``.
"""

import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx


class RequestFailed(Exception):
    """The server refused or broke off a request, or sent fewer or more tokens than asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, and how many tokens to generate whatever they are."""

    model: str
    prompt_token_ids: list[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """``tokens`` new tokens that arrived together at ``time`` (``time.perf_counter``, seconds)."""

    time: float
    tokens: int


def random_prompt(seed: str, length: int, token_ids: range) -> list[int]:
    """``length`` token ids, drawn uniformly so that no prompt starts with a cached one's tokens."""
    return random.Random(seed).choices(token_ids, k=length)


def open_client(base_url: str, connections: int) -> httpx.AsyncClient:
    """A client that never waits for a connection of its own and allows ten minutes of silence."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=base_url, timeout=600, limits=limits, trust_env=False)


async def stream(client: httpx.AsyncClient, request: Request) -> AsyncIterator[Arrival]:
    """Send the request and yield each chunk that carries tokens, as it arrives.

    Raises:
        RequestFailed: The answer is an error, or does not hold exactly the tokens asked for.
    """
    body = {
        "model": request.model,
        "prompt": request.prompt_token_ids,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    received = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise RequestFailed(f"HTTP {response.status_code}: {text[:300]}")
        async for line in response.aiter_lines():
            tokens = _tokens_in(line)
            if tokens:
                received += tokens
                yield Arrival(time.perf_counter(), tokens)
    if received != request.output_tokens:
        raise RequestFailed(f"asked for {request.output_tokens} tokens, got {received}")


def _tokens_in(line: str) -> int:
    """Tokens that one line of server-sent events carries.

    A server that does not know ``return_token_ids`` is taken to send one token a chunk; should it
    send more, the request's total is wrong and the request counts as failed.
    """
    if not line.startswith("data: ") or line == "data: [DONE]":
        return 0
    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        raise RequestFailed(json.dumps(chunk["error"])[:300])
    return sum(_tokens_of(choice) for choice in chunk["choices"])


def _tokens_of(choice: dict[str, Any]) -> int:
    if "token_ids" in choice:
        return len(choice["token_ids"] or [])
    return 1 if choice.get("text") else 0
