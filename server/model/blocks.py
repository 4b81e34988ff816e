"""The smallest parts of a decoder: frozen tensors with the one thing each of them computes."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from ...adapters.device.batch import AdapterBatch
from ...kernels.backend import Backend
from ...kernels.linear.op import LinearOp
from ...kernels.tables import SiteTargets


@dataclass(frozen=True, slots=True)
class Linear:
    """One GEMM and the adapters' corrections to it: y = x Wᵀ + b, each row changed by its own.

    Attributes:
        base: x Wᵀ + b, the targets' weights one below the other; see ``kernels/linear/op.py``.
        targets: Which adaptable modules lie where in y.
    """

    base: LinearOp
    targets: SiteTargets

    def forward(self, x: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """x (rows, in) -> y (rows, out)."""
        return self.base(x) if deltas is None else deltas.linear(self.base, x, self.targets)


class Norm(Protocol):
    """A normalisation of the residual stream, with the addition that mostly comes before it."""

    def forward(self, x: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """X (rows, size), normalised."""
        ...

    def add(self, x: Tensor, residual: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """residual += x in place, then the normalised residual."""
        ...


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """y = weight * x / sqrt(mean(x²) + eps); see ``kernels/rms_norm/op.py``.

    Attributes:
        weight: (size,).
        eps: Added to the mean of squares.
        row: Where adapters know it: its index in the layout.
        backend: Device operations.
    """

    weight: Tensor
    eps: float
    row: int
    backend: Backend

    def forward(self, x: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """x (rows, size) or (rows, heads, size) -> y of the same shape."""
        y = self.backend.rms_norm(x, self.weight, self.eps)
        if deltas is not None:
            deltas.norm(y, x, self.row, self.eps, centered=False)
        return y

    def add(self, x: Tensor, residual: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """residual += x in place, then the normalised residual."""
        y = self.backend.add_rms_norm(x, residual, self.weight, self.eps)
        if deltas is not None:
            deltas.norm(y, residual, self.row, self.eps, centered=False)
        return y


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias.

    Attributes:
        weight: (size,).
        bias: (size,).
        eps: Added to the variance.
        row: Where adapters know it: its index in the layout.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    row: int

    def forward(self, x: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """x (rows, size) -> y of the same shape."""
        y = functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if deltas is not None:
            deltas.norm(y, x, self.row, self.eps, centered=True)
        return y

    def add(self, x: Tensor, residual: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """residual += x in place, then the normalised residual."""
        residual += x
        return self.forward(residual, deltas)


@dataclass(frozen=True, slots=True)
class Embedding:
    """One table of vectors.

    Attributes:
        weight: (entries, hidden).
        row: Where adapters know it: its index in the layout.
        backend: Device operations.
    """

    weight: Tensor
    row: int
    backend: Backend

    def forward(self, ids: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """(rows,) int64 -> a new (rows, hidden)."""
        x = self.backend.gather_rows(self.weight, ids)
        if deltas is not None:
            deltas.embedding(x, ids, self.row)
        return x
