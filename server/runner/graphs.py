"""Decode steps captured as CUDA graphs: hundreds of launches become one.

A step of one token for every sequence is padded to one of a few numbers of rows, its *bucket*. All
it reads lies at addresses that do not change: weights, caches, the adapters' pool and tables, and
the arrays that the stage lays there. So what was launched once for a bucket can be replayed for
every later step of the same shape. A shape's first step runs as it is, which compiles its kernels;
the second is captured. Steps of base rows alone have graphs of their own, without a trace of
adapters.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_GRAPHS = 128
"""Kept at once; each takes a few megabytes. The least recently used goes first."""


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then the multiples of 8, up to the first that holds all sequences."""
    sizes = (1, 2, 4, *range(8, max_num_seqs + 8, 8))
    return sizes[: bisect_left(sizes, max_num_seqs) + 1]


@dataclass(frozen=True, slots=True)
class _Captured:
    """A recorded step and where its result lies."""

    graph: torch.cuda.CUDAGraph
    result: Tensor


class StepGraphs:
    """The captured steps of one runner."""

    def __init__(self) -> None:
        """Nothing is captured; all graphs share the memory of what they compute on the way."""
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()

    def run(self, shape: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, replayed where a step of this shape was captured.

        Args:
            shape: Equal for steps whose launches are equal.
            compute: Launches the step on tensors that lie where those of its shape always do. What
                it returns is overwritten by the next step.
        """
        if shape not in self._graphs:
            self._keep(shape, None)
            return compute()
        captured = self._graphs[shape]
        if captured is None:
            captured = self._capture(compute)
            self._keep(shape, captured)
        self._graphs.move_to_end(shape)
        captured.graph.replay()
        return captured.result

    def _capture(self, compute: Callable[[], Tensor]) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        # Adapters are read in a thread of their own, which may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = compute()
        return _Captured(graph, result)

    def _keep(self, shape: Hashable, captured: _Captured | None) -> None:
        self._graphs[shape] = captured
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
