"""Which of a request's positions an adapter's corrections apply to. Free of torch.

A position is the index of a token in prompt and output. Every scope is one range of positions that
is known from the prompt alone, so that it stays the same while tokens are generated, however the
prompt is cut into chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Positions ``start .. end``; ``end`` None is open.

    Attributes:
        start: First position.
        end: One past the last.
        key: What the content of the span depends on beside the tokens before its end, for the
            names of cached blocks; empty for most.
    """

    start: int
    end: int | None = None
    key: bytes = b""


@dataclass(frozen=True, slots=True)
class EveryPosition:
    """The whole request."""

    def span(self, prompt: Sequence[int]) -> Span | None:  # noqa: ARG002  # as every scope
        """All positions."""
        return Span(0)


@dataclass(frozen=True, slots=True)
class FromInvocation:
    """From the start of the last occurrence of ``token_ids`` in the prompt on (aLoRA).

    Nowhere, if they do not occur; output tokens are never searched.
    """

    token_ids: tuple[int, ...]

    def span(self, prompt: Sequence[int]) -> Span | None:
        """Positions from the last occurrence on, None without one."""
        wanted, length = list(self.token_ids), len(self.token_ids)
        for start in range(len(prompt) - length, -1, -1):
            if prompt[start] == wanted[0] and list(prompt[start : start + length]) == wanted:
                return Span(start)
        return None


@dataclass(frozen=True, slots=True)
class PromptHead:
    """The first ``length`` positions, up to where a tail begins (AdapterHub's ReFT).

    Without a tail they are those of the whole sequence, output included: that is what the library
    computes for each token when it reads the sequence so far.

    Attributes:
        length: Positions of the head.
        tail: Positions of the tail, 0 without one.
    """

    length: int
    tail: int = 0

    def span(self, prompt: Sequence[int]) -> Span | None:
        """Positions 0 .. length, or to the tail; None if the tail has all."""
        if self.tail == 0:
            return Span(0, self.length)
        end = _head_end(len(prompt), self.length, self.tail)
        key = b"" if end == self.length else str(len(prompt)).encode()
        return Span(0, end, key) if end else None


@dataclass(frozen=True, slots=True)
class PromptTail:
    """The last ``length`` positions of the prompt, which win where they meet the head.

    Attributes:
        length: Positions of the tail.
        head: Positions of the head, 0 without one.
    """

    length: int
    head: int = 0

    def span(self, prompt: Sequence[int]) -> Span | None:
        """Positions from ``length`` before the prompt's end; None if the head has all."""
        size = len(prompt)
        start = max(0, size - self.length, _head_end(size, self.head, self.length))
        return Span(start, size, str(size).encode()) if start < size else None


Scope = EveryPosition | FromInvocation | PromptHead | PromptTail


def _head_end(size: int, head: int, tail: int) -> int:
    """Where the head ends in a prompt of ``size`` tokens.

    The library takes the tail's rows from the end of [head's rows, tail's rows], and as many as the
    tail has when it is not cut short. So a prompt of half the tail or less gets the head's rows in
    both places, if these are rows of all of its tokens.
    """
    if size <= head and 2 * size <= tail:
        return size
    return min(head, max(0, size - tail))
