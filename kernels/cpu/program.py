"""Steps recorded as C calls: made once from Python, and then again without it.

Of a decode step of a small base, a quarter is Python between operations. But steps of one shape
make the same calls with the same arguments, as long as everything lies where it lay: weights,
caches and a step's inputs do so anyway, and what the step allocates on its way comes from an arena.
So the calls of a step are kept as data (``program.h``), and one C function makes them all.

What torch computes itself meanwhile is kept as well, and computed again into the same memory. Views
need nothing. A step that reads a number of a tensor on its way cannot be recorded.
"""

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .library import FLOAT, INT, POINTER, Kernel, Library, raise_if

_ALIGNMENT = 64
"""Bytes; of a cache line."""

_CHUNK = 1 << 24
"""Bytes that an arena grows by."""

_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default)

Report = Callable[[str, float], None]
"""Takes an operation's name and the seconds that one call of it took."""


class NotRecordable(RuntimeError):
    """The step depends on numbers that it computes; the message names the operation."""


class _Value(ctypes.Union):
    _fields_ = (("integer", INT), ("number", ctypes.c_double))


class _Call(ctypes.Structure):
    _fields_ = (("function", POINTER), ("values", POINTER))


@dataclass(frozen=True, slots=True)
class _Calls:
    """C calls in a row.

    Attributes:
        calls: Of ``_Call``.
        names: Of the operations.
        kept: What the arguments' addresses are of.
    """

    calls: Any
    names: Sequence[str]
    kept: Sequence[Any]

    def run(self, library: Library, report: Report | None) -> None:
        count = len(self.names)
        seconds = None if report is None else (ctypes.c_double * count)()
        raise_if(library.run_calls(self.calls, count, seconds), "a recorded step")
        if report is not None and seconds is not None:
            for name, spent in zip(self.names, seconds, strict=True):
                report(name, spent)


@dataclass(frozen=True, slots=True)
class _TorchCall:
    """An operation of torch's, whose result goes where the recorded one lies."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    results: Sequence[Tensor]

    def run(self) -> None:
        found = self.function(*self.args, **self.kwargs)
        for result, again in zip(self.results, _tensors(found), strict=True):
            if result.data_ptr() != again.data_ptr():
                result.copy_(again)


@dataclass(frozen=True, slots=True)
class Program:
    """A recorded step.

    Attributes:
        library: Whose functions it calls.
        parts: What to do, in order.
        result: Where the step's result lies.
        report: Told of every C call, if given.
    """

    library: Library
    parts: Sequence[_Calls | _TorchCall]
    result: Tensor
    report: Report | None

    def replay(self) -> Tensor:
        """The step again; the result lies where it lay, until any program of the arena runs.

        Raises:
            IndexError: What an operation found wrong in its index tables.
        """
        for part in self.parts:
            if isinstance(part, _Calls):
                part.run(self.library, self.report)
            else:
                part.run()
        return self.result


class Arena:
    """Memory that recorded steps allocate from, each from its beginning: only one runs at a time.

    Memory that was given back is given out again to who wants as much: the layers of a model all
    want the same, and so use the same few lines of cache.
    """

    def __init__(self) -> None:
        """Nothing is reserved."""
        self._chunks: list[npt.NDArray[np.uint8]] = []
        self.reset()

    def reset(self) -> None:
        """Begin again: what was allocated before belongs to another recording."""
        self._chunk, self._end = 0, 0
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A dense tensor of any contents."""
        count = math.prod(shape)
        size = max(1, count) * dtype.itemsize
        free = self._free[size]
        place = free.pop() if free else self._take(size)
        memory = place[:size]
        # The tensor's storage keeps this very array, whatever views are made of it.
        weakref.finalize(memory, free.append, place)
        return torch.frombuffer(memory, dtype=dtype)[:count].view(shape)

    def _take(self, size: int) -> npt.NDArray[np.uint8]:
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        while self._chunk < len(self._chunks):
            chunk = self._chunks[self._chunk]
            start = max(self._end, -chunk.ctypes.data % _ALIGNMENT)
            if start + rounded <= len(chunk):
                self._end = start + rounded
                return chunk[start : self._end]
            self._chunk, self._end = self._chunk + 1, 0
        self._chunks.append(np.empty(max(_CHUNK, rounded + _ALIGNMENT), np.uint8))
        return self._take(size)


class Recorder(TorchDispatchMode):
    """Keeps what is computed while it is entered, as the parts of a program."""

    def __init__(self, library: Library, arena: Arena) -> None:
        """Record the library's calls; what is allocated lies in the arena."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._library = library
        self._arena = arena
        self.parts: list[_Calls | _TorchCall] = []
        self._calls: list[tuple[str, int, Any]] = []
        self._kept: list[Any] = []

    def __enter__(self) -> "Recorder":
        """Begin."""
        self._library.recorder = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """End."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._library.recorder = None
        self._end_calls()

    def note(self, name: str, function: Kernel, packed: int, args: Sequence[Any]) -> None:
        """Keep a C call; ``packed`` is the address of what takes its arguments as data."""
        types = function.argtypes  # type: ignore[attr-defined]  # ctypes' own
        values = (_Value * len(args))()
        for value, kind, arg in zip(values, types, args, strict=True):
            if kind is FLOAT:
                value.number = arg
            else:
                value.integer = self._integer(arg)
        self._calls.append((name, packed, values))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """See ``TorchDispatchMode``."""
        named = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise NotRecordable(f"{func} looks at a tensor's numbers")
        if func in _ALLOCATIONS:
            return self._place(func, args, named)
        result = func(*args, **named)
        if isinstance(result, bool | int | float):
            raise NotRecordable(f"{func} looks at a tensor's numbers")
        if func._schema.is_mutable or not _is_view(result, args):
            self._end_calls()
            self.parts.append(_TorchCall(func, args, named, _tensors(result)))
        return result

    def _place(self, func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
        """An empty tensor of the arena, or one that the recording keeps."""
        like = func(*args, **{**named, "device": "meta"})
        if like.is_contiguous() and torch.device(named.get("device") or "cpu").type == "cpu":
            return self._arena.allocate(like.shape, like.dtype)
        placed: Tensor = func(*args, **named)
        self._kept.append(placed)
        return placed

    def _integer(self, arg: Any) -> int:
        if isinstance(arg, int):
            return arg
        if arg is None:
            return 0
        self._kept.append(arg)
        return ctypes.addressof(arg._obj)

    def _end_calls(self) -> None:
        if not self._calls:
            return
        calls = (_Call * len(self._calls))(
            *(_Call(packed, ctypes.addressof(values)) for _, packed, values in self._calls)
        )
        kept = [*self._kept, *(values for _, _, values in self._calls)]
        self.parts.append(_Calls(calls, [name for name, _, _ in self._calls], kept))
        self._calls, self._kept = [], []


@dataclass(frozen=True, slots=True)
class Programs:
    """Records steps of one library; only the last that ran has its result.

    Attributes:
        library: The compiled kernels.
        report: Told of every C call of a replayed step, if given.
        arena: Where the steps' memory lies.
    """

    library: Library
    report: Report | None = None
    arena: Arena = field(default_factory=Arena)

    def capture(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run the step once, and return what runs it again and gives its result.

        Raises:
            NotRecordable: It looks at numbers on its way.
        """
        self.arena.reset()
        with Recorder(self.library, self.arena) as recorder:
            result = compute()
        return Program(self.library, recorder.parts, result, self.report).replay


def _is_view(result: Any, args: Sequence[Any]) -> bool:
    """Whether the result is made of the arguments' memory.

    It is looked at, not asked of the operation: in inference mode some come here that return a view
    or a copy, as need be.
    """
    given = {each.untyped_storage().data_ptr() for each in _tensors(args)}
    return all(each.untyped_storage().data_ptr() in given for each in _tensors(result))


def _tensors(result: Any) -> Sequence[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [each for each in result or () if isinstance(each, Tensor)]
