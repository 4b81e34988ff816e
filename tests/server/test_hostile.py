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

from deltamux.server.api.protocol import (
    AdapterBody,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadLoraBody,
    TokenizeBody,
    UnloadLoraBody,
)

from .hostile_adapters import HostileAdapter, hostile_adapters
from .peft_oracle import Oracle
from .running import RunningServer, running_server
from .siege import GoodCase, undisturbed

SECRET = "zq7-secret-marker"
MAX_TOKENS = 12
PROMPTS = [list(range(40, 60)), list(range(100, 133))]
CONFIGS = {
    "small": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "large": LoraConfig(r=33, lora_alpha=33, target_modules=["k_proj", "up_proj", "down_proj"]),
    "rs": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["o_proj", "gate_proj"]),
}
COMPLETION = {"model": "base", "prompt": SECRET, "max_tokens": 2, "user": SECRET}
CHAT = {"model": "base", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
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


BAD_NAMES = ["../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "a\0b", "a b", "a\n", "é", "\u202e"]
BAD_NAMES += ["x" * 200, "x" * 10**6, "base", "small@1", "base:small", "%2e%2e%2f", "${HOME}"]
BAD_PATHS = ["/nonexistent", "../" * 500 + "etc", "a\0b", "/proc/self/fd", "~", "x" * 10**5, "\n"]


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

ROUTES = {
    "/v1/completions": (COMPLETION, CompletionBody),
    "/v1/chat/completions": (CHAT, ChatBody),
    "/tokenize": ({"prompt": SECRET}, TokenizeBody),
    "/detokenize": ({"tokens": [5]}, DetokenizeBody),
    "/v1/adapters": ({"name": "new", "path": "/nonexistent"}, AdapterBody),
    "/v1/load_lora_adapter": ({"lora_name": "new", "lora_path": "/nonexistent"}, LoadLoraBody),
    "/v1/unload_lora_adapter": ({"lora_name": "new"}, UnloadLoraBody),
}
# JSON that no field of any body takes.
JUNK = ["NaN", "-1e999", f"1{'0' * 400}", '[[["junk"]]]', '"\\ud800"']


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


OUT_OF_RANGE = [
    *[("temperature", value) for value in (-0.1, 2.1, -1e308, 1e308, "1", True, [])],
    *[("top_p", value) for value in (0, -1, 1.01, 1e308)],
    *[("top_k", value) for value in (-2, 2**31, 10**30, 1.5)],
    *[("min_p", value) for value in (-0.01, 1.01)],
    *[("n", value) for value in (0, -1, 129, 10**30, 1.5, True)],
    *[("max_tokens", value) for value in (0, -1, 257, 2**31, 2**63, 10**30, 0.5)],
    *[("min_tokens", value) for value in (-1, 3, 2**63)],
    *[("repetition_penalty", value) for value in (0, -1, 101, 1e-300)],
    *[("presence_penalty", value) for value in (-2.1, 2.1)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1)],
    *[("logit_bias", {"5": value}) for value in (-101, 101, 1e308, "1")],
    *[("logit_bias", {key: 1}) for key in ("-1", "300", str(2**31), "x", "", "9" * 5000, "٣")],
    ("logit_bias", {str(key): 1 for key in range(1025)}),
    *[("seed", value) for value in (2**63, -(2**63) - 1, 0.5)],
    *[("priority", value) for value in (2**31, -(2**31), 0.5)],
    *[("prompt_logprobs", value) for value in (-1, 21, 2**63)],
    *[("stop_token_ids", [value]) for value in (-1, 300, 2**31, 2**63, 0.5)],
    *[("stop", value) for value in (["x"] * 100, "x" * 257, "", [""], [SECRET] * 10**5)],
    *[("cache_salt", value) for value in ("", "x" * 257, "x" * 10**6)],
    ("best_of", 2),
    ("stream_options", {"include_usage": True}),
    ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function"}]),
    ("adapters", [{"name": "small"}]),
    ("guided_regex", "(a+)+$"),
    ("__class__", 1),
]
BAD_PROMPTS = [
    *["", [], [""], [[]], [["x"]], ["x", 1], [1, "x"], {"text": "x"}],
    *[[-1], [300], [2**31], [2**63], [10**30], [0.5], [True], [None]],
    *[[5] * 256, [5] * 10**6, [[5] * 300], ["x"] * 1025, [""] * 10**6],
    *["x " * 300, "x" * 10**6, "\x00\x01\x7f" * 200],
]
BAD_MESSAGES = [
    *[[], [{}], ["x"], [None], "x", {"role": "user"}, [{"role": "user"}]],
    *[[{"role": role, "content": "x"}] for role in ("", "root", "tool", "user\n", None, 1)],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}],
    [{"role": "user", "content": "x", "no_such_field": 1}],
    [{"role": "user", "content": "x " * 300}],
    [{"role": "user", "content": "x" * 10**6}],
    [{"role": "user", "content": ""}] * 5000,
    [{"role": "user", "content": "\ud800"}],
    [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
    [{}] * 10**6,
]
ARGUMENTS = [
    {"messages": 1},
    {"chat_template": "{{ 1 }}"},
    {"tokenize": True},
    {"self": 1},
    {"extra": ["\ud800"]},
    {"\ud800": 1},
    {str(key): 1 for key in range(100)},
]


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        ("/v1/completions", OUT_OF_RANGE),
        ("/v1/chat/completions", OUT_OF_RANGE),
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


ODD_BUT_GOOD = [
    {"prompt": "\x00\x01\x1b[2J\r\n\x7f\u202e"},
    {"user": "\ud800"},
    {"cache_salt": "\x00" * 256},
    {"stop": ["\x00", "\ufffd"]},
    {"metadata": {"deep": [[[[{}]]]]}},
    {"seed": -(2**63)},
    {"priority": -(2**31) + 1},
    {"top_k": 2**31 - 1},
    {"top_k": -1},
    {"logit_bias": {"5": -100, "299": 100}},
    {"temperature": 2, "top_p": 1e-300, "min_p": 1},
    {"temperature": 1e-300},
    {"repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": -2},
    {"n": 128, "temperature": 0},
]


def test_odd_values_that_are_served(http, attack):
    with attack():
        for fields in ODD_BUT_GOOD:
            raw = json.dumps(COMPLETION | fields)
            answer = http.post("/v1/completions", content=raw, headers=JSON)
            assert answer.status_code == 200, (fields, answer.text)
            assert {one["finish_reason"] for one in answer.json()["choices"]} <= {"length", "stop"}


BAD_MODELS = ["nope", "../base", "small@wrongdigest", "small@", "base:nope", "base@1", "x" * 10**6]
BAD_MODELS += ["small\x00", "SMALL", " small", "/etc/passwd"]


def test_unknown_models(http, attack):
    with attack():
        for path, name in itertools.product(
            ["/v1/completions", "/v1/chat/completions"], BAD_MODELS
        ):
            refusal(http.post(path, json=ROUTES[path][0] | {"model": name}), 404, "model")


def _body(**fields: object) -> bytes:
    return json.dumps(COMPLETION | fields).encode()


MALFORMED = {
    "empty": b"",
    "open": b'{"model": "base"',
    "nonsense": b"nonsense",
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "text": b'"text"',
    "not utf-8": b'{"model": "\xff\xfe"}',
    "zero": b"\x00" * 100,
    "deep": b"[" * 100_000,
    "deep field": b'{"model": "base", "prompt": "x", "metadata": '
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}",
    "long number": b'{"model": "base", "prompt": "x", "seed": ' + b"9" * 10**5 + b"}",
    "many fields": json.dumps(COMPLETION | {f"k{n}": 1 for n in range(10**5)}).encode(),
    "trailing": _body() + b"}",
}


def test_malformed_json(http, attack):
    paths = [path for path in ROUTES if "lora" not in path]
    with attack():
        for path, raw in itertools.product(paths, MALFORMED.values()):
            refusal(http.post(path, content=raw, headers=JSON), 400)


def test_requests_that_are_no_requests_for_this_server(http, attack):
    with attack():
        for size in (17 * 2**20, 20 * 2**20):
            answer = http.post("/v1/completions", content=_body(prompt="x" * size), headers=JSON)
            refusal(answer, 413)
        for kind in ("text/plain", "multipart/form-data", "", "application/json2"):
            answer = http.post("/v1/completions", content=_body(), headers={"content-type": kind})
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

_POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def _request(body: bytes, more: bytes = b"") -> bytes:
    return _POST + more + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


GARBAGE = {
    "binary": bytes(range(256)) * 8,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "smtp": b"HELO example\r\nMAIL FROM: <x>\r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "negative length": _POST + b"Content-Length: -5\r\n\r\n",
    "two lengths": _POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    "bad chunks": _POST + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\nabc\r\n",
    "bad header": _POST + b"X Y\x00: z\r\n\r\n",
    "endless header": _POST + b"X: " + b"a" * 10**6,
    "pipelined": _request(_body()) + b"GARBAGE\r\n\r\n",
}


def test_garbage_on_the_wire(server, attack):
    with attack():
        for name, raw in GARBAGE.items():
            with closing(_connect(server)) as connection:
                answer = _exchange(connection, raw)
            statuses = [int(part.split()[0]) for part in answer.split(b"HTTP/1.1 ")[1:]]
            assert statuses, (name, answer)
            assert all(status == 200 or 400 <= status < 500 for status in statuses), (name, answer)


def test_clients_that_leave(server, attack):
    long = _request(_body(max_tokens=200, ignore_eos=True))
    stream = _request(_body(max_tokens=200, ignore_eos=True, stream=True, n=8))
    with attack():
        for raw in (long, stream, long[:40], long[:-5], _POST, b"", stream[: len(_POST)]):
            for wait in (False, True):
                with closing(_connect(server)) as connection:
                    connection.sendall(raw)
                    if wait and raw is stream:
                        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_that_never_reads(server, attack):
    body = _body(max_tokens=200, ignore_eos=True, stream=True, n=64, logprobs=20)
    with closing(_connect(server)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(_request(body))
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
