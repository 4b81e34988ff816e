"""The feed-forward half of a layer: gated (Llama and its kin) or plain (GPT-2)."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor
from torch.nn import functional

from ...adapters.device.batch import AdapterBatch
from ...kernels.backend import Backend
from .blocks import Linear


class MLP(Protocol):
    """A feed-forward network over rows."""

    def forward(self, x: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """x (rows, hidden) -> (rows, hidden)."""
        ...


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """y = down(silu(gate(x)) * up(x)), gate and up in one GEMM."""

    gate_up: Linear
    down: Linear
    backend: Backend

    def forward(self, x: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """x (rows, hidden) -> (rows, hidden)."""
        inner = self.backend.silu_mul(self.gate_up.forward(x, deltas))
        return self.down.forward(inner, deltas)


@dataclass(frozen=True, slots=True)
class PlainMLP:
    """y = down(gelu(up(x))).

    Attributes:
        up: To the inner width.
        down: Back to the residual stream.
        approximate: ``tanh`` is transformers' ``gelu_new``, ``none`` the exact GELU.
    """

    up: Linear
    down: Linear
    approximate: Literal["tanh", "none"]

    def forward(self, x: Tensor, deltas: AdapterBatch | None) -> Tensor:
        """x (rows, hidden) -> (rows, hidden)."""
        inner = functional.gelu(self.up.forward(x, deltas), approximate=self.approximate)
        return self.down.forward(inner, deltas)
