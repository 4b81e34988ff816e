"""From a request's prompt or conversation to token ids, without holding up other streams."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..text.tokenizer import ChatTemplateError, Tokenizer
from .errors import InvalidRequest
from .protocol import CompletionBody, Conversation
from .sampling import check_vocabulary
from .state import AppState

T = TypeVar("T")

# Normalisers compose at most this many characters into one.
_COMPOSED = 4


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt as the engine takes it, and its text where it came as one."""

    token_ids: list[int]
    text: str | None = None

    def text_or_decoded(self, tokenizer: Tokenizer) -> str:
        """The prompt's text, for ``echo``."""
        return tokenizer.decode(self.token_ids) if self.text is None else self.text


async def completion_prompts(body: CompletionBody, state: AppState) -> list[TokenPrompt]:
    """The prompts of a completion request, at least one, none of them empty.

    Raises:
        InvalidRequest: A prompt is too long, empty once tokenized, or not in the vocabulary.
    """
    if isinstance(body.prompt, str):
        return [await _from_text(body.prompt, body.add_special_tokens, state)]
    return [await _from_item(item, body, state) for item in _items(body.prompt)]


async def chat_prompt(
    body: Conversation, state: AppState, add_special_tokens: bool = False
) -> TokenPrompt:
    """The prompt the chat template makes of a conversation.

    Raises:
        InvalidRequest: There is no template or it refuses; the prompt is too long.
    """
    messages = [message.flat() for message in body.messages]

    def render() -> str:
        return state.tokenizer.render_chat(
            messages, body.add_generation_prompt, body.chat_template_kwargs
        )

    characters = sum(len(message["content"]) for message in messages)
    check_characters(characters, state, "messages")
    try:
        text = await _aside(render, characters, state)
    except ChatTemplateError as error:
        raise InvalidRequest(str(error), "messages") from error
    return await _from_text(text, add_special_tokens, state, "messages")


async def encode(text: str, add_special_tokens: bool, state: AppState) -> list[int]:
    """Token ids of a text, in a thread if it is long."""
    return await _aside(lambda: state.tokenizer.encode(text, add_special_tokens), len(text), state)


def check_characters(characters: int, state: AppState, param: str) -> None:
    """Refuse text that no tokenization could fit, before any time goes into tokenizing it.

    Raises:
        InvalidRequest: Naming ``param``.
    """
    max_model_len = state.require_info().max_model_len
    if characters > max_model_len * state.tokenizer.longest_token * _COMPOSED:
        raise InvalidRequest(
            f"{characters} characters of text cannot fit this model's {max_model_len} tokens.",
            param,
        )


def _items(prompt: list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    texts: list[str | list[int]] = []
    ids: list[int] = []
    for item in prompt:
        if isinstance(item, int):
            ids.append(item)
        else:
            texts.append(item)
    return [ids] if ids else texts


async def _from_item(item: str | list[int], body: CompletionBody, state: AppState) -> TokenPrompt:
    if isinstance(item, str):
        return await _from_text(item, body.add_special_tokens, state)
    check_vocabulary(item, state.require_info(), "prompt")
    return TokenPrompt(item)


async def _from_text(
    text: str, add_special_tokens: bool, state: AppState, param: str = "prompt"
) -> TokenPrompt:
    check_characters(len(text), state, param)
    token_ids = await encode(text, add_special_tokens, state)
    if not token_ids:
        raise InvalidRequest(f"{param}: the text has no tokens.", param)
    return TokenPrompt(token_ids, text)


async def _aside(work: Callable[[], T], characters: int, state: AppState) -> T:
    if characters <= state.limits.inline_characters:
        return work()
    return await asyncio.to_thread(work)
