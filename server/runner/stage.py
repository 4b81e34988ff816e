"""Brings a step's small arrays to where the device reads them.

A copy from ordinary memory to a GPU makes the host wait for it. So arrays are first laid one behind
the other in pinned memory, and ``flush`` sends what was laid there since the last one. Where an
array comes to lie, on a CPU too, depends on the sizes of those placed before it alone: steps that
place arrays of the same sizes find them at the same addresses, which is what a captured step needs.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes; kernels read 16 at once."""

Array = npt.NDArray[Any]


class Stage(Protocol):
    """The way to the device for what the host knows of a step."""

    @property
    def overflowed(self) -> bool:
        """Whether some array of this step lies elsewhere than in other steps of its sizes."""
        ...

    def begin(self) -> None:
        """A new step begins: what was placed for earlier ones is no longer needed."""
        ...

    def place(self, array: Array) -> Tensor:
        """The array as a tensor on the device, which holds it after ``flush``."""
        ...

    def flush(self) -> None:
        """Send what was placed; kernels launched from now on find it."""
        ...


class _Shelf:
    """Bytes in which arrays come to lie one behind the other."""

    def __init__(self, memory: Array) -> None:
        """``memory`` is (bytes,) uint8."""
        self.memory = memory
        self.end = 0

    def lay(self, array: Array) -> Array | None:
        """The array where it lies now, None where there is no room."""
        start, end = self.end, self.end + array.nbytes
        if end > len(self.memory):
            return None
        laid = self.memory[start:end].view(array.dtype).reshape(array.shape)
        laid[...] = array
        self.end = start + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        return laid


class HostStage:
    """Where the device computes in host memory, arrays only come to lie where they always do.

    Args:
        num_bytes: What does not fit there stays where it is.
    """

    def __init__(self, num_bytes: int = 0) -> None:
        """Begin empty."""
        aligned = np.empty(num_bytes + _ALIGNMENT, dtype=np.uint8)
        start = -aligned.ctypes.data % _ALIGNMENT
        self._shelf = _Shelf(aligned[start : start + num_bytes])
        self.overflowed = False

    def begin(self) -> None:
        """Lay from the beginning again."""
        self._shelf.end = 0
        self.overflowed = False

    def place(self, array: Array) -> Tensor:
        """Lay the array behind the last one."""
        laid = self._shelf.lay(array)
        if laid is None:
            self.overflowed = True
            return torch.from_numpy(array)
        return torch.from_numpy(laid)

    def flush(self) -> None:
        """Nothing is under way."""


class PinnedStage:
    """Pinned memory and its twin on a GPU.

    Args:
        host: (bytes,) uint8, page-locked; what does not fit goes a way of its own.
        twin: (bytes,) uint8, on the device.
    """

    def __init__(self, host: Array, twin: Tensor) -> None:
        """Begin empty."""
        self._shelf = _Shelf(host)
        self._twin = twin
        self.overflowed = False
        self._sent = 0
        self._copied: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Wait until the last copy has read the pinned memory; it mostly has, long ago."""
        if self._copied is not None:
            self._copied.synchronize()
        self._shelf.end = self._sent = 0
        self.overflowed = False

    def place(self, array: Array) -> Tensor:
        """Lay the array behind the last one."""
        start = self._shelf.end
        laid = self._shelf.lay(array)
        if laid is None:
            self.overflowed = True
            return send(torch.from_numpy(np.ascontiguousarray(array)), self._twin.device)
        dtype = torch.from_numpy(laid).dtype
        return self._twin[start : start + laid.nbytes].view(dtype).view(laid.shape)

    def flush(self) -> None:
        """One copy on the current stream."""
        host, end = self._shelf.memory, self._shelf.end
        if end == self._sent:
            return
        part = slice(self._sent, min(end, len(host)))
        self._twin[part].copy_(torch.from_numpy(host[part]), non_blocking=True)
        self._sent = end
        if torch.cuda.is_available():
            self._copied = torch.cuda.Event()
            self._copied.record()


def make_stage(device: torch.device, num_bytes: int) -> Stage:
    """The stage of a device."""
    if device.type != "cuda":
        return HostStage(num_bytes)
    host = _pinned(torch.empty(num_bytes, dtype=torch.uint8)).numpy()
    return PinnedStage(host, torch.empty(num_bytes, dtype=torch.uint8, device=device))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on its way to the device; on a GPU from pinned memory, so that no host waits."""
    return tensor if device.type != "cuda" else _pinned(tensor).to(device, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    """Page-locked where there is a GPU to copy to; a trace of its work needs none."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
