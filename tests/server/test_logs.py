"""One line for every request, as text or JSON, with everything but what is private."""

import json
import logging
import re
import sys
from datetime import datetime

import httpx
import pytest

from deltamux.server.engine.errors import EngineDied
from deltamux.server.logs import JsonLines, TextLines, fields
from deltamux.server.tenants.directory import Account, Key
from deltamux.server.tenants.keys import hash_key
from deltamux.server.tenants.tenant import Role, Tenant

from .fake_engine import leave_when_stalled
from .fake_store import write_adapter
from .siege import eventually

SECRET = "s3cret-prompt-of-somebody"
KEY = "sk-deltamux-s3cret-key"
HEADERS = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "my-request:7"}
ASK = {"model": "base", "prompt": SECRET, "max_tokens": 2, "user": "s3cret-user"}
FORMATTERS = {"text": TextLines(), "json": JsonLines()}


@pytest.fixture
def lines(caplog):
    """Everything logged, as both formats write it."""
    caplog.set_level(logging.DEBUG, logger="deltamux")
    return lambda form: [FORMATTERS[form].format(record) for record in caplog.records]


@pytest.fixture
def access(lines):
    """At least so many lines of access: one is written after its answer's last byte."""

    def found(number: int = 1) -> list[dict]:
        def those() -> list[dict]:
            each = [json.loads(line) for line in lines("json")]
            return [line for line in each if line["logger"] == "deltamux.access"]

        eventually(lambda: len(those()) >= number, those)
        return those()

    return found


@pytest.fixture
def shared(server):
    key = Key(hash_key(KEY))
    server.state.tenants.use_file([Account(Tenant("ann", adapters=("*",)), Role.USER, (key,))])
    return server


def post(server, path="/v1/completions", headers=HEADERS, **body) -> httpx.Response:
    return httpx.post(server.url + path, json={**ASK, **body}, headers=headers, timeout=30)


def test_a_line_tells_who_asked_for_what_and_what_it_took(shared, access):
    usage = post(shared).json()["usage"]
    [line] = access()
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    taken = {name: line.pop(name) for name in ("seconds", "queue_seconds", "first_token_seconds")}
    assert 0 < taken["queue_seconds"] <= taken["first_token_seconds"] <= taken["seconds"]
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", line.pop("id"))
    assert line == {
        "level": "INFO",
        "logger": "deltamux.access",
        "message": "POST /v1/completions 200",
        "request_id": "my-request:7",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "tenant": "ann",
        "key_id": Key(hash_key(KEY)).id,
        "model": "base",
        "stream": False,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": 2,
        "completion_tokens": 2,
        "finish_reasons": "length",
    }


def test_adapters_are_told_with_their_version(server, access):
    path = write_adapter(server.state_dir / "shelf" / "poet", "poet")
    body = {"lora_name": "poet", "lora_path": str(path)}
    httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).raise_for_status()
    post(server, model="poet", stream=True)
    _, line = access(2)
    digest = server.state.registry.catalog.get("poet").default_digest
    assert (line["model"], line["digest"], line["stream"]) == ("poet", digest, True)
    assert line.keys().isdisjoint({"tenant", "key_id"})


def test_every_request_has_a_line_however_it_ends(server, access):
    post(server, n=0)
    post(server, model="nope")
    httpx.get(f"{server.url}/v1/nothing%0aINFO%20forged?query={SECRET}")
    server.engine.die_after, server.engine.death = 2, EngineDied("gone")
    post(server, stream=True)
    server.engine.refusal = RuntimeError("a defect")
    post(server)
    found = [(line["status"], line["path"]) for line in access(5)]
    assert found == [
        (400, "/v1/completions"),
        (404, "/v1/completions"),
        (404, "/v1/nothing%0aINFO%20forged"),
        (200, "/v1/completions"),
        (500, "/v1/completions"),
    ]
    assert access(4)[3]["finish_reasons"] == "error"
    assert access(4)[3]["completion_tokens"] == 1


def test_a_client_that_left(server, access):
    server.engine.stall_after = 2
    leave_when_stalled(server, "/v1/completions", {**ASK, "max_tokens": 9}, 1)
    assert server.engine.on_abort.acquire(timeout=30)
    httpx.get(f"{server.url}/health")
    left = access()[0]
    assert (left["status"], left["finish_reasons"]) == (499, "abort")


def test_nothing_private_is_ever_written(shared, lines):
    server = shared
    chat = {"model": "base", "messages": [{"role": "user", "content": SECRET}]}
    for body in ({}, {"stream": True}, {"n": 0}, {"model": "nope"}, {"stop": SECRET}):
        post(server, **body)
        httpx.post(f"{server.url}/v1/chat/completions", json={**chat, **body}, headers=HEADERS)
    httpx.post(f"{server.url}/v1/completions", content=f'{{"{SECRET}', headers=HEADERS)
    httpx.post(f"{server.url}/tokenize", json={"prompt": SECRET}, headers=HEADERS)
    httpx.get(f"{server.url}/v1/models?api_key={KEY}", headers=HEADERS)
    httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}x"})
    server.engine.refusal = RuntimeError("a defect")
    post(server)
    for form in FORMATTERS:
        text = "\n".join(lines(form))
        assert text.count("deltamux.access") >= 14
        for private in (SECRET, KEY, hash_key(KEY), "s3cret", "hello world"):
            assert private not in text


def record(message: str, **more) -> logging.LogRecord:
    made = logging.getLogger("deltamux.x").makeRecord(
        "deltamux.x", logging.WARNING, "file", 1, message, ("an argument",), None, **more
    )
    made.created = 0.0
    return made


def test_formats():
    plain = record("it is %s")
    assert TextLines().format(plain) == "WARNING deltamux.x: it is an argument"
    assert json.loads(JsonLines().format(plain)) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "WARNING",
        "logger": "deltamux.x",
        "message": "it is an argument",
    }
    with_fields = record("it is %s", extra=fields(tokens=7, tenant=None, name="ann"))
    assert TextLines().format(with_fields).endswith("it is an argument tokens=7 name=ann")
    assert json.loads(JsonLines().format(with_fields))["tokens"] == 7


def test_a_traceback_is_one_json_line():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        failed = record("it is %s")
        failed.exc_info = sys.exc_info()
    line = JsonLines().format(failed)
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["exception"]
