"""Single requests as bytes, right and wrong, each a function of a seed and its number alone."""

import copy
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from .good import Body, chance, good

JSON = "application/json"

_DEEP = "\x1fdeep"
"""Stands for lists in lists, deeper than Python's own encoder goes."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 2**31, -(2**31) - 1, 2**63, 2**64, 10**30, -(10**300)),
    *(1e308, -1e-308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "\x00", "\ud800", "🦊" * 50, "x" * 5000, "null", "0", "NaN", "../../etc", "base"),
    *(
        [],
        {},
        [[]],
        [None],
        [{}],
        {"": {}},
        {"\ud800": 1},
        [0] * 300,
        ["x"] * 100,
        {"type": "x"},
        _DEEP,
    ),
)

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW")

PATHS = (
    *("/", "/v1", "/v1/", "/v1/nothing", "/v1/completions/", "//v1/completions", "/v1/models/"),
    *("/v1/models/red", "/v1/models/%00", "/v1/models/..%2f..", "/v1/models/%ff", "/v1/adapters/x"),
    *(
        "/v1/adapters?limit=-1",
        "/v1/adapters?limit=9e9&after=%F0",
        "/v1/adapters/green",
        "/metrics",
    ),
    *("/health", "/ready", "/version", "/openapi.json", "/docs", "/v1/usage", "/" + "a" * 5000),
    *("/v1/models/%F0%9F%A6%8A", "/v1/adapters/%2e%2e", "/v1/adapters?after=\x7f", "/static/..;/x"),
)

POSTED = (
    *("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"),
    *("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
)


@dataclass(frozen=True, slots=True)
class Shot:
    """One request.

    Attributes:
        kind: What is wrong with it, ``good`` where nothing is.
        method: Of HTTP.
        path: With its query.
        headers: Beside Host and length.
        content: The body's bytes.
        sends: How much of the body is sent before the connection is closed; None for all.
        reads: How many bytes of the answer are read before the connection is closed; None for all.
    """

    kind: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = (("Content-Type", JSON),)
    content: bytes = b""
    sends: int | None = None
    reads: int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the connection is closed before the end."""
        return self.sends is not None or self.reads is not None


def shot(seed: int, number: int) -> Shot:
    """Request number ``number`` of a run."""
    draw = Random(f"{seed}:{number}")
    [make] = draw.choices([each for each, _ in KINDS], [weight for _, weight in KINDS])
    return make(draw)


def _good(draw: Random) -> Shot:
    path, body = good(draw)
    return Shot("good", "POST", path, content=_encoded(body))


def _encoded(body: object) -> bytes:
    return json.dumps(body).encode().replace(json.dumps(_DEEP).encode(), b"[" * 3000 + b"]" * 3000)


def _odd(draw: Random) -> Any:
    return copy.deepcopy(draw.choice(ODD))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a body."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += _places(inner)
    return found


def _mutated(draw: Random) -> Shot:
    """A good body in which one thing or a few are not as they were."""
    path, body = good(draw)
    body = json.loads(json.dumps(body))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = _places(body)
        if places:
            _spoil(draw, *draw.choice(places))
    if chance(draw, 0.1):
        body[draw.choice(("no_such_field", "suffix", "functions", "\x00", "store"))] = _odd(draw)
    if chance(draw, 0.1):
        path = draw.choice(POSTED)
    return Shot("mutated", "POST", path, content=_encoded(body))


def _spoil(draw: Random, container: Any, key: Any) -> None:
    if chance(draw, 0.15):
        del container[key]
    elif chance(draw, 0.1) and isinstance(container, dict):
        container[str(key) + draw.choice(("", "s", " ", "\x00"))] = container.pop(key)
    else:
        container[key] = _odd(draw)


def _damaged(draw: Random) -> Shot:
    """A good body whose bytes are not."""
    path, body = good(draw)
    content = _encoded(body)
    damages: tuple[Callable[[], bytes], ...] = (
        lambda: content[: draw.randrange(len(content))],
        lambda: content + draw.choice((b"}", b"\x00", content, b"//")),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode().encode(draw.choice(("utf-16", "utf-32", "utf-7", "cp037"))),
        lambda: _flipped(draw, content),
        lambda: b"[" * draw.choice((10, 1000, 100_000)),
        lambda: b'{"model":' * draw.choice((10, 1000, 50_000)),
        lambda: content.replace(b": ", b": \xff\xfe", 1),
        lambda: content[:-1] + b', "model": "base", "model": {}}',
        lambda: content[:-1] + b', "seed": ' + b"9" * draw.choice((100, 5000)) + b"}",
        lambda: content[:-1] + b', "temperature": ' + b"1" * 400 + b".5}",
        lambda: draw.randbytes(draw.randint(0, 300)),
        lambda: draw.choice((b"", b"null", b"5", b'"x"', b"[]", b"NaN", b"{}", b"\n")),
    )
    return Shot("damaged", "POST", path, content=draw.choice(damages)())


def _flipped(draw: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _mislabelled(draw: Random) -> Shot:
    """A good body under headers that are not."""
    shot = _good(draw)
    kinds = ("", "text/plain", "application/xml", "application/json; charset=utf-16", "x" * 3000)
    headers: tuple[tuple[tuple[str, str], ...], ...] = (
        (),
        *((("Content-Type", kind),) for kind in kinds),
        (("Content-Type", JSON), ("Content-Encoding", "gzip")),
        (("Content-Type", JSON), ("Accept", "application/xml"), ("Accept-Encoding", "br;q=0")),
        (("Content-Type", JSON), ("Expect", "100-continue")),
        (("Content-Type", JSON), ("X-Request-Id", "\xff" * 200)),
        (("Content-Type", JSON), ("Origin", "https://a.example")),
        (("Content-Type", JSON), ("Authorization", draw.choice(("Bearer", "Basic x", "\xfe")))),
    )
    content = gzip.compress(shot.content) if chance(draw, 0.1) else shot.content
    return replace(shot, kind="mislabelled", headers=draw.choice(headers), content=content)


def _misrouted(draw: Random) -> Shot:
    """Paths and methods that there are and that there are not."""
    path = draw.choice((*PATHS, *POSTED))
    content = _encoded(good(draw)[1]) if chance(draw, 0.3) else b""
    return Shot("misrouted", draw.choice(METHODS), path, content=content)


def _upload(draw: Random) -> Shot:
    """Forms with files that are no adapters, most of them broken."""
    boundary = draw.choice(("b", "x" * 70, "a b", "", '"q"'))
    name = draw.choice(("green", "../x", "", "red", "\x00", "é"))
    archive = draw.choice((b"", b"PK\x03\x04", b"\x1f\x8b\x08", draw.randbytes(200), b"x" * 99_999))
    lines = [
        f"--{boundary}\r\nContent-Disposition: form-data; name=name\r\n\r\n{name}\r\n".encode(),
        f"--{boundary}\r\nContent-Disposition: form-data; name=archive; filename=a.tar\r\n"
        "Content-Type: application/x-tar\r\n\r\n".encode()
        + archive
        + b"\r\n",
        f"--{boundary}--\r\n".encode(),
    ]
    content = b"".join(part for part in lines if chance(draw, 0.8))
    if chance(draw, 0.3):
        content = content[: draw.randint(0, len(content))]
    kind = f"multipart/form-data; boundary={boundary}"
    kind = kind if chance(draw, 0.9) else "multipart/form-data"
    return Shot("upload", "POST", "/v1/adapters", (("Content-Type", kind),), content)


def _managed(draw: Random) -> Shot:
    """Adapters that are not there, and changes that make no sense."""
    name = draw.choice(("green", "red", "base", "", "x" * 300, "a/b", "\ud800", "x@1"))
    place = draw.choice(
        ("no-such-folder", "..", "~", "", "a\x00b", "http://[", "http://[::", "s3://x", "\ud800")
    )
    asked: tuple[tuple[str, str, Body], ...] = (
        ("POST", "/v1/adapters", {"name": name, "source": place, "replace": True}),
        ("POST", "/v1/adapters", {"name": name, "path": place, "wait": False, "digest": "0" * 64}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": place}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "green", "lora_int_id": 5}),
        ("PATCH", "/v1/adapters/blue", {"pinned": chance(draw, 0.5)}),
        ("PATCH", "/v1/adapters/red", {"version": draw.choice(("0", "zz", "\x00"))}),
        ("PATCH", "/v1/adapters/red", {"rollback": True}),
        ("DELETE", "/v1/adapters/green", {}),
    )
    method, path, body = draw.choice(asked)
    headers = [("Content-Type", JSON)]
    if chance(draw, 0.1):
        headers.append(("Origin", draw.choice(("http://[", "null", "", "https://a.example"))))
    return Shot("managed", method, path, tuple(headers), _encoded(body))


def _cut(draw: Random) -> Shot:
    """A client that goes away, while it sends or while it reads."""
    shot = _good(draw)
    if chance(draw, 0.3):
        return replace(shot, kind="cut", sends=draw.randrange(len(shot.content)))
    body = json.loads(shot.content)
    if "max_tokens" in body:
        body |= {"max_tokens": 100, "ignore_eos": True}
    return replace(shot, kind="cut", content=_encoded(body), reads=draw.randint(0, 3000))


KINDS: tuple[tuple[Callable[[Random], Shot], float], ...] = (
    (_good, 40),
    (_mutated, 26),
    (_damaged, 10),
    (_mislabelled, 5),
    (_misrouted, 6),
    (_upload, 3),
    (_managed, 4),
    (_cut, 6),
)
