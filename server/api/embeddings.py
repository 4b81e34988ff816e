"""``POST /v1/embeddings``: what the model makes of a text, as one vector.

The vector is the last token's state behind the final norm, scaled to length 1, which is vLLM's
pooling of models that generate text. Inputs run like prompts, in the same batches.
"""

import math
import struct
from base64 import b64encode
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..engine.errors import EngineDied
from ..generation import GenerationRequest, SamplingParams
from ..metrics.request import Asked, RequestRecord
from ..store.leases import ModelChoice
from ..tenants.isolation import cache_salt, share_of
from ..usage.counts import Counts
from .answers import Embedding, EmbeddingList, EmbeddingUsage
from .caller import Calling
from .choice import check_ended_well
from .errors import InternalError, InvalidRequest
from .generate import check_adapters, consumer_of, longest_of, model_choice
from .merge import merge
from .observe import note
from .prompts import TokenPrompt, embedding_inputs
from .protocol import EmbeddingBody
from .rate_headers import rate_headers
from .respond import json_response
from .security import json_only
from .sse import while_connected
from .state import AppState, State

router = APIRouter()

# Bounds of a request that generates; no token is chosen after these prompts.
_NO_SAMPLING = SamplingParams(max_tokens=1, seed=0)


@router.post("/v1/embeddings", dependencies=[json_only])
async def create_embeddings(
    body: EmbeddingBody, request: Request, state: State, caller: Calling
) -> Response:
    """Embed texts with the model, or with one of its adapters."""
    state.limiter.check(caller.tenant)
    chosen = model_choice(body, caller, request)
    await check_adapters(chosen, state)
    inputs = await embedding_inputs(body, state)
    _check_lengths(inputs, longest_of(chosen, state))
    record = RequestRecord(consumer_of(caller, [], state), _asked(len(inputs)))
    note(request.scope, record)
    work = _vectors(body, chosen, inputs, record, state)
    vectors = await while_connected(request.receive, work)
    tokens = sum(len(each.token_ids) for each in inputs)
    record.counts = Counts(requests=1, prompt_tokens=tokens)
    state.ledger.add(record.consumer, record.counts)
    data = [_shown(index, vector, body) for index, vector in enumerate(vectors)]
    answer = EmbeddingList(data, body.model, EmbeddingUsage(tokens, tokens))
    response = json_response(answer)
    response.headers.update(rate_headers(state.limiter.allowances(caller.tenant)))
    return response


def _asked(inputs: int) -> Asked:
    return Asked(
        id=f"embd-{uuid4().hex}",
        operation="embeddings",
        stream=False,
        n=inputs,
        max_tokens=None,
        temperature=0.0,
        top_p=1.0,
    )


def _check_lengths(inputs: Sequence[TokenPrompt], max_len: int) -> None:
    longest = max(len(each.token_ids) for each in inputs)
    if longest >= max_len:
        raise InvalidRequest(
            f"The input has {longest} tokens; this model embeds at most {max_len - 1}.", "input"
        )


@dataclass(frozen=True, slots=True)
class _Embedded:
    """The state of one input, (hidden,) float32 as bytes."""

    index: int
    hidden: bytes


async def _vectors(
    body: EmbeddingBody,
    chosen: ModelChoice,
    inputs: Sequence[TokenPrompt],
    record: RequestRecord,
    state: AppState,
) -> list[bytes]:
    """States by input; all of them on one version of each adapter."""
    caller, found = chosen.caller, dict[int, bytes]()
    tokens = sum(len(each.token_ids) for each in inputs)
    with state.limiter.admitted(caller.tenant, tokens, 0) as running:
        async with state.registry.leases.lease(chosen) as adapters:
            record.consumer = consumer_of(caller, adapters, state)
            requests = [
                GenerationRequest(
                    request_id=f"{record.asked.id}-{index}",
                    prompt_token_ids=each.token_ids,
                    sampling=_NO_SAMPLING,
                    adapters=[each.use for each in adapters],
                    cache_salt=cache_salt(caller, body.cache_salt),
                    priority=body.priority,
                    deadline=body.deadline,
                    share=share_of(caller),
                    embeds=True,
                )
                for index, each in enumerate(inputs)
            ]
            streams = [_embed(index, each, record, state) for index, each in enumerate(requests)]
            async with aclosing(merge(streams)) as merged:
                async for each in merged:
                    running.ends_waiting()
                    found[each.index] = each.hidden
    return [found[index] for index in range(len(inputs))]


async def _embed(
    index: int, request: GenerationRequest, record: RequestRecord, state: AppState
) -> AsyncGenerator[_Embedded, None]:
    """The state of one input; closing the generator aborts it.

    Raises:
        EngineError: As ``EnginePort.generate``.
        ApiError: As ``check_ended_well``.
    """
    ids = [each.adapter_id for each in request.adapters]
    with state.metrics.sequence(record, ids, len(request.prompt_token_ids)) as sequence:
        async with aclosing(state.engine.generate(request)) as updates:
            async for update in updates:
                if update.finish_reason is not None:
                    break
            else:
                raise EngineDied("The engine ended a request without a reason.")
        check_ended_well(update)
        if update.hidden is None:
            raise InternalError("The engine gave this request up: it brought no vector.")
        sequence.embedded(update.scheduled)
        sequence.finish(update.finish_reason)
    yield _Embedded(index, update.hidden)


def _shown(index: int, hidden: bytes, body: EmbeddingBody) -> Embedding:
    form = struct.Struct(f"<{len(hidden) // 4}f")
    vector = form.unpack(hidden)
    length = math.hypot(*vector) or 1.0
    scaled = form.pack(*(value / length for value in vector))
    if body.encoding_format == "base64":
        return Embedding(index, b64encode(scaled).decode())
    return Embedding(index, list(form.unpack(scaled)))
