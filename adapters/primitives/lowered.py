"""A whole adapter: its corrections by scope, and the keys and values before a request's own."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..scope import Scope
from .embedding import EmbeddingAffine, EmbeddingRows
from .layer import Bottleneck, NormOverride, SideAttention
from .linear import (
    Affine,
    Circulant,
    Dense,
    InputTransform,
    Kronecker,
    OutputRows,
    Sparse,
    Spectral,
)
from .primitive import ALIGNMENT_BYTES, Primitive

PRIMITIVE_TYPES: tuple[type[Primitive], ...] = (
    Affine,
    Dense,
    Sparse,
    Spectral,
    Kronecker,
    Circulant,
    OutputRows,
    InputTransform,
    EmbeddingRows,
    EmbeddingAffine,
    NormOverride,
    Bottleneck,
    SideAttention,
)
"""What has a table on the device."""


_MAX_ALIKE_BYTES = 1 << 16
"""Of an index tensor that is looked at for others like it: longer ones are trained, not drawn."""


@dataclass(frozen=True)
class KVPrefix:
    """Keys and values before a request's own, in ordinary cache blocks.

    Attributes:
        keys: (layers, kv_heads, length, head_dim), as they stand in the cache: rotated or not.
        values: Like the keys.
        position_offset: Added to the position of every token of the request: the length in PEFT,
            0 in AdapterHub.
        embedded: Whether the base computed it from a soft prompt, so that it belongs to the bare
            base and goes with no other adapter.
        layers: Those that attend to it, ascending; None for all of them. What it holds for the
            others is not read.
    """

    keys: Tensor
    values: Tensor
    position_offset: int
    embedded: bool = False
    layers: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Keys of a layer."""
        return self.keys.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values."""
        return (self.keys, self.values)


@dataclass(frozen=True)
class Part:
    """Primitives that apply to the same positions; each part has an adapter slot of its own.

    Attributes:
        scope: The positions.
        primitives: At most one of each type at each place.
    """

    scope: Scope
    primitives: tuple[Primitive, ...]


Stored = TypeVar("Stored")
"""A dataclass with tensors among its fields."""


@dataclass(frozen=True)
class LoweredAdapter:
    """An adapter in host memory, ready to be copied to the device.

    Attributes:
        digest: SHA-256 (hex) over the adapter's files: the version's identity and its KV's salt.
        kind: ``lora``, ...
        library: ``peft``, ...
        parts: Corrections by scope.
        prefix: None without one.
    """

    digest: str
    kind: str
    library: str
    parts: tuple[Part, ...]
    prefix: KVPrefix | None = None

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "LoweredAdapter":
        """The same adapter with every tensor changed, each object once."""
        changed: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in changed:
                changed[id(tensor)] = change(tensor)
            return changed[id(tensor)]

        parts = (
            replace(part, primitives=tuple(_mapped(each, once) for each in part.primitives))
            for part in self.parts
        )
        prefix = None if self.prefix is None else _mapped(self.prefix, once)
        return replace(self, parts=tuple(parts), prefix=prefix)

    @cached_property
    def primitives(self) -> tuple[Primitive, ...]:
        """Those of all parts."""
        return tuple(primitive for part in self.parts for primitive in part.primitives)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """What its primitives store on the device, each object once, in order of appearance."""
        found = {id(tensor): tensor for each in self.primitives for tensor in each.tensors}
        return tuple(found.values())

    @cached_property
    def index_digests(self) -> tuple[bytes | None, ...]:
        """Of each of ``tensors`` that holds indices SHA-256 over them; None for numbers.

        And for indices of more than 64 KiB, which are those of no other adapter.
        """
        return tuple(map(_index_digest, self.tensors))

    @cached_property
    def rank(self) -> int:
        """Largest rank of any low-rank primitive, 0 without one."""
        return max((each.rank for each in self.primitives if isinstance(each, Affine)), default=0)

    @cached_property
    def num_elements(self) -> int:
        """Numbers stored, the same on host and device."""
        return sum(tensor.numel() for tensor in self._stored)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes stored on the host."""
        return sum(tensor.nbytes for tensor in self._stored)

    @cached_property
    def num_device_bytes(self) -> int:
        """Bytes it takes in the device's adapter pool, its prefix, which lies in the cache, aside.

        Up to 63 a tensor of them are for alignment.
        """
        return sum(-(-each.nbytes // ALIGNMENT_BYTES) for each in self.tensors) * ALIGNMENT_BYTES

    @property
    def _stored(self) -> tuple[Tensor, ...]:
        return self.tensors if self.prefix is None else (*self.tensors, *self.prefix.tensors)


def _index_digest(tensor: Tensor) -> bytes | None:
    if tensor.dtype != torch.int32 or tensor.nbytes > _MAX_ALIKE_BYTES:
        return None
    return hashlib.sha256(tensor.numpy().tobytes()).digest()


def _mapped(stored: Stored, change: Callable[[Tensor], Tensor]) -> Stored:
    """A copy with each field that is a tensor changed."""
    record: Any = stored
    values = {each.name: getattr(record, each.name) for each in fields(record)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    mapped: Stored = replace(record, **{name: change(value) for name, value in tensors.items()})
    return mapped
