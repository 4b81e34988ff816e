"""Clients that go away and engines that fail: nobody waits, nothing leaks, nothing runs on."""

import httpx
import openai
import pytest

from deltamux.server.engine.errors import EngineDied, EngineUnavailable, QueueFull

from .fake_engine import leave_when_stalled, serving


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stall_after", [0, 3])
def test_a_client_that_goes_away_is_cancelled(tokenizer, caplog, path, stream, stall_after):
    messages = [{"role": "user", "content": "hi"}]
    prompt = {"messages": messages} if "chat" in path else {"prompt": "x"}
    with serving(tokenizer) as server:
        server.engine.stall_after = stall_after
        leave_when_stalled(server, path, {"model": "base", "stream": stream, "n": 2, **prompt}, 2)
        for _ in range(2):
            assert server.engine.on_abort.acquire(timeout=30)
    assert len(set(server.engine.aborted)) == 2
    assert server.engine.finished == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_closing_a_stream_cancels_it(server, client):
    server.engine.stall_after = 3
    with client.completions.create(model="base", prompt="x", stream=True) as stream:
        next(stream)
    assert server.engine.on_abort.acquire(timeout=30)


def test_a_queue_that_fills_up_halfway_cancels_the_rest(server, client):
    server.engine.stall_after = 1
    server.engine.max_submitted = 2
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="base", prompt=["x", "y", "z"])
    assert len(server.engine.aborted) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EngineUnavailable("The engine is restarting."), openai.InternalServerError),
        (QueueFull("The queue is full."), openai.RateLimitError),
    ],
)
def test_an_engine_that_refuses_gives_its_status(server, client, error, kind, stream):
    server.engine.refusal = error
    with pytest.raises(kind) as raised:
        client.completions.create(model="base", prompt=["x", "y"], stream=stream)
    assert raised.value.status_code == (429 if isinstance(error, QueueFull) else 503)
    assert raised.value.response.headers["retry-after"].isdigit()
    assert raised.value.body["message"] == str(error)
    assert server.engine.submitted == []


def test_an_engine_that_dies_ends_a_stream_with_an_error(server, client):
    server.engine.die_after, server.engine.death = 3, EngineDied("The engine died.")
    stream = client.completions.create(model="base", prompt="x", stream=True, n=2)
    assert "hello world".startswith(next(stream).choices[0].text)
    with pytest.raises(openai.APIError, match=r"The engine died\."):
        list(stream)
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model="base", prompt="x")
    assert raised.value.status_code == 503


def test_an_unexpected_failure_is_logged_and_shows_nothing_of_itself(tokenizer, caplog):
    with serving(tokenizer) as server:
        server.engine.refusal = RuntimeError("secret detail")
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "base", "prompt": "x"})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "Internal server error.",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert "secret detail" in caplog.text


def test_an_engine_that_is_down_is_not_asked(server, client):
    server.engine.info = None
    with pytest.raises(openai.InternalServerError, match="starting or restarting"):
        client.completions.create(model="base", prompt="x")
    assert httpx.get(f"{server.url}/health").status_code == 200
    ready = httpx.get(f"{server.url}/ready")
    assert ready.status_code == 503
    assert ready.json()["error"]["type"] == "ServiceUnavailableError"
