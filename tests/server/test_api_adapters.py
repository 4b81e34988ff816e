"""Adapters over HTTP: naming, loading, replacing and unloading them while requests run."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deltamux.adapters.errors import AdapterCorrupt, AdapterNotFound, AdapterUnsupported
from deltamux.adapters.folder import hash_folder
from deltamux.server.composition import Composable
from deltamux.server.engine.errors import EngineUnavailable
from deltamux.server.generation import AdapterWeight

from .fake_engine import MAX_MODEL_LEN, Running
from .fake_store import files_in
from .siege import eventually

BAD_NAMES = ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a b", "a:b", "a@b", "é", "x" * 129]
BAD_NAMES += ["a\n", "a\x00", "%2e%2e", "base"]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def http(server: Running, shelf: Path) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


def load(http: httpx.Client, name: str, path: str = "some/path", **more) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def complete(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "x"})


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    return answer.status_code, error["type"], error["message"]


def test_vllms_answers_byte_for_byte(server, http):
    answer = load(http, "a")
    assert (answer.status_code, answer.content) == (
        200,
        b"Success: LoRA adapter 'a' added successfully.",
    )
    assert answer.headers["content-type"].startswith("text/plain")
    assert error_of(load(http, "a")) == (
        400,
        "InvalidUserInput",
        "The lora adapter 'a' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True.",
    )
    missing = (400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
    for body in ({}, {"lora_name": "x"}, {"lora_path": "x"}, {"lora_name": "", "lora_path": "x"}):
        assert error_of(http.post("/v1/load_lora_adapter", json=body)) == missing
    answer = unload(http, "a")
    assert (answer.status_code, answer.content) == (
        200,
        b"Success: LoRA adapter 'a' removed successfully.",
    )
    assert error_of(unload(http, "a")) == (
        404,
        "NotFoundError",
        "The lora adapter 'a' cannot be found.",
    )
    assert error_of(http.post("/v1/unload_lora_adapter", json={})) == (
        400,
        "InvalidUserInput",
        "'lora_name' needs to be provided to unload a LoRA adapter.",
    )


def test_the_model_field_picks_the_adapter(server, http):
    p, q = (hash_folder(Path(label)) for label in "pq")
    assert load(http, "a", "p").status_code == load(http, "b", "q").status_code == 200
    by_name = {name: adapter_id for adapter_id, name in zip((1, 2), "ab", strict=True)}
    names = ["base", "a", "b", "base:a", f"a@{p[:3]}", f"base:b@{q[:6]}", f"b@sha256:{q}"]
    for name in names:
        assert complete(http, name).json()["model"] == name
    expected = [[], *([AdapterWeight(by_name[n])] for n in ("a", "b", "a", "a", "b", "b"))]
    assert [request.adapters for request in server.engine.submitted] == expected
    bad = ["a@", "a@z", f"a@@{p}", f"a@{q}", f"a@{p}0", "c", "base:base", "a:b", f"base@{p}"]
    for name in bad:
        assert error_of(complete(http, name))[:2] == (404, "NotFoundError")


def compose(http, *adapters, model="base"):
    chosen = [{"name": name, "weight": weight} for name, weight in adapters]
    body = {"model": model, "prompt": "hi", "adapters": chosen}
    return http.post("/v1/completions", json=body)


def test_adapters_are_summed_with_their_weights(server, http):
    for name in "ab":
        load(http, name, name)
    assert compose(http, ("a", 0.5), ("base:b", -2.0)).json()["model"] == "base"
    assert server.engine.submitted[0].adapters == [AdapterWeight(1, 0.5), AdapterWeight(2, -2.0)]
    chat = {"model": "base", "messages": MESSAGES, "adapters": [{"name": "b"}]}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    assert server.engine.submitted[1].adapters == [AdapterWeight(2, 1.0)]


@pytest.mark.parametrize(
    ("adapters", "model", "says"),
    [
        ([("a", 1.0)], "a", "'model' names the base"),
        ([("a", 1.0), ("a", 0.5)], "base", "one adapter twice"),
        ([("a", 1.0), ("ia3", 1.0)], "base", "'ia3' cannot be weighted or combined.*it scales"),
        ([("ia3", 0.5)], "base", "'ia3' cannot be weighted"),
        ([("prefix", 0.5)], "base", "'prefix' cannot have the weight 0.5"),
        ([("prefix", 1.0), ("unshifted", 1.0)], "base", "these prefixes cannot be combined"),
    ],
)
def test_a_combination_without_meaning_is_refused_before_it_is_queued(
    adapters, model, says, server, http
):
    server.engine.composables = {
        "ia3": Composable("it scales"),
        "prefix": Composable(None, 5, True),
        "unshifted": Composable(None, 5, False),
    }
    for name in ("a", "ia3", "prefix", "unshifted"):
        load(http, name, name)
    answer = compose(http, *adapters, model=model)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "adapters"
    assert re.search(says, answer.json()["error"]["message"])
    assert server.engine.submitted == []
    allowed = compose(http, *adapters[:1]) if adapters[0][0] == "a" else None
    assert allowed is None or allowed.status_code == 200


def test_names_of_a_combination_must_be_adapters(server, http):
    load(http, "a", "p")
    for name in ("nobody", "base"):
        answer = compose(http, ("a", 1.0), (name, 1.0))
        assert error_of(answer)[:2] == (404, "NotFoundError")


def test_a_prefix_takes_part_of_the_models_length(server, http):
    server.engine.composables = {"p": Composable(None, 30, True)}
    load(http, "p", "p")
    long = list(range(3, 3 + MAX_MODEL_LEN - 30))
    fits = http.post("/v1/completions", json={"model": "p", "prompt": long[:-1], "max_tokens": 1})
    assert fits.status_code == 200
    refused = http.post("/v1/completions", json={"model": "p", "prompt": long, "max_tokens": 1})
    assert refused.status_code == 400
    assert http.post("/v1/completions", json={"model": "base", "prompt": long}).status_code == 200


def test_models_are_listed_as_vllm_lists_them(server, http, shelf):
    load(http, "a", "p")
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    base, adapter = listed["data"]
    created = base.pop("created")
    assert base == {
        "id": "base",
        "object": "model",
        "owned_by": "deltamux",
        "root": "some/folder",
        "parent": None,
        "permission": [],
        "max_model_len": 64,
    }
    assert created == server.state.created
    assert (adapter["id"], adapter["root"], adapter["parent"]) == ("a", str(shelf / "p"), "base")
    assert http.get("/v1/models/base:a").json() == http.get("/v1/models/a").json() == adapter
    assert error_of(http.get("/v1/models/nope"))[0] == 404
    assert error_of(http.get("/v1/models/..%2f..%2fetc"))[0] == 404


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(server, http, name):
    for answer in (
        load(http, name or " "),
        http.post("/v1/adapters", json={"name": name, "path": "p"}),
    ):
        assert error_of(answer)[:2] == (400, "InvalidUserInput")
    assert server.engine.load_calls == 0
    assert server.state.registry.catalog.all() == []


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (AdapterNotFound("no folder"), 404, "NotFoundError"),
        (AdapterCorrupt("NaN in q_proj"), 400, "InvalidUserInput"),
        (AdapterUnsupported("use_dora"), 400, "InvalidUserInput"),
    ],
)
def test_a_refused_adapter_leaves_nothing(server, http, error, status, kind):
    server.engine.bad_adapters["p"] = error
    message = f"{type(error).__name__}: {error}"
    assert error_of(load(http, "a", "p")) == (status, kind, message)
    assert http.get("/v1/adapters").json() == {"object": "list", "data": [], "has_more": False}
    assert error_of(complete(http, "a"))[0] == 404
    eventually(lambda: files_in(server.state_dir / "adapters") == ["contents", "staging"])
    assert load(http, "a", "good").status_code == 200


def test_a_refused_replacement_leaves_the_old_one(server, http, shelf):
    load(http, "a", "old")
    server.engine.bad_adapters["new"] = AdapterCorrupt("bad")
    assert error_of(load(http, "a", "new", load_inplace=True))[0] == 400
    assert complete(http, "a").status_code == 200
    assert server.engine.submitted[0].adapters == [AdapterWeight(1)]
    card = http.get("/v1/adapters/a").json()
    assert (card["source"], len(card["versions"])) == (str(shelf / "old"), 1)


def test_our_own_routes(server, http, shelf):
    added = http.post("/v1/adapters", json={"name": "a", "path": "p"})
    assert added.status_code == 201
    card = added.json()
    assert (card["name"], card["source"], card["error"]) == ("a", str(shelf / "p"), None)
    assert (card["info"]["rank"], card["digest"]) == (8, hash_folder(shelf / "p"))
    assert http.get("/v1/adapters/a").json() == card
    assert http.get("/v1/adapters").json() == {"object": "list", "data": [card], "has_more": False}
    again = http.post("/v1/adapters", json={"name": "a", "path": "p"})
    assert error_of(again)[:2] == (400, "InvalidUserInput")
    assert http.delete("/v1/adapters/a").json() == {
        "name": "a",
        "object": "adapter",
        "deleted": True,
    }
    assert server.engine.unloaded == [1]
    change = {"pinned": True}
    for answer in (
        http.get("/v1/adapters/a"),
        http.delete("/v1/adapters/a"),
        http.patch("/v1/adapters/a", json=change),
    ):
        assert error_of(answer)[:2] == (404, "NotFoundError")


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a"},
        {"name": "a", "path": "p", "source": "p"},
        {"name": "a", "path": "p", "digest": "abc"},
        {"name": "a", "path": "p", "digest": "g" * 64},
        {"name": "a", "path": "p", "pinned": True},
        {"path": "p"},
    ],
    ids=str,
)
def test_bad_registrations(server, http, body):
    assert error_of(http.post("/v1/adapters", json=body))[:2] == (400, "invalid_request_error")
    assert server.engine.load_calls == 0


@pytest.mark.parametrize(
    "body",
    [{}, {"rollback": False}, {"version": ""}, {"version": "a", "rollback": True}, {"pin": True}],
    ids=str,
)
def test_bad_changes(server, http, body):
    load(http, "a", "p")
    assert error_of(http.patch("/v1/adapters/a", json=body))[:2] == (400, "invalid_request_error")


def test_the_list_comes_in_pages(server, http):
    for name in "abpq":
        load(http, name, name)
    first = http.get("/v1/adapters?limit=3").json()
    assert ([each["name"] for each in first["data"]], first["has_more"]) == ([*"abp"], True)
    rest = http.get("/v1/adapters?limit=3&after=p").json()
    assert ([each["name"] for each in rest["data"]], rest["has_more"]) == (["q"], False)
    assert http.get("/v1/adapters?limit=0").status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "example.org"},
        {"host": "10.0.0.1:80"},
        {"host": "["},
        {"host": "evil.example, 127.0.0.1"},
        {"host": "a@127.0.0.1"},
        {"host": "127.0.0.1.evil.example"},
        {"x-forwarded-for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
    ],
)
def test_management_is_for_this_machine_alone(server, http, headers):
    body = {"lora_name": "a", "lora_path": "p"}
    for answer in (
        http.post("/v1/load_lora_adapter", json=body, headers=headers),
        http.post("/v1/unload_lora_adapter", json=body, headers=headers),
        http.get("/v1/adapters", headers=headers),
        http.post("/v1/adapters", json={"name": "a", "path": "p"}, headers=headers),
        http.delete("/v1/adapters/a", headers=headers),
    ):
        assert error_of(answer)[:2] == (403, "PermissionDeniedError")
    assert server.engine.load_calls == 0
    assert http.get("/v1/models", headers=headers).status_code == 200


def test_loads_of_one_name_at_once_load_once(server, http):
    answers: list[httpx.Response] = []

    def call() -> None:
        answers.append(load(http, "a"))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * 7
    assert server.engine.load_calls == 1
    assert list(server.engine.loaded) == [1]


def stream_of(http: httpx.Client, model: str):
    body = {"model": model, "prompt": "x", "stream": True}
    return http.stream("POST", "/v1/completions", json=body)


@pytest.mark.parametrize("how", ["unload", "replace"])
def test_a_running_request_keeps_its_adapter(server, http, how):
    load(http, "a", "old")
    server.engine.stall_after = 3
    with stream_of(http, "a") as answer:
        chunks = answer.iter_text()  # kept: dropping it closes the connection
        next(chunks)
        if how == "unload":
            assert unload(http, "a").status_code == 200
            assert error_of(complete(http, "a"))[0] == 404
        else:
            assert load(http, "a", "new", load_inplace=True).status_code == 200
        assert server.engine.unloaded == []
    assert server.engine.on_unload.wait(10)
    assert server.engine.unloaded == [1]
    server.engine.stall_after = None
    if how == "replace":
        assert complete(http, "a").status_code == 200
        assert server.engine.submitted[-1].adapters == [AdapterWeight(2)]
        assert server.engine.loaded == {2: "new"}


def test_an_idle_adapter_is_replaced_and_unloaded_at_once(server, http):
    load(http, "a", "old")
    assert load(http, "a", "new", load_inplace=True).text == (
        "Success: LoRA adapter 'a' added successfully."
    )
    assert server.engine.loaded == {2: "new"}


def test_loading_while_the_engine_is_down(server, http):
    server.engine.refusal = EngineUnavailable("The engine is restarting.")
    assert error_of(load(http, "a")) == (
        503,
        "ServiceUnavailableError",
        "The engine is restarting.",
    )
    assert server.state.registry.catalog.all() == []


def test_unloading_while_the_engine_is_down_forgets_the_adapter(server, http):
    load(http, "a")
    server.engine.refusal = EngineUnavailable("The engine is restarting.")
    assert unload(http, "a").status_code == 200
    assert server.state.registry.catalog.all() == []


def test_tokenize_and_detokenize(server, http, tokenizer):
    ids = tokenizer.encode("one 日")
    answer = http.post("/tokenize", json={"prompt": "one 日", "return_token_strs": True}).json()
    assert answer == {
        "count": len(ids),
        "max_model_len": 64,
        "tokens": ids,
        "token_strs": [tokenizer.token(i) for i in ids],
    }
    answer = http.post("/tokenize", json={"model": "base", "messages": MESSAGES}).json()
    assert answer["tokens"] == tokenizer.encode(tokenizer.render_chat(MESSAGES))
    assert answer["token_strs"] is None
    text = http.post("/detokenize", json={"model": "base", "tokens": [*ids, 0]}).json()
    assert text == {"prompt": "one 日<|endoftext|>"}
    empty = http.post("/tokenize", json={"prompt": ""}).json()
    assert empty["tokens"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        (
            "/tokenize",
            {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
            400,
            "prompt",
        ),
        ("/tokenize", {"prompt": "x", "model": "nope"}, 404, "model"),
        ("/tokenize", {"prompt": "x" * 100_000}, 400, "prompt"),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
    ids=str,
)
def test_bad_tokenize(server, http, path, body, status, param):
    answer = http.post(path, json=body)
    assert error_of(answer)[0] == status
    assert answer.json()["error"]["param"] == param
