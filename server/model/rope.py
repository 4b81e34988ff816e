"""Rotary frequencies and the table of their cosines, made once when a model is loaded."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.backend import Backend


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by ``factor`` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, others blended.

    With L the original context and w a wavelength, s = (L / w - low) / (high - low) clamped to
    [0, 1] gives the frequency f' = (1 - s) f / factor + s f.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding over the whole head.

    Attributes:
        theta: Base of the geometric series of frequencies.
        scaling: How frequencies are changed for contexts longer than trained on.
    """

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin of position * frequency.

    Attributes:
        cos: (max_position, head_dim / 2) float32.
        sin: The same.
        backend: Device operations.
    """

    cos: Tensor
    sin: Tensor
    backend: Backend

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of both tables: (rows,) int64 -> two (rows, head_dim / 2)."""
        gather = self.backend.gather_rows
        return gather(self.cos, positions), gather(self.sin, positions)


def rotary_table(
    rope: RopeConfig, head_dim: int, max_position: int, device: torch.device, backend: Backend
) -> RotaryTable:
    """The table of every position that the model serves."""
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, frequencies(rope, head_dim))
    return RotaryTable(angles.cos().to(device), angles.sin().to(device), backend)


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """f_i = theta^(-2i / head_dim), scaled -> (head_dim / 2,) float32 on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case None:
            return base
        case LinearScaling(factor):
            return base / factor
        case Llama3Scaling():
            return _llama3(base, rope.scaling)


def _llama3(base: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_max_position * base / (2 * math.pi)  # L / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * base / scaling.factor + smooth * base
