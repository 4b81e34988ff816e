"""How adapters' tensors get from host memory to the device.

On a GPU copies go over a stream of their own, from pinned memory: the host goes on at once, and
what is being computed is not held up. The stream of the computation waits for them only before the
first step that follows.
"""

from typing import Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """The way of large tensors to the device."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Start to copy; ``source`` stays as it is until that is done."""
        ...

    def wait(self) -> None:
        """What is launched from now on finds everything copied before."""
        ...


class HostCopies:
    """Within host memory."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copied when it returns."""
        to.copy_(source)

    def wait(self) -> None:
        """There is nothing to wait for."""


class StreamCopies:
    """Over a stream of their own.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        """Open the stream."""
        self._stream = torch.cuda.Stream(device)
        self._sources: list[Tensor] = []
        self._pending = False

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Behind what was launched so far, which may still read the memory that is overwritten."""
        if not self._pending:
            self._sources = []
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        self._sources.append(source)
        self._pending = True

    def wait(self) -> None:
        """An event between the two streams; the host does not wait."""
        if self._pending:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._pending = False


def make_copies(device: torch.device) -> Copies:
    """Those of a device; a trace of a GPU's work, where there is none, needs no stream."""
    if device.type == "cuda" and torch.cuda.is_available():
        return StreamCopies(device)
    return HostCopies()
