"""What a timed case of an operation is, and how much there is of everything in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels.backend import Backend
from .counting import Work
from .gpu_operands import Operands

EPS = 1e-5
"""Of norms."""


@dataclass(frozen=True, slots=True)
class Load:
    """What there is of everything.

    Attributes:
        rows: Of a decode step.
        prompt: Rows of a prompt.
        counts: Different LoRAs in a decode step.
        ranks: Of them.
        adapters: Different adapters in a decode step, of every other kind.
        contexts: Keys of a decode step's rows.
        block: Of rotations and circulants.
        width: Of bottlenecks.
        tokens: With another embedding.
    """

    rows: int = 64
    prompt: int = 2048
    counts: Sequence[int] = (1, 8, 32, 64)
    ranks: Sequence[int] = (8, 16, 64)
    adapters: int = 8
    contexts: Sequence[int] = (1024, 8192)
    block: int = 64
    width: int = 64
    tokens: int = 1000

    @property
    def steps(self) -> "tuple[AdapterStep, AdapterStep]":
        """A decode step, and a prompt."""
        return (
            AdapterStep(
                f"decode, {self.rows} rows of {self.adapters} adapters",
                self.adapters,
                self.rows // self.adapters,
            ),
            AdapterStep(f"prompt of {self.prompt} rows", 1, self.prompt),
        )


@dataclass(frozen=True, slots=True)
class AdapterStep:
    """A step whose every row has an adapter.

    Attributes:
        name: As people call it.
        adapters: Different ones.
        each: Rows of each.
    """

    name: str
    adapters: int
    each: int

    @property
    def rows(self) -> int:
        """Of the step."""
        return self.adapters * self.each


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on operands of its own.

    Attributes:
        operation: A field of ``Backend``, or of its ``deltas``.
        name: What the case is.
        run: Calls a backend's.
        work: What it cannot do without.
        changed: Tensors that it changes in place.
    """

    operation: str
    name: str
    run: Callable[[Backend], Tensor | None]
    work: Work
    changed: tuple[Tensor, ...] = ()


Build = Callable[[Operands], Case]
"""Makes a case's operands; what the case before took may be overwritten."""
