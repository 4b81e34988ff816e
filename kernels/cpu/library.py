"""The compiled library seen from Python: C functions by dtype, and structures prepared once."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

Kernel = Callable[..., bytes | None]
"""A C function: takes integers, floats and addresses; returns what was wrong, or None."""

POINTER = ctypes.c_void_p
INT = ctypes.c_int64
FLOAT = ctypes.c_float


class ROWS(ctypes.c_int64):
    """An integer that is how many rows a step has: a recorded step can be made again for fewer."""


DTYPES: Mapping[torch.dtype, str] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Element types there are kernels for, and what ends their names."""

K = TypeVar("K")
V = TypeVar("V")


class Latest(Generic[K, V]):
    """Prepares a step's table once for the many layers that use it: keeps the last, by identity."""

    def __init__(self, prepare: Callable[[K], V]) -> None:
        """Keep how a new object is prepared."""
        self._prepare = prepare
        self._entry: tuple[K, V] | None = None

    def __call__(self, key: K) -> V:
        """What ``prepare`` made of this very object."""
        entry = self._entry
        if entry is None or entry[0] is not key:
            entry = self._entry = (key, self._prepare(key))
        return entry[1]


class Reads(ctypes.Structure):
    """Memory that a call will read: ``Reads`` of ``team.h``."""

    _fields_ = (("begin", POINTER), ("bytes", INT))


@dataclass(frozen=True, slots=True)
class Recordable:
    """What makes a kernel's call again, as ``program.h`` has it.

    Attributes:
        packed: Address of what takes its arguments as data.
        reads: Tells the memory that a call reads, from the address of these; None where that is not
            worth telling.
    """

    packed: int
    reads: Callable[[int], Reads] | None


class Recording(Protocol):
    """What keeps the C calls of a step while it is recorded; see ``program.py``."""

    def note(
        self, name: str, function: Kernel, recordable: Recordable, args: Sequence[Any]
    ) -> Sequence[Any]:
        """Keep one call; what it is made with now."""
        ...


class Library:
    """The compiled library.

    Attributes:
        recorder: Told of every call of a kernel, while there is one.
        run_calls: Makes recorded calls.
    """

    def __init__(self, path: Path) -> None:
        """Load it; raises OSError where that fails."""
        self._functions = ctypes.CDLL(str(path))
        self.recorder: Recording | None = None
        self.run_calls = self.function("run_calls", (POINTER, INT, POINTER, INT), ctypes.c_char_p)

    def function(self, name: str, arguments: Sequence[Any], result: Any) -> Callable[..., Any]:
        """A C function that is not a kernel."""
        function = self._functions[name]
        function.argtypes, function.restype = list(arguments), result
        return function

    def kernel(self, name: str, arguments: Sequence[Any], label: str = "") -> Kernel:
        """A kernel, whose calls can be recorded, under the label."""
        function: Kernel = self.function(name, arguments, ctypes.c_char_p)
        packed = ctypes.cast(self._functions[f"{name}_packed"], POINTER).value or 0
        tells_reads = hasattr(self._functions, f"{name}_reads")
        reads = self.function(f"{name}_reads", (POINTER,), Reads) if tells_reads else None
        recordable = Recordable(packed, reads)

        def call(*args: Any) -> bytes | None:
            if self.recorder is None:
                return function(*args)
            return function(*self.recorder.note(label or name, function, recordable, args))

        return call


class Kernels:
    """One operation's C functions by dtype."""

    def __init__(self, library: Library, name: str, arguments: Sequence[Any]) -> None:
        """Find ``<name>_<dtype>`` in the library and declare its argument types."""
        self._name = name
        self._by_dtype: Mapping[torch.dtype, Kernel] = {
            dtype: library.kernel(f"{name}_{suffix}", arguments, name)
            for dtype, suffix in DTYPES.items()
        }

    def of(self, *tensors: Tensor) -> Kernel:
        """The function for tensors that share one dtype, lie on the CPU and are dense in rows.

        Raises:
            ValueError: They differ in dtype, there is no kernel for it, or they are elsewhere.
        """
        dtype = tensors[0].dtype
        for tensor in tensors:
            if tensor.dtype is not dtype or not tensor.is_cpu or tensor.stride(-1) != 1:
                raise ValueError(self._refusal(tensor, dtype))
        kernel = self._by_dtype.get(dtype)
        if kernel is None:
            raise ValueError(
                f"{self._name}: no CPU kernel for {dtype}; run the model in float32 or bfloat16"
            )
        return kernel

    def _refusal(self, tensor: Tensor, dtype: torch.dtype) -> str:
        return (
            f"{self._name}: expected {dtype} tensors on the CPU, dense in their last dimension;"
            f" got {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )


def raise_if(error: bytes | None, operation: str) -> None:
    """Raise IndexError with what a kernel found wrong in its index tables."""
    if error is not None:
        raise IndexError(f"{operation}: {error.decode()}")


def address(tensor: Tensor, dtype: torch.dtype, name: str) -> int:
    """Where a contiguous CPU tensor of this dtype begins.

    Raises:
        ValueError: It is something else; the message calls it ``name``.
    """
    if tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor on the CPU, got {tensor.dtype} on"
            f" {tensor.device} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def require(met: bool, message: str) -> None:
    """Raise ValueError with a message that costs nothing to make."""
    if not met:
        raise ValueError(message)
