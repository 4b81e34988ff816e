"""How much one step and one sequence may hold."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The scheduler's bounds, checked when made.

    Attributes:
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Rows of one step. At least ``max_num_seqs``, so that every running
            sequence can decode in every step.
        max_model_len: Tokens of one sequence, prompt and output.
        vocab_size: Token ids are below it.
        max_overtakes: Steps in which a sequence that waits for an adapter slot may be overtaken;
            after these nothing of its tenant passes it until it runs, and nothing of others if
            nothing of its tenant runs.
        step_overhead: Rows whose computing takes as long as what a step costs whatever its rows:
            reading the weights, mostly. Bounds the steps that tenants share.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    max_overtakes: int = 64
    step_overhead: int = 32

    def __post_init__(self) -> None:
        """Refuse bounds under which some sequence could never run.

        Raises:
            ValueError: A bound is too small; the message names it.
        """
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, not {self.max_num_seqs}")
        if self.max_model_len < 2:
            raise ValueError(
                f"max_model_len must be at least 2 (one prompt and one output token), not"
                f" {self.max_model_len}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least"
                f" max_num_seqs ({self.max_num_seqs}), because every running sequence decodes one"
                " token in every step: raise the first or lower the second"
            )
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {self.vocab_size}")
        if self.max_overtakes < 0:
            raise ValueError(f"max_overtakes must not be negative, but is {self.max_overtakes}")
        if self.step_overhead < 0:
            raise ValueError(f"step_overhead must not be negative, but is {self.step_overhead}")


def longest_sequence(
    max_model_len: int,
    num_blocks: int,
    block_size: int,
    prefix_length: int = 0,
    position_offset: int = 0,
    width: int = 1,
) -> int:
    """Tokens of one sequence at most, prompt and output: what model and cache hold.

    Args:
        max_model_len: Positions of the model that are served.
        num_blocks: Blocks of the cache.
        block_size: Tokens of a block.
        prefix_length: Keys that the sequence's adapters put before it, in blocks of their own.
        position_offset: What these add to the position of each of its tokens.
        width: Sequences of its length that must fit at once: the beams of a search.
    """
    blocks = (num_blocks - -(-prefix_length // block_size)) // width
    return min(max_model_len - position_offset, blocks * block_size)
