"""Turns tokens into text one at a time, never emitting half a character.

A character may span several tokens, and a token's text may depend on the one before it (a leading
space that only the first word of a text loses). So each token is decoded together with a short
window of its predecessors, and what ends in U+FFFD, which is how decoders write an incomplete
character, is held back until the next tokens complete it.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# A character has at most four bytes and a token at least one, so what is still incomplete after
# this many tokens is invalid, not unfinished.
_MAX_BYTES = 4
_MAX_PENDING = 16
_CONTEXT = 8

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Incremental ``decode``: the pieces of all ``push`` and of ``flush`` join to the whole text.

    Work per token is bounded. For byte-level vocabularies this holds for any tokens; for byte
    fallback (sentencepiece) for tokens that spell valid UTF-8, because there a later invalid byte
    would change the text of earlier ones.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        """Start after ``context``, the end of the prompt, whose own text is not emitted.

        Args:
            decode: Text of tokens; special tokens are in or out as the caller wants them.
            context: The last tokens before the first one pushed; a few are enough.
        """
        self._decode = decode
        self._window = _context(decode, context)
        self._read = len(self._window)
        settled = _settled(decode, self._window)
        self._emitted = len(settled)
        # The end of the context, not ours to emit unless its character is completed by our tokens.
        self._unfinished = decode(self._window)[self._emitted :]

    def push(self, token_id: int) -> str:
        """The characters this token completes, often one word, sometimes none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        stable = text.rstrip(REPLACEMENT)
        if len(stable) == len(text) > self._emitted:
            piece = self._after_emitted(text)
            self._restart(self._window[self._read :])
            return piece
        if len(self._window) - self._read > _MAX_PENDING:
            return self._give_up(text)
        return self._emit(stable)

    def flush(self) -> str:
        """What is left at the end: an incomplete character, as U+FFFD."""
        return self._emit(self._decode(self._window))

    def _emit(self, text: str) -> str:
        piece = self._after_emitted(text)
        self._emitted = max(self._emitted, len(text))
        return piece

    def _after_emitted(self, text: str) -> str:
        skipped = self._unfinished if text.startswith(self._unfinished, self._emitted) else ""
        return text[self._emitted + len(skipped) :]

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._read = len(window)
        self._emitted = len(self._decode(window))
        self._unfinished = ""

    def _give_up(self, text: str) -> str:
        if not text.endswith(REPLACEMENT):  # the pending tokens have no text at all
            self._window = self._window[: self._read]
            return ""
        # Only the last U+FFFD can still become part of a character.
        piece = self._after_emitted(text[:-1])
        self._restart(self._window[-_CONTEXT:])
        self._emitted -= 1
        return piece


def _context(decode: Decode, token_ids: Sequence[int]) -> list[int]:
    """The last tokens, without the end of a character whose beginning is not among them.

    Under byte fallback one such byte would spoil the text of the whole run of bytes after it.
    """
    if len(token_ids) <= _CONTEXT:
        return list(token_ids)
    longest = list(token_ids[-_CONTEXT - _MAX_BYTES + 1 :])
    candidates = [longest[start:] for start in range(len(longest) - _CONTEXT + 1)]
    return min(candidates, key=lambda ids: decode(ids).count(REPLACEMENT))


def _settled(decode: Decode, context: list[int]) -> str:
    """Text of the context up to a character that its last tokens may have left incomplete."""
    text = ""
    for end in range(len(context), max(len(context) - _MAX_BYTES, 0), -1):
        text = decode(context[:end])
        if not text.endswith(REPLACEMENT):
            break
    return text.rstrip(REPLACEMENT)
