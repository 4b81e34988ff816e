"""Where one sequence stands in its grammar: which tokens may come next."""

from llguidance import LLMatcher

from .vocabulary import Vocabulary, first_line


class Matcher:
    """Follows the tokens of one sequence; a ``TokenMatcher`` of the scheduler.

    Attributes:
        end_token_ids: Tokens that end a text; outside of that they are never allowed.
        must_end: Whether, as of the last mask, nothing but an end token may come.
        error: Why no token can come any more: the text became too costly to follow.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, may_end_early: bool) -> None:
        """Start at the beginning of a text.

        Args:
            matcher: Of the grammar; it is this object's own from now on.
            vocabulary: What it was compiled for.
            may_end_early: Whether the text may end where it could also go on.
        """
        self._matcher = matcher
        self._may_end_early = may_end_early
        self.end_token_ids = vocabulary.end_token_ids
        self.must_end = False
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def accept(self, token_id: int) -> bool:
        """Go on behind this token; False, with ``error`` set, if the grammar does not allow it."""
        accepted = bool(self._matcher.consume_token(token_id))
        if not accepted:
            self._note_error()
        return accepted

    def mask(self) -> bytes:
        """Bit i % 8 of byte i // 8 says whether token i may come next; none, with an ``error``."""
        mask = bytes(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            self._note_error()
            return bytes(len(mask))
        text_only = bytearray(mask)
        for end in self.end_token_ids:
            text_only[end // 8] &= ~(1 << end % 8)
        self.must_end = text_only.count(0) == len(text_only)
        return mask if self._may_end_early or self.must_end else bytes(text_only)

    def _note_error(self) -> None:
        reason = first_line(self._matcher.get_error())
        self.error = f"its output cannot be matched with its grammar any further: {reason}"
