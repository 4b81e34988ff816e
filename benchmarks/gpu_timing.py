"""How long work takes on a GPU, and what the GPU does at best: both measured.

Kernels are timed as the server runs them in decode steps, replayed from a CUDA graph: what the host
does to launch them is left out, and a few microseconds of the replay itself are not. Before every
run triton's ``do_bench`` overwrites the GPU's cache, so that weights come from memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from triton.testing import do_bench

Timed = Callable[[], object]
Timer = Callable[[Timed], float]
"""Microseconds of a call."""

_COPIED_BYTES = 1 << 30
_MULTIPLIED = 8192


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device was measured to do.

    Attributes:
        bytes_per_second: Read and written by a kernel that negates 1 GiB.
        flops_per_second: Of the product of two random bfloat16 matrices (8192, 8192).
        replay_us: Of a graph with one launch that does nothing to speak of.
    """

    bytes_per_second: float
    flops_per_second: float
    replay_us: float

    def floor_us(self, num_bytes: int, flops: int) -> float:
        """What bytes or operations take at these rates, whichever is longer."""
        return 1e6 * max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def replayed_us(timed: Timed, warmup_ms: int = 25, measured_ms: int = 100) -> float:
    """The median of replays from a CUDA graph; nothing in the call may wait for the device."""
    graph = _captured(timed)
    milliseconds: float = do_bench(
        graph.replay, warmup=warmup_ms, rep=measured_ms, return_mode="median"
    )
    return 1e3 * milliseconds


def called_us(timed: Timed) -> float:
    """The median of calls, with what the host does between its launches."""
    milliseconds: float = do_bench(timed, return_mode="median")
    return 1e3 * milliseconds


def measure_rates() -> Rates:
    """Of the current GPU."""
    # Random: equal numbers cost the multipliers less power, and so are multiplied faster.
    source = torch.randn(_COPIED_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    # By a kernel: what a graph has of a plain copy is slower.
    copy_us = replayed_us(lambda: torch.neg(source, out=target))
    matrix = torch.randn(_MULTIPLIED, _MULTIPLIED, dtype=torch.bfloat16, device="cuda")
    product_us = replayed_us(lambda: matrix @ matrix)
    one = torch.zeros(1, device="cuda")
    return Rates(
        bytes_per_second=2 * _COPIED_BYTES / (1e-6 * copy_us),
        flops_per_second=2 * _MULTIPLIED**3 / (1e-6 * product_us),
        replay_us=replayed_us(one.zero_),
    )


def _captured(timed: Timed) -> torch.cuda.CUDAGraph:
    """A graph of one call, after two on a stream beside that compile what is to be compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        timed()
        timed()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        timed()
    return graph
