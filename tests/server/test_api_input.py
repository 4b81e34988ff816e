"""Bodies that are refused: each with its status and the field at fault, the engine untouched."""

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from deltamux.server.api.state import Limits
from deltamux.server.text.tokenizer import Tokenizer

from .fake_engine import MAX_MODEL_LEN, Running, byte_level_tokenizer, serving

COMPLETION = {"model": "base", "prompt": "one two"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Running]:
    limits = Limits(max_body_bytes=200_000, max_sequences=200)
    with serving(tokenizer, limits) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


def assert_refused(server: Running, answer: httpx.Response, status: int, param: str | None) -> str:
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param), error
    assert answer.json().keys() == {"error"}
    assert server.engine.submitted == []
    return error["message"]


UNSERVED = {"not": {"type": "string"}}
BAD_SHARED = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "0.5"),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 2**40),
    ("top_k", 1.5),
    ("min_p", -0.01),
    ("min_p", 2),
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("best_of", 129),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", MAX_MODEL_LEN),
    ("max_tokens", 10**30),
    ("min_tokens", -1),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("seed", 2**63),
    ("seed", "x"),
    ("logit_bias", {"0": 101}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"99999": 1}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", "x" * 257),
    ("stop", 5),
    ("stop_token_ids", [99999]),
    ("stop_token_ids", [-1]),
    ("prompt_logprobs", 21),
    ("cache_salt", ""),
    ("priority", 2**40),
    ("stream_options", {"include_usage": True}),
    ("adapters", [{"weight": 1}]),
    ("adapters", [{"name": "", "weight": 1}]),
    ("adapters", [{"name": "a", "weight": 1e6}]),
    ("adapters", [{"name": "a", "scale": 1}]),
    ("adapters", {"name": "a"}),
    ("adapters", [{"name": "a"}] * 17),
    ("tools", [{"type": "function"}]),
    ("tool_choice", "auto"),
    ("functions", [{}]),
    ("use_beam_search", 1),
    ("beam_width", 4),
    ("length_penalty", 0.5),
    ("suffix", "end"),
    ("store", True),
    ("response_format", "json_object"),
    ("response_format", {"type": "structural_tag"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x y", "schema": {}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": UNSERVED}}),
    ("structured_outputs", {"json": UNSERVED}),
    ("structured_outputs", {"json": "{"}),
    ("structured_outputs", {"json": {}, "whitespace_pattern": "["}),
    ("structured_outputs", {"regex": "["}),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}),
    ("structured_outputs", {"choice": []}),
    ("structured_outputs", {"choice": [""]}),
    ("structured_outputs", {"grammar": "start: foo"}),
    ("structured_outputs", {"structural_tag": "x"}),
    ("guided_json", UNSERVED),
    ("guided_regex", "(?=a)b"),
    ("guided_choice", "yes"),
    ("guided_choice", ["x"] * 1025),
    ("guided_grammar", 'root ::= "a'),
    ("guided_decoding_backend", "xgrammar"),
    ("no_such_field", 1),
    ("model", ""),
    ("model", None),
    ("model", 7),
    ("stream", "yes"),
]
BAD_COMPLETION = [
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [""]),
    ("prompt", [[]]),
    ("prompt", ["a", 1]),
    ("prompt", [1, "a"]),
    ("prompt", [[1], "a"]),
    ("prompt", [-1]),
    ("prompt", [99999]),
    ("prompt", [[1], [99999]]),
    ("prompt", [2**70]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", {"text": "a"}),
    ("prompt", 5),
    ("prompt", None),
    ("prompt", [5] * MAX_MODEL_LEN),
    ("prompt", "one two three " * 100),
    ("prompt", "one two three " * 10_000),
    ("prompt", ["x"] * 201),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("messages", []),
]
BAD_CHAT = [
    ("messages", []),
    ("messages", None),
    ("messages", "hi"),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "tool", "content": "x"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
    ("messages", [{"role": "user", "content": "forbidden"}]),
    ("messages", [{"role": "user", "content": "one two three " * 100}]),
    ("messages", [{"role": "user", "content": "one two three " * 10_000}]),
    ("max_completion_tokens", 0),
    ("max_completion_tokens", MAX_MODEL_LEN),
    ("logprobs", 5),
    ("top_logprobs", 2),
    ("top_logprobs", 21),
    ("chat_template_kwargs", 5),
    ("prompt", "x"),
]


@pytest.mark.parametrize(
    ("path", "base", "field", "value"),
    [("/v1/completions", COMPLETION, *case) for case in BAD_SHARED + BAD_COMPLETION]
    + [("/v1/chat/completions", CHAT, *case) for case in BAD_SHARED + BAD_CHAT],
    ids=lambda value: str(value)[:24],
)
def test_bad_field(server, http, path, base, field, value):
    message = assert_refused(server, http.post(path, json=base | {field: value}), 400, field)
    assert "Traceback" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": ["x"] * 3, "n": 128}, "prompt"),
        ({"prompt": [5] * 60, "max_tokens": 5}, "max_tokens"),
    ],
)
def test_fields_that_contradict_each_other(server, http, fields, param):
    answer = http.post("/v1/completions", json=COMPLETION | fields)
    assert_refused(server, answer, 400, param)


def test_chat_limits_that_contradict_each_other(server, http):
    fields = {"max_tokens": 5, "max_completion_tokens": 6}
    assert_refused(server, http.post("/v1/chat/completions", json=CHAT | fields), 400, "max_tokens")


RAW_BODIES = [
    (b"", None),
    (b"{", None),
    (b"nonsense", None),
    (b"[]", None),
    (b"5", None),
    (b'"text"', None),
    (b"\xff\xfe\x00", None),
    (b"[" * 100_000, None),
    (b'{"model": "base", "prompt": "x", "temperature": NaN}', "temperature"),
    (b'{"model": "base", "prompt": "x", "temperature": Infinity}', "temperature"),
    (b'{"model": "base", "prompt": "x", "logit_bias": {"1": -Infinity}}', "logit_bias"),
    (b'{"model": "base", "prompt": "x", "temperature": 1e999}', "temperature"),
    (b'{"model": "base", "prompt": "\\ud800"}', "prompt"),
    (b'{"model": "base", "prompt": "x", "\\ud800": 1}', None),
    (b'{"model": "base", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", None),
]


@pytest.mark.parametrize(("raw", "param"), RAW_BODIES, ids=lambda value: str(value)[:40])
def test_bad_json(server, http, raw, param):
    answer = http.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert_refused(server, answer, 400, param)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_must_say_that_it_is_json(server, http, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = http.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers)
    assert_refused(server, answer, 415, None)


def test_a_large_body_is_refused_by_its_announced_length(server, http):
    answer = http.post("/v1/completions", json=COMPLETION | {"prompt": "x" * 300_000})
    assert_refused(server, answer, 413, None)


def test_a_large_body_of_unknown_length_is_refused_while_it_is_read(server, http):
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"x" * 10_000

    answer = http.post(
        "/v1/completions", content=endless(), headers={"content-type": "application/json"}
    )
    assert_refused(server, answer, 413, None)


def test_a_client_that_leaves_within_its_body_disturbs_nobody(server, http):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("model", ["nope", "base:nope", "base:", "base@1", "../base", "a" * 5000])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unknown_model(server, http, path, model):
    base = CHAT if "chat" in path else COMPLETION
    answer = http.post(path, json=base | {"model": model})
    assert_refused(server, answer, 404, "model")
    assert answer.json()["error"]["type"] == "NotFoundError"
    assert len(answer.content) < 1500


def test_the_openai_client_understands_refusals(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="nope", prompt="x")
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="base", prompt="x", temperature=9)
    assert missing.value.body["param"] == "model"
    assert bad.value.body["type"] == "invalid_request_error"


def test_unknown_routes_and_methods(server, http):
    assert_refused(server, http.get("/v1/nothing"), 404, None)
    assert_refused(server, http.get("/docs"), 404, None)
    answer = http.get("/v1/completions")
    assert_refused(server, answer, 405, None)
    assert answer.headers["allow"] == "POST"


HARMLESS = {
    "user": "me",
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "store": False,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "best_of": 1,
    "use_beam_search": False,
    "stop": None,
    "max_tokens": None,
    "seed": None,
    "adapters": [],
}


def test_what_asks_for_nothing_is_accepted(tokenizer):
    with serving(tokenizer) as running:
        for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
            answer = httpx.post(f"{running.url}/v1/{path}", json=body | HARMLESS)
            assert answer.status_code == 200, answer.text
        assert len(running.engine.submitted) == 2


def test_a_model_without_a_chat_template_says_so():
    with serving(byte_level_tokenizer(template=None)) as running:
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT)
        assert "no chat template" in assert_refused(running, answer, 400, "messages")
