"""Sends shots over sockets of their own, as rudely as they ask, and judges what comes back."""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jsonschema

from .shots import Shot

HANG_SECONDS = 60.0
_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
_NO_HTTP = b"Invalid HTTP request received."


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: 0 where the connection was closed without an answer."""

    status: int
    head: bytes = b""
    body: bytes = b""

    @classmethod
    def of(cls, raw: bytes) -> "Answer":
        raw = raw.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        found = _STATUS.match(raw)
        head, _, body = raw.partition(b"\r\n\r\n")
        if found is None:
            return cls(0, head, body)
        chunked = b"transfer-encoding: chunked" in head.lower()
        return cls(int(found[1]), head.lower(), _unchunked(body) if chunked else body)


def _unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        parts.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Target:
    """Where shots go, and the key they go with."""

    host: str
    port: int
    key: str | None = None


async def fire(shot: Shot, target: Target) -> Answer:
    """The answer.

    Raises:
        TimeoutError: There was none.
    """
    async with asyncio.timeout(HANG_SECONDS):
        reader, writer = await asyncio.open_connection(target.host, target.port)
        try:
            writer.write(_bytes_of(shot, target))
            if shot.sends is not None:
                return Answer(0)
            whole = -1 if shot.reads is None else shot.reads
            return Answer.of(await reader.read(whole))
        except ConnectionError:
            return Answer(0)
        finally:
            writer.transport.abort()


def _bytes_of(shot: Shot, target: Target) -> bytes:
    lines = [
        f"{shot.method} {shot.path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Connection: close",
        f"Content-Length: {len(shot.content)}",
        *(f"{name}: {value}" for name, value in shot.headers),
    ]
    if target.key is not None and not any(name == "Authorization" for name, _ in shot.headers):
        lines.append(f"Authorization: Bearer {target.key}")
    head = "\r\n".join(lines).encode("latin-1", "replace")
    return head + b"\r\n\r\n" + shot.content[: shot.sends]


@dataclass(frozen=True, slots=True)
class Judge:
    """Holds answers to what the server says of itself.

    Attributes:
        answers: Of each path, what checks its good answer.
    """

    answers: Mapping[str, jsonschema.Draft202012Validator]

    @classmethod
    def of(cls, page: Mapping[str, object]) -> "Judge":
        """Of an OpenAPI page."""
        components = {"components": page["components"]}
        answers = {}
        for path, methods in page["paths"].items():
            good = methods.get("post", {}).get("responses", {}).get("200", {})
            schema = good.get("content", {}).get("application/json", {}).get("schema")
            if schema is not None:
                answers[path] = jsonschema.Draft202012Validator({**schema, **components})
        return cls(answers)

    def fault(self, shot: Shot, answer: Answer) -> str | None:
        """What is wrong with an answer; None if nothing."""
        if shot.is_cut:
            return None
        if answer.status == 0:
            return "no answer"
        if answer.status >= 500 and not _is_named(answer):
            return "a failure"
        if shot.kind == "good" and answer.status != 200:
            return "a good request is refused"
        if shot.method == "HEAD" or not answer.body:
            return None
        return self._fault_of_body(shot, answer)

    def _fault_of_body(self, shot: Shot, answer: Answer) -> str | None:
        if answer.status >= 400:
            return None if _is_refusal(answer) else "a refusal without OpenAI's error"
        if b"text/event-stream" in answer.head:
            ended = answer.body.endswith(b"data: [DONE]\n\n")
            return None if ended else "a stream that does not end"
        schema = self.answers.get(shot.path)
        if schema is None or b"application/json" not in answer.head:
            return None
        error = next(schema.iter_errors(json.loads(answer.body)), None)
        return None if error is None else f"not as the page says: {error.message[:200]}"


def _is_named(answer: Answer) -> bool:
    """501 for what no release serves yet, and 503 that says when to try again."""
    return answer.status == 501 or (answer.status == 503 and b"retry-after" in answer.head)


def _is_refusal(answer: Answer) -> bool:
    if answer.body == _NO_HTTP:
        return True
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return error.keys() == {"message", "type", "param", "code"} and error["code"] == answer.status
