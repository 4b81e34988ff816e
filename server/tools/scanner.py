"""Finds where a JSON object ends that arrives in pieces, without reading what is in it."""

from dataclasses import dataclass


@dataclass(slots=True)
class ObjectScanner:
    """Follows an object to its last brace.

    Attributes:
        stray: A sign that ends it where it stands outside of strings, which no JSON has; empty for
            none.
        depth: Braces and brackets that are open.
        is_over: Whether the end was found.
        is_broken: Whether it ended with ``stray``.
    """

    stray: str
    depth: int = 0
    is_over: bool = False
    is_broken: bool = False
    _in_string: bool = False
    _is_escaped: bool = False

    def split(self, text: str) -> tuple[str, str]:
        """What of the next piece belongs to the object, and what stands behind it."""
        for index, sign in enumerate(text):
            if sign == self.stray and not self._in_string:
                self.is_over = self.is_broken = True
                return text[:index], text[index:]
            self._take(sign)
            if self.is_over:
                return text[: index + 1], text[index + 1 :]
        return text, ""

    def _take(self, sign: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped, self._in_string = sign == "\\", sign != '"'
        elif sign == '"':
            self._in_string = True
        elif sign in "{[":
            self.depth += 1
        elif sign in "}]":
            self.depth -= 1
            self.is_over = self.depth == 0
