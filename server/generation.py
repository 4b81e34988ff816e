"""The vocabulary of one generation: what is asked of the engine and what comes back.

These are the only types that every stage from the API to the sampler shares. They are msgspec
structs because they cross the process boundary as they are.
"""

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a sequence ended. Every sequence ends exactly once, with one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class BeamSearch(msgspec.Struct, frozen=True, array_like=True):
    """A search for the likeliest outputs, instead of drawing tokens.

    Attributes:
        width: Beams that go on side by side, >= 2.
        length_penalty: The sum of log-probabilities is divided by the length to this power.
        num_answers: Outputs to report, at most ``width``.
    """

    width: int
    length_penalty: float
    num_answers: int


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens of one sequence are chosen; validated by the API before it gets here.

    Attributes:
        max_tokens: Tokens to generate at most, >= 1.
        min_tokens: Tokens before an end-of-sequence or stop token may be chosen.
        temperature: 0 is greedy.
        top_p: Smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: Tokens kept; 0 keeps all.
        min_p: Tokens less likely than this times the likeliest are dropped; 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in prompt
            or output (CTRL, arXiv:1909.05858); 1 is none.
        presence_penalty: Subtracted once from the logit of every token in the output.
        frequency_penalty: Subtracted once per occurrence in the output.
        logit_bias: Added to the logits of these token ids.
        seed: 64-bit. Token i of a sequence is drawn with a number that depends on (seed, i)
            alone: a sequence can be resumed anywhere and does not depend on its neighbours.
        end_token_ids: The model's own end tokens, empty under ``ignore_eos``.
        stop_token_ids: The request's own.
        logprobs: Alternatives reported per generated token; 0 reports the chosen one alone.
        prompt_logprobs: The same per prompt token.
        grammar: What the output must match, in llguidance's form; None for anything. It ends
            where the grammar allows no more, and an end token is chosen only where the grammar
            allows an end; under ``ignore_eos`` only where it allows nothing else.
        beams: Beam search: what else says how tokens are chosen has no effect, and ``logprobs`` is
            at least its width and the number of end and stop tokens together.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    end_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    beams: BeamSearch | None = None


class AdapterWeight(msgspec.Struct, frozen=True, array_like=True):
    """One adapter of a request.

    Attributes:
        adapter_id: The adapter.
        weight: What its corrections are multiplied by.
    """

    adapter_id: int
    weight: float = 1.0


class Share(msgspec.Struct, frozen=True, array_like=True):
    """Whose request it is, for fair scheduling.

    Attributes:
        tenant: Name; empty for requests of no tenant, which together count as one.
        weight: Its share of the tokens served, relative to the others' that have work, > 0.
    """

    tenant: str = ""
    weight: float = 1.0


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate; ``n`` choices are n of these.

    Attributes:
        request_id: Unique among the live ones.
        prompt_token_ids: At least one token.
        sampling: How tokens are chosen.
        adapters: Their corrections are added; none, for the bare base.
        cache_salt: Requests share cached prefixes only under an equal salt.
        priority: Lower runs earlier (vLLM's meaning), among the requests of its tenant.
        deadline: When it must have begun to run, in seconds of the machine's monotonic clock; of
            equal priority, the earliest runs first.
        share: Whose it is.
        embeds: Whether the last token's hidden state is asked for, and no token.
        output_token_ids: Tokens already generated, to resume where another engine stopped.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapters: list[AdapterWeight] = []
    cache_salt: str | None = None
    priority: int = 0
    deadline: float | None = None
    share: Share = Share()
    embeds: bool = False
    output_token_ids: list[int] = []


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's raw distribution (before any penalty).

    Attributes:
        token_id: The token that stands there.
        logprob: Its log-probability.
        rank: 1 for the likeliest token.
        top: The likeliest tokens with their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class BeamAnswer(msgspec.Struct, frozen=True, array_like=True):
    """One output that beam search found.

    Attributes:
        tokens: All of them; an end or stop token is included.
        score: What it is ranked by.
        finish_reason: STOP or LENGTH.
    """

    tokens: list[TokenLogprobs]
    score: float
    finish_reason: FinishReason


class SequenceUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did for one sequence.

    Attributes:
        request_id: Whose.
        token_ids: New tokens; an end or stop token is included.
        logprobs: One per new token where asked for.
        prompt_logprobs: One per prompt token from the second on, as the prompt is computed.
        num_cached_tokens: Prompt tokens taken from the prefix cache.
        finish_reason: Set on the last update.
        stop_token_id: The end or stop token that ended it.
        error: The reason under ``FinishReason.ERROR``.
        expired: Whether that is its deadline, which passed before it began to run.
        beams: What beam search found, best first, on its only update.
        scheduled: On the first update after it, when the sequence was part of a step for the first
            time, as ``time.monotonic`` tells it, which all processes of a machine share.
        hidden: (hidden,) float32, little-endian: the last token's state behind the final norm, on
            the only update of a request that ``embeds``.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    expired: bool = False
    beams: list[BeamAnswer] = []
    scheduled: float | None = None
    hidden: bytes | None = None
