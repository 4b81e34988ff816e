"""Grammars of requests, compiled in a thread of their own, off the step loop."""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from llguidance import LLMatcher

from ..generation import GenerationRequest
from ..grammar.constraint import GrammarRefused
from ..grammar.matcher import Matcher
from ..grammar.vocabulary import Vocabulary

_KEPT = 128
"""Compiled grammars kept for later requests; the least recently used goes first."""


class GrammarCompiler:
    """Compiles each grammar once; every public method belongs to the engine's thread.

    Args:
        load: Gives the base's vocabulary. It is called at once, in the thread: few requests need
            it, and none should wait for it to be ready.
        wakeup: An eventfd that is written when a grammar has been compiled.
    """

    def __init__(self, load: Callable[[], Vocabulary], wakeup: int) -> None:
        """Begin without any grammar."""
        # A descriptor of our own: the other may be closed while a grammar is compiled.
        self._wakeup = os.dup(wakeup)
        self._compiled: OrderedDict[str, LLMatcher | GrammarRefused] = OrderedDict()
        self._waiting: dict[str, list[str]] = {}
        self._ended: SimpleQueue[tuple[str, LLMatcher | GrammarRefused]] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")
        self._vocabulary = self._thread.submit(load)
        self._vocabulary.add_done_callback(self._wake_if_failed)

    def ask(self, grammar: str, request_id: str) -> bool:
        """Whether it is compiled; where it is not it will be, and ``completed`` will tell."""
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return True
        if grammar not in self._waiting:
            self._waiting[grammar] = []
            self._thread.submit(self._compile, grammar).add_done_callback(self._wake)
        self._waiting[grammar].append(request_id)
        return False

    def completed(self) -> list[str]:
        """Ids of the requests whose grammars have been compiled since the last call.

        Raises:
            Exception: As ``load``, if that failed.
        """
        if self._vocabulary.done():
            self._vocabulary.result()
        request_ids: list[str] = []
        for _ in range(self._ended.qsize()):
            grammar, outcome = self._ended.get_nowait()
            self._compiled[grammar] = outcome
            request_ids += self._waiting.pop(grammar)
        while len(self._compiled) > max(_KEPT, len(request_ids)):
            self._compiled.popitem(last=False)
        return request_ids

    def matcher(self, request: GenerationRequest) -> Matcher | None:
        """A matcher of its grammar, which is compiled, behind what it has generated already.

        Returns:
            None where it has no grammar.

        Raises:
            GrammarRefused: The grammar cannot be compiled, or does not allow that.
        """
        if request.sampling.grammar is None:
            return None
        compiled = self._compiled[request.sampling.grammar]
        if isinstance(compiled, GrammarRefused):
            raise compiled
        may_end_early = bool(request.sampling.end_token_ids)
        matcher = Matcher(compiled.deep_copy(), self._vocabulary.result(), may_end_early)
        if not all(map(matcher.accept, request.output_token_ids)):
            raise GrammarRefused(matcher.error)
        return matcher

    def close(self) -> None:
        """End the thread after what it compiles now."""
        self._thread.shutdown(cancel_futures=True)
        os.close(self._wakeup)

    def _compile(self, grammar: str) -> None:
        try:
            self._ended.put((grammar, self._vocabulary.result().compile(grammar)))
        except GrammarRefused as error:
            self._ended.put((grammar, error))

    def _wake(self, future: "Future[None]") -> None:
        if not future.cancelled():
            os.eventfd_write(self._wakeup, 1)

    def _wake_if_failed(self, vocabulary: "Future[Vocabulary]") -> None:
        if not vocabulary.cancelled() and vocabulary.exception() is not None:
            os.eventfd_write(self._wakeup, 1)
