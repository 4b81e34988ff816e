"""Sends a job's answer, streamed or whole; the two generation routes differ in format alone."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from .answers import Usage
from .choice import ChoiceDelta
from .generate import Gathered, Job, Tally, gather
from .meter import Meter
from .observe import note
from .protocol import GenerationBody, StreamOptions
from .rate_headers import rate_headers
from .sse import EventStream, while_connected
from .state import AppState


class Format(Protocol):
    """How a route writes its answers."""

    def opening(self) -> Sequence[msgspec.Struct]:
        """Chunks before the first delta."""
        ...

    def chunk(self, delta: ChoiceDelta, usage: Usage | msgspec.UnsetType | None) -> msgspec.Struct:
        """One delta."""
        ...

    def closing(self, usage: Usage) -> msgspec.Struct:
        """The chunk without choices that carries the usage."""
        ...

    def whole(self, choices: list[Gathered], usage: Usage) -> msgspec.Struct:
        """The whole answer."""
        ...


async def respond(
    request: Request,
    state: AppState,
    body: GenerationBody,
    job: Job,
    source: AsyncGenerator[ChoiceDelta, None],
    form: Format,
) -> Response:
    """The answer of a job whose deltas ``source`` yields; closed when the client goes away.

    A stream's headers wait for the first delta, so that an engine that is down or full still
    answers with its own status. Every answer says what is left of the caller's limits.
    """
    note(request.scope, job.record)
    response = await _response(request, state, body, job, source, form)
    response.headers.update(rate_headers(state.limiter.allowances(job.caller.tenant)))
    return response


async def _response(
    request: Request,
    state: AppState,
    body: GenerationBody,
    job: Job,
    source: AsyncGenerator[ChoiceDelta, None],
    form: Format,
) -> Response:
    meter = Meter(job, state.ledger)
    if not body.stream:
        with meter.counting():
            work = gather(job, source, meter.tally)
            choices = await while_connected(request.receive, work)
            meter.sending()
        return json_response(form.whole(choices, meter.tally.usage()))
    first = await while_connected(request.receive, anext(source))
    options = body.stream_options or StreamOptions()
    return EventStream(_chunks(first, source, meter, form, options))


def json_response(answer: msgspec.Struct) -> Response:
    """A struct as a JSON answer."""
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _chunks(
    first: ChoiceDelta,
    rest: AsyncGenerator[ChoiceDelta, None],
    meter: Meter,
    form: Format,
    options: StreamOptions,
) -> AsyncGenerator[msgspec.Struct, None]:
    tally = meter.tally
    async with aclosing(rest):
        with meter.counting():
            for chunk in form.opening():
                yield chunk
            tally.add(first)
            meter.sending()
            yield form.chunk(first, _usage_of_chunk(tally, options))
            async for delta in rest:
                tally.add(delta)
                meter.sending()
                yield form.chunk(delta, _usage_of_chunk(tally, options))
    if options.include_usage:
        yield form.closing(tally.usage())


def _usage_of_chunk(tally: Tally, options: StreamOptions) -> Usage | msgspec.UnsetType | None:
    if options.continuous_usage_stats:
        return tally.usage()
    return None if options.include_usage else msgspec.UNSET
