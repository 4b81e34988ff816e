"""The store over HTTP: uploads, versions, pins and sources; reloads while requests run."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deltamux.adapters.errors import AdapterCorrupt
from deltamux.adapters.folder import hash_folder
from deltamux.server.api.state import Limits
from deltamux.server.store.archives import ArchiveLimits
from deltamux.server.store.sources import SourcePolicy

from .fake_engine import Running, serving
from .fake_store import files_in, write_adapter
from .hostile_archives import GOOD, HOSTILE, packed, tar
from .siege import eventually


@pytest.fixture(scope="module")
def store(tokenizer) -> Iterator[Running]:
    """A server that several tests use, each under names of its own."""
    limits = Limits(max_body_bytes=10_000, max_upload_bytes=300_000)
    archives = ArchiveLimits(max_bytes=1_000_000, max_entries=100)
    policy = SourcePolicy(("local", "upload", "memory://allowed"))
    with serving(tokenizer, limits, policy, archives=archives) as running:
        yield running


@pytest.fixture
def http(store) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=store.url, timeout=20) as client:
        yield client


def upload(http: httpx.Client, raw: bytes, name: str, headers=None, **fields) -> httpx.Response:
    data = {"name": name, **fields}
    files = {"archive": ("adapter.tar.gz", raw)}
    return http.post("/v1/adapters", data=data, files=files, headers=headers)


def message(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def labels_used(store: Running) -> list[str]:
    return [
        store.engine.loaded[each.adapter_id]
        for request in store.engine.submitted
        for each in request.adapters
    ]


def complete(http: httpx.Client, model: str, **more) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "x", **more})


@pytest.mark.parametrize("make", [tar, packed])
def test_an_uploaded_adapter_is_served(make, store, http):
    name = f"uploaded-{make.__name__}"
    added = upload(http, make(GOOD), name)
    assert added.status_code == 201
    card = added.json()
    assert (card["source"], card["pinned"], len(card["versions"])) == ("upload", False, 1)
    digest = card["digest"]
    assert hash_folder(Path(card["path"])) == digest
    assert complete(http, name).status_code == 200
    assert http.get(f"/v1/adapters/{name}").json()["hits"] == 1

    assert "loaded already" in message(upload(http, make(GOOD), name), 400)
    again = upload(http, make(GOOD), name, replace="true", digest=f"sha256:{digest}")
    assert (again.status_code, len(again.json()["versions"])) == (201, 1)
    assert digest in message(upload(http, make(GOOD), "other", digest="0" * 64), 400)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_by_name_and_leaves_nothing(name, store, http):
    make, _ = HOSTILE[name]
    before = files_in(store.state_dir / "adapters")
    assert message(upload(http, make(), f"hostile-{name}"), 400)
    assert http.get(f"/v1/adapters/hostile-{name}").status_code == 404
    eventually(lambda: files_in(store.state_dir / "adapters") == before)


def test_an_archive_the_engine_refuses_leaves_nothing(store, http):
    before = files_in(store.state_dir / "adapters")
    store.engine.bad_adapters["planted"] = AdapterCorrupt("NaN in q_proj")
    config = ("adapter_config.json", b'{"label": "planted"}')
    assert "NaN in q_proj" in message(upload(http, tar((config, GOOD[1])), "refused"), 400)
    eventually(lambda: files_in(store.state_dir / "adapters") == before)


def test_uploads_have_a_limit_of_their_own(store, http):
    assert "300000 bytes" in message(upload(http, b"x" * 400_000, "large"), 413)
    assert message(upload(http, b"x" * 200_000, "large"), 400)
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": "x" * 20_000})
    assert "10000 bytes" in message(answer, 413)


def test_a_form_without_an_archive_or_with_more_fields(store, http):
    assert "archive" in message(http.post("/v1/adapters", files={"name": (None, "a")}), 400)
    assert "pinned" in message(upload(http, tar(GOOD), "a", pinned="true"), 400)
    assert message(upload(http, tar(GOOD), "a/b"), 400)
    assert message(http.post("/v1/adapters", content=b"name=a", headers={}), 415)


def test_no_web_page_uploads(store, http):
    evil = {"origin": "https://evil.example"}
    assert "evil.example" in message(upload(http, tar(GOOD), "evil", headers=evil), 403)
    own = {"origin": store.url}
    assert upload(http, tar(GOOD), "own-page", headers=own).status_code == 201


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("hf://org/name", 403),
        ("memory://forbidden/a", 403),
        ("https://user:secret@host/a", 400),
        ("memory://allowed/nothing", 502),
    ],
)
def test_sources_that_are_not_given(source, status, store, http):
    answers = [
        http.post("/v1/adapters", json={"name": "s", "source": source}),
        http.post("/v1/load_lora_adapter", json={"lora_name": "s", "lora_path": source}),
    ]
    for answer in answers:
        assert "secret" not in message(answer, status)


def test_versions_pins_and_rollback(store, http, tmp_path):
    one, two = (write_adapter(tmp_path / label, label) for label in ("one", "two"))
    for path in (one, two):
        added = http.post("/v1/adapters", json={"name": "v", "source": str(path), "replace": True})
        assert added.status_code == 201
    old, new = hash_folder(one), hash_folder(two)

    def change(**body) -> dict:
        answer = http.patch("/v1/adapters/v", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    store.engine.submitted.clear()
    complete(http, "v")
    assert change(rollback=True)["digest"] == old
    complete(http, "v")
    complete(http, f"v@{new[:12]}")
    assert change(version=f"sha256:{new}")["digest"] == new
    complete(http, "v")
    assert labels_used(store) == ["two", "one", "two", "two"]
    card = change(pinned=True)
    assert (card["pinned"], [each["default"] for each in card["versions"]]) == (True, [True, False])
    assert change(pinned=False, rollback=True)["pinned"] is False
    assert "no version" in message(http.patch("/v1/adapters/v", json={"version": "zz"}), 400)
    assert message(http.patch("/v1/adapters/v", json={"rollback": True}), 400)


def test_an_adapter_can_be_registered_without_waiting(store, http, tmp_path):
    folder = write_adapter(tmp_path / "later", "later")
    body = {"name": "later", "source": str(folder), "wait": False}
    answer = http.post("/v1/adapters", json=body)
    assert answer.status_code == 202
    assert complete(http, "later").status_code == 200
    eventually(lambda: http.get("/v1/adapters/later").json()["digest"] is not None)

    http.post("/v1/adapters", json=body | {"name": "never", "source": str(tmp_path / "nothing")})
    eventually(lambda: http.get("/v1/adapters/never").json()["state"] == "failed")
    refused = complete(http, "never")
    assert "no adapter folder" in message(refused, 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert http.delete("/v1/adapters/never").status_code == 200


def test_reloads_under_load_fail_no_request_and_mix_no_answer(store, http, tmp_path):
    """Every choice of an answer is the version the request began on."""
    store.engine.reply = lambda request: store.engine.loaded[request.adapters[0].adapter_id]
    folder = write_adapter(tmp_path / "hot", "version 0")
    load = {"lora_name": "hot", "lora_path": str(folder)}
    assert http.post("/v1/load_lora_adapter", json=load).status_code == 200
    over, wrong, served = threading.Event(), [], []

    def ask() -> None:
        with httpx.Client(base_url=store.url, timeout=20) as client:
            while not over.is_set():
                answer = complete(client, "hot", n=4, max_tokens=30)
                texts = {each["text"] for each in answer.json().get("choices", [])}
                if answer.status_code == 200 and len(texts) == 1:
                    served.append(texts.pop())
                else:
                    wrong.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 40):
        write_adapter(folder, f"version {number}")
        answer = http.post("/v1/load_lora_adapter", json=load | {"load_inplace": True})
        assert answer.status_code == 200, answer.text
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(set(served)) > 1
    assert set(served) <= {f"version {number}" for number in range(40)}
    card = http.get("/v1/adapters/hot").json()
    kept = {each["digest"] for each in card["versions"]}
    assert len(kept) == 5
    assert complete(http, "hot").json()["choices"][0]["text"] == "version 39"
    http.delete("/v1/adapters/hot")
    eventually(lambda: not any("version" in label for label in store.engine.loaded.values()))
    assert all(not (store.state_dir / "adapters" / "contents" / each).exists() for each in kept)
