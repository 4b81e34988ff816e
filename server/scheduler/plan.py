"""What the scheduler tells the runner to compute, and what the runner tells it back."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..generation import TokenLogprobs
from .sequence import Prefix, Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens ``start .. end`` of a sequence go through the model in this step.

    Attributes:
        sequence: Read-only for the runner; its block table covers ``end`` tokens.
        start: Tokens computed before.
        end: Tokens computed after.
        samples: Whether the last of these rows chooses the sequence's next token.
        embeds: Whether its hidden state is what the request asks for instead.
    """

    sequence: Sequence
    start: int
    end: int
    samples: bool
    embeds: bool = False

    @property
    def num_tokens(self) -> int:
        """Rows of this sequence in the step."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class PrefixLoad:
    """Keys and values of adapters that are to be written to the cache.

    Attributes:
        prefix: What they are.
        blocks: Cache block by its index in the prefix, for the blocks to be written.
    """

    prefix: Prefix
    blocks: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: which tokens of which sequences run together.

    Attributes:
        scheduled: What the runner computes.
        prefix_loads: What is written to the cache before.
        block_copies: Cache blocks and those they are copied to, after that and before the rest.
        unservable: Sequences that can never run, because their adapter gets no slot even while
            nothing else runs; ``commit`` ends them.
    """

    scheduled: tuple[ScheduledSequence, ...]
    prefix_loads: tuple[PrefixLoad, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()
    unservable: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return sum(item.num_tokens for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What the runner computed for the ScheduledSequence at the same position of the plan.

    Attributes:
        token_id: The chosen token, None where the sequence did not sample.
        logprobs: Of the chosen token, where asked for.
        prompt_logprobs: Of prompt tokens ``start + 1 .. min(end, prompt_len - 1)``, where asked
            for.
        error: Why the row is unusable (its logits are not finite); ends the sequence alone.
        hidden: (hidden,) float32 as bytes, where the sequence embeds.
    """

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    hidden: bytes | None = None
