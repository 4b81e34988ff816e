"""A sequence: one prompt and what has been generated for it. Free of torch."""

from dataclasses import dataclass, field

from ..generation import GenerationRequest, SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """The mutable state of one request in the engine; only the scheduler changes it.

    Attributes:
        request: What was asked for.
        salt: What separates its cached prefixes from others': adapter digest and cache salt.
        arrival: Order of arrival, which breaks ties of priority.
        token_ids: Prompt and output.
        num_computed_tokens: Leading tokens whose keys and values are in the cache.
        num_cached_tokens: Prompt tokens found in the prefix cache at first admission.
        block_table: Cache blocks, in order.
    """

    request: GenerationRequest
    salt: bytes
    arrival: int
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start from the prompt and any output to resume."""
        self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]

    @property
    def sampling(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.request.sampling

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_len
