"""Finds stop strings in text that arrives in pieces, without showing any part of one."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopStrings:
    """Cuts a text at the first stop string that is completed in it.

    What could still become a stop string is held back. The result does not depend on how the text
    is split into pieces: of the stop strings in it, the one that ends first wins, and of those that
    end together the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for ``stops``, none of them empty."""
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> Piece:
        """The text that cannot be part of a stop string any more."""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return Piece(text[:start], stop)
        shown = len(text) - longest_overlap(text, self._stops)
        self._held = text[shown:]
        return Piece(text[:shown])

    def flush(self) -> str:
        """The text held back, once nothing can follow it."""
        held, self._held = self._held, ""
        return held


def longest_overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which one of ``stops`` begins."""
    return max((_suffix_prefix(text, stop) for stop in stops), default=0)


def _suffix_prefix(text: str, stop: str) -> int:
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
