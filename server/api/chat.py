"""``POST /v1/chat/completions``."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from .answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    PromptLogprobs,
    Usage,
)
from .caller import Calling
from .choice import ChoiceDelta, ScoredToken
from .generate import Gathered, Job, check_adapters, deltas, make_job, model_choice
from .logprobs import TokenNames, chat_logprobs, prompt_logprobs
from .prompts import chat_prompt, check_sequences
from .protocol import ChatBody
from .respond import respond
from .security import json_only
from .state import AppState, State
from .tool_fields import NamedTool
from .tools import ChoiceCalls, chat_grammar, shows_special_tokens, tool_format, whole_calls

router = APIRouter()


@router.post("/v1/chat/completions", dependencies=[json_only])
async def create_chat_completion(
    body: ChatBody, request: Request, state: State, caller: Calling
) -> Response:
    """Add the model's turn to a conversation."""
    state.limiter.check(caller.tenant)
    chosen = model_choice(body, caller, request)
    await check_adapters(chosen, state)
    check_sequences(body, 1, state)
    tools = tool_format(body, state)
    prompt = await chat_prompt(body, state)
    grammar = await chat_grammar(body, tools, state)
    skips = not shows_special_tokens(tools, state)
    job = make_job("chatcmpl", body, chosen, [prompt], state, body.prompt_logprobs, grammar, skips)
    named = isinstance(body.tool_choice, NamedTool)
    calls = [ChoiceCalls(tools, named) for _ in job.choices]
    return await respond(
        request, state, body, job, deltas(job, state), _Format(body, job, state, calls)
    )


@dataclass(frozen=True, slots=True)
class _Format:
    body: ChatBody
    job: Job
    state: AppState
    calls: Sequence[ChoiceCalls]

    def opening(self) -> list[ChatChunk]:
        """The role of every choice; the prompt's tokens, where asked for, come with the first."""
        role = ChatDelta(role="assistant", content="")
        options = self.body.stream_options
        usage = None if options is not None and options.include_usage else UNSET
        return [
            ChatChunk(
                self.job.id,
                self.job.created,
                self.job.model,
                [ChatChunkChoice(choice.index, role)],
                usage,
                self._prompt_token_ids() if choice.index == 0 else UNSET,
            )
            for choice in self.job.choices
        ]

    def chunk(self, delta: ChoiceDelta, usage: Usage | UnsetType | None) -> ChatChunk:
        calls = self.calls[delta.index]
        text, parts = calls.take(delta.text, delta.finish_reason is not None)
        called = calls.deltas(parts)
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(
                content=UNSET if called and not text else text, tool_calls=called or UNSET
            ),
            logprobs=self._logprobs(delta.scored),
            finish_reason=calls.finish_reason(delta.finish_reason),
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self.body.return_token_ids else UNSET,
        )
        return ChatChunk(self.job.id, self.job.created, self.job.model, [choice], usage)

    def closing(self, usage: Usage) -> ChatChunk:
        return ChatChunk(self.job.id, self.job.created, self.job.model, [], usage)

    def whole(self, choices: list[Gathered], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            self.job.id,
            self.job.created,
            self.job.model,
            [self._choice(choice) for choice in choices],
            usage,
            self._prompt_logprobs(choices[0]),
            self._prompt_token_ids(),
        )

    def _choice(self, choice: Gathered) -> ChatChoice:
        calls = self.calls[choice.index]
        text, parts = calls.take(choice.text, is_last=True)
        called = whole_calls(parts)
        return ChatChoice(
            index=choice.index,
            message=ChatMessage(None if called and not text else text, called or UNSET),
            logprobs=self._logprobs(choice.scored),
            finish_reason=calls.finish_reason(choice.finish_reason) or "",
            stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if self.body.return_token_ids else UNSET,
        )

    def _logprobs(self, scored: list[ScoredToken]) -> ChatLogprobs | None:
        return chat_logprobs(scored, self._names()) if self.body.logprobs else None

    def _prompt_logprobs(self, choice: Gathered) -> PromptLogprobs | UnsetType:
        if self.body.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(choice.prompt_logprobs, self._names())

    def _prompt_token_ids(self) -> list[int] | UnsetType:
        return self.job.prompts[0].token_ids if self.body.return_token_ids else UNSET

    def _names(self) -> TokenNames:
        return TokenNames(self.state.tokenizer, self.body.return_tokens_as_token_ids)
