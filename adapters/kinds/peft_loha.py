"""LoHa (FedPara, arXiv:2108.06098) as PEFT stores and computes it.

    y += s ((A1 B1) * (A2 B2)) x,   s = alpha / r,

elementwise, with A1 (out, r) ``hada_w1_a``, B1 (r, in) ``hada_w1_b``, and A2 and B2 likewise. The
product of two matrices of rank r has rank r² at most, with known factors: row (i, j) of A is
B1[i] * B2[j], and row (i, j) of B is A1[:, i] * A2[:, j] (the Khatri-Rao product).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..formats.binding import cast
from ..formats.config_fields import FieldRules
from ..formats.factors import khatri_rao
from ..formats.linear_adapter import (
    LinearAdapter,
    PeftKind,
    Tensors,
    is_low_rank,
    iter_each,
    low_rank,
    low_rank_shape,
    require_shape,
)
from ..formats.lycoris import CONVOLUTIONS, IMPLEMENTED, LYCORIS_HARMLESS, LycorisScalars
from ..formats.peft_tensors import required
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Dense
from ..primitives.primitive import Primitive

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    scale: float

    @property
    def in_features(self) -> int:
        return self.b1.shape[1]

    @property
    def out_features(self) -> int:
        return self.a1.shape[0]

    @property
    def rank(self) -> int:
        """Of the low-rank form."""
        return self.a1.shape[1] ** 2

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield low_rank_shape(self.path, self.rank, self.in_features, self.out_features)


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    tensors = Tensors.read(
        checkpoint.config, checkpoint.tensors, _NAMES, ((".hada_t", CONVOLUTIONS),)
    )
    scalars = LycorisScalars.read(checkpoint.config, len(tensors.modules))
    modules = tuple(_module(path, parts, scalars) for path, parts in tensors.modules.items())
    return LinearAdapter(modules, iter_each(_lower), tensors.saved)


def _module(path: str, parts: Mapping[str, Tensor], scalars: LycorisScalars) -> _Module:
    a1, b1, a2, b2 = required(path, parts, *_NAMES)
    rank = scalars.rank(path)
    require_shape(path, "hada_w1_a", a1, None, rank)
    require_shape(path, "hada_w1_b", b1, rank, None)
    require_shape(path, "hada_w2_a", a2, a1.shape[0], rank)
    require_shape(path, "hada_w2_b", b2, rank, b1.shape[1])
    return _Module(path, a1, b1, a2, b2, scalars.scale(path))


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    a1, b1, a2, b2 = (t.float() for t in (module.a1, module.b1, module.a2, module.b2))
    if is_low_rank(module.rank, module.in_features, module.out_features):
        yield low_rank(base, target, khatri_rao(b1, b2), khatri_rao(a1.T, a2.T) * module.scale)
    else:
        delta = (a1 @ b1) * (a2 @ b2) * module.scale
        yield Dense(target, cast(module.path, delta, base.dtype))


KIND = PeftKind(
    name="loha",
    page=KindPage(
        title="LoHa: low-rank Hadamard product (FedPara, arXiv:2108.06098)",
        family="reparameterisation",
        files="hada_w1_a (out, r), hada_w1_b (r, in), hada_w2_a (out, r), hada_w2_b (r, in) of "
        "each module; fields r, alpha, rank_pattern, alpha_pattern",
        equation="y += alpha / r ((w1_a w1_b) * (w2_a w2_b)) x, elementwise: a low-rank difference "
        "of rank r²",
        primitives=("Affine", "Dense"),
        memory="r² (in + out) a module; in out where that is less",
        limits="Linear modules only, as in PEFT: not GPT-2's Conv1D. Factors of convolutions "
        "(hada_t1, hada_t2) are refused.",
    ),
    rules=FieldRules(implemented=IMPLEMENTED, harmless=LYCORIS_HARMLESS, refused={}),
    read=_read,
)
