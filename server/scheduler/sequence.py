"""A sequence: one prompt and what has been generated for it. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from ..generation import GenerationRequest, SamplingParams
from .token_matcher import TokenMatcher

if TYPE_CHECKING:
    from .beam_group import BeamGroup


@dataclass(frozen=True, slots=True)
class Activation:
    """Positions ``start .. end`` of a sequence that one part of an adapter corrects.

    Attributes:
        adapter_id: The adapter.
        part: Index of the part.
        start: First position.
        end: One past the last, None for all that follow.
        weight: What its corrections are multiplied by.
    """

    adapter_id: int
    part: int
    start: int
    end: int | None
    weight: float


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values that adapters put before a sequence's own, in blocks of their own.

    They end where their last block ends, so that the sequence's first token begins a block; the
    keys before them in their first block are empty, and attention skips them.

    Attributes:
        name: What they are, for all sequences that share them.
        length: Keys of a layer.
        position_offset: Added to the position of each of the sequence's tokens.
        adapter_ids: Whose they are, in order.
        layers: Those that attend to them, ascending; None for all of them.
    """

    name: bytes
    length: int
    position_offset: int
    adapter_ids: tuple[int, ...]
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Salt:
    """What the contents of cached blocks depend on beside their tokens.

    Attributes:
        position: First position whose keys and values depend on it.
        value: What it is.
    """

    position: int
    value: bytes


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """What a request's adapters do to its sequence; nothing, for the bare base.

    Attributes:
        adapter_ids: Those that must be on the device.
        activations: Their corrections by position; the nth overlaps others only as a sum.
        prefix: Their keys and values, None without any.
        salts: Of their positions.
    """

    adapter_ids: tuple[int, ...] = ()
    activations: tuple[Activation, ...] = ()
    prefix: Prefix | None = None
    salts: tuple[Salt, ...] = ()


NO_ADAPTER = AdapterUse()


@dataclass(slots=True, eq=False)
class Sequence:
    """The mutable state of one request in the engine; only the scheduler changes it.

    Attributes:
        request: What was asked for.
        adapters: What its adapters do to it.
        arrival: Order of arrival, which breaks ties of priority and deadline.
        matcher: Follows its output, where that must match a grammar.
        group: The beams it is one of, in beam search.
        number: Among all beams that its request has had.
        block_copy: A cache block and the one it is to be copied to before the sequence goes on.
        token_ids: Prompt and output.
        max_len: Tokens that these may become, which the scheduler finds when it takes it in.
        num_computed_tokens: Leading tokens whose keys and values are in the cache.
        num_cached_tokens: Prompt tokens found in the prefix cache at first admission.
        prefix_blocks: Cache blocks of its adapters' prefix, shared with other sequences.
        block_table: Cache blocks of its own tokens, in order.
        block_hashes: Names of its leading full blocks, as far as they were needed.
        num_prompt_logprobs: Prompt log-probabilities sent, where asked for.
        num_preemptions: Times it was taken off the device to be recomputed.
        num_overtaken: Steps, since it began to wait, in which a later one was admitted before it.
        num_charged: Leading tokens that were counted as service to its tenant.
        last_step: Number of the last step it was part of.
    """

    request: GenerationRequest
    adapters: AdapterUse
    arrival: int
    matcher: TokenMatcher | None = None
    group: "BeamGroup | None" = None
    number: int = 0
    block_copy: tuple[int, int] | None = None
    token_ids: list[int] = field(init=False)
    max_len: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    prefix_blocks: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_preemptions: int = 0
    num_overtaken: int = 0
    num_charged: int = 0
    last_step: int = 0

    def __post_init__(self) -> None:
        """Start from the prompt and any output to resume."""
        self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]

    def renumber_blocks(self, new: Mapping[int, int]) -> None:
        """Blocks with a new number lie there now."""
        self.prefix_blocks = [new.get(block, block) for block in self.prefix_blocks]
        self.block_table = [new.get(block, block) for block in self.block_table]
        if self.block_copy is not None:
            source, target = self.block_copy
            self.block_copy = new.get(source, source), new.get(target, target)

    @property
    def name(self) -> tuple[str, int]:
        """Unique among the live ones."""
        return self.request.request_id, self.number

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.request.share.tenant

    @property
    def num_given(self) -> int:
        """Tokens it came with: its prompt, and an output that it resumes."""
        return self.prompt_len + len(self.request.output_token_ids)

    @property
    def position_offset(self) -> int:
        """Added to the index of a token for its position."""
        return 0 if self.adapters.prefix is None else self.adapters.prefix.position_offset

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
    def order(self) -> tuple[int, float, int]:
        """Of one tenant's, smaller is admitted earlier and preempted later."""
        deadline = self.request.deadline
        return self.request.priority, inf if deadline is None else deadline, self.arrival

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to go through the model: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def cache_limit(self) -> int:
        """Leading tokens that may come from the prefix cache.

        The last token's row chooses the next token, and the row before every prompt
        log-probability that is still to be sent must be computed. A beam that waits for others
        computes a row before that too, or a step might have none.
        """
        if self.group is not None and self.group.is_forked:
            return len(self.token_ids) - 2
        if self.sampling.prompt_logprobs is None or self.num_prompt_logprobs >= self.prompt_len - 1:
            return len(self.token_ids) - 1
        return self.num_prompt_logprobs
