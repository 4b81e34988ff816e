"""LoRA on one module, from its tensors in the file to a primitive on a base.

On a linear module with weight W, bias b and output y = W x + b:

    y' = y + B A x + c             with B A, c scaled
    y' = b + g * (W x + B A x)     DoRA (arXiv:2402.09353): g = m / |W + B A|, lengths of rows

and on an embedding E, row e of a token t: e' = g * (e + B A[:, t]), g = m / |E + ΔE| of columns.
A part that training took out of W (``weight_parts``) is subtracted as further ranks of A and B.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..errors import AdapterUnsupported, shown
from ..kind import PrimitiveShape
from ..layout import LinearTarget
from ..primitives.embedding import EmbeddingAffine
from ..primitives.linear import Affine
from .binding import cast, embedding_site, linear_target, mismatch, named_target
from .lora_storage import Storage
from .weight_parts import RemovedPart, column_norms, row_norms


@dataclass(frozen=True, slots=True)
class LinearLora:
    """LoRA on a linear module, as stored.

    Attributes:
        path: Module path.
        rank: r.
        a: A.
        b: B.
        scale: Of the difference and of the bias.
        storage: How A and B are stored.
        bias: c (out,).
        diagonal: (r,), between A and B (KaSA, AdaLoRA).
        magnitude: m (out,) of DoRA.
        removed: The part of the base's weight that training took out.
    """

    path: str
    rank: int
    a: Tensor
    b: Tensor
    scale: float
    storage: Storage
    bias: Tensor | None = None
    diagonal: Tensor | None = None
    magnitude: Tensor | None = None
    removed: RemovedPart | None = None

    @property
    def reads_base(self) -> bool:
        """Whether it depends on the weight of the base."""
        return self.magnitude is not None or self.removed is not None

    @property
    def shape(self) -> PrimitiveShape:
        """What it lowers to."""
        ranks = 1 if self.removed is None else 2
        vectors = (self.bias, self.magnitude)
        stored = ranks * (self.a.numel() + self.b.numel())
        stored += sum(vector.numel() for vector in vectors if vector is not None)
        return PrimitiveShape(Affine.__name__, self.path, ranks * self.rank, stored)

    def lower(self, base: Base) -> Affine | EmbeddingAffine:
        """The correction of the base's module at its path.

        Raises:
            AdapterMismatch: There is none, or one of other sizes.
            AdapterUnsupported: The base's module cannot have it, or it overflows.
        """
        if self.storage.of_parameter and self.path in base.layout.embeddings_by_path:
            # Of an embedding, the stored weight has a row a token.
            as_embedding = EmbeddingLora(self.path, self.rank, self.b.T, self.a.T, self.scale)
            return as_embedding.lower(base)
        return self._on_target(base, self._target(base))

    def _target(self, base: Base) -> LinearTarget:
        target = named_target(base.layout, self.path)
        linear_target(base.layout, self.path, *self.storage.features(target, self.a, self.b))
        if self.removed is not None:
            _require_removable(base, target, self.removed, self.rank)
        return target

    def _on_target(self, base: Base, target: LinearTarget) -> Affine:
        a, b = self._factors(base, target)
        bias = None if self.bias is None else self.bias.float() * self.scale
        gain = None
        if self.magnitude is not None:
            own = base.linear(target)
            gain = _gain(self.path, self.magnitude, row_norms(own.weight, a, b))
            b = gain[:, None] * b
            bias = None if own.bias is None else own.bias.float() * (1 - gain)
        return Affine(
            target,
            a=cast(self.path, a, base.dtype),
            b=cast(self.path, b.T, base.dtype),
            bias=None if bias is None else cast(self.path, bias, base.dtype),
            scale=None if gain is None else cast(self.path, gain, base.dtype),
        )

    def _factors(self, base: Base, target: LinearTarget) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) in float32, everything but DoRA's gain folded in."""
        a, b = self.storage.factors(target, self.a.float(), self.b.float())
        b = b * self.scale if self.diagonal is None else b * (self.diagonal.float() * self.scale)
        if self.removed is None:
            return a, b
        left, right = self.removed.find(base.linear(target).weight, self.rank)
        taken = self.scale if self.removed.is_scaled else 1
        return torch.cat([a, right]), torch.cat([b, -taken * left], dim=1)


@dataclass(frozen=True, slots=True)
class EmbeddingLora:
    """LoRA on an embedding, as stored.

    Attributes:
        path: Module path.
        rank: r.
        a: A (r, tokens).
        b: B (hidden, r).
        scale: Of the difference.
        magnitude: m (hidden,) of DoRA.
    """

    path: str
    rank: int
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def reads_base(self) -> bool:
        """Whether it depends on the weight of the base."""
        return self.magnitude is not None

    @property
    def shape(self) -> PrimitiveShape:
        """What it lowers to."""
        present = (self.a, self.b, self.magnitude)
        stored = sum(tensor.numel() for tensor in present if tensor is not None)
        return PrimitiveShape(EmbeddingAffine.__name__, self.path, self.rank, stored)

    def lower(self, base: Base) -> EmbeddingAffine:
        """The correction of the base's embedding at its path; as ``LinearLora.lower``."""
        site = embedding_site(base.layout, self.path)
        theirs, ours = (self.a.shape[1], self.b.shape[0]), (site.num_embeddings, site.size)
        if theirs != ours:
            raise mismatch(
                base.layout,
                f"{shown(self.path)} has {theirs[0]} rows of {theirs[1]} there, "
                f"{ours[0]} of {ours[1]} here",
            )
        a, b = self.a.float().T, (self.b.float() * self.scale).T
        gain = None
        if self.magnitude is not None:
            own = base.embedding(site)
            gain = _gain(self.path, self.magnitude, column_norms(own, b, a))
            b = b * gain
        return EmbeddingAffine(
            site,
            a=cast(self.path, a, base.dtype),
            b=cast(self.path, b, base.dtype),
            scale=None if gain is None else cast(self.path, gain, base.dtype),
        )


LoraModule = LinearLora | EmbeddingLora


def _require_removable(base: Base, target: LinearTarget, removed: RemovedPart, rank: int) -> None:
    """Raise unless PEFT can take such a part out of the target's weight."""
    if target.is_transposed and not removed.on_conv1d:
        raise AdapterUnsupported(
            f"{shown(target.path)} is a Conv1D of GPT-2, for which PEFT has no {removed.name}"
        )
    if base.layout.tied_head and target.path == base.layout.head_path:
        raise AdapterUnsupported(
            f"{shown(target.path)} is the embedding of this base as well, and {removed.name} "
            f"changed both: save again with save_pretrained(..., save_embedding_layers=True)"
        )
    if rank > min(target.in_features, target.out_features) - removed.leaves_some:
        raise mismatch(
            base.layout,
            f"{removed.name} of rank {rank} is too large for {shown(target.path)}, which maps "
            f"{target.in_features} to {target.out_features} here",
        )


def _gain(path: str, magnitude: Tensor, lengths: Tensor) -> Tensor:
    """g = m / |W + ΔW|."""
    if not bool((lengths > 0).all()):
        raise AdapterUnsupported(
            f"{shown(path)} has a row that the adapter makes 0, which DoRA cannot scale"
        )
    return magnitude.float() / lengths
