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
    """The first ``length`` positions of the prompt (ReFT)."""

    length: int

    def span(self, prompt: Sequence[int]) -> Span | None:
        """Positions 0 .. length, as far as the prompt goes."""
        end = min(self.length, len(prompt))
        # A shorter prompt's later tokens are output, which is left alone: its length counts.
        key = b"" if end == self.length else str(len(prompt)).encode()
        return Span(0, end, key)


@dataclass(frozen=True, slots=True)
class PromptTail:
    """The last ``length`` positions of the prompt (ReFT)."""

    length: int

    def span(self, prompt: Sequence[int]) -> Span | None:
        """Positions from ``length`` before the prompt's end."""
        size = len(prompt)
        return Span(max(0, size - self.length), size, str(size).encode())


Scope = EveryPosition | FromInvocation | PromptHead | PromptTail
