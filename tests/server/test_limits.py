"""How much a tenant may ask for: counted by itself, and over HTTP through OpenAI's client."""

import re
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest

from deltamux.server.api.rate_headers import duration
from deltamux.server.tenants.directory import Account, Key
from deltamux.server.tenants.errors import LimitExceeded
from deltamux.server.tenants.keys import hash_key
from deltamux.server.tenants.limits import Allowance, TenantLimiter
from deltamux.server.tenants.tenant import Role, Tenant, TenantLimits

from .fake_engine import byte_level_tokenizer, serving


@pytest.fixture
def clock(monkeypatch):
    """The time that the limiter and the library it counts with see."""
    clock = SimpleNamespace(now=6000.0)
    clock.time = lambda: clock.now
    for module in ("limits.storage.memory", "limits.strategies"):
        monkeypatch.setattr(f"{module}.time", clock)
    monkeypatch.setattr("deltamux.server.tenants.limits.time", clock.time)
    return clock


def tenant(**limits):
    return Tenant("acme", limits=TenantLimits(**limits))


def begin(limiter, who, prompt=1, completion=0, took=0):
    with limiter.admitted(who, prompt, completion) as running:
        running.took(took)


def test_requests_of_any_minute_are_counted_exactly(clock):
    limiter, acme = TenantLimiter(), tenant(requests_per_minute=3)
    for _ in range(3):
        begin(limiter, acme)
        clock.now += 10
    assert limiter.allowances(acme) == [Allowance("requests", 3, 0, 30.0)]
    with pytest.raises(LimitExceeded, match=r"\(RPM\): Limit 3, Used 3.*try again in 30s") as error:
        begin(limiter, acme)
    assert error.value.retry_after == 30
    clock.now += 30.1
    begin(limiter, acme)
    with pytest.raises(LimitExceeded):
        begin(limiter, acme)


def test_tokens_are_counted_when_asked_for_and_else_when_taken(clock):
    limiter, acme = TenantLimiter(), tenant(tokens_per_minute=1000)

    def remaining():
        return limiter.allowances(acme)[0].remaining

    begin(limiter, acme, prompt=100, completion=200, took=20)
    assert remaining() == 700
    begin(limiter, acme, prompt=100, took=250)
    assert remaining() == 350
    with pytest.raises(LimitExceeded, match="Limit 1000, Used 650, Requested 351"):
        begin(limiter, acme, prompt=1, completion=350)
    assert remaining() == 350
    begin(limiter, acme, prompt=50, took=5000)
    assert remaining() == 0
    clock.now += 120
    assert remaining() == 1000
    with pytest.raises(LimitExceeded, match="ask for fewer tokens") as error:
        begin(limiter, acme, prompt=1001)
    assert error.value.retry_after is None


def test_what_is_refused_counts_for_nothing(clock):
    limiter = TenantLimiter()
    acme = tenant(requests_per_minute=5, tokens_per_minute=100, concurrency=1)
    with limiter.admitted(acme, 10, 0):
        before = limiter.allowances(acme)
        for tokens in (10, 1000):
            with pytest.raises(LimitExceeded, match=r"in flight.*'concurrency'"):
                begin(limiter, acme, prompt=tokens)
    with pytest.raises(LimitExceeded, match="TPM"):
        begin(limiter, acme, prompt=95)
    assert limiter.allowances(acme) == before


def test_a_request_waits_until_its_first_token(clock):
    limiter, acme = TenantLimiter(), tenant(queue=1)
    with limiter.admitted(acme, 1, 0) as first:
        with pytest.raises(LimitExceeded, match=r"1 requests waiting.*'queue'"):
            begin(limiter, acme)
        first.took(1)
        with limiter.admitted(acme, 1, 0), pytest.raises(LimitExceeded):
            begin(limiter, acme)
        begin(limiter, acme)


def test_tenants_do_not_share_limits_and_who_is_none_has_none(clock):
    limiter = TenantLimiter()
    first = tenant(requests_per_minute=1)
    second = Tenant("other", limits=first.limits)
    begin(limiter, first)
    begin(limiter, second)
    for _ in range(5):
        begin(limiter, None, prompt=10**6)
    assert limiter.allowances(None) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.12, "120ms"), (1, "1s"), (7.66, "7.66s"), (60, "1m0s"), (361.5, "6m1.5s")],
)
def test_durations_are_written_as_openai_does(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def server():
    limits = TenantLimits(
        requests_per_minute=4, tokens_per_minute=500, concurrency=2, max_tokens=40
    )
    accounts = [
        Account(Tenant("acme", ("*",), limits=limits), Role.USER, (Key(hash_key("key-a")),), 0),
        Account(Tenant("free", ("*",)), Role.USER, (Key(hash_key("key-b")),), 0),
    ]
    with serving(byte_level_tokenizer(), accounts=accounts) as server:
        yield server


def client_of(server, key):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_headers_say_what_is_left_and_429_is_openais(server):
    with client_of(server, "key-a") as client, client_of(server, "key-b") as other:
        ask = {"model": server.state.model_name, "prompt": "abcd", "max_tokens": 6}
        raw = client.completions.with_raw_response
        answer = raw.create(**ask)
        tokens = answer.parse().usage.prompt_tokens + 6
        assert answer.headers["x-ratelimit-limit-requests"] == "4"
        assert answer.headers["x-ratelimit-remaining-requests"] == "3"
        assert re.fullmatch(r"1m0s|5\d(\.\d+)?s", answer.headers["x-ratelimit-reset-requests"])
        assert answer.headers["x-ratelimit-limit-tokens"] == "500"
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(500 - tokens)
        with client.completions.create(**ask, stream=True) as stream:
            assert stream.response.headers["x-ratelimit-remaining-requests"] == "2"
            list(stream)
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(**{**ask, "n": 13, "max_tokens": 40})
        assert error.value.response.headers["x-ratelimit-remaining-requests"] == "2"
        assert "retry-after" not in error.value.response.headers
        assert error.value.body["type"] == "RateLimitError"
        submitted = len(server.engine.submitted)
        for _ in range(2):
            client.completions.create(**ask)
        with pytest.raises(openai.RateLimitError, match="requests per min") as error:
            client.completions.create(**ask)
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
        assert len(server.engine.submitted) == submitted + 2
        assert (
            "x-ratelimit-limit-requests"
            not in other.completions.with_raw_response.create(**ask).headers
        )


def test_max_tokens_bounds_what_may_be_asked_for_and_what_is_meant_by_nothing(server):
    with client_of(server, "key-a") as client:
        chat = {"model": server.state.model_name, "messages": [{"role": "user", "content": "x"}]}
        client.chat.completions.create(**chat)
        assert server.engine.submitted[-1].sampling.max_tokens == 40
        with pytest.raises(openai.BadRequestError, match="more than the 40"):
            client.chat.completions.create(**chat, max_tokens=41)


def test_requests_in_flight_are_counted_until_they_end_or_their_client_goes(server):
    server.engine.stall_after = 1
    ask = {"model": server.state.model_name, "prompt": "abcd", "stream": True}
    head = {"Authorization": "Bearer key-a"}

    def leave():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=ask, headers=head, timeout=0.5)

    leaving = [threading.Thread(target=leave) for _ in range(2)]
    for thread in leaving:
        thread.start()
        assert server.engine.on_stall.acquire(timeout=30)
    with httpx.Client(base_url=server.url, headers=head) as client:
        refused = client.post("/v1/completions", json=ask)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        for thread in leaving:
            thread.join()
            assert server.engine.on_abort.acquire(timeout=30)
        server.engine.stall_after = None
        assert client.post("/v1/completions", json=ask).status_code == 200
