"""Finds tool calls in an output that arrives in pieces.

A call is told when it is complete: what turns out to be none can then still be shown as text.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from ..text.stop_strings import longest_overlap
from .formats import ToolFormat

_BEHIND_CALL = " \t\r\n,;]"
_SEPARATORS = _BEHIND_CALL + "["
_NAME_BEFORE = re.compile(r"([A-Za-z_][\w.-]*)\s*(?:\[ARGS\])?\s*(?=\{)")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model makes; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a piece of output adds."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: "Parsed") -> "Parsed":
        """This, and what follows."""
        return Parsed(self.text + other.text, self.calls + other.calls)


class ToolParser:
    """Splits one output into text and calls.

    Args:
        form: How the model writes calls.
    """

    def __init__(self, form: ToolFormat) -> None:
        """Start at the beginning of an output."""
        self._form = form
        self._held = ""
        self._in_calls = False
        self._is_first = True
        self._may_be_complete = False

    def push(self, text: str) -> Parsed:
        """What can be told by now."""
        self._held += text
        # Only a brace completes a call: what is long is not parsed anew for every token.
        self._may_be_complete = "}" in text
        parsed, step = Parsed(), self._next()
        while step is not None:
            parsed += step
            step = self._next()
        return parsed

    def flush(self) -> str:
        """The text held back, once nothing follows: an unfinished call is shown as it is."""
        held, self._held = self._held, ""
        return "" if self._in_calls and not held.strip(_SEPARATORS) else held

    def _next(self) -> Parsed | None:
        """Take in a part of what is held; None if that needs more."""
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
        named = _NAME_BEFORE.match(rest)
        body = rest[named.end() :] if named else rest
        if not (body.startswith("{") and self._may_be_complete):
            return None
        try:
            value, end = _DECODER.raw_decode(body)
        except json.JSONDecodeError:
            return None
        call = self._call(named[1] if named else None, value)
        self._held = body[end:]
        text = rest[: len(rest) - len(self._held)] if call is None else ""
        return Parsed(text, () if call is None else (call,))

    def _call(self, name: str | None, value: dict[str, Any]) -> ToolCall | None:
        """The call that an object stands for; None if it is none."""
        arguments: object = value
        if name is None:
            name = value.get("name")
            arguments = value.get(self._form.arguments, value.get("arguments", {}))
        if not (isinstance(name, str) and isinstance(arguments, dict)):
            return None
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
