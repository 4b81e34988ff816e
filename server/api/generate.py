"""What both generation routes do between a validated body and an answer's format.

``Job`` is the fan-out of one request into choices; ``deltas`` runs it; ``gather`` collects it for
clients that do not stream; ``Tally`` counts what it took.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from time import time
from uuid import uuid4

from fastapi import Request

from ..composition import Composable, check_room
from ..generation import GenerationRequest, TokenLogprobs
from ..metrics.request import Asked, RequestRecord
from ..scheduler.limits import longest_sequence
from ..store.leases import Leased, ModelChoice
from ..tenants.isolation import cache_salt, share_of
from ..tenants.tenant import Caller
from ..usage.counts import NOTHING, Consumer, Counts
from .answers import CachedTokens, Usage
from .choice import Choice, ChoiceDelta, ScoredToken, stream_choice
from .errors import InvalidRequest
from .logprobs import prompt_tokens
from .merge import merge
from .prompts import TokenPrompt
from .protocol import ChatBody, GenerationBody, ModelBody
from .request_id import request_id
from .sampling import check_token_ids, max_new_tokens, sampling_params
from .search import best_answers, stream_beams
from .state import AppState


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request's choices.

    Attributes:
        id: What the client is told.
        chosen: What it runs on, as the client named it.
        prompts: One or more.
        choices: Candidates, as many for each prompt, in order.
        answers_per_prompt: How many of these the client gets, ``n``.
        record: What is known of how it goes.
        reserved: Completion tokens that the request says it may take; 0 where it does not say.
        created: Unix time.
    """

    id: str
    chosen: ModelChoice
    prompts: list[TokenPrompt]
    choices: list[Choice]
    answers_per_prompt: int
    record: RequestRecord
    reserved: int = 0
    created: int = field(default_factory=lambda: int(time()))

    @property
    def caller(self) -> Caller:
        """Who asked."""
        return self.chosen.caller

    @property
    def model(self) -> str:
        """As the client named it."""
        return self.chosen.model

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once however many choices it has."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def choices_per_prompt(self) -> int:
        """Candidates of each prompt."""
        return len(self.choices) // len(self.prompts)

    def prompt_of(self, answer: int) -> TokenPrompt:
        """The prompt of the answer with this index."""
        return self.prompts[answer // self.answers_per_prompt]


def model_choice(body: ModelBody, caller: Caller, request: Request) -> ModelChoice:
    """What a request is to run on, as its caller named it."""
    adapters = tuple((each.name, each.weight) for each in body.adapters)
    sticky = request_id(request.scope) if body.user is None else body.user
    return ModelChoice(body.model, caller, adapters, sticky)


async def check_adapters(choice: ModelChoice, state: AppState) -> None:
    """Refuse a model, or a combination of adapters, that is not served; fetch what is not here yet.

    Raises:
        RegistryError: As ``AdapterRegistry.prepare`` and ``Leases.select``.
        CompositionRefused: The adapters cannot be combined, or take too much together.
        EngineUnavailable: The engine is down.
    """
    await state.registry.prepare(choice)
    adapters = _composables(choice, state)
    if adapters:
        check_room(adapters, state.require_info().adapter_room)


def _composables(chosen: ModelChoice, state: AppState) -> list[Composable]:
    return [each.version.info.composable for each in state.registry.leases.select(chosen)]


def longest_of(chosen: ModelChoice, state: AppState, width: int = 1) -> int:
    """Tokens that a sequence, or each of ``width`` beams, has at most beside these adapters."""
    adapters, info = _composables(chosen, state), state.require_info()
    device_bytes = sum(each.takes.device_bytes for each in adapters)
    return longest_sequence(
        info.max_model_len,
        info.num_blocks - -(-device_bytes // info.block_bytes),
        info.block_size,
        sum(each.prefix_length for each in adapters),
        sum(each.prefix_length for each in adapters if each.shifts_positions),
        width,
    )


def make_job(
    prefix: str,
    body: GenerationBody,
    chosen: ModelChoice,
    prompts: list[TokenPrompt],
    state: AppState,
    prompt_logprobs: int | None,
    grammar: str | None = None,
    skip_special_tokens: bool = True,
) -> Job:
    """Fan a request out: candidate ``c`` of prompt ``p`` has index ``p * (candidates) + c``.

    Raises:
        InvalidRequest: Token ids or lengths the model does not have.
    """
    info = state.require_info()
    max_len = longest_of(chosen, state, max(body.num_beams, 1))
    if body.num_beams > info.max_num_seqs:
        raise InvalidRequest(
            f"{body.num_beams} beams are more than the {info.max_num_seqs} sequences that run at "
            "once.",
            "beam_width",
        )
    check_token_ids(body, info)
    tenant = chosen.caller.tenant
    most = None if tenant is None else tenant.limits.max_tokens
    # A tokenizer may name end tokens that the model was not made with and cannot choose.
    end_token_ids = tuple(end for end in state.tokenizer.end_token_ids if end < info.vocab_size)
    job_id = f"{prefix}-{uuid4().hex}"
    choices: list[Choice] = []
    for number, prompt in enumerate(prompts):
        max_tokens = max_new_tokens(body, len(prompt.token_ids), max_len, most)
        for choice in range(body.n if body.use_beam_search else body.num_candidates):
            request = GenerationRequest(
                request_id=f"{job_id}-{number}-{choice}",
                prompt_token_ids=prompt.token_ids,
                sampling=sampling_params(
                    body, choice, max_tokens, end_token_ids, prompt_logprobs, grammar
                ),
                cache_salt=cache_salt(chosen.caller, body.cache_salt),
                priority=body.priority,
                deadline=body.deadline,
                share=share_of(chosen.caller),
            )
            skips = body.skip_special_tokens and skip_special_tokens
            choices.append(
                Choice(len(choices), prompt, request, tuple(body.stop), skips, body.num_logprobs)
            )
    record = RequestRecord(consumer_of(chosen.caller, [], state), _asked(job_id, body))
    reserved = sum(each.request.sampling.max_tokens for each in choices) if body.says_length else 0
    return Job(job_id, chosen, prompts, choices, body.n, record, reserved)


def _asked(job_id: str, body: GenerationBody) -> Asked:
    return Asked(
        id=job_id,
        operation="chat" if isinstance(body, ChatBody) else "text_completion",
        stream=body.stream,
        n=body.n,
        max_tokens=body.token_limit,
        temperature=body.temperature,
        top_p=body.top_p,
    )


def consumer_of(caller: Caller, adapters: Sequence[Leased], state: AppState) -> Consumer:
    """Whose usage a request on these adapters is."""
    return Consumer(
        state.model_name,
        caller.tenant.name if caller.tenant else "",
        caller.key_id,
        "+".join(each.name for each in adapters),
        "+".join(each.digest for each in adapters),
    )


async def deltas(job: Job, state: AppState) -> AsyncGenerator[ChoiceDelta, None]:
    """Run the job; its adapter stays in the engine until this ends.

    Raises:
        UnknownModel: The model is gone since the request was checked.
        AdapterUnavailable: An adapter cannot be loaded now.
        LimitExceeded: The caller's limits do not let it in now.
        EngineError: As ``EnginePort.generate``.
        ApiError: As ``stream_choice``.
    """
    with state.limiter.admitted(job.caller.tenant, job.prompt_tokens, job.reserved) as running:
        async with state.registry.leases.lease(job.chosen) as adapters:
            job.record.consumer = consumer_of(job.caller, adapters, state)
            uses = [each.use for each in adapters]
            streams = [stream(uses, job.record, state) for stream in _streams(job)]
            async with aclosing(merge(streams)) as merged:
                async for delta in merged:
                    running.took(len(delta.token_ids))
                    yield delta


def _streams(job: Job) -> "list[partial[AsyncGenerator[ChoiceDelta, None]]]":
    """One for each sequence, or for all answers of one search."""
    if job.choices[0].request.sampling.beams is None:
        return [partial(stream_choice, choice) for choice in job.choices]
    n = job.choices_per_prompt
    starts = range(0, len(job.choices), n)
    return [partial(stream_beams, job.choices[start : start + n]) for start in starts]


async def echoed(
    job: Job, source: AsyncGenerator[ChoiceDelta, None], state: AppState, scored: bool
) -> AsyncGenerator[ChoiceDelta, None]:
    """``source`` with each choice's prompt in front of its text, and scored like it."""
    texts = [choice.prompt.text_or_decoded(state.tokenizer) for choice in job.choices]
    started: set[int] = set()
    async with aclosing(source):
        async for plain in source:
            delta = _shifted(plain, len(texts[plain.index]))
            if delta.index not in started:
                started.add(delta.index)
                prompt = job.choices[delta.index].prompt.token_ids if scored else []
                delta = _with_prompt(texts[delta.index], prompt, delta, state)
            yield delta


def _shifted(delta: ChoiceDelta, offset: int) -> ChoiceDelta:
    return replace(delta, scored=[replace(one, offset=one.offset + offset) for one in delta.scored])


def _with_prompt(
    text: str, token_ids: list[int], delta: ChoiceDelta, state: AppState
) -> ChoiceDelta:
    scored = prompt_tokens(token_ids, delta.prompt_logprobs, state.tokenizer) if token_ids else []
    return replace(delta, text=text + delta.text, scored=[*scored, *delta.scored])


@dataclass(slots=True)
class Gathered:
    """All deltas of one choice together."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: int | str | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Append one delta."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.scored += delta.scored
        self.prompt_logprobs += delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)


async def gather(
    job: Job, source: AsyncGenerator[ChoiceDelta, None], tally: "Tally"
) -> list[Gathered]:
    """Every answer whole, by index; ``tally`` counts what all candidates take."""
    gathered = [Gathered(choice.index) for choice in job.choices]
    async with aclosing(source):
        async for delta in source:
            gathered[delta.index].add(delta)
            tally.add(delta)
    return best_answers(gathered, job.choices_per_prompt, job.answers_per_prompt)


class Tally:
    """Counts tokens: a prompt once however many choices it has, the output of every choice."""

    def __init__(self, prompts: Sequence[TokenPrompt], choices_per_prompt: int) -> None:
        """Start with nothing generated."""
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._completion_tokens = 0
        self._choices_per_prompt = choices_per_prompt
        self._cached = [0] * len(prompts)

    def add(self, delta: ChoiceDelta) -> None:
        """Count one delta; of a prompt's choices the first tells what was cached before it."""
        self._completion_tokens += len(delta.token_ids)
        prompt, choice = divmod(delta.index, self._choices_per_prompt)
        if choice == 0:
            self._cached[prompt] = delta.cached_tokens

    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=CachedTokens(sum(self._cached)),
        )

    def counts(self) -> Counts:
        """The same as the ledger has it: nothing, until a request has got something."""
        if not self._completion_tokens:
            return NOTHING
        cached = sum(self._cached)
        return Counts(1, self._prompt_tokens, cached, self._completion_tokens)
