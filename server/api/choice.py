"""One choice of an answer: from the engine's updates for one sequence to text for one client."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from ..engine.errors import EngineDied
from ..generation import (
    AdapterWeight,
    FinishReason,
    GenerationRequest,
    SequenceUpdate,
    TokenLogprobs,
)
from ..metrics.request import RequestRecord
from ..text.detokenizer import Detokenizer
from ..text.stop_strings import Piece, StopStrings
from ..text.tokenizer import Tokenizer
from .errors import DeadlineExceeded, InternalError, ServiceUnavailable
from .prompts import TokenPrompt
from .state import AppState


@dataclass(frozen=True, slots=True)
class Choice:
    """A sequence to generate and how its text is to be shown.

    Attributes:
        index: Of the choice.
        prompt: What it continues.
        request: What the engine is asked for; all choices of one beam search share it.
        stop: Strings that end the text.
        skip_special_tokens: Whether special tokens have no text.
        num_logprobs: Alternatives of a token that the client asked for.
    """

    index: int
    prompt: TokenPrompt
    request: GenerationRequest
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with log-probabilities.

    Attributes:
        token_id: The token.
        logprobs: None for the first token of a prompt, which nothing predicts.
        offset: Characters of the choice's text before the token's own.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    offset: int


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one engine step adds to one choice.

    Attributes:
        index: Of the choice.
        text: New text; empty while characters or stop strings are incomplete.
        token_ids: New tokens.
        scored: The same with log-probabilities, where the request asked for them.
        prompt_logprobs: Of the prompt from its second token on, on the first delta of a choice.
        cached_tokens: Prompt tokens taken from the prefix cache.
        finish_reason: Set on the last delta.
        stop_reason: The stop string or stop token of the request that ended it.
    """

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChoiceText:
    """Makes deltas of one sequence's updates, up to its end or a stop string."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        """Start after the choice's prompt."""
        skip = choice.skip_special_tokens
        self._choice = choice
        self._detokenizer = Detokenizer(
            lambda ids: tokenizer.decode(ids, skip), choice.prompt.token_ids
        )
        self._stops = StopStrings(choice.stop)
        self._num_tokens = 0
        self._num_characters = 0
        self._cached_tokens = 0
        self._prompt_logprobs: list[TokenLogprobs] = []

    def take(self, update: SequenceUpdate) -> ChoiceDelta | None:
        """What the update adds; None where there is nothing to show yet.

        Tokens after one that completes a stop string are dropped.

        Raises:
            DeadlineExceeded: It had not begun to run when its deadline passed.
            InternalError: The engine gave the sequence up.
            ServiceUnavailable: The engine ended it without being asked to.
        """
        self._prompt_logprobs += update.prompt_logprobs
        self._cached_tokens = max(self._cached_tokens, update.num_cached_tokens)
        check_ended_well(update)
        if not update.token_ids and update.finish_reason is None:
            return None
        return self._delta(update)

    def _delta(self, update: SequenceUpdate) -> ChoiceDelta:
        pieces: list[str] = []
        scored: list[ScoredToken] = []
        stop: str | None = None
        used = 0
        for used, token_id in enumerate(update.token_ids, 1):
            if update.logprobs:
                scored.append(
                    ScoredToken(token_id, update.logprobs[used - 1], self._num_characters)
                )
            ends = update.stop_token_id is not None and used == len(update.token_ids)
            piece = Piece("") if ends else self._push(token_id)
            pieces.append(piece.text)
            if (stop := piece.stop) is not None:
                break
        if stop is None and update.finish_reason is not None:
            tail = self._flush()
            pieces.append(tail.text)
            stop = tail.stop
        finished = FinishReason.STOP if stop is not None else update.finish_reason
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, []
        return ChoiceDelta(
            index=self._choice.index,
            text="".join(pieces),
            token_ids=update.token_ids[:used],
            scored=scored,
            prompt_logprobs=prompt_logprobs,
            cached_tokens=self._cached_tokens,
            finish_reason=None if finished is None else finished.value,
            stop_reason=self._stop_token(update) if stop is None else stop,
        )

    def _push(self, token_id: int) -> Piece:
        text = self._detokenizer.push(token_id)
        self._num_characters += len(text)
        self._num_tokens += 1
        if self._num_tokens <= self._choice.request.sampling.min_tokens:
            return Piece(text)
        return self._stops.push(text)

    def _flush(self) -> Piece:
        piece = self._stops.push(self._detokenizer.flush())
        return piece if piece.stop is not None else Piece(piece.text + self._stops.flush())

    def _stop_token(self, update: SequenceUpdate) -> int | None:
        """The token that ended the sequence, if the request named it and not the model."""
        own = update.stop_token_id in self._choice.request.sampling.stop_token_ids
        return update.stop_token_id if own else None


def check_ended_well(update: SequenceUpdate) -> None:
    """Raise where the update says that its sequence came to no good end.

    Raises:
        DeadlineExceeded: It had not begun to run when its deadline passed.
        InternalError: The engine gave it up.
        ServiceUnavailable: The engine ended it without being asked to.
    """
    if update.expired:
        raise DeadlineExceeded("The request had not begun to run when its deadline passed.")
    if update.finish_reason is FinishReason.ERROR:
        raise InternalError(f"The engine gave this request up: {update.error}")
    if update.finish_reason is FinishReason.ABORT:
        raise ServiceUnavailable("The server ended this request.", headers={"Retry-After": "1"})


async def stream_choice(
    choice: Choice, adapters: list[AdapterWeight], record: RequestRecord, state: AppState
) -> AsyncGenerator[ChoiceDelta, None]:
    """Generate the choice; closing the generator aborts its sequence.

    Raises:
        EngineError: As ``EnginePort.generate``.
        ApiError: As ``ChoiceText.take``.
    """
    text = ChoiceText(choice, state.tokenizer)
    request = msgspec.structs.replace(choice.request, adapters=adapters)
    with state.metrics.sequence(
        record, [each.adapter_id for each in adapters], len(request.prompt_token_ids)
    ) as sequence:
        async with aclosing(state.engine.generate(request)) as updates:
            async for update in updates:
                delta = text.take(update)
                sequence.tokens(0 if delta is None else len(delta.token_ids), update.scheduled)
                if delta is None:
                    continue
                if delta.finish_reason is not None:
                    sequence.finish(delta.finish_reason)
                    break
                yield delta
            else:
                raise EngineDied("The engine ended a request without a reason.")
    # The sequence is closed before its last delta is shown: who has the answer holds nothing more.
    yield delta
