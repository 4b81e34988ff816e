"""The smallest parts of a decoder: frozen tensors with the one thing each of them computes."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from ...adapters.batch import AdapterBatch
from ...kernels.backend import Backend
from ...kernels.linear.op import LinearOp
from ...kernels.low_rank.op import SiteTargets


@dataclass(frozen=True, slots=True)
class Linear:
    """One GEMM and the adapters' corrections to it: y = x Wᵀ + b, then += each row's own delta.

    Attributes:
        base: x Wᵀ + b, the targets' weights one below the other; see ``kernels/linear/op.py``.
        targets: Which adaptable modules lie where in y.
    """

    base: LinearOp
    targets: SiteTargets

    def forward(self, x: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """x (rows, in) -> y (rows, out)."""
        y = self.base(x)
        if deltas is not None:
            deltas.add(y, x, self.targets)
        return y


class Norm(Protocol):
    """A normalisation of the residual stream, with the addition that comes before it."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place, then the normalised residual."""
        ...


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """y = weight * x / sqrt(mean(x²) + eps); see ``kernels/rms_norm/op.py``."""

    weight: Tensor
    eps: float
    backend: Backend

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, size) or (rows, heads, size) -> y of the same shape."""
        return self.backend.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place, then the normalised residual."""
        return self.backend.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias."""

    weight: Tensor
    bias: Tensor
    eps: float

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place, then the normalised residual."""
        residual += x
        return functional.layer_norm(residual, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token vectors, plus position vectors where positions are learned.

    Attributes:
        tokens: (vocab, hidden).
        positions: (max_position, hidden), or None.
    """

    tokens: Tensor
    positions: Tensor | None = None

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Two (rows,) int64 -> a new (rows, hidden)."""
        x = functional.embedding(token_ids, self.tokens)
        if self.positions is not None:
            x += functional.embedding(positions, self.positions)
        return x
