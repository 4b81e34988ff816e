"""Judges grammars before their requests are queued, and remembers what it found."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from .constraint import GrammarRefused
from .judge import Judge
from .vocabulary import VocabularySource

_REMEMBERED = 256

_MAX_BYTES = 256 * 2**10
"""Of a grammar; larger ones are refused as they are."""


class GrammarCheck:
    """Says whether the engine will take a grammar; new ones are judged one at a time.

    Args:
        source: The base's tokens.
    """

    def __init__(self, source: VocabularySource) -> None:
        """Know no grammar yet; the judge starts with the first."""
        self._source = source
        self._refusals: OrderedDict[str, str | None] = OrderedDict()
        self._judge: Judge | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")

    async def __call__(self, grammar: str) -> None:
        """Return if the engine can generate a text that matches the grammar.

        Raises:
            GrammarRefused: It is too large or takes too long, is no grammar, asks for what is not
                enforced, or allows only the empty text.
        """
        if len(grammar.encode()) > _MAX_BYTES:
            raise GrammarRefused(f"it is larger than {_MAX_BYTES} bytes")
        if grammar not in self._refusals:
            loop = asyncio.get_running_loop()
            self._refusals[grammar] = await loop.run_in_executor(self._thread, self._ask, grammar)
        self._refusals.move_to_end(grammar)
        refusal = self._refusals[grammar]
        if len(self._refusals) > _REMEMBERED:
            self._refusals.popitem(last=False)
        if refusal is not None:
            raise GrammarRefused(refusal)

    def close(self) -> None:
        """End the judge, if there is one, in the midst of its work."""
        judge = self._judge
        if judge is not None and judge.is_alive:
            judge.interrupt()
        self._thread.shutdown(cancel_futures=True)
        if judge is not None and judge.is_alive:
            judge.close()

    def _ask(self, grammar: str) -> str | None:
        if self._judge is None or not self._judge.is_alive:
            self._judge = Judge(self._source)
        return self._judge.refusal(grammar)
