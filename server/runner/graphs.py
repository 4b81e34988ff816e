"""Decode steps captured and replayed: hundreds of launches as one, without Python between them.

On a GPU, they are CUDA graphs; a step of one token for every sequence is padded to one of a few
numbers of rows, its *bucket*. On a CPU, which captures cheaply, they are programs
(``kernels/cpu/program.py``), with a bucket for every number of rows. All that a step reads lies at
addresses that do not change: weights, caches, the adapters' pool and tables, and the arrays that
the stage lays there. So what was launched once for a bucket can be replayed for every later step of
the same shape. A shape's first step runs as it is, which compiles a GPU's kernels; the second is
captured. Steps of base rows alone have graphs of their own, without a trace of adapters.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

_MAX_GRAPHS = 128
"""Kept at once; the least recently used goes first."""

_MAX_SEEN = 4096
"""Shapes remembered that were run once."""


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then the multiples of 8, up to the first that holds all sequences."""
    sizes = (1, 2, 4, *range(8, max_num_seqs + 8, 8))
    return sizes[: bisect_left(sizes, max_num_seqs) + 1]


Replay = Callable[[], Tensor]
"""Runs a captured step on what lies in its places now; the next step overwrites the result."""


class Capture(Protocol):
    """A device's way to capture a step."""

    def capture(self, compute: Callable[[], Tensor]) -> Replay:
        """What ``compute`` launches, to be launched again."""
        ...


class StepGraphs:
    """The captured steps of one runner.

    Args:
        capture: How one is captured.
    """

    def __init__(self, capture: Capture) -> None:
        """Nothing is captured."""
        self._capture = capture
        self._graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self._seen: set[Hashable] = set()

    def run(self, shape: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, replayed where a step of this shape was captured.

        Args:
            shape: Equal for steps whose launches are equal.
            compute: Launches the step on tensors that lie where those of its shape always do, and
                returns its result, which the next step overwrites.
        """
        replay = self._graphs.get(shape)
        if replay is None:
            if shape not in self._seen:
                self._remember(shape)
                return compute()
            replay = self._capture.capture(compute)
            self._keep(shape, replay)
        self._graphs.move_to_end(shape)
        return replay()

    def _remember(self, shape: Hashable) -> None:
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen.add(shape)

    def _keep(self, shape: Hashable, replay: Replay) -> None:
        self._graphs[shape] = replay
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)


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
