"""Finds tool calls in an output that arrives in pieces, and passes their arguments on in pieces.

A call is told when its name and the first brace of its arguments are there, which is where nothing
but a call can follow; what turns out to be none before that can still be shown as text. Arguments
are the text that the model wrote, whether they are read in pieces or as a whole.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..text.stop_strings import longest_overlap
from .formats import ToolFormat
from .scanner import ObjectScanner

_BEHIND_CALL = " \t\r\n,;]"
_SEPARATORS = _BEHIND_CALL + "["
_NAME_BEFORE = re.compile(r"([A-Za-z_][\w.-]*)\s*(?:\[ARGS\])?\s*(?=\{)")
_NAME = r"[\w.:/-]+"
_HEAD = r'\{\s*"name"\s*:\s*"(' + _NAME + r')"\s*,\s*"(?:%s)"\s*:\s*(?=\{)'
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model makes; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """What a piece of output adds to the calls: a ``name`` begins the next one.

    Attributes:
        name: Of a call that begins, None where the last one goes on.
        arguments: More of the text of its arguments.
    """

    name: str | None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a piece of output adds."""

    text: str = ""
    parts: tuple[CallPart, ...] = ()

    def __add__(self, other: "Parsed") -> "Parsed":
        """This, and what follows."""
        return Parsed(self.text + other.text, self.parts + other.parts)

    @property
    def calls(self) -> list[ToolCall]:
        """The calls that the parts make up; the first part must begin one."""
        return joined(self.parts)


def joined(parts: Iterable[CallPart]) -> list[ToolCall]:
    """Calls made of their parts."""
    calls: list[ToolCall] = []
    for part in parts:
        if part.name is not None:
            calls.append(ToolCall(part.name, part.arguments))
        else:
            calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + part.arguments)
    return calls


class ToolParser:
    """Splits one output into text and calls.

    Args:
        form: How the model writes calls.

    Attributes:
        has_calls: Whether any call has begun.
    """

    def __init__(self, form: ToolFormat) -> None:
        """Start at the beginning of an output."""
        self._form = form
        self._head = re.compile(_HEAD % "|".join({form.arguments, "arguments"}))
        self._held = ""
        self._in_calls = False
        self._is_first = True
        self._has_brace = False
        self._arguments: ObjectScanner | None = None
        self._around: ObjectScanner | None = None
        """What stands around the arguments, while they are read and until it ends."""
        self._is_broken = False
        self.has_calls = False

    @property
    def is_whole(self) -> bool:
        """Whether the arguments of every call that began have ended."""
        return self._arguments is None and not self._is_broken

    def push(self, text: str) -> Parsed:
        """What can be told by now."""
        self._held += text
        # Only a brace begins or completes a call: what is long is not read anew for every token.
        self._has_brace = "{" in text or "}" in text
        parsed, step = Parsed(), self._next()
        while step is not None:
            parsed += step
            step = self._next()
        self.has_calls = self.has_calls or bool(parsed.parts)
        return parsed

    def flush(self) -> str:
        """The text held back, once nothing follows: an unfinished call is shown as it is."""
        held, self._held = self._held, ""
        return "" if self._in_calls and not held.strip(_SEPARATORS) else held

    def _next(self) -> Parsed | None:
        """Take in a part of what is held; None if that needs more."""
        if self._arguments is not None:
            return self._next_arguments(self._arguments)
        if self._around is not None:
            return self._next_around(self._around)
        return self._next_call() if self._in_calls else self._next_text()

    def _next_text(self) -> Parsed | None:
        start = self._held.lstrip()
        if self._form.bare and self._is_first and start[:1] in ("", "{"):
            self._in_calls = bool(start)
            return Parsed() if start else None
        before, begin, after = self._held.partition(self._form.begin)
        if begin:
            self._in_calls, self._held = True, begin + after
            return self._shown(before.rstrip())
        # Blanks before a call are no text of the answer.
        may_begin = longest_overlap(self._held, [self._form.begin])
        piece = self._held[: len(self._held) - may_begin].rstrip()
        self._held = self._held[len(piece) :]
        return self._shown(piece) if piece else None

    def _shown(self, text: str) -> Parsed:
        self._is_first = self._is_first and not text
        return Parsed(text)

    def _next_call(self) -> Parsed | None:
        rest = self._held.lstrip(_BEHIND_CALL).removeprefix(self._form.begin).lstrip(_SEPARATORS)
        if self._form.end and rest.startswith(self._form.end):
            self._in_calls, self._held = False, rest[len(self._form.end) :]
            return Parsed()
        if not self._has_brace:
            return None
        if named := _NAME_BEFORE.match(rest):
            return self._begin(named[1], rest[named.end() :], None)
        if head := self._head.match(rest):
            around = ObjectScanner(self._form.end[:1], depth=1)
            return self._begin(head[1], rest[head.end() :], around)
        return self._whole_object(rest) if rest.startswith("{") else None

    def _begin(self, name: str, rest: str, around: ObjectScanner | None) -> Parsed:
        self._arguments, self._around = ObjectScanner(self._form.end[:1]), around
        self._held = rest
        return Parsed(parts=(CallPart(name),))

    def _next_arguments(self, scanner: ObjectScanner) -> Parsed | None:
        if not self._held:
            return None
        piece, self._held = scanner.split(self._held)
        if scanner.is_over:
            self._arguments = None
        if scanner.is_broken:
            self._is_broken, self._around = True, None
        return Parsed(parts=(CallPart(None, piece),))

    def _next_around(self, scanner: ObjectScanner) -> Parsed | None:
        _, self._held = scanner.split(self._held)
        if not scanner.is_over:
            return None
        self._around, self._is_broken = None, self._is_broken or scanner.is_broken
        return Parsed()

    def _whole_object(self, rest: str) -> Parsed | None:
        """A call whose name comes late or alone, or an object that is none."""
        try:
            value, end = _DECODER.raw_decode(rest)
        except (json.JSONDecodeError, RecursionError):
            return None
        self._held = rest[end:]
        name = value.get("name")
        arguments = value.get(self._form.arguments, value.get("arguments", {}))
        if not (
            isinstance(name, str) and re.fullmatch(_NAME, name) and isinstance(arguments, dict)
        ):
            return Parsed(rest[:end])
        return Parsed(parts=(CallPart(name, _written(arguments)),))


def _written(arguments: dict[str, object]) -> str:
    """As JSON, with signs that are no UTF-8 escaped."""
    text = json.dumps(arguments, ensure_ascii=False)
    return json.dumps(arguments) if _LONE_SURROGATE.search(text) else text
