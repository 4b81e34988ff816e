"""What adapters lower to. The engine knows these; it does not know kinds.

Each primitive is a correction of one base module's output, computed beside the base and never
merged into it. Its device math lives once, in ``kernels/``.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .layout import LinearTarget

ALIGNMENT_BYTES = 64
"""Every tensor begins at a multiple of this on the device."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """y += (x Aᵀ) B on one target.

    Attributes:
        target: The linear module.
        a: (rank, in_features).
        b: (rank, out_features): the checkpoint's B transposed, so that a rank row is contiguous in
            both factors, and multiplied by the adapter's scale.
    """

    target: LinearTarget
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """Rows of A and of B."""
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it stores, in the order A, B."""
        return (self.a, self.b)


@dataclass(frozen=True, slots=True)
class OutputBias:
    """y += c on one target, c (out_features,)."""

    target: LinearTarget
    bias: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it stores."""
        return (self.bias,)


Primitive = LowRank | OutputBias


@dataclass(frozen=True)
class LoweredAdapter:
    """An adapter in host memory, ready to be copied to the device.

    Attributes:
        digest: SHA-256 (hex) over the adapter's files: the version's identity and its KV's salt.
        kind: ``lora``, ...
        library: ``peft``, ...
        rank: Largest rank of any low-rank primitive, 0 without one.
        primitives: At most one of each type per target.
    """

    digest: str
    kind: str
    library: str
    rank: int
    primitives: tuple[Primitive, ...]

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """What its primitives store, in their order."""
        return tuple(tensor for primitive in self.primitives for tensor in primitive.tensors)

    @cached_property
    def num_elements(self) -> int:
        """Numbers stored, the same on host and device."""
        return sum(tensor.numel() for tensor in self.tensors)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes stored on the host."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def num_device_bytes(self) -> int:
        """Bytes it takes on the device, up to 63 a tensor of them for alignment."""
        return (
            sum(-(-tensor.nbytes // ALIGNMENT_BYTES) for tensor in self.tensors) * ALIGNMENT_BYTES
        )
