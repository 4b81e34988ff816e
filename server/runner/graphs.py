"""Decode steps captured and replayed: hundreds of launches as one, without Python between them.

On a GPU, they are CUDA graphs; a step of one token for every sequence is padded to one of a few
numbers of rows, its *bucket*. On a CPU, which captures cheaply, they are programs
(``kernels/cpu/program.py``), with a bucket for every number of rows. All that a step reads lies at
addresses that do not change: weights, caches, the adapters' pool and tables, and the arrays that
the stage lays there. So what was launched once for a bucket can be replayed for every later step of
the same shape. A shape's first step runs as it is, which compiles a GPU's kernels; the second is
captured. Steps of base rows alone have graphs of their own, without a trace of adapters.

On a CPU with a matrix unit, steps with prompts are programs as well. They are laid out for a power
of two of rows and computed for as many as there are.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ...kernels.cpu.program import Padded, Program, Programs

_MAX_GRAPHS = 128
"""Kept at once; the least recently used goes first."""

_MAX_SEEN = 4096
"""Shapes remembered that were run once."""


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then the multiples of 8, up to the first that holds all sequences."""
    sizes = (1, 2, 4, *range(8, max_num_seqs + 8, 8))
    return sizes[: bisect_left(sizes, max_num_seqs) + 1]


_LEAST_PROMPT_ROWS = 16
"""Of a bucket: fewer are one tile of the matrix unit all the same."""

G = TypeVar("G")

Replay = Callable[[], Tensor]
"""Runs a captured step on what lies in its places now; the next step overwrites the result."""


class Capture(Protocol):
    """A device's way to capture a step."""

    def capture(self, compute: Callable[[], Tensor]) -> Replay:
        """What ``compute`` launches, to be launched again."""
        ...


class _Kept(Generic[G]):
    """The captured steps that were used last, by shape."""

    def __init__(self) -> None:
        """Nothing is captured."""
        self._by_shape: OrderedDict[Hashable, G] = OrderedDict()

    def find(self, shape: Hashable) -> G | None:
        """That of the shape, which is used now."""
        found = self._by_shape.get(shape)
        if found is not None:
            self._by_shape.move_to_end(shape)
        return found

    def keep(self, shape: Hashable, graph: G) -> None:
        """Keep one, in the place of what was not used for longest."""
        self._by_shape[shape] = graph
        if len(self._by_shape) > _MAX_GRAPHS:
            self._by_shape.popitem(last=False)


class StepGraphs:
    """The captured decode steps of one runner.

    Args:
        capture: How one is captured.
    """

    def __init__(self, capture: Capture) -> None:
        """Nothing is captured."""
        self._capture = capture
        self._kept: _Kept[Replay] = _Kept()
        self._seen: set[Hashable] = set()

    def run(self, shape: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, replayed where a step of this shape was captured.

        Args:
            shape: Equal for steps whose launches are equal.
            compute: Launches the step on tensors that lie where those of its shape always do, and
                returns its result, which the next step overwrites.
        """
        replay = self._kept.find(shape)
        if replay is None:
            if shape not in self._seen:
                self._remember(shape)
                return compute()
            replay = self._capture.capture(compute)
            self._kept.keep(shape, replay)
        return replay()

    def _remember(self, shape: Hashable) -> None:
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen.add(shape)


class PromptPrograms:
    """The recorded steps with prompts of one runner.

    Args:
        programs: Records them; of kernels that leave out the rows a step is padded by.
        max_rows: Of a step.
    """

    def __init__(self, programs: Programs, max_rows: int) -> None:
        """Nothing is recorded."""
        doubled = range(_LEAST_PROMPT_ROWS.bit_length() - 1, (max_rows - 1).bit_length())
        self.buckets = (*(1 << power for power in doubled), max_rows)
        """Ascending numbers of rows that steps are laid out for."""
        self._programs = programs
        self._kept: _Kept[Program] = _Kept()

    def run(self, shape: Hashable, compute: Callable[[], Tensor], padded: Padded) -> Tensor:
        """What ``compute`` gives, replayed where a step of this shape was recorded.

        Args:
            shape: Equal for steps that differ in their number of rows alone.
            compute: The step over all rows that it is laid out for, as ``StepGraphs.run`` has it.
            padded: Rows that there are, and that it is laid out for; the others have no meaning in
                the result.
        """
        program = self._kept.find(shape)
        if program is not None:
            return program.replay(padded.rows)
        program = self._programs.record(compute, padded)
        self._kept.keep(shape, program)
        return program.result

    def run_once(self, compute: Callable[[], Tensor], padded: Padded) -> Tensor:
        """As ``run``, for a step whose arrays lie elsewhere than those of other steps."""
        return self._programs.record(compute, padded).result


class CudaCapture:
    """CUDA graphs, which share the memory of what they compute on the way.

    Args:
        max_rows: Of the largest result.
        vocab_size: Columns of a result.
        device: The GPU.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        """Reserve the result."""
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        # One for all graphs: a result of its own in each would take hundreds of megabytes.
        self._result = torch.empty(max_rows, vocab_size, dtype=torch.float32, device=device)

    def capture(self, compute: Callable[[], Tensor]) -> Replay:
        """Record the step, which launches nothing.

        Not by ``torch.cuda.graph``: that empties torch's caches of device and pinned memory first,
        in the midst of serving.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Adapters are read in a thread of their own, which may allocate meanwhile.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                computed = compute()
                result = self._result[: len(computed)]
                result.copy_(computed)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
