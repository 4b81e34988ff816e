"""``/v1/usage`` tells what clients were told, to the token, and to each tenant its own alone."""

import csv
import io
import json

import httpx
import pytest

from deltamux.server.engine.errors import EngineDied, QueueFull
from deltamux.server.tenants.directory import Account, Key
from deltamux.server.tenants.keys import hash_key
from deltamux.server.tenants.tenant import Role, Tenant

from .fake_engine import Running, leave_when_stalled
from .fake_store import write_adapter

KEYS = {"ann": "key-of-ann", "bob": "key-of-bob", "root": "key-of-root"}
COUNTED = ("prompt_tokens", "cached_tokens", "completion_tokens")


def ask(server: Running, who: str, path: str = "/v1/completions", **body) -> dict:
    """What the client was told its request took."""
    body = {"model": "base", **({} if "messages" in body else {"prompt": "one two"}), **body}
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    answer = httpx.post(server.url + path, json=body, headers=bearer(who), timeout=30)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return amounts(answer.json()["usage"])
    *_, last, done = [line for line in answer.text.splitlines() if line]
    assert done == "data: [DONE]"
    return amounts(json.loads(last.removeprefix("data: "))["usage"])


def bearer(who: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[who]}"}


def amounts(usage: dict) -> dict:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {**{name: usage[name] for name in COUNTED[::2]}, "cached_tokens": cached}


def used(server: Running, who: str, **query) -> dict:
    answer = httpx.get(f"{server.url}/v1/usage", params=query, headers=bearer(who))
    assert answer.status_code == 200, answer.text
    return answer.json()


def load(server: Running, name: str) -> str:
    path = write_adapter(server.state_dir / "shelf" / name, name)
    body = {"lora_name": name, "lora_path": str(path)}
    answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, headers=bearer("root"))
    assert answer.status_code == 200, answer.text
    return server.state.registry.catalog.get(name).default_digest


@pytest.fixture
def shared(server: Running) -> Running:
    """The same with two tenants and an administrator."""
    accounts = [
        Account(
            Tenant(name, adapters=("*",)),
            Role.ADMIN if name == "root" else Role.USER,
            (Key(hash_key(key)),),
        )
        for name, key in KEYS.items()
    ]
    server.state.tenants.use_file(accounts)
    return server


CHAT = {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": "hi"}]}
REQUESTS = [
    {},
    {"stream": True},
    {"prompt": ["one", "two three"], "n": 3},
    {"prompt": ["one", "two three"], "n": 3, "stream": True},
    {"n": 1, "best_of": 3},
    {"stop": "wor", "stream": True},
    {"max_tokens": 1},
    {"echo": True, "logprobs": 1, "stream": True},
    {**CHAT},
    {**CHAT, "n": 2, "stream": True},
]


def test_usage_is_what_clients_were_told(shared):
    told = {who: dict.fromkeys(COUNTED, 0) for who in ("ann", "bob")}
    for number, request in enumerate(REQUESTS):
        for who in ("ann", "bob")[: 1 + number % 2]:
            for name, amount in ask(shared, who, **request).items():
                told[who][name] += amount
    for who, requests in (("ann", len(REQUESTS)), ("bob", len(REQUESTS) // 2)):
        total = used(shared, who)["total"]
        assert {name: total[name] for name in COUNTED} == told[who]
        assert total["requests"] == requests
        assert total["total_tokens"] == total["prompt_tokens"] + total["completion_tokens"]
        assert total["undelivered_completion_tokens"] == 0


def test_by_adapter_version_key_and_day(shared):
    first = load(shared, "poet")
    ask(shared, "ann", model="poet")
    load(shared, "other")
    ask(shared, "ann", model=f"poet@{first[:12]}", max_tokens=1)
    weights = [{"name": "poet", "weight": 0.5}, {"name": "other", "weight": 0.5}]
    ask(shared, "ann", adapters=weights, max_tokens=1)
    ask(shared, "bob", max_tokens=1)
    rows = used(shared, "ann", group_by="adapter,digest,key_id")["data"]
    assert {(row["adapter"], row["digest"]): row["requests"] for row in rows} == {
        ("poet", first): 2,
        ("poet+other", f"{first}+{shared.state.registry.catalog.get('other').default_digest}"): 1,
    }
    assert {row["key_id"] for row in rows} == {Key(hash_key(KEYS["ann"])).id}
    assert used(shared, "ann", adapter="poet")["total"]["requests"] == 2
    assert used(shared, "ann", digest=f"sha256:{first[:9]}")["total"]["requests"] == 3
    assert used(shared, "bob", adapter="")["total"]["completion_tokens"] == 1
    [day] = {row["day"] for row in used(shared, "root")["data"]}
    assert used(shared, "root", start=day, end=day)["total"]["requests"] == 4
    assert used(shared, "root", end="2020-12-31") == {
        "object": "usage",
        "data": [],
        "total": dict.fromkeys(used(shared, "root")["total"], 0),
    }


def test_tenants_see_their_own_and_administrators_all(shared):
    for who in KEYS:
        ask(shared, who)
    tenants = {row["tenant"] for row in used(shared, "root", group_by="tenant")["data"]}
    assert tenants == {"ann", "bob", ""}
    for query in ({}, {"tenant": "ann"}):
        rows = used(shared, "ann", group_by="tenant", **query)["data"]
        assert [row["tenant"] for row in rows] == ["ann"]
    assert used(shared, "root", tenant="bob")["total"]["requests"] == 1
    others = httpx.get(f"{shared.url}/v1/usage?tenant=bob", headers=bearer("ann"))
    assert (others.status_code, others.json()["error"]["param"]) == (403, "tenant")
    assert httpx.get(f"{shared.url}/v1/usage").status_code == 401


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"group_by": "day,colour"}, "group_by"),
        ({"group_by": "day,day"}, "group_by"),
        ({"start": "yesterday"}, "start"),
        ({"start": "2026-02-01", "end": "2026-01-01"}, "end"),
        ({"format": "xml"}, "format"),
        ({"tenants": "ann"}, "tenants"),
    ],
)
def test_what_cannot_be_asked(shared, query, param):
    answer = httpx.get(f"{shared.url}/v1/usage", params=query, headers=bearer("root"))
    assert answer.status_code == 400, answer.text
    assert param in answer.json()["error"]["param"]


def test_as_a_table(shared):
    ask(shared, "ann")
    ask(shared, "bob", stream=True)
    rows = used(shared, "root")["data"]
    url = f"{shared.url}/v1/usage"
    accepted = httpx.get(url, headers={**bearer("root"), "Accept": "text/csv"})
    named = httpx.get(url, headers=bearer("root"), params={"format": "csv"})
    assert accepted.text == named.text
    assert named.headers["content-type"].startswith("text/csv")
    found = list(csv.DictReader(io.StringIO(named.text)))
    assert found == [{name: str(value) for name, value in row.items()} for row in rows]
    assert len(found) == 2


def test_what_fails_or_is_left_counts_as_far_as_it_came(shared):
    """Streams: what was sent. Whole answers: what was generated for them, as undelivered."""
    prompt = len(shared.engine.tokenizer.encode("one two"))
    engine = shared.engine
    engine.die_after, engine.death = 3, EngineDied("gone")  # the first update has no token
    url = f"{shared.url}/v1/completions"
    body = {"model": "base", "prompt": "one two"}
    assert httpx.post(url, json=body, headers=bearer("ann")).status_code == 503
    streamed = httpx.post(url, json={**body, "stream": True}, headers=bearer("bob"))
    assert streamed.text.count('"text"') == 2
    lost = used(shared, "ann")["total"]
    assert (lost["requests"], lost["prompt_tokens"], lost["completion_tokens"]) == (0, 0, 0)
    assert lost["undelivered_requests"] == 1
    assert lost["undelivered_prompt_tokens"] == prompt
    assert lost["undelivered_completion_tokens"] == 2
    sent = used(shared, "bob")["total"]
    assert (sent["requests"], sent["prompt_tokens"], sent["completion_tokens"]) == (1, prompt, 2)
    assert sent["undelivered_completion_tokens"] == sent["undelivered_prompt_tokens"] == 0


def test_a_client_that_leaves_before_its_answer_is_there(server):
    server.engine.stall_after = 3  # the first update has no token
    body = {"model": "base", "prompt": "one two"}
    leave_when_stalled(server, "/v1/completions", body, 1)
    assert server.engine.on_abort.acquire(timeout=30)
    lost = httpx.get(f"{server.url}/v1/usage").json()["total"]
    assert (lost["completion_tokens"], lost["undelivered_completion_tokens"]) == (0, 2)


def test_refused_requests_count_nothing(shared):
    url = f"{shared.url}/v1/completions"
    for body in ({"n": 0}, {"model": "nope"}):
        body = {"model": "base", "prompt": "one two", **body}
        assert httpx.post(url, json=body, headers=bearer("ann")).status_code in (400, 404)
    shared.engine.refusal = QueueFull("full")
    body = {"model": "base", "prompt": "one two"}
    assert httpx.post(url, json=body, headers=bearer("ann")).status_code == 429
    assert used(shared, "ann")["data"] == []
