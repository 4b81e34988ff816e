"""SHiRA (arXiv:2406.13175) as PEFT stores and computes it.

    y += S x,

with S (out, in) sparse: the trained ``shira_weight`` (n,) at the places ``shira_indices`` (2, n),
row and column. n = r (in + out), as many as LoRA of rank r has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.binding import cast, mismatch
from ..formats.config_fields import FieldRules
from ..formats.factors import csr
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    bounded_rank,
    iter_each,
    require_shape,
    split_off,
)
from ..formats.peft_tensors import required
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Sparse
from ..primitives.primitive import Primitive

_WEIGHT, _INDICES = "shira_weight", "shira_indices"


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    weight: Tensor
    indices: Tensor
    rank: int
    in_features: None = None
    out_features: None = None

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield PrimitiveShape(Sparse.__name__, self.path, 0, 2 * self.weight.numel())


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    config = checkpoint.config
    rank = bounded_rank("r", config.get("r", 32))
    indices, rest = split_off(checkpoint.tensors, _INDICES)
    tensors = Tensors.read(config, rest, (_WEIGHT,))
    if set(indices) != set(tensors.modules):
        raise AdapterCorrupt(f"{_INDICES} and {_WEIGHT} are not of the same modules")
    modules = tuple(
        _module(path, parts, indices[path], rank) for path, parts in tensors.modules.items()
    )
    return LinearAdapter(modules, iter_each(_lower), tensors.saved)


def _module(path: str, parts: Mapping[str, Tensor], indices: Tensor, rank: int) -> _Module:
    (weight,) = required(path, parts, _WEIGHT)
    require_shape(path, _WEIGHT, weight, None)
    require_shape(path, _INDICES, indices, 2, weight.numel())
    # Saved as float32 on Windows.
    whole = indices.to(torch.int32)
    if not bool((whole == indices).all()) or int(whole.min()) < 0:
        raise AdapterCorrupt(f"{shown(path)} has {_INDICES} that are no places of a matrix")
    return _Module(path, weight, whole, rank)


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    width, out = target.in_features, target.out_features
    rows, columns = module.indices.long()
    count = module.rank * (width + out)
    if module.weight.numel() != count or int(rows.max()) >= out or int(columns.max()) >= width:
        raise mismatch(
            base.layout,
            f"{shown(module.path)} maps {width} to {out} features here and would have {count} "
            f"entries of rank {module.rank}; there it has {module.weight.numel()}, or other widths",
        )
    row_starts, columns, values = csr(rows, columns, module.weight.float(), out)
    yield Sparse(target, row_starts, columns, cast(module.path, values, base.dtype))


KIND = PeftKind(
    name="shira",
    page=KindPage(
        title="SHiRA: sparse high-rank adapters (arXiv:2406.13175)",
        family="reparameterisation",
        files="shira_weight (n,) and shira_indices (2, n) of each module, n = r (in + out); field "
        "r",
        equation="y += S x with the weights at the indices of S, zero elsewhere",
        primitives=("Sparse",),
        memory="n numbers, and n + out + 1 indices, a module",
        limits="Linear modules only, as in PEFT: not GPT-2's Conv1D.",
    ),
    rules=FieldRules(
        implemented=frozenset({"r", "modules_to_save"}),
        harmless={
            **HARMLESS,
            "mask_type": "chose the places, which are stored",
            "random_seed": "chose the places, which are stored",
        },
        refused={},
    ),
    read=_read,
)
