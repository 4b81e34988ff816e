"""A trace: requests that were, one JSON object a line, sent again at their times."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from ..errors import BenchmarkError

_Count = Annotated[int, msgspec.Meta(ge=1)]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request; ``time`` in seconds from the start, never less than the line before's.

    Of ``prompt_tokens`` (random ones) and ``prompt`` (text), one is given.
    """

    time: Annotated[float, msgspec.Meta(ge=0)]
    model: str
    output_tokens: _Count
    prompt_tokens: _Count | None = None
    prompt: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """A file's rows.

    Attributes:
        name: Of the file.
        sha256: Of its bytes.
    """

    name: str
    sha256: str
    rows: tuple[Row, ...]


def read_trace(path: Path) -> Trace:
    """Read and check a file; empty lines do not count.

    Raises:
        BenchmarkError: It cannot be read, holds nothing, or a line is no row.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"--trace {path}: {error.strerror}") from error
    lines = [each for each in enumerate(content.splitlines(), start=1) if each[1].strip()]
    rows = tuple(_row(path, number, line) for number, line in lines)
    if not rows:
        raise BenchmarkError(f"--trace {path}: holds no request")
    for (number, _), row, before in zip(lines[1:], rows[1:], rows, strict=False):
        if row.time < before.time:
            raise BenchmarkError(f"--trace {path}:{number}: time {row.time:g} is before the last")
    return Trace(path.name, hashlib.sha256(content).hexdigest(), rows)


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = msgspec.json.decode(line, type=Row)
    except msgspec.DecodeError as error:
        raise BenchmarkError(f"--trace {path}:{number}: {error}") from error
    if (row.prompt is None) is (row.prompt_tokens is None):
        raise BenchmarkError(f"--trace {path}:{number}: give one of prompt_tokens and prompt")
    return row
