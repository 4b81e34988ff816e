"""HRA (Householder reflection adaptation, arXiv:2405.17484) as PEFT stores and computes it.

    y = W H_1 H_2 ... H_r x + b,   H_i = I - 2 u_i u_iᵀ,

with u_i the columns of ``hra_u`` (in, r), each divided by its length. With ``apply_GS`` they are
made orthogonal first (Gram-Schmidt), and the product is I - 2 Q Qᵀ for any orthonormal basis Q of
what they span. Either way the product is I plus a matrix of rank r with known factors, and W times
that is a low-rank correction.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.config_fields import FieldRules, flag
from ..formats.factors import householder_product
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    bounded_rank,
    iter_each,
    low_rank,
    require_shape,
)
from ..formats.peft_tensors import required
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Affine
from ..primitives.primitive import Primitive

_U = "hra_u"
_INDEPENDENT = 1e-5
"""A column that is shorter than this, once the others' parts are taken away, is rounding in PEFT's
float32, and so is what PEFT computes from it."""


@dataclass(frozen=True, slots=True)
class _Module:
    """U (in, r) and Z (r, in): the product of the reflections is I - U Z."""

    path: str
    u: Tensor
    z: Tensor
    out_features: None = None

    @property
    def in_features(self) -> int:
        return self.u.shape[0]

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        numbers = self.rank * self.in_features
        yield PrimitiveShape(Affine.__name__, self.path, self.rank, numbers)


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    config = checkpoint.config
    rank = bounded_rank("r", config.get("r", 8))
    is_orthogonal = flag("apply_GS", config.get("apply_GS", False))
    tensors = Tensors.read(config, checkpoint.tensors, (_U,))
    modules = tuple(
        _module(path, parts, rank, is_orthogonal) for path, parts in tensors.modules.items()
    )
    return LinearAdapter(modules, iter_each(_lower), tensors.saved)


def _module(path: str, parts: Mapping[str, Tensor], rank: int, is_orthogonal: bool) -> _Module:
    (stored,) = required(path, parts, _U)
    require_shape(path, _U, stored, None, rank)
    columns = stored.double()
    lengths = columns.norm(dim=0)
    if not bool((lengths > 0).all()):
        raise AdapterCorrupt(f"{shown(path)} has a {_U} with a column of zeros")
    units = columns / lengths
    u, z = _orthogonal_product(path, units) if is_orthogonal else householder_product(units)
    return _Module(path, u.float(), z.float())


def _orthogonal_product(path: str, units: Tensor) -> tuple[Tensor, Tensor]:
    if units.shape[1] > units.shape[0]:
        raise _dependent(path)
    basis, triangle = torch.linalg.qr(units)
    if not bool((triangle.diagonal().abs() > _INDEPENDENT).all()):
        raise _dependent(path)
    return basis, 2 * basis.T


def _dependent(path: str) -> AdapterCorrupt:
    return AdapterCorrupt(
        f"{shown(path)} has a {_U} whose columns depend on each other, so that Gram-Schmidt "
        f"(apply_GS) divides rounding errors by their length"
    )


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    weight = base.linear(target).weight.float()
    yield low_rank(base, target, module.z, -(weight @ module.u).T)


KIND = PeftKind(
    name="hra",
    page=KindPage(
        title="HRA: Householder reflection adaptation (arXiv:2405.17484)",
        family="reparameterisation",
        files="hra_u (in, r) of each module; fields r, apply_GS",
        equation="y = W H_1 ... H_r x + b, H_i = I - 2 u_i u_iᵀ with the columns of hra_u made "
        "unit vectors (orthonormal with apply_GS); H_1 ... H_r = I - U Z (compact WY form), so "
        "that y += -(W U) Z x",
        primitives=("Affine", "Dense"),
        memory="r (in + out) a module; in out where that is less",
        limits="Linear modules only, as in PEFT: not GPT-2's Conv1D. A column of zeros, and with "
        "apply_GS columns that depend on each other, are refused: PEFT divides by zero.",
    ),
    rules=FieldRules(
        implemented=frozenset({"r", "apply_GS", "bias", "modules_to_save"}),
        harmless=HARMLESS,
        refused={},
    ),
    read=_read,
)
