"""What a run shows on stderr while it goes on."""

import asyncio
import time
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType

import rich.progress
from rich.console import Console

_TERMINAL_SECONDS, _LINE_SECONDS, _WINDOW_SECONDS = 0.5, 5.0, 3.0


@dataclass(slots=True)
class Tally:
    """Counts of one phase of a run, kept by those who send it.

    Attributes:
        name: Of the phase.
        requests: How many there will be, where that is known.
        seconds: How long requests are sent, where that is bounded.
    """

    name: str
    requests: int | None
    seconds: float | None
    sent: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    ttfts: list[float] = field(default_factory=list)

    def add_ttft(self, seconds: float) -> None:
        """Keep them sorted."""
        insort(self.ttfts, seconds)

    def line(self, tokens_per_second: float) -> str:
        """All of it, for a reader."""
        total = "" if self.requests is None else f"/{self.requests}"
        parts = [f"{self.done}{total} done", f"{self.sent - self.done} running"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{tokens_per_second:,.0f} tokens/s"]
        if self.ttfts:
            parts += [f"TTFT p50 {1000 * self.ttfts[len(self.ttfts) // 2]:,.0f} ms"]
        return ", ".join(parts)

    def fraction(self, elapsed: float) -> float:
        """How much of the phase is over, by the bound that ends it first."""
        by_time = elapsed / self.seconds if self.seconds else 0.0
        by_count = self.done / self.requests if self.requests else 0.0
        return min(1.0, max(by_time, by_count))


class Progress:
    """Shows a tally: a bar on a terminal, else a line every few seconds."""

    def __init__(self, tally: Tally, console: Console | None = None) -> None:
        """On stderr unless said otherwise."""
        self._tally = tally
        self._console = console or Console(stderr=True)
        self._started = time.perf_counter()
        self._window = deque([(self._started, 0)])
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn(f"{tally.name:8}"),
            rich.progress.BarColumn(10),
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=1.0)

    async def __aenter__(self) -> "Progress":
        """Start to show it."""
        if self._console.is_terminal:
            self._bar.start()
        self._shower = asyncio.create_task(self._show())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Show the last of it."""
        self._shower.cancel()
        await asyncio.gather(self._shower, return_exceptions=True)
        self._update()
        if self._console.is_terminal:
            self._bar.stop()

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(_TERMINAL_SECONDS if self._console.is_terminal else _LINE_SECONDS)
            self._update()

    def _update(self) -> None:
        if not self._console.is_terminal:
            self._console.out(f"{self._tally.name}: {self._line()}", highlight=False)
            return
        elapsed = time.perf_counter() - self._started
        completed = self._tally.fraction(elapsed)
        self._bar.update(self._task, completed=completed, description=self._line(), refresh=True)

    def _line(self) -> str:
        """The tally with the tokens/s of the last seconds."""
        now = time.perf_counter()
        self._window.append((now, self._tally.tokens))
        while len(self._window) > 2 and now - self._window[1][0] > _WINDOW_SECONDS:
            self._window.popleft()
        start, before = self._window[0]
        return self._tally.line((self._tally.tokens - before) / max(now - start, 1e-9))
