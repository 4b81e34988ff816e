"""The fields that ask for more candidates than answers, and what does not go together with them."""

from typing import Any

from pydantic import Field, model_validator

from .body import refuse
from .output_format import ConstrainedBody

MAX_CHOICES = 128
MAX_BEAMS = 64
MAX_LENGTH_PENALTY = 100

_NOT_WITH_BEAMS: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (-1, 0, 1),
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "prompt_logprobs": (None,),
    "forced_tools": ([],),
}
"""Fields that beam search has no use for, with the values that it may be left at."""


class SearchedBody(ConstrainedBody):
    """A body that may ask for the best of several candidates."""

    stream: bool = False
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    use_beam_search: bool = False
    beam_width: int | None = Field(default=None, ge=1, le=MAX_BEAMS)
    length_penalty: float = Field(default=1.0, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)

    @property
    def num_beams(self) -> int:
        """Beams of a search, as many as answers if the request does not say; 0 without one."""
        return (self.beam_width or self.n) if self.use_beam_search else 0

    @property
    def num_candidates(self) -> int:
        """Outputs that are generated for each prompt, of which ``n`` are answers."""
        return max(self.n, self.best_of or 0, self.num_beams)

    @model_validator(mode="after")
    def _candidates_suffice(self) -> "SearchedBody":
        if self.best_of is not None and self.best_of < self.n:
            raise refuse("best_of", "'best_of' is smaller than 'n'.")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise refuse("best_of", "'best_of' larger than 'n' is not available in a stream.")
        if self.use_beam_search:
            self._check_beams()
        elif self.beam_width not in (None, 1):
            raise refuse("beam_width", "'beam_width' needs 'use_beam_search': true.")
        elif self.length_penalty != 1:
            raise refuse("length_penalty", "'length_penalty' needs 'use_beam_search': true.")
        return self

    def _check_beams(self) -> None:
        if self.num_beams < self.n:
            raise refuse("beam_width", "'beam_width' is smaller than 'n'.")
        if self.best_of not in (None, self.n):
            raise refuse("best_of", "'best_of' does not go together with 'use_beam_search'.")
        if self.constraint is not None:
            field = self.constraint[0].partition(".")[0]
            raise refuse(field, f"{field!r} does not go together with 'use_beam_search'.")
        for field, idle in _NOT_WITH_BEAMS.items():
            if getattr(self, field, idle[0]) not in idle:
                param = "tool_choice" if field == "forced_tools" else field
                raise refuse(param, f"{param!r} does not go together with 'use_beam_search'.")
