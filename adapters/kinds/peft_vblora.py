"""VB-LoRA (arXiv:2405.15179) as PEFT stores and computes it: LoRA out of a bank of vectors.

    y += B A x,

where each piece of ``vector_length`` numbers of a row of A, and of a column of B, is a mixture of
``topk`` vectors of the bank that all modules share. Stored are logits over the whole bank, of which
the largest count, or with ``save_only_topk_weights`` the mixtures themselves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import INTEGER_DTYPES, Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.config_fields import FieldRules, flag, positive_int
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    bounded_rank,
    iter_each,
    low_rank,
    low_rank_shape,
    require_shape,
    split_off,
)
from ..formats.peft_tensors import require_float, required
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.primitive import Primitive

MAX_TOPK = 256

_BANK = "base_model.vblora_vector_bank"
_A, _B = "vblora_logits_A", "vblora_logits_B"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_OF_LOGITS = ((".vblora_logits_", "save_only_topk_weights is true, and these are logits"),)
_OF_TOPK = (("_topk_", "save_only_topk_weights is false, and it holds the largest only"),)


@dataclass(frozen=True, slots=True)
class _Mixture:
    """Mixtures of vectors of the bank (vectors, length), each of the first two dimensions one.

    Attributes:
        indices: (rows, tiles, topk) int64.
        weights: (rows, tiles, topk), 1 in sum over the last dimension.
        bank: (vectors, length).
    """

    indices: Tensor
    weights: Tensor
    bank: Tensor

    def vectors(self) -> Tensor:
        """(rows, tiles, length)."""
        bank, weights = self.bank.float(), self.weights.float()
        # One vector at a time: all at once would take topk times the memory.
        mixed = weights[..., 0, None] * bank[self.indices[..., 0]]
        for i in range(1, self.indices.shape[-1]):
            mixed += weights[..., i, None] * bank[self.indices[..., i]]
        return mixed


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    a: _Mixture
    b: _Mixture

    @property
    def rank(self) -> int:
        return self.a.indices.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.indices.shape[1] * self.a.bank.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.indices.shape[0] * self.b.bank.shape[1]

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield low_rank_shape(self.path, self.rank, self.in_features, self.out_features)


@dataclass(frozen=True, slots=True)
class _Reader:
    """What the configuration and the bank say about every module."""

    rank: int
    topk: int
    bank: Tensor

    def module(self, path: str, parts: Mapping[str, Tensor]) -> _Module:
        """A's logits are (r, in / length, vectors), B's (out / length, r, vectors)."""
        return _Module(
            path,
            self.mixture(path, _A, parts, self.rank, None),
            self.mixture(path, _B, parts, None, self.rank),
        )

    def mixture(
        self, path: str, name: str, parts: Mapping[str, Tensor], *sizes: int | None
    ) -> _Mixture:
        (logits,) = required(path, parts, name)
        require_shape(path, name, logits, *sizes, self.bank.shape[0])
        largest, indices = logits.float().topk(self.topk, dim=-1)
        return _Mixture(indices, largest.softmax(dim=-1), self.bank)

    def module_of_topk(
        self, path: str, parts: Mapping[str, Tensor], indices: Mapping[str, Mapping[str, Tensor]]
    ) -> _Module:
        def mixture(name: str, *sizes: int | None) -> _Mixture:
            weights = parts.get(name + _WEIGHTS)
            found = indices[name].get(path)
            if found is None or weights is None:
                raise AdapterCorrupt(f"{shown(path)} has no {name}: the weight file is incomplete")
            return self.mixture_of_topk(path, name, found, weights, sizes)

        return _Module(path, mixture(_A, self.rank, None), mixture(_B, None, self.rank))

    def mixture_of_topk(
        self, path: str, name: str, indices: Tensor, weights: Tensor, sizes: tuple[int | None, ...]
    ) -> _Mixture:
        """The last weight is not stored: it is what the others leave of 1."""
        require_shape(path, name + _INDICES, indices, *sizes, self.topk)
        if indices.dtype not in INTEGER_DTYPES:
            raise AdapterCorrupt(f"{shown(path)} has {name + _INDICES} of {indices.dtype}")
        if weights.shape != (*indices.shape[:2], self.topk - 1):
            raise AdapterCorrupt(f"{shown(path)} has {name + _WEIGHTS} of {list(weights.shape)}")
        which, known = indices.long(), weights.float()
        ordered = which.sort(dim=-1).values
        if int(which.min()) < 0 or int(which.max()) >= self.bank.shape[0]:
            raise AdapterCorrupt(f"{shown(path)} has {name + _INDICES} outside the vector bank")
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise AdapterCorrupt(f"{shown(path)} names a vector twice in {name + _INDICES}")
        last = 1 - known.sum(dim=-1, keepdim=True)
        every = torch.cat([known, last], dim=-1)
        if float(every.min()) < -1e-6:
            raise AdapterCorrupt(f"{shown(path)} has {name + _WEIGHTS} that are no mixture")
        return _Mixture(which, every.clamp(min=0), self.bank)


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    config, rest = checkpoint.config, dict(checkpoint.tensors)
    if _BANK not in rest:
        raise AdapterCorrupt("vblora_vector_bank is not in the file")
    reader = _reader(config, rest.pop(_BANK))
    if flag("save_only_topk_weights", config.get("save_only_topk_weights", False)):
        indices = {}
        for name in (_A, _B):
            indices[name], rest = split_off(rest, name + _INDICES)
        tensors = Tensors.read(config, rest, (_A + _WEIGHTS, _B + _WEIGHTS), _OF_LOGITS)
        if any(set(found) != set(tensors.modules) for found in indices.values()):
            raise AdapterCorrupt("topk_indices and topk_weights are not of the same modules")
        modules = tuple(
            reader.module_of_topk(path, parts, indices) for path, parts in tensors.modules.items()
        )
    else:
        tensors = Tensors.read(config, rest, (_A, _B), _OF_TOPK)
        modules = tuple(reader.module(path, parts) for path, parts in tensors.modules.items())
    return LinearAdapter(modules, iter_each(_lower), tensors.saved, on_conv1d=True)


def _reader(config: Mapping[str, object], bank: Tensor) -> _Reader:
    vectors = positive_int("num_vectors", config.get("num_vectors", 256))
    length = positive_int("vector_length", config.get("vector_length", 256))
    topk = positive_int("topk", config.get("topk", 2))
    require_float(_BANK, bank)
    require_shape(_BANK, "tensor", bank, vectors, length)
    if topk > vectors:
        raise AdapterCorrupt(f"topk is {topk}, and the vector bank holds {vectors}")
    if topk > MAX_TOPK:
        raise AdapterUnsupported(f"topk is {topk}, more than {MAX_TOPK}")
    return _Reader(bounded_rank("r", config.get("r", 4)), topk, bank)


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    a = module.a.vectors().flatten(1)
    b = module.b.vectors().transpose(0, 1).flatten(1)
    yield low_rank(base, target, a, b)


KIND = PeftKind(
    name="vblora",
    page=KindPage(
        title="VB-LoRA: LoRA from a vector bank (arXiv:2405.15179)",
        family="reparameterisation",
        files="vblora_logits_A (r, in / vector_length, num_vectors) and vblora_logits_B (out / "
        "vector_length, r, num_vectors) of each module, or the same names with _topk_indices and "
        "_topk_weights, and once vblora_vector_bank (num_vectors, vector_length); fields r, topk, "
        "num_vectors, vector_length, save_only_topk_weights",
        equation="y += B A x; every vector_length numbers of A's rows and B's columns are "
        "sum_k softmax(topk logits)_k bank[index_k]",
        primitives=("Affine", "Dense"),
        memory="r (in + out) a module; in out where that is less",
        limits=f"topk up to {MAX_TOPK}.",
    ),
    rules=FieldRules(
        implemented=frozenset(
            {
                "r",
                "num_vectors",
                "vector_length",
                "topk",
                "save_only_topk_weights",
                "bias",
                "modules_to_save",
            }
        ),
        harmless={
            **HARMLESS,
            "vblora_dropout": "off outside training",
            "init_vector_bank_bound": "initialization only",
            "init_logits_std": "initialization only",
        },
        refused={},
    ),
    read=_read,
)
