"""What a hostile client sends, and what is odd and yet good."""

import json

from deltamux.server.api.adapter_bodies import AdapterBody, LoadLoraBody, UnloadLoraBody
from deltamux.server.api.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)

SECRET = "zq7-secret-marker"

COMPLETION = {"model": "base", "prompt": SECRET, "max_tokens": 2, "user": SECRET}

CHAT = {"model": "base", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}

BAD_NAMES = ["../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "a\0b", "a b", "a\n", "é", "\u202e"]

BAD_NAMES += ["x" * 200, "x" * 10**6, "base", "small@1", "base:small", "%2e%2e%2f", "${HOME}"]

BAD_PATHS = ["/nonexistent", "../" * 500 + "etc", "a\0b", "/proc/self/fd", "~", "x" * 10**5, "\n"]

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
    *[("best_of", value) for value in (0, 129, 10**30, 1.5)],
    *[("beam_width", value) for value in (0, 2, 65, 10**30)],
    *[("length_penalty", value) for value in (2, 1e308, "1")],
    ("stream_options", {"include_usage": True}),
    ("response_format", {"type": "json_object", "schema": {}}),
    ("tools", [{"type": "function"}]),
    ("adapters", "small"),
    ("adapters", [{"name": 5}]),
    ("adapters", [{"name": "small", "weight": 1e9}]),
    ("adapters", [{"name": "small", "weight": "1"}]),
    ("adapters", [{"name": "small"}] * 2),
    ("adapters", [{"name": "small"}] * 10**5),
    # This ends the process that judges; the others start it again.
    ("guided_json", {"allOf": [{"pattern": f"a{{{number}}}"} for number in range(1, 40)]}),
    *[("guided_regex", value) for value in ("", "(", "(?=a)b", "\ud800", 5)],
    ("guided_json", {"enum": ["\ud800"]}),
    ("guided_json", {"enum": [float("nan")]}),
    ("guided_json", {"enum": json.loads("[" * 200 + "]" * 200)}),
    ("guided_choice", ["x" * 300_000]),
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

ODD_BUT_GOOD = [
    {"prompt": "\x00\x01\x1b[2J\r\n\x7f\u202e"},
    {"user": "\u00fc" * 5000},
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
    {"guided_regex": "(a+)+$"},
    {"guided_choice": ["\x00", "\u202e", '"', "\\"]},
]

BAD_MODELS = ["nope", "../base", "small@wrongdigest", "small@", "base:nope", "base@1", "x" * 10**6]

BAD_MODELS += ["small\x00", "SMALL", " small", "/etc/passwd"]


def completion(**fields: object) -> bytes:
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
    "trailing": completion() + b"}",
}

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def wire(body: bytes, more: bytes = b"") -> bytes:
    return POST + more + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


GARBAGE = {
    "binary": bytes(range(256)) * 8,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "smtp": b"HELO example\r\nMAIL FROM: <x>\r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "negative length": POST + b"Content-Length: -5\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    "bad chunks": POST + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\nabc\r\n",
    "bad header": POST + b"X Y\x00: z\r\n\r\n",
    "endless header": POST + b"X: " + b"a" * 10**6,
    "pipelined": wire(completion()) + b"GARBAGE\r\n\r\n",
}
