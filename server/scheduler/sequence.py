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
        block_hashes: Names of its leading full blocks, as far as they were needed.
        num_prompt_logprobs: Prompt log-probabilities sent, where asked for.
        num_preemptions: Times it was taken off the device to be recomputed.
        num_overtaken: Steps, since it began to wait, in which a later one was admitted before it.
    """

    request: GenerationRequest
    salt: bytes
    arrival: int
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_preemptions: int = 0
    num_overtaken: int = 0

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

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is admitted earlier and preempted later."""
        return self.request.priority, self.arrival

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to go through the model: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def cache_limit(self) -> int:
        """Leading tokens that may come from the prefix cache.

        The last token's row chooses the next token, and the row before every prompt
        log-probability that is still to be sent must be computed.
        """
        if self.sampling.prompt_logprobs is None or self.num_prompt_logprobs >= self.prompt_len - 1:
            return len(self.token_ids) - 1
        return self.num_prompt_logprobs
