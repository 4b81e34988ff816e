"""``POST /v1/completions``."""

from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from .answers import Completion, CompletionChoice, CompletionLogprobs, PromptLogprobs, Usage
from .caller import Calling
from .choice import ChoiceDelta, ScoredToken
from .constrain import output_grammar
from .generate import Gathered, Job, check_adapters, deltas, echoed, make_job, model_choice
from .logprobs import TokenNames, completion_logprobs, prompt_logprobs
from .prompts import completion_prompts
from .protocol import CompletionBody
from .respond import respond
from .security import json_only
from .state import AppState, State

router = APIRouter()


@router.post("/v1/completions", dependencies=[json_only])
async def create_completion(
    body: CompletionBody, request: Request, state: State, caller: Calling
) -> Response:
    """Continue one or more prompts."""
    state.limiter.check(caller.tenant)
    chosen = model_choice(body, caller, request)
    await check_adapters(chosen, state)
    prompts = await completion_prompts(body, state)
    grammar = await output_grammar(body, state)
    job = make_job("cmpl", body, chosen, prompts, state, _prompt_logprobs(body), grammar)
    source = deltas(job, state)
    if body.echo:
        source = echoed(job, source, state, scored=body.logprobs is not None)
    return await respond(request, state, body, job, source, _Format(body, job, state))


def _prompt_logprobs(body: CompletionBody) -> int | None:
    """Alternatives per prompt token: the request's own, or what an echo with logprobs shows."""
    if body.prompt_logprobs is None and body.echo:
        return body.logprobs
    return body.prompt_logprobs


@dataclass(frozen=True, slots=True)
class _Format:
    body: CompletionBody
    job: Job
    state: AppState
    started: set[int] = field(default_factory=set)

    def opening(self) -> list[Completion]:
        return []

    def chunk(self, delta: ChoiceDelta, usage: Usage | UnsetType | None) -> Completion:
        first = delta.index not in self.started
        self.started.add(delta.index)
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta.scored),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self.body.return_token_ids else UNSET,
            prompt_token_ids=self._prompt_token_ids(delta.index) if first else UNSET,
        )
        return self._completion([choice], usage)

    def closing(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, choices: list[Gathered], usage: Usage) -> Completion:
        return self._completion([self._choice(choice) for choice in choices], usage)

    def _choice(self, choice: Gathered) -> CompletionChoice:
        return CompletionChoice(
            index=choice.index,
            text=choice.text,
            logprobs=self._logprobs(choice.scored),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if self.body.return_token_ids else UNSET,
            prompt_token_ids=self._prompt_token_ids(choice.index),
            prompt_logprobs=self._prompt_logprobs(choice),
        )

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        return Completion(self.job.id, self.job.created, self.job.model, choices, usage)

    def _logprobs(self, scored: list[ScoredToken]) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(scored, self._names())

    def _prompt_logprobs(self, choice: Gathered) -> PromptLogprobs | UnsetType:
        if self.body.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(choice.prompt_logprobs, self._names())

    def _prompt_token_ids(self, index: int) -> list[int] | UnsetType:
        if not self.body.return_token_ids:
            return UNSET
        return self.job.prompt_of(index).token_ids

    def _names(self) -> TokenNames:
        return TokenNames(self.state.tokenizer, self.body.return_tokens_as_token_ids)
