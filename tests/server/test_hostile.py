"""Hostile requests to a real server: each refused with its status, nothing else disturbed."""

import itertools
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path

import httpx
import pytest
from peft import LoraConfig

from deltamux.server.api.body import Body
from deltamux.server.api.protocol import ChatBody, CompletionBody

from .hostile_adapters import HostileAdapter, hostile_adapters
from .hostile_requests import (
    ARGUMENTS,
    BAD_MESSAGES,
    BAD_MODELS,
    BAD_NAMES,
    BAD_PATHS,
    BAD_PROMPTS,
    CHAT,
    COMPLETION,
    GARBAGE,
    JUNK,
    MALFORMED,
    ODD_BUT_GOOD,
    OUT_OF_RANGE,
    POST,
    ROUTES,
    SECRET,
    completion,
    wire,
)
from .peft_oracle import Oracle
from .running import RunningServer, running_server
from .siege import GoodCase, undisturbed

MAX_TOKENS = 12
PROMPTS = [list(range(40, 60)), list(range(100, 133))]
CONFIGS = {
    "small": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "large": LoraConfig(r=33, lora_alpha=33, target_modules=["k_proj", "up_proj", "down_proj"]),
    "rs": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["o_proj", "gate_proj"]),
}
JSON = {"content-type": "application/json"}
Attack = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def oracle(model) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def adapters(oracle, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {
        name: oracle.save_adapter(config, folder / name, seed, size=0.1)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def cases(oracle, adapters) -> list[GoodCase]:
    return [
        GoodCase(name, prompt, oracle.generate(prompt, MAX_TOKENS, adapters.get(name)).token_ids)
        for name in ("base", *adapters)
        for prompt in PROMPTS
    ]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def server(model, adapters, cases, log) -> Iterator[RunningServer]:
    options = [f"--adapter={name}={path}" for name, path in adapters.items()]
    options += ["--served-model-name", "base", "--memory-budget", "4MiB", "--kernels", "auto"]
    options += ["--dtype", "float32"]
    with running_server(model, *options, log=log, OMP_NUM_THREADS="1") as running:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            answers = [case.ask(client) for case in cases]
            # What starts with the first structured output is no leak of a later one.
            structured = client.post("/v1/completions", json=COMPLETION | {"guided_regex": "x"})
            structured.raise_for_status()
        assert answers == [case.expected for case in cases]
        assert len(set(map(tuple, answers))) == len(cases), "the adapters make no difference"
        yield running


@pytest.fixture
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def attack(server, cases, log) -> Attack:
    return partial(undisturbed, server, cases, log)


def _post(http: httpx.Client, path: str, body: dict[str, object]) -> httpx.Response:
    """As the json module writes it: httpx cannot send lone surrogates."""
    return http.post(path, content=json.dumps(body), headers=JSON)


def refusal(answer: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of a refusal in OpenAI's shape."""
    body = answer.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param), error
    assert error["type"]
    assert 0 < len(error["message"]) <= 1000
    assert SECRET not in answer.text
    return error["message"]


# ------------------------------------------------------------------------------ adapters


def test_adapters_that_must_be_refused(http, attack, adapters, tmp_path):
    proof = tmp_path / "executed"
    folders = hostile_adapters(adapters["small"], tmp_path / "hostile", proof)
    before = http.get("/v1/models").json()["data"]
    with attack():
        for number, hostile in enumerate(folders):
            answer = _load(http, hostile, native=number % 2 == 0)
            message = refusal(answer, hostile.status)
            assert hostile.says in message, (hostile.name, message)
            assert "\n" not in message
            gone = http.post("/v1/completions", json=COMPLETION | {"model": hostile.name})
            refusal(gone, 404, "model")
    assert not proof.exists()
    assert http.get("/v1/models").json()["data"] == before


def _load(http: httpx.Client, hostile: HostileAdapter, native: bool) -> httpx.Response:
    if native:
        body = {"name": hostile.name, "path": str(hostile.path)}
        return http.post("/v1/adapters", json=body)
    body = {"lora_name": hostile.name, "lora_path": str(hostile.path)}
    return http.post("/v1/load_lora_adapter", json=body)


def test_adapters_under_names_and_paths_that_must_be_refused(http, attack, adapters):
    path = str(adapters["small"])
    with attack():
        for name in BAD_NAMES:
            for kind in (
                ("name", "path", "adapters"),
                ("lora_name", "lora_path", "load_lora_adapter"),
            ):
                answer = http.post(f"/v1/{kind[2]}", json={kind[0]: name, kind[1]: path})
                refusal(answer, 400)
        for bad in BAD_PATHS:
            answer = http.post("/v1/adapters", json={"name": "new", "path": bad})
            assert answer.status_code in (400, 404), (bad, answer.text)
            refusal(answer, answer.status_code)
        for name in ("small", "large"):
            refusal(http.post("/v1/adapters", json={"name": name, "path": path}), 400)
        for name in ("nope", "..%2f..%2fetc", "%00", "x" * 5000):
            refusal(http.delete(f"/v1/adapters/{name}"), 404)
    assert [card["name"] for card in http.get("/v1/adapters").json()["data"]] == sorted(CONFIGS)


def test_a_refused_replacement_leaves_the_old_adapter(http, attack, adapters, cases, tmp_path):
    [nan] = [
        hostile
        for hostile in hostile_adapters(adapters["small"], tmp_path / "hostile", tmp_path / "no")
        if hostile.name == "nan"
    ]
    body = {"lora_name": "small", "lora_path": str(nan.path), "load_inplace": True}
    with attack():
        refusal(http.post("/v1/load_lora_adapter", json=body), 400)
    for case in cases:
        assert case.ask(http) == case.expected


# ------------------------------------------------------------------------------ bodies


def own_fields(body_type: type[Body]) -> list[str]:
    """A chat request shares most fields with a completion, where they are tried."""
    shared = CompletionBody.model_fields if body_type is ChatBody else {}
    return [name for name in body_type.model_fields if name == "model" or name not in shared]


@pytest.mark.parametrize("path", ROUTES)
def test_junk_in_every_field(http, attack, path):
    base, body_type = ROUTES[path]
    with attack():
        for name in own_fields(body_type):
            start = json.dumps({key: value for key, value in base.items() if key != name})[:-1]
            for junk in JUNK:
                raw = f'{start}{", " if len(start) > 1 else ""}"{name}": {junk}}}'
                refusal(http.post(path, content=raw, headers=JSON), 400, name)


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        ("/v1/completions", OUT_OF_RANGE),
        ("/v1/completions", [("prompt", value) for value in BAD_PROMPTS]),
        ("/v1/completions", [("logprobs", value) for value in (-1, 21, True, 10**30)]),
        ("/v1/chat/completions", [("messages", value) for value in BAD_MESSAGES]),
        ("/v1/chat/completions", [("max_completion_tokens", v) for v in (0, -1, 257, 2**63)]),
        ("/v1/chat/completions", [("top_logprobs", value) for value in (-1, 1, 21, 10**30)]),
        ("/tokenize", [("prompt", value) for value in ("x" * 10**6, 5)]),
        ("/detokenize", [("tokens", [value]) for value in (-1, 300, 2**63, 0.5)]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0][0],
)
def test_values_out_of_range(http, attack, path, bad):
    base = {key: value for key, value in ROUTES[path][0].items() if key != "max_tokens"}
    with attack():
        for name, value in bad:
            limit = {"max_tokens": 2} if name == "min_tokens" else {}
            refusal(_post(http, path, base | limit | {name: value}), 400, name)


def test_template_arguments(http, attack):
    with attack():
        for arguments in ARGUMENTS:
            answer = _post(http, "/v1/chat/completions", CHAT | {"chat_template_kwargs": arguments})
            assert answer.json()["error"]["param"] in ("messages", "chat_template_kwargs")
            assert answer.status_code == 400


def test_odd_values_that_are_served(http, attack):
    with attack():
        for fields in ODD_BUT_GOOD:
            raw = json.dumps(COMPLETION | fields)
            answer = http.post("/v1/completions", content=raw, headers=JSON)
            assert answer.status_code == 200, (fields, answer.text)
            assert {one["finish_reason"] for one in answer.json()["choices"]} <= {"length", "stop"}


def test_unknown_models(http, attack):
    with attack():
        for path, name in itertools.product(
            ["/v1/completions", "/v1/chat/completions"], BAD_MODELS
        ):
            refusal(http.post(path, json=ROUTES[path][0] | {"model": name}), 404, "model")


def test_malformed_json(http, attack):
    paths = ["/v1/completions", "/v1/chat/completions", "/v1/adapters"]
    with attack():
        for path, raw in itertools.product(paths, MALFORMED.values()):
            refusal(http.post(path, content=raw, headers=JSON), 400)


def test_requests_that_are_no_requests_for_this_server(http, attack):
    with attack():
        for size in (17 * 2**20, 20 * 2**20):
            answer = http.post(
                "/v1/completions", content=completion(prompt="x" * size), headers=JSON
            )
            refusal(answer, 413)
        for kind in ("text/plain", "multipart/form-data", "", "application/json2"):
            answer = http.post(
                "/v1/completions", content=completion(), headers={"content-type": kind}
            )
            refusal(answer, 415)
        for method, path in [
            ("GET", "/v1/completions"),
            ("PUT", "/v1/models"),
            ("POST", "/metrics"),
        ]:
            refusal(http.request(method, path), 405)
        for path in ("/v1/nothing", "/docs", "/v1/models/nope", "/%2e%2e/etc"):
            assert http.get(path).status_code == 404, path
        for name in ("evil.example", "evil.example:8000", "10.0.0.1"):
            body = {"name": "new", "path": "/nonexistent"}
            refusal(http.post("/v1/adapters", json=body, headers={"host": name}), 403)


# ------------------------------------------------------------------------------ connections


def test_garbage_on_the_wire(server, attack):
    with attack():
        for name, raw in GARBAGE.items():
            with closing(_connect(server)) as connection:
                answer = _exchange(connection, raw)
            statuses = [int(part.split()[0]) for part in answer.split(b"HTTP/1.1 ")[1:]]
            assert statuses, (name, answer)
            assert all(status == 200 or 400 <= status < 500 for status in statuses), (name, answer)


def test_clients_that_leave(server, attack):
    long = wire(completion(max_tokens=200, ignore_eos=True))
    stream = wire(completion(max_tokens=200, ignore_eos=True, stream=True, n=8))
    with attack():
        for raw in (long, stream, long[:40], long[:-5], POST, b"", stream[: len(POST)]):
            for wait in (False, True):
                with closing(_connect(server)) as connection:
                    connection.sendall(raw)
                    if wait and raw is stream:
                        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_that_never_reads(server, attack):
    body = completion(max_tokens=200, ignore_eos=True, stream=True, n=64, logprobs=20)
    with closing(_connect(server)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(wire(body))
        with attack():
            connection.close()


def _connect(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def _exchange(connection: socket.socket, raw: bytes) -> bytes:
    """What the server says until it closes; a reset ends it as well."""
    answer = b""
    try:
        connection.sendall(raw)
        while part := connection.recv(65536):
            answer += part
    except (ConnectionResetError, BrokenPipeError):
        return answer
    return answer


# ------------------------------------------------------------------------------ afterwards


def test_the_log_holds_nothing_of_the_requests(server, log):
    httpx.post(f"{server.url}/v1/completions", json=COMPLETION).raise_for_status()
    text = log.read_text()
    assert SECRET not in text
    assert "ERROR" not in text
