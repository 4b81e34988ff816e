"""Steps recorded as C calls: made once from Python, and then again without it.

Of a decode step of a small base, a quarter is Python between operations. But steps of one shape
make the same calls with the same arguments, as long as everything lies where it lay: weights,
caches and a step's inputs do so anyway, and what the step allocates on its way comes from an arena.
So the calls of a step are kept as data (``program.h``), and one C function makes them all.

What torch computes itself meanwhile is kept as well, and computed again into the same memory. Views
need nothing. A step that reads a number of a tensor on its way cannot be recorded.

A step may be recorded on tensors of more rows than it has, and then be made again for any number of
rows up to that: kernels say which of their arguments is the number of rows. What they leave out has
no meaning; what torch computes itself goes over all rows.
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

from ..memory import reserve
from .library import FLOAT, POINTER, ROWS, Kernel, Library, Reads, Recordable, raise_if

_ALIGNMENT = 64
"""Bytes; of a cache line."""

_CHUNK = 1 << 24
"""Bytes that an arena grows by."""

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
)

Report = Callable[[str, float], None]
"""Takes an operation's name and the seconds that one call of it took."""


class NotRecordable(RuntimeError):
    """The step depends on numbers that it computes; the message names the operation."""


class _Call(ctypes.Structure):
    _fields_ = (("function", POINTER), ("values", POINTER), ("reads", Reads))


@dataclass(frozen=True, slots=True)
class Padded:
    """How many rows a step has, and how many there are in the tensors it is laid out in."""

    rows: int
    laid_out: int


@dataclass(frozen=True, slots=True)
class _Calls:
    """C calls in a row.

    Attributes:
        calls: Of ``_Call``.
        names: Of the operations.
        values: (arguments of all calls,) int64: ``Value`` of ``program.h``.
        rows_at: Which of them are the step's number of rows.
        kept: What the arguments' addresses are of.
    """

    calls: Any
    names: Sequence[str]
    values: npt.NDArray[np.int64]
    rows_at: npt.NDArray[np.int64]
    kept: Sequence[Any]

    def run(self, library: Library, report: Report | None) -> None:
        count = len(self.names)
        seconds = None if report is None else (ctypes.c_double * count)()
        error = library.run_calls(self.calls, count, seconds, torch.get_num_threads())
        raise_if(error, "a recorded step")
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

    def replay(self, rows: int | None = None) -> Tensor:
        """The step again; the result lies where it lay, until any program of the arena runs.

        Args:
            rows: Of the step, where it was recorded as padded.

        Raises:
            IndexError: What an operation found wrong in its index tables.
        """
        for part in self.parts:
            if isinstance(part, _Calls):
                if rows is not None:
                    part.values[part.rows_at] = rows
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
            start = self._end
            if start + rounded <= len(chunk):
                self._end = start + rounded
                return chunk[start : self._end]
            self._chunk, self._end = self._chunk + 1, 0
        self._chunks.append(reserve(max(_CHUNK, rounded)))
        return self._take(size)


class Recorder(TorchDispatchMode):
    """Keeps what is computed while it is entered, as the parts of a program."""

    def __init__(self, library: Library, arena: Arena, padded: Padded | None) -> None:
        """Record the library's calls; what is allocated lies in the arena."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._library = library
        self._arena = arena
        self._padded = padded
        self.parts: list[_Calls | _TorchCall] = []
        self._begin_calls()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep torch's compiler out, torch imports it, 130 MB that nothing else needs."""
        return False

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

    def note(
        self, name: str, function: Kernel, recordable: Recordable, args: Sequence[Any]
    ) -> Sequence[Any]:
        """Keep a C call.

        Returns:
            The arguments, of a padded step with its number of rows.

        Raises:
            NotRecordable: The call goes over another number of rows than the step is padded to.
        """
        types: Sequence[Any] = function.argtypes  # type: ignore[attr-defined]  # ctypes' own
        made_with = list(args)
        self._calls.append((name, recordable, len(self._values)))
        for index, (kind, arg) in enumerate(zip(types, args, strict=True)):
            if kind is ROWS and self._padded is not None:
                if arg != self._padded.laid_out:
                    raise NotRecordable(f"{name} has {arg} rows in a step of {self._padded}")
                self._rows_at.append(len(self._values))
                made_with[index] = self._padded.rows
            self._values.append(_as_value(kind, made_with[index]))
            if not isinstance(arg, int | float | None):
                self._kept.append(arg)
        return made_with

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

    def _begin_calls(self) -> None:
        self._calls: list[tuple[str, Recordable, int]] = []
        """Name, address and place of the first argument of each."""
        self._values: list[int] = []
        self._rows_at: list[int] = []
        self._kept: list[Any] = []

    def _end_calls(self) -> None:
        if self._calls:
            values = np.array(self._values, dtype=np.int64)
            first = values.ctypes.data
            calls = (_Call * len(self._calls))(
                *(_as_call(made, first + values.itemsize * at) for _, made, at in self._calls)
            )
            names = [name for name, _, _ in self._calls]
            rows_at = np.array(self._rows_at, dtype=np.int64)
            self.parts.append(_Calls(calls, names, values, rows_at, self._kept))
        self._begin_calls()


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
        return self.record(compute).replay

    def record(self, compute: Callable[[], Tensor], padded: Padded | None = None) -> Program:
        """Run the step once, and return it as a program, which has its result.

        Args:
            compute: The step.
            padded: Its rows, where the tensors that it reads have more.

        Raises:
            NotRecordable: It looks at numbers on its way, or not all of it is padded alike.
        """
        self.arena.reset()
        with Recorder(self.library, self.arena, padded) as recorder:
            result = compute()
        return Program(self.library, recorder.parts, result, self.report)


def _as_call(made: Recordable, values: int) -> _Call:
    return _Call(made.packed, values, Reads() if made.reads is None else made.reads(values))


def _as_value(kind: Any, arg: Any) -> int:
    """An argument's 64 bits: of a float they are a double's, of a reference its address."""
    if kind is FLOAT:
        return int(np.float64(arg).view(np.int64))
    if arg is None or isinstance(arg, int):
        return int(arg or 0)
    return ctypes.addressof(arg._obj)


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
