"""From a request's prompt or conversation to token ids, without holding up other streams."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ..text.chat_template import ChatTemplateError
from ..text.tokenizer import Tokenizer
from .conversation import Conversation
from .errors import InvalidRequest
from .protocol import CompletionBody, EmbeddingBody, GenerationBody
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


Prompts = str | list[str] | list[int] | list[list[int]]
"""What the field may hold that prompts come in."""


async def embedding_inputs(body: EmbeddingBody, state: AppState) -> list[TokenPrompt]:
    """What is to be embedded, at least one text, none of them empty.

    Raises:
        InvalidRequest: As ``completion_prompts``.
    """
    number, limit = len(_items(body.input)), state.limits.max_sequences
    if number > limit:
        raise InvalidRequest(f"{number} inputs exceed the limit of {limit}.", "input")
    return await _from_items(body.input, body.add_special_tokens, state, "input")


async def completion_prompts(body: CompletionBody, state: AppState) -> list[TokenPrompt]:
    """The prompts of a completion request, at least one, none of them empty.

    Raises:
        InvalidRequest: There are too many prompts, or one is too long, empty once tokenized, or not
            in the vocabulary.
    """
    check_sequences(body, len(_items(body.prompt)), state)
    return await _from_items(body.prompt, body.add_special_tokens, state, "prompt")


def check_sequences(body: GenerationBody, num_prompts: int, state: AppState) -> None:
    """Refuse more sequences than one request may have, before any prompt is tokenized.

    Raises:
        InvalidRequest: Naming the field that makes them so many.
    """
    limit, each = state.limits.max_sequences, body.num_candidates
    if num_prompts * each > limit:
        raise InvalidRequest(
            f"{num_prompts} prompts times {each} candidates exceed the limit of {limit} sequences "
            "in one request.",
            "n" if num_prompts == 1 else body.prompt_field,
        )


async def chat_prompt(
    body: Conversation, state: AppState, add_special_tokens: bool = False
) -> TokenPrompt:
    """The prompt the chat template makes of a conversation.

    Raises:
        InvalidRequest: There is no template or it refuses; the prompt is too long.
    """
    messages = [message.flat() for message in body.messages]
    tools = [tool.for_template() for tool in body.offered_tools]

    def render() -> str:
        return state.tokenizer.render_chat(
            messages, body.add_generation_prompt, body.chat_template_kwargs, tools or None
        )

    characters = sum(len(message["content"]) for message in messages) + len(str(tools))
    check_characters(characters, state, "messages")
    try:
        text = await _aside(render, characters, state)
    except ChatTemplateError as error:
        raise InvalidRequest(str(error), "messages") from error
    return await _from_text(text, len(text), add_special_tokens, state, "messages")


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


async def _from_items(
    prompts: Prompts, add_special_tokens: bool, state: AppState, param: str
) -> list[TokenPrompt]:
    items = _items(prompts)
    # Many short texts hold up other streams like a long one.
    characters = sum(len(item) for item in items if isinstance(item, str))
    return [await _from_item(item, characters, add_special_tokens, state, param) for item in items]


def _items(prompt: Prompts) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    texts: list[str | list[int]] = []
    ids: list[int] = []
    for item in prompt:
        if isinstance(item, int):
            ids.append(item)
        else:
            texts.append(item)
    return [ids] if ids else texts


async def _from_item(
    item: str | list[int],
    characters: int,
    add_special_tokens: bool,
    state: AppState,
    param: str,
) -> TokenPrompt:
    """``characters`` of all prompts together."""
    if isinstance(item, str):
        return await _from_text(item, characters, add_special_tokens, state, param)
    check_vocabulary(item, state.require_info(), param)
    return TokenPrompt(item)


async def _from_text(
    text: str, characters: int, add_special_tokens: bool, state: AppState, param: str
) -> TokenPrompt:
    check_characters(len(text), state, param)
    work = partial(state.tokenizer.encode, text, add_special_tokens)
    token_ids = await _aside(work, characters, state)
    if not token_ids:
        raise InvalidRequest(f"{param}: the text has no tokens.", param)
    # A tokenizer may know tokens that were added after the model was made.
    check_vocabulary(token_ids, state.require_info(), param)
    return TokenPrompt(token_ids, text)


async def _aside(work: Callable[[], T], characters: int, state: AppState) -> T:
    if characters <= state.limits.inline_characters:
        return work()
    return await asyncio.to_thread(work)
