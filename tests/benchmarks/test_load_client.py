"""One streamed completion against a scripted server: what is counted and what is a failure."""

import asyncio

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.benchmarks.client import Answer, Request, RequestFailed, open_client, share

from .fake_openai import FakeServer


def ask(server: FakeServer, *requests: Request) -> list[Answer]:
    """Answers, one request after the other over one client."""

    async def run() -> list[Answer]:
        answers = [Answer(request) for request in requests]
        async with open_client(server.url) as client:
            for answer in answers:
                async for _ in answer.arrivals(client):
                    pass
        return answers

    return asyncio.run(run())


def test_a_body_asks_for_exact_tokens_and_for_the_usage(server: FakeServer) -> None:
    ask(server, Request("base", [5, 6], 3), Request("base", "text", 3, exact=False, key="secret"))
    exact, open_ended = server.bodies
    assert exact == {
        "model": "base",
        "prompt": [5, 6],
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert open_ended["prompt"] == "text"
    assert "ignore_eos" not in open_ended
    assert server.keys == [None, "Bearer secret"]


def test_a_connection_is_used_again(server: FakeServer) -> None:
    ask(server, *[Request("base", [1], 2)] * 5)
    assert len(server.connections) == 1


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("usage", [True, False])
def test_token_ids_tell_the_tokens_of_each_chunk(
    server: FakeServer, line_end: str, usage: bool
) -> None:
    server.chunk_sizes, server.line_end, server.with_usage = (1, 3, 2), line_end, usage
    [answer] = ask(server, Request("base", [1, 2, 3, 4], 8))
    assert answer.tokens == [1, 3, 2, 1, 1]
    assert len(answer.times) == 5
    assert answer.times == sorted(answer.times)
    assert answer.prompt_tokens == (4 if usage else None)


def test_without_token_ids_the_usage_is_shared_among_the_chunks(server: FakeServer) -> None:
    server.chunk_sizes, server.with_token_ids = (1, 3, 2), False
    [answer] = ask(server, Request("base", [1], 8))
    assert (sum(answer.tokens), len(answer.tokens)) == (8, 5)


def test_without_either_a_chunk_is_a_token(server: FakeServer) -> None:
    server.with_token_ids = server.with_usage = False
    [answer] = ask(server, Request("base", [1], 8))
    assert answer.tokens == [1] * 8
    server.chunk_sizes = (2,)
    with pytest.raises(RequestFailed, match="asked for 8 tokens, got 4"):
        ask(server, Request("base", [1], 8))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("refused", "HTTP 404: no such model"),
        ("busy", "HTTP 429: too many requests"),
        ("failing", "the stream ended with an error: the engine died"),
        ("undone", r"the stream ended without \[DONE\]"),
        ("garbled", "no completion chunk"),
        ("short", "asked for 4 tokens, got 3"),
        ("long", "asked for 4 tokens, got 5"),
    ],
)
def test_failures_say_what_happened(server: FakeServer, model: str, message: str) -> None:
    with pytest.raises(RequestFailed, match=message):
        ask(server, Request(model, [1], 4))


def test_a_connection_that_breaks_off_is_a_failure(server: FakeServer) -> None:
    with pytest.raises(httpx.ReadError):
        ask(server, Request("torn", [1], 4))


def test_shorter_answers_are_fine_where_they_may_be(server: FakeServer) -> None:
    [answer] = ask(server, Request("short", [1], 4, exact=False))
    assert sum(answer.tokens) == 3


def test_requests_after_a_failure_are_answered(server: FakeServer) -> None:
    async def run() -> int:
        async with open_client(server.url) as client:
            for model in ("torn", "busy", "failing"):
                with pytest.raises((RequestFailed, httpx.HTTPError)):
                    async for _ in Answer(Request(model, [1], 4)).arrivals(client):
                        pass
            return sum([n async for n in Answer(Request("base", [1], 4)).arrivals(client)])

    assert asyncio.run(run()) == 4


def test_silence_is_a_failure(server: FakeServer) -> None:
    server.seconds_per_chunk = 0.2

    async def run() -> None:
        async with open_client(server.url, silence=0.02) as client:
            async for _ in Answer(Request("base", [1], 4)).arrivals(client):
                pass

    with pytest.raises(httpx.ReadTimeout):
        asyncio.run(run())


@given(st.integers(0, 200), st.integers(1, 60))
def test_shares_add_up_and_differ_by_one_at_most(tokens: int, chunks: int) -> None:
    shares = share(tokens, chunks)
    assert (len(shares), sum(shares)) == (chunks, tokens)
    assert max(shares) - min(shares) <= 1
    assert tokens == 0 or shares[0] > 0
    assert share(tokens, 0) == []
