"""Log-probabilities in the three dialects: completions, chat, and vLLM's prompt_logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..generation import TokenLogprobs
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import Tokenizer
from .answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from .choice import ScoredToken

# JSON has no infinity; OpenAI's API writes this for a token that cannot occur.
_IMPOSSIBLE = -9999.0


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written: as their text, or as ``token_id:123``."""

    tokenizer: Tokenizer
    as_ids: bool

    def name(self, token_id: int) -> str:
        """The token as a string."""
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int]:
        """The token's bytes, which join to the text's even where a token is no whole character."""
        return list(self.tokenizer.token_bytes(token_id))


def completion_logprobs(tokens: Sequence[ScoredToken], names: TokenNames) -> CompletionLogprobs:
    """A list each of tokens, their log-probabilities, alternatives and offsets in the text."""
    return CompletionLogprobs(
        tokens=[names.name(token.token_id) for token in tokens],
        token_logprobs=[_logprob(token.logprobs) for token in tokens],
        top_logprobs=[_alternatives(token.logprobs, names) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


def chat_logprobs(tokens: Sequence[ScoredToken], names: TokenNames) -> ChatLogprobs:
    """An object per token."""
    content = [_chat_token(token.logprobs, names) for token in tokens if token.logprobs is not None]
    return ChatLogprobs(content)


def prompt_logprobs(tokens: Sequence[TokenLogprobs], names: TokenNames) -> PromptLogprobs:
    """Per prompt token the token itself and its likelier rivals, by id; None for the first."""
    return [None, *(_prompt_token(token, names.tokenizer) for token in tokens)]


def prompt_tokens(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> list[ScoredToken]:
    """The prompt as scored tokens, for ``echo``."""
    detokenizer = Detokenizer(tokenizer.decode)
    scored: list[ScoredToken] = []
    offset = 0
    for token_id, found in zip(token_ids, [None, *logprobs], strict=True):
        scored.append(ScoredToken(token_id, found, offset))
        offset += len(detokenizer.push(token_id))
    return scored


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)


def _logprob(found: TokenLogprobs | None) -> float | None:
    return None if found is None else _finite(found.logprob)


def _alternatives(found: TokenLogprobs | None, names: TokenNames) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one; of tokens with the same text the likeliest stays."""
    if found is None:
        return None
    alternatives: dict[str, float] = {}
    for token_id, logprob in [*found.top, (found.token_id, found.logprob)]:
        alternatives.setdefault(names.name(token_id), _finite(logprob))
    return alternatives


def _chat_token(found: TokenLogprobs, names: TokenNames) -> ChatTokenLogprob:
    top = [
        TopLogprob(names.name(token_id), _finite(logprob), names.bytes(token_id))
        for token_id, logprob in found.top
    ]
    token_id = found.token_id
    return ChatTokenLogprob(
        names.name(token_id), _finite(found.logprob), names.bytes(token_id), top
    )


def _prompt_token(found: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, PromptLogprob]:
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(found.top, 1)]
    return {
        str(token_id): PromptLogprob(_finite(logprob), rank, tokenizer.token_text(token_id))
        for token_id, logprob, rank in [(found.token_id, found.logprob, found.rank), *ranked]
    }
