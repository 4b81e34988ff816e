"""What scheduler and sampler ask of the grammar that a sequence's output must match."""

from typing import Protocol


class TokenMatcher(Protocol):
    """Follows the output of one sequence."""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the output."""
        ...

    @property
    def must_end(self) -> bool:
        """Whether, as of the last mask, nothing but an end token may come."""
        ...

    @property
    def error(self) -> str | None:
        """Why no token can come any more."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        ...

    def accept(self, token_id: int) -> bool:
        """Go on behind this token; False, with ``error`` set, if it cannot stand there."""
        ...

    def mask(self) -> bytes:
        """Bit i % 8 of byte i // 8 says whether token i may come next."""
        ...
