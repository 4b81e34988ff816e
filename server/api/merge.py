"""Several asynchronous streams as one, in the order in which their items come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """A stream is over, well or with the error that ended it."""

    error: Exception | None


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """All items of all streams; the first error ends everything.

    However it ends, by exhaustion, an error, closing or cancellation, every stream is closed
    before it returns.
    """
    if len(streams) == 1:  # nearly always: a task and a queue would cost every token a detour
        async with aclosing(streams[0]) as only:
            async for each in only:
                yield each
        return
    queue: asyncio.Queue[T | _End] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    live = len(pumps)
    try:
        while live:
            item = await queue.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                live -= 1
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: AsyncGenerator[T, None], queue: "asyncio.Queue[T | _End]") -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait(item)
    except Exception as error:  # noqa: BLE001 - handed over as it is and raised by merge()
        queue.put_nowait(_End(error))
    else:
        queue.put_nowait(_End(None))
