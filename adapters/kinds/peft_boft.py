"""BOFT (orthogonal butterfly, arXiv:2311.06243) as PEFT stores and computes it.

    y = s * (W x') + b,   x' = x B_m ... B_2 B_1,   B_i = P_i diag(Q_i) P_iᵀ,

with the blocks of Q_i the Cayley transforms of ``boft_R`` (m, blocks, b, b), of which only the
skew-symmetric part counts, P_i the butterfly's permutations (P_1 is the identity) and s (out, 1)
``boft_s``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.binding import cast
from ..formats.config_fields import FieldRules, count_or_zero, positive_int
from ..formats.factors import cayley
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    iter_each,
    require_shape,
)
from ..formats.peft_tensors import required
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Affine, InputTransform
from ..primitives.primitive import Primitive

_R, _S = "boft_R", "boft_s"


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    blocks: Tensor
    scale: Tensor

    @property
    def in_features(self) -> int:
        return self.blocks.shape[1] * self.blocks.shape[2]

    @property
    def out_features(self) -> int:
        return self.scale.shape[0]

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield PrimitiveShape(InputTransform.__name__, self.path, 0, self.blocks.numel())
        yield PrimitiveShape(Affine.__name__, self.path, 0, self.scale.numel())


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    config = checkpoint.config
    tensors = Tensors.read(config, checkpoint.tensors, (_R, _S))
    factors = positive_int("boft_n_butterfly_factor", config.get("boft_n_butterfly_factor", 1))
    sizes = _sizes(config)
    modules = tuple(_module(path, parts, factors, sizes) for path, parts in tensors.modules.items())
    return LinearAdapter(modules, iter_each(_lower), tensors.saved)


def _sizes(config: Mapping[str, object]) -> tuple[int | None, int | None]:
    """Number of blocks and size of a block, one of which is None: it follows from the width."""
    count = count_or_zero("boft_block_num", config.get("boft_block_num", 0))
    size = count_or_zero("boft_block_size", config.get("boft_block_size", 4))
    if (count == 0) == (size == 0):
        raise AdapterCorrupt(
            f"boft_block_num is {count} and boft_block_size {size}, and one has to be 0"
        )
    return count or None, size or None


def _module(
    path: str, parts: Mapping[str, Tensor], factors: int, sizes: tuple[int | None, int | None]
) -> _Module:
    blocks, scale = required(path, parts, _R, _S)
    count, size = sizes
    require_shape(path, _R, blocks, None, count, size, size)
    require_shape(path, _S, scale, None, 1)
    stages, count, size, other = blocks.shape
    # Without its CUDA extension PEFT trains, saves and loads one factor whatever was asked for.
    if size != other or stages not in (1, factors):
        raise AdapterCorrupt(
            f"{shown(path)} has a {_R} of {list(blocks.shape)}, and boft_n_butterfly_factor is "
            f"{factors}"
        )
    if stages > 1 and (size % 2 or stages > count.bit_length() or count % (1 << (stages - 1))):
        raise AdapterCorrupt(
            f"{shown(path)} has {count} blocks of {size}, which {stages} butterfly factors cannot "
            f"exchange"
        )
    return _Module(path, blocks, scale)


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    stages, count, size, _ = module.blocks.shape
    raw = module.blocks.double()
    rotations = cayley((raw - raw.mT).flatten(0, 1) / 2).view(raw.shape)
    orders = None if stages == 1 else _orders(stages, count, size)
    # x meets the last factor first.
    yield InputTransform(
        target,
        rotations=cast(module.path, rotations.flip(0), base.dtype),
        permutations=orders,
    )
    scale = module.scale.float()[:, 0]
    own = base.linear(target).bias
    bias = None if own is None else cast(module.path, own.float() * (1 - scale), base.dtype)
    yield Affine(target, bias=bias, scale=cast(module.path, scale, base.dtype))


def _orders(stages: int, count: int, size: int) -> Tensor:
    """p (stages, in) int32 of every factor, the last first: x P diag(Q) Pᵀ permutes by it."""
    width = count * size
    orders = torch.empty(stages, width, dtype=torch.int32)
    for factor in range(stages):
        permutation = _butterfly(width, size << factor, size // 2)
        orders[stages - 1 - factor] = permutation.argsort()
    return orders


def _butterfly(width: int, group: int, half: int) -> Tensor:
    """In each group of ``group`` numbers, the even runs of ``half`` numbers, then the odd ones."""
    runs = torch.arange(width).view(width // group, group // half, half)
    return torch.cat([runs[:, 0::2], runs[:, 1::2]], dim=1).flatten()


KIND = PeftKind(
    name="boft",
    page=KindPage(
        title="BOFT: orthogonal butterfly (arXiv:2311.06243)",
        family="reparameterisation",
        files="boft_R (m, in / b, b, b) and boft_s (out, 1) of each module; fields "
        "boft_block_size, boft_block_num, boft_n_butterfly_factor",
        equation="y = s * (W x') + bias, x' = x B_m ... B_1, B_i = P_i diag(Q_i) P_iᵀ, Q the "
        "Cayley transforms of the skew-symmetric parts of boft_R, P_i the butterfly's "
        "permutations",
        primitives=("InputTransform", "Affine"),
        memory="m in b + out a module (2 out where the base has a bias), and m in indices where m "
        "is more than 1",
        limits="Linear modules only, as in PEFT: not GPT-2's Conv1D. Without its CUDA extension "
        "PEFT itself trains and saves one factor whatever boft_n_butterfly_factor says, and that "
        "is what is served then.",
    ),
    rules=FieldRules(
        implemented=frozenset(
            {
                "boft_block_size",
                "boft_block_num",
                "boft_n_butterfly_factor",
                "bias",
                "modules_to_save",
            }
        ),
        harmless={**HARMLESS, "boft_dropout": "off outside training"},
        refused={},
    ),
    read=_read,
)
