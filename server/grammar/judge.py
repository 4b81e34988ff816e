"""Compiles grammars of strangers in a process of its own, which can be ended.

Some grammars take exponential time and memory to compile: a JSON schema of two dozen patterns that
must all match, for one. In no thread could that be stopped.
"""

import multiprocessing
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from .constraint import GrammarRefused
from .matcher import Matcher
from .vocabulary import Vocabulary, VocabularySource

PROCESS_NAME = "grammar-judge"
"""As ``ps`` and ``top`` show it."""

_START_SECONDS = 60.0

_CPU_SECONDS = 2
"""Of a processor, for one grammar; most take some milliseconds."""

_SECONDS = 20.0
"""By the clock, where the processor is busy with other things."""

_MEMORY_BYTES = 512 << 20


class Judge:
    """A process that says of one grammar after the other whether it will do.

    Args:
        source: The base's tokens.
    """

    def __init__(self, source: VocabularySource) -> None:
        """Start the process, and wait for it."""
        self._pipe, far_end = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_run, args=(far_end, source), name=PROCESS_NAME, daemon=True
        )
        self._process.start()
        far_end.close()
        self.is_alive = True
        self._receive(_START_SECONDS)

    def refusal(self, grammar: str) -> str | None:
        """Why the grammar is refused; None if it is good. Blocks for some seconds at most.

        Where it takes too much time or memory the process is gone afterwards.
        """
        self._pipe.send(grammar)
        return self._receive(_SECONDS)

    def interrupt(self) -> None:
        """End what the process does; whoever waits for its answer is told at once."""
        self._process.kill()

    def close(self) -> None:
        """End the process; nobody may be waiting for it."""
        self.is_alive = False
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()

    def _receive(self, seconds: float) -> str | None:
        try:
            if self._pipe.poll(seconds):
                answer: str | None = self._pipe.recv()
                return answer
        except EOFError:
            pass
        self.close()
        return f"compiling it takes more than {_CPU_SECONDS} s or {_MEMORY_BYTES >> 20} MiB"


def judge(grammar: str, vocabulary: Vocabulary) -> None:
    """Return if some text can be generated that matches the grammar.

    Raises:
        GrammarRefused: It is none, asks for what is not enforced, or allows only the empty text.
    """
    matcher = Matcher(vocabulary.compile(grammar), vocabulary, may_end_early=True)
    matcher.mask()
    if matcher.error is not None:
        raise GrammarRefused(matcher.error)
    if matcher.must_end:
        raise GrammarRefused("no text but the empty one matches it")


def _run(pipe: Connection, source: VocabularySource) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it, in its own order
    Path("/proc/self/comm").write_text(PROCESS_NAME)
    vocabulary = source.load()
    _limit_memory()
    pipe.send(None)
    while True:
        try:
            grammar = pipe.recv()
        except EOFError:
            return
        _limit_time()
        pipe.send(_refusal(grammar, vocabulary))


def _refusal(grammar: str, vocabulary: Vocabulary) -> str | None:
    try:
        judge(grammar, vocabulary)
    except GrammarRefused as error:
        return str(error)
    return None


def _limit_time() -> None:
    """From now on; the limit counts whole seconds, of all that the process has taken."""
    taken = resource.getrusage(resource.RUSAGE_SELF)
    most = int(taken.ru_utime + taken.ru_stime) + _CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _limit_memory() -> None:
    """Beyond what is there already; who needs more ends."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
