"""Where AdapterHub's ReFT acts: the first positions of a sequence and the last of its prompt.

The library computes both from what the layer gave, writes the first and then the last over it. So
the last positions win where both meet, and the two ranges here never overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .scope import PromptHead, PromptTail, Span


@dataclass(frozen=True, slots=True)
class ReftHead(PromptHead):
    """The first ``length`` positions, up to where the tail begins.

    Without a tail they are those of the whole sequence, output included: that is what the library
    computes for each token when it reads the sequence so far.

    Attributes:
        tail: Positions of the tail, 0 without one.
    """

    tail: int

    def span(self, prompt: Sequence[int]) -> Span | None:
        """Positions 0 .. length, or to the tail; None if the tail has all."""
        if self.tail == 0:
            return Span(0, self.length)
        end = _head_end(len(prompt), self.length, self.tail)
        key = b"" if end == self.length else str(len(prompt)).encode()
        return Span(0, end, key) if end else None


@dataclass(frozen=True, slots=True)
class ReftTail(PromptTail):
    """The last ``length`` positions of the prompt.

    Attributes:
        head: Positions of the head, 0 without one.
    """

    head: int

    def span(self, prompt: Sequence[int]) -> Span | None:
        """Positions from ``length`` before the prompt's end; None if the head has all."""
        size = len(prompt)
        start = max(0, size - self.length, _head_end(size, self.head, self.length))
        return Span(start, size, str(size).encode()) if start < size else None


def _head_end(size: int, head: int, tail: int) -> int:
    """Where the head ends in a prompt of ``size`` tokens.

    The library takes the tail's rows from the end of [head's rows, tail's rows], and as many as the
    tail has when it is not cut short. So a prompt of half the tail or less gets the head's rows in
    both places, if these are rows of all of its tokens.
    """
    if size <= head and 2 * size <= tail:
        return size
    return min(head, max(0, size - tail))
