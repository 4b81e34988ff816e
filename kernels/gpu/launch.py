"""A kernel launch as data: what a step runs on a GPU is what is compiled ahead of time without one.

Every ``gpu.py`` turns operands into launches by looking at nothing but their shapes, strides and
types. So the same function serves a run, a compilation for a GPU that is not there
(``compile.py``), and a count of the bytes that move.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Argument = Tensor | int | float


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: The ``triton.jit`` function.
        grid: Programs in each of up to three dimensions.
        arguments: By name, what may differ between launches of one compiled kernel.
        constants: By name, its ``tl.constexpr`` parameters.
        num_warps: Warps of a program.
        num_stages: Loads of a loop that are under way at once.
        matrix: Whether it multiplies on matrix units, given 16-bit numbers.
    """

    kernel: Any  # triton has no static types
    grid: tuple[int, ...]
    arguments: Mapping[str, Argument]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    matrix: bool = False

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the kernel's own constants."""
        # Triton's default for fused multiply-adds changes with its versions.
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def run(self) -> None:
        """Launch it on the current stream; a grid without programs is none."""
        if 0 in self.grid:
            return
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            **self.options,
        )


def ceil_div(size: int, of: int) -> int:
    """How many of these hold a size; Triton's own costs a launch microseconds."""
    return -(-size // of)


def power_of_two(size: int) -> int:
    """The least one that is not below a size."""
    return 1 << max(size - 1, 0).bit_length()


def run_all(launches: Iterable[Launch]) -> None:
    """One after another."""
    for launch in launches:
        launch.run()
